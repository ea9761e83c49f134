# SPDX-License-Identifier: Apache-2.0
"""The ranks of one machine: what one of them reads, it sends to the others."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from paradiff.solver.ranks import Ranks

CHUNK = 64 * 2**20
"""Bytes that are sent at once, and most memory that sending takes."""


class Machine:
    """The ranks of a run that share a machine. All ranks have to make this object.

    Args:
        ranks: The ranks of the run.

    Attributes:
        ranks: As given.
        places: The places of the machine's ranks in the run.
        first: Whether this rank is the first of them.

    Raises:
        RanksFailed: If a rank does not come.
    """

    def __init__(self, ranks: Ranks) -> None:
        import torch.distributed as dist

        # torchrun numbers the machines; several of them may have one name.
        own = f"{socket.gethostname()} {os.environ.get('GROUP_RANK', '')}".encode()
        machines = ranks.gather_bytes(own)
        self.ranks = ranks
        self.places = [place for place, machine in enumerate(machines) if machine == own]
        self.first = self.places[0] == ranks.place
        members = [ranks.members[place] for place in self.places]
        self._group: Any = dist.new_group(members, use_local_synchronization=True) if len(members) > 1 else None
        self._root = members[0]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Lets the machine's first rank go through the block before the others: what it downloads, they find."""
        if not self.first:
            self.ranks.agree({})
        yield
        if self.first:
            self.ranks.agree({})

    def spread(self, tensors: Sequence[Tensor], *, chunk: int = CHUNK) -> None:
        """Fills tensors on all ranks of the machine with the values that its first rank has.

        Args:
            tensors: Contiguous tensors on one device, of the same shapes and dtypes on all ranks.
            chunk: Most bytes that are sent at once.

        Raises:
            RanksFailed: If a rank is gone.
        """
        import torch.distributed as dist

        if self._group is None:
            return
        for parts in chunks([bits(tensor) for tensor in tensors], chunk):
            data = torch.cat(parts)
            self.ranks.finish(dist.broadcast(data, self._root, group=self._group, async_op=True))
            if not self.first:
                for part, own in zip(parts, data.split([len(part) for part in parts]), strict=True):
                    part.copy_(own)


def bits(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes, in its own memory."""
    return tensor.detach().view(-1).view(torch.uint8)


def chunks(parts: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Parts cut and put together to lists of at most `most` bytes, in order."""
    held: list[Tensor] = []
    room = most
    for part in itertools.chain.from_iterable(part.split(most) for part in parts if len(part)):
        if len(part) > room:
            yield held
            held, room = [], most
        held.append(part)
        room -= len(part)
    if held:
        yield held

# SPDX-License-Identifier: Apache-2.0
"""What deals a round's items out: the protocol of ranks (sharded.py) and of several devices of one process (replicas.py)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Bound(Protocol):
    """What cuts items into calls: a `RowBound`."""

    max_rows: int | None

    def stretch(
        self,
        items: range,
        call: Callable[[slice], Any],
        device: torch.device,
        *,
        rows: int,
        widths: Sequence[int] | None,
        made: Callable[[int, int], None] | None,
    ) -> list[tuple[Any, int]]:
        """The parts of consecutive items, each with the number of items that it is for."""
        ...

    def next_call(self, left: int, rows: int, widths: Sequence[int] | None) -> tuple[int, int]:
        """The items of the next call where so many are left, and how many of them are of these."""
        ...


class Crew(Protocol):
    """Members that each evaluate stretches of a round's items: ranks, or devices of one process.

    Attributes:
        shares: Stretches that the items are cut into, at least.
        members: How many they are.
        even: Stretches of equal length that the items of a round are cut into; 1 where their lengths differ.
    """

    shares: int

    @property
    def members(self) -> int: ...

    @property
    def even(self) -> int: ...

    def parts(
        self,
        bound: Bound,
        count: int,
        call: Callable[[slice], Any],
        device: torch.device,
        *,
        rows: int,
        widths: Sequence[int] | None,
        inputs: Sequence[Tensor],
        key: Hashable,
        mark: int,
        made: Callable[[int, int], None] | None = None,
    ) -> list[Any]:
        """The outputs for all items in consecutive parts, in order.

        Args:
            bound: Whose items they are.
            count: Number of items.
            call: The network call for the items of a slice; it returns nested lists and dicts of tensors `[items, ...]`.
            device: Where the outputs belong.
            rows: Rows of one item.
            widths: The numbers of items that calls may have; None for any.
            inputs: `[items, ...]` tensors on which all members have to agree.
            key: What the form of the output depends on; None where nothing is known of it.
            mark: A further number on which all members have to agree.
            made: Told the items of each call that was made, by any member, and how many of them fill it.

        Raises:
            RanksFailed: If members disagree, or one of them fails.
            torch.OutOfMemoryError: If one item alone does not fit on one of them.
        """
        ...


def shares_of(count: int, shares: int) -> list[range]:
    """`range(count)` in at most so many consecutive stretches of equal length, the last one shorter."""
    size = max(1, -(-count // shares))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def dealt(count: int, shares: int, members: int) -> list[list[range]]:
    """For each member the stretches of `range(count)` that it evaluates. They follow each other from member to member, as
    evenly as they go."""
    owners = [k * members // shares for k in range(shares)] if shares >= members else list(range(shares))
    every = shares_of(count, shares)
    return [[share for share, owner in zip(every, owners, strict=False) if owner == member] for member in range(members)]

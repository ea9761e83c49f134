# SPDX-License-Identifier: Apache-2.0
"""Blocks: a partition of the chain that the window loop respects.

In turn: the window holds one block, and the next one begins when the last node of this one has passed. In flight together (the
diagonal schedule; Zhou and Sugiyama, arXiv 2412.07435): the next block joins the window once this one has been swept a number
of times, the stagger, so that block n is at its j-th sweep while block n - 1 is some sweeps ahead.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paradiff.chain.table import Table
from paradiff.errors import are_whole, is_whole, require_kind, require_whole, shown
from paradiff.methods.face import plain


@dataclass(frozen=True)
class Blocks:
    """A partition of the chain.

    Attributes:
        count: Number of blocks, of equal length in log(alpha/sigma) as far as the nodes allow; or the nodes at which blocks
            begin and end, 0 and N included.
        stagger: Sweeps of the newest block after which the next one joins it; None to wait until it has passed.
        carry: Whether a sweep carries changes across the edges of blocks in flight together. If not, a block sees its start as
            the last round left it, which is the published schedule.

    Raises:
        ValueError: If there is no block, a block has no step, or the stagger is below 1.
    """

    count: int | Sequence[int]
    stagger: int | None = None
    carry: bool = True

    def __post_init__(self) -> None:
        if is_whole(self.count):
            if self.count < 1:
                raise ValueError(f"{shown(self.count)} blocks were asked for; give at least 1, or the nodes of their edges")
        elif not are_whole(self.count):
            raise ValueError(f"blocks is {shown(self.count)}; it must be a whole number of blocks, or the nodes of their edges")
        elif len(self.count) < 2 or self.count[0] != 0 or any(b <= a for a, b in itertools.pairwise(self.count)):
            raise ValueError(
                f"the block edges are {shown(list(self.count))}; they must rise from 0 to the last node, so that no block is "
                "shorter than a step"
            )
        require_kind("carry", self.carry, bool)
        if not self.carry and self.stagger is None:
            raise ValueError("carry is False without a stagger; blocks in turn have no neighbour to carry to: leave it True")
        if self.stagger is not None:
            require_whole("the stagger", self.stagger, 1, " sweep, or None for blocks in turn")
        object.__setattr__(self, "count", plain(self.count))

    def edges(self, table: Table) -> list[int]:
        """The nodes at which blocks of a table begin and end, 0 and N included.

        Raises:
            ValueError: If edges do not end at the table's last node, there are more blocks than steps, or no node has both
                signal and noise.
        """
        if not is_whole(self.count):
            if self.count[-1] != table.steps:
                raise ValueError(f"the last block edge is {self.count[-1]}; the chain ends at node {table.steps}")
            return list(self.count)
        steps, count = table.steps, self.count
        if count > steps:
            raise ValueError(
                f"{count} blocks were asked of a chain of {steps} steps; a block cannot be shorter than a step: give at most "
                f"{steps}"
            )
        if count == 1:
            return [0, steps]
        level = torch.where((table.alpha > 0) & (table.sigma > 0), (table.alpha / table.sigma).log(), torch.nan)
        finite = (~level.isnan()).nonzero()[:, 0]
        if not len(finite):
            raise ValueError(
                f"{count} blocks were asked of table {table.name!r}, no node of which has both signal and noise, by whose "
                "ratio blocks are spread; give the nodes at which they end"
            )
        first, last = float(level[finite[0]]), float(level[finite[-1]])
        wanted = torch.linspace(first, last, count + 1, dtype=torch.float64, device=level.device)[1:-1]
        nearest = (level.nan_to_num(torch.inf)[None] - wanted[:, None]).abs().argmin(1).tolist()
        edges = [0]
        for k, node in enumerate(nearest, start=1):
            edges.append(min(max(node, edges[-1] + 1), steps - count + k))
        return [*edges, steps]

# SPDX-License-Identifier: Apache-2.0
"""Where the states of one sample's block runs are held: slots of one tensor, given back when a run is done with."""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.step import uploaded
from paradiff.methods.parareal.setup import PararealSetup
from paradiff.methods.parareal.stopping import BlockRun


class StatePool:
    """Slots for states.

    Args:
        slots: Their number at first; it doubles when they are used up.
        like: `[2P-1, ...]` what a slot holds: the last P states, then the outputs before the newest one.

    Attributes:
        states: `[slots, 2P-1, ...]` the slots.
        free: The numbers of those that are free.
    """

    def __init__(self, slots: int, like: Tensor) -> None:
        self.states = like.new_zeros(slots, *like.shape)
        self.free = list(range(slots))

    def take(self) -> int:
        """A free slot."""
        if not self.free:
            size = len(self.states)
            self.states = torch.cat([self.states, torch.zeros_like(self.states)])
            self.free = list(range(size, 2 * size))
        return self.free.pop()

    def give_back(self, *slots: int) -> None:
        """Frees slots; -1 is none."""
        self.free += [slot for slot in slots if slot >= 0]

    def index(self, values: list[int]) -> Tensor:
        """Whole numbers or truth values on the device, without waiting for it."""
        return uploaded(values, self.states.device)


class BlockRuns:
    """The block runs of one sample.

    Args:
        setup: What all samples share.
        x0: `[...]` the state at node 0.

    Attributes:
        at: For every block edge, its runs by iteration; the last edge has some too, which hold the sample.
        level: `[B+1]` the iteration of the newest value of every edge; -1 before its first.
        settled: The last edge whose value is final.
        pool: The states.
    """

    def __init__(self, setup: PararealSetup, x0: Tensor) -> None:
        self._setup = setup
        self.pool = StatePool(4 * setup.width + 2, x0.expand(2 * setup.table.band - 1, *x0.shape))
        self.at: list[dict[int, BlockRun]] = [{} for _ in range(setup.intervals + 1)]
        self.level = [-1] * (setup.intervals + 1)
        self.settled = 0

    def begin(self, block: int, level: int) -> BlockRun:
        """A new run, with a slot for its start."""
        run = BlockRun(block, level, self.pool.take(), theta=self._setup.method.control.first_theta)
        self.at[block][level] = run
        self.level[block] = level
        return run

    def begin_from_noise(self, level: int) -> BlockRun:
        """A new run of the first block, whose start is exact."""
        run = self.begin(0, level)
        run.change = run.error = run.estimate = run.residual = 0.0
        return run

    def drop(self, run: BlockRun) -> None:
        """Frees what a run holds."""
        if self.at[run.block].pop(run.level, None) is run:
            self.pool.give_back(run.start, run.running, run.end, run.clean, run.clean_before)

    @property
    def in_flight(self) -> range:
        """The blocks that may run."""
        return range(self.settled, min(self.settled + self._setup.width, self._setup.intervals))

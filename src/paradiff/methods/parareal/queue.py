# SPDX-License-Identifier: Apache-2.0
"""Which rows of one sample are ready in a round: all of them (`pipelined`), or those of one phase (`batched`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from paradiff.methods.parareal.pool import BlockRuns
from paradiff.methods.parareal.setup import PararealSetup
from paradiff.methods.parareal.stopping import BlockRun
from paradiff.solver.protocol import Query


@dataclass
class Row:
    """One row of a round: a step of a block's run, fine, coarse, or both at once."""

    run: BlockRun
    node: int
    fine: bool
    coarse: bool


@dataclass(frozen=True, eq=False)
class PararealQuery(Query):
    """The rows of one round.

    Attributes:
        steps: What each row is: a step of a block's run.
        at: The nodes, as an index on the device.
        states: `[R, 2P-1, ...]` the states that each step reads, not scaled, then the outputs.
    """

    steps: list[Row]
    at: Tensor
    states: Tensor


class Queue(Protocol):
    """The order of one sample's rows."""

    def ready(self) -> list[Row]:
        """The rows of the next round, one at least."""
        ...

    def turn(self) -> None:
        """Called when the steps of a round are taken, and the edge values made that can be."""
        ...


def row(setup: PararealSetup, run: BlockRun, fine: bool, coarse: bool) -> Row:
    """The next step of a run."""
    node = setup.edges[run.block] + run.fine if fine else setup.coarse.nodes[setup.first_step[run.block] + run.coarse]
    return Row(run, node, fine, coarse)


class PipelinedQueue:
    """Every row that is ready, in the order of the round in which it would be taken without a row bound."""

    def __init__(self, setup: PararealSetup, runs: BlockRuns) -> None:
        self._setup, self._runs = setup, runs

    def ready(self) -> list[Row]:
        """The next steps of all runs, up to the bound on rows."""
        setup, method, rows = self._setup, self._setup.method, []
        for block in self._runs.in_flight:
            for run in self._runs.at[block].values():
                wanted = method.iterations is None or run.level < method.iterations
                due, steps = run.level * (setup.longest - 1) + block, setup.coarse_steps(run)
                if run.fine == 0 and run.coarse == 0 < steps:
                    rows.append((due, run.level, row(setup, run, wanted, True)))
                    continue
                if run.coarse < steps:
                    rows.append((due + run.coarse, run.level, row(setup, run, False, True)))
                if wanted and run.fine < setup.fine_steps(run):
                    rows.append((due + run.fine, run.level, row(setup, run, True, False)))
        if method.rows is not None:
            rows.sort(key=lambda r: (r[0], r[1], r[2].run.block, r[2].fine))
            rows = rows[: method.rows]
        return [found for _, _, found in rows]

    def turn(self) -> None:
        """There are no phases."""


class BatchedQueue:
    """A coarse sweep, one row a round, then the fine steps of all blocks side by side, and so on."""

    def __init__(self, setup: PararealSetup, runs: BlockRuns) -> None:
        self._setup, self._runs = setup, runs
        self._sweeping, self._level = True, 0

    def ready(self) -> list[Row]:
        """The next row of the coarse sweep, or the next of every fine run."""
        setup = self._setup
        runs = [at[self._level] for at in self._runs.at[:-1] if self._level in at]
        if self._sweeping:
            return [row(setup, next(run for run in runs if run.coarse < setup.coarse_steps(run)), False, True)]
        return [row(setup, run, True, False) for run in runs if run.fine < setup.fine_steps(run)]

    def turn(self) -> None:
        """From the coarse sweep to the fine runs and back."""
        setup, runs = self._setup, [at.get(self._level) for at in self._runs.at[:-1]]
        if self._sweeping and all(run is not None and run.coarse == setup.coarse_steps(run) for run in runs):
            self._sweeping = False
        elif not self._sweeping and all(run is not None and run.fine == setup.fine_steps(run) for run in runs):
            self._sweeping, self._level = True, self._level + 1
            old, again = self._runs.at[0][self._level - 1], self._runs.begin_from_noise(self._level)
            states = self._runs.pool.states
            states[again.start] = states[old.start]

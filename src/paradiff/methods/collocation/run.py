# SPDX-License-Identifier: Apache-2.0
"""Collocation on one problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from paradiff.chain.table import Table
from paradiff.methods.collocation.conditions import NOT_SMOOTH, unfit_coefficients
from paradiff.methods.collocation.handover import Handover, WindowLoop
from paradiff.methods.collocation.options import CollocationOptions
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.solver import CollocationSolver
from paradiff.methods.collocation.warm import whole_of
from paradiff.samplers.continuum import continuum
from paradiff.solver.protocol import Problem
from paradiff.solver.solution import ErrorEstimate, Status


class CollocationRun:
    """What all samples share, and a solver for each (protocol.py's `Run`).

    Raises:
        ValueError: If the method does not fit the problem's table, or the file of `warm_start` is no mesh store.
    """

    def __init__(self, options: CollocationOptions, problem: Problem) -> None:
        if problem.trajectory is not None and all(whole_of(part) is not None for part in problem.trajectory.parts):
            options = options.of_differences(problem.table)
        self._options, self._problem = options, problem
        self._table = _target(options, problem.table)
        self._unfit = options.unfit(self._table, options.stored(self._table)) if problem.smooth else NOT_SMOOTH
        self._setup: CollocationSetup | None = None
        self._solvers: list[CollocationSolver | Handover] = []
        arithmetic = {
            "device": problem.device,
            "dtype": problem.dtype,
            "shared_window": problem.shared_window,
            "resolution": problem.resolution,
            "symmetry": problem.symmetry,
            "renewed": problem.renewed,
        }
        if self._unfit is None:
            self._setup = CollocationSetup(self._table, options, **arithmetic)
            self._window_loop = self._setup.window_loop
            recurrence, most_gain = self._setup.recurrence, self._setup.control.most_gain
            self._unfit = unfit_coefficients(recurrence, self._setup.system(recurrence, self._setup.points), most_gain)
        else:
            control = options.control_on(self._table)
            variance = options.variance_on(self._table)
            self._window_loop = WindowLoop(self._table, options, control, variance=variance, **arithmetic)
        if self._unfit is not None and options.target != "chain":
            raise ValueError(
                f"the {options.target} of table {problem.table.name!r} cannot be solved by collocation: {self._unfit}; ask for "
                'target="chain", which the window method solves where collocation cannot'
            )

    @property
    def t(self) -> Tensor:
        """`[N+1]` times of the chain that is solved, which for another target is not the problem's."""
        return self._window_loop.setup().t if self._setup is None else self._setup.t

    def solver(self, sample: int) -> CollocationSolver | Handover:
        """The solver of one sample."""
        noise, start = self._problem.noise, self._problem.start_of(sample)
        begin, keep = self._problem.part_of(sample), self._problem.keep
        if self._unfit is not None or self._setup is None:
            assert self._unfit is not None
            found = self._window_loop.first(noise, sample, start, self._unfit, begin=begin, keep=keep)
        else:
            found = CollocationSolver(self._setup, noise, sample, start, begin, keep=keep)
        self._solvers.append(found)
        return found

    def status(self, estimates: Sequence[ErrorEstimate]) -> tuple[Status, str]:
        """How the run ended."""
        tolerance, worst = self._options.tolerance, max(e.estimated_error for e in estimates)
        beside = self._handed_over()
        if worst > tolerance:
            return Status.STOPPED, Status.STOPPED.message(
                f"an estimated error of {worst:.2g} was reached, where {tolerance:g} was asked for; give more nodes "
                f"(max_nodes), or let the window method go on (exact=True){beside}"
            )
        return (
            Status.CONVERGED,
            Status.CONVERGED.message(f"the estimated error of every sample is at most {tolerance:g}{beside}"),
        )

    def _handed_over(self) -> str:
        """Which samples the window method took over, and why; empty where it took none but those that were asked for."""
        count = len(self._solvers)
        if self._unfit is not None:
            return f"; the window method solved all nodes, since {self._unfit}"
        reasons = Counter(s.handed_over for s in self._solvers if isinstance(s, CollocationSolver) and s.handed_over)
        told = [f"; the window method took {n} of {count} samples over, since {reason}" for reason, n in reasons.items()]
        return "".join(told)

    def close(self) -> None:
        """Writes where the samples needed nodes, if a file was given for it."""
        if self._setup is not None:
            self._setup.save()


def _target(options: CollocationOptions, table: Table) -> Table:
    """The chain that is solved: the table's own, or a fine grid of the equation that it discretizes."""
    kind = options.target
    return table if kind == "chain" else table.cached(("continuum", kind), lambda: continuum(table, kind))

# SPDX-License-Identifier: Apache-2.0
"""Collocation on one problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from paradiff.chain.table import Table
from paradiff.methods.collocation.conditions import NOT_SMOOTH, ends_early, unfit_coefficients
from paradiff.methods.collocation.handover import Handover, WindowLoop
from paradiff.methods.collocation.options import CollocationOptions
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.solver import CollocationSolver
from paradiff.methods.collocation.warm import whole_of
from paradiff.samplers.continuum import continuum
from paradiff.solver.protocol import Problem
from paradiff.solver.solution import ErrorEstimate, Status
from paradiff.solver.trajectory import Part


class Way:
    """How samples of one kind are solved: those that begin from an earlier run's states at all nodes, or all others.

    Args:
        options: The method, for samples of this kind.
        problem: The problem.

    Attributes:
        unfit: Why the window method solves all their nodes from the first round on; None where it does not.
        setup: What they share; None where `unfit` was found before it was made.
        window_loop: The window method that takes them over.

    Raises:
        ValueError: If the method does not fit the problem's table, or the file of `warm_start` is no mesh store.
    """

    def __init__(self, options: CollocationOptions, problem: Problem) -> None:
        table = _target(options, problem.table)
        self.unfit = options.unfit(table, options.stored(table)) if problem.smooth else NOT_SMOOTH
        if self.unfit is None and problem.trajectory is not None:
            self.unfit = ends_early(table, options.control_on(table).most_undecided)
        self.setup: CollocationSetup | None = None
        arithmetic = {
            "device": problem.device,
            "dtype": problem.dtype,
            "shared_window": problem.shared_window,
            "resolution": problem.resolution,
            "symmetry": problem.symmetry,
            "renewed": problem.renewed,
            "elements": problem.elements,
        }
        if self.unfit is None:
            self.setup = setup = CollocationSetup(table, options, **arithmetic)
            self.window_loop = setup.window_loop
            self.unfit = unfit_coefficients(
                setup.recurrence, setup.system(setup.recurrence, setup.points), setup.control.most_gain
            )
        else:
            control, variance = options.control_on(table), options.variance_on(table)
            self.window_loop = WindowLoop(table, options, control, variance=variance, **arithmetic)
        if self.unfit is not None and options.target != "chain":
            raise ValueError(
                f"the {options.target} of table {problem.table.name!r} cannot be solved by collocation: {self.unfit}; ask for "
                'target="chain", which the window method solves where collocation cannot'
            )


class CollocationRun:
    """What all samples share, and a solver for each (protocol.py's `Run`).

    Raises:
        ValueError: If the method does not fit the problem's table, or the file of `warm_start` is no mesh store.
    """

    def __init__(self, options: CollocationOptions, problem: Problem) -> None:
        self._options, self._problem = options, problem
        parts = [None] if problem.trajectory is None else problem.trajectory.parts
        kinds = {_differs(part) for part in parts}
        self._ways = {
            differs: Way(options.of_differences(problem.table) if differs else options, problem) for differs in sorted(kinds)
        }
        self._solvers: list[CollocationSolver | Handover] = []

    @property
    def t(self) -> Tensor:
        """`[N+1]` times of the chain that is solved, which for another target is not the problem's."""
        way = next(iter(self._ways.values()))
        return way.window_loop.setup().t if way.setup is None else way.setup.t

    def solver(self, sample: int) -> CollocationSolver | Handover:
        """The solver of one sample."""
        noise, start = self._problem.noise, self._problem.start_of(sample)
        begin, keep = self._problem.part_of(sample), self._problem.keep
        way = self._ways[_differs(begin)]
        if way.unfit is not None or way.setup is None:
            assert way.unfit is not None
            found = way.window_loop.first(noise, sample, start, way.unfit, begin=begin, keep=keep)
        else:
            found = CollocationSolver(way.setup, noise, sample, start, begin, keep=keep)
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
        count, unfit = len(self._solvers), [way.unfit for way in self._ways.values()]
        if unfit[0] is not None and len(unfit) == 1:
            return f"; the window method solved all nodes, since {unfit[0]}"
        reasons = Counter(s.reason if isinstance(s, Handover) else s.handed_over for s in self._solvers)
        told = [f"; the window method took {n} of {count} samples over, since {why}" for why, n in reasons.items() if why]
        return "".join(told)

    def close(self) -> None:
        """Writes where the samples needed nodes, if a file was given for it."""
        for way in self._ways.values():
            if way.setup is not None:
                way.setup.save()


def _differs(part: Part | None) -> bool:
    """Whether a sample begins from an earlier run's states at all nodes."""
    return part is not None and whole_of(part) is not None


def _target(options: CollocationOptions, table: Table) -> Table:
    """The chain that is solved: the table's own, or a fine grid of the equation that it discretizes."""
    kind = options.target
    return table if kind == "chain" else table.cached(("continuum", kind), lambda: continuum(table, kind))

# SPDX-License-Identifier: Apache-2.0
"""Collocation on one problem."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from paradiff.methods.collocation.options import CollocationOptions
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.solver import CollocationSolver
from paradiff.solver.protocol import Problem
from paradiff.solver.solution import ErrorEstimate, Status


class CollocationRun:
    """What all samples share, and a solver for each (protocol.py's `Run`)."""

    def __init__(self, options: CollocationOptions, problem: Problem) -> None:
        self._options, self._problem = options, problem
        self._setup = CollocationSetup(
            problem.table,
            options,
            device=problem.device,
            dtype=problem.dtype,
            shared_window=problem.shared_window,
            resolution=problem.resolution,
        )

    @property
    def t(self) -> Tensor:
        """`[N+1]` times of the chain that is solved, which for another target is not the problem's."""
        return self._setup.t

    def solver(self, sample: int) -> CollocationSolver:
        """The solver of one sample."""
        return CollocationSolver(self._setup, self._problem.noise, sample, self._problem.start_of(sample))

    def status(self, estimates: Sequence[ErrorEstimate]) -> tuple[Status, str]:
        """How the run ended."""
        tolerance, worst = self._options.tolerance, max(e.estimated_error for e in estimates)
        if worst > tolerance:
            return Status.STOPPED, Status.STOPPED.message(
                f"an estimated error of {worst:.2g} was reached, where {tolerance:g} was asked for; give more nodes "
                "(max_nodes), or let the window method go on (exact=True)"
            )
        return Status.CONVERGED, Status.CONVERGED.message(f"the estimated error of every sample is at most {tolerance:g}")

    def close(self) -> None:
        """Writes where the samples needed nodes, if a file was given for it."""
        self._setup.save()

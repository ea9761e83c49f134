# SPDX-License-Identifier: Apache-2.0
"""SRDS on one problem."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from paradiff.chain.sensitivity import ABOVE_TOLERANCE
from paradiff.methods.parareal.options import PararealOptions
from paradiff.methods.parareal.setup import PararealSetup
from paradiff.methods.parareal.solver import PararealSolver
from paradiff.solver.protocol import Problem
from paradiff.solver.solution import ErrorEstimate, Status

RULES = {
    "error": "the estimated error of every sample is at most {:g}",
    "change": "every node passed with a change of at most {:g} times its step's noise",
    "sample": "the last iteration changed every sample by at most {:g}, root mean square",
    "image": "the last iteration changed every picture by at most {:g} grey levels, on average",
}


class PararealRun:
    """What all samples share, and an iteration for each (protocol.py's `Run`)."""

    def __init__(self, options: PararealOptions, problem: Problem) -> None:
        options.check_shape(problem.noise.shape)
        self._options, self._problem = options, problem
        self._setup = PararealSetup(
            problem.table, options, problem.device, problem.dtype, problem.shared_window, problem.elements
        )

    @property
    def t(self) -> Tensor:
        """`[N+1]` times of the chain."""
        return self._setup.t

    def solver(self, sample: int) -> PararealSolver:
        """The iteration of one sample."""
        return PararealSolver(self._setup, self._problem.noise, sample, self._problem.start_of(sample))

    def status(self, estimates: Sequence[ErrorEstimate]) -> tuple[Status, str]:
        """How the run ended."""
        options = self._options
        if all(e.estimated_error == 0 for e in estimates):
            return Status.EXACT, Status.EXACT.message()
        if options.iterations is not None:
            return Status.STOPPED, Status.STOPPED.message(f"{options.iterations} iterations were made, as asked")
        worst = max(e.estimated_error for e in estimates)
        if options.rule == "error" and worst > options.tolerance:
            return Status.STOPPED, Status.STOPPED.message(ABOVE_TOLERANCE.format(worst, options.tolerance))
        return Status.CONVERGED, Status.CONVERGED.message(RULES[options.rule].format(options.tolerance))

    def close(self) -> None:
        """Nothing is kept."""

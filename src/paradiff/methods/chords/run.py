# SPDX-License-Identifier: Apache-2.0
"""CHORDS on one problem."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from paradiff.methods.chords.options import ChordsOptions
from paradiff.methods.chords.setup import ChordsSetup
from paradiff.methods.chords.solver import ChordsSolver
from paradiff.solver.protocol import Problem
from paradiff.solver.solution import ErrorEstimate, Status

RULES = {
    "error": "the estimated error of every sample is at most {:g}",
    "change": "the last answer changed every sample by at most {:g}, root mean square",
}


class ChordsRun:
    """What all samples share, and the cores of each (protocol.py's `Run`)."""

    def __init__(self, options: ChordsOptions, problem: Problem) -> None:
        self._options, self._problem = options, problem
        self._setup = ChordsSetup(problem.table, options, problem.device, problem.dtype, problem.shared_window)
        self._solvers: list[ChordsSolver] = []

    @property
    def t(self) -> Tensor:
        """`[N+1]` times of the chain."""
        return self._setup.t

    def solver(self, sample: int) -> ChordsSolver:
        """The cores of one sample."""
        self._solvers.append(ChordsSolver(self._setup, self._problem.noise, sample, self._problem.start_of(sample)))
        return self._solvers[-1]

    def status(self, estimates: Sequence[ErrorEstimate]) -> tuple[Status, str]:
        """How the run ended."""
        options = self._options
        if all(solver.exact for solver in self._solvers):
            return Status.EXACT, Status.EXACT.message()
        if options.answers is not None:
            return Status.STOPPED, Status.STOPPED.message(f"answer {options.answers} was made, as asked")
        return Status.CONVERGED, Status.CONVERGED.message(RULES[options.rule].format(options.tolerance))

    def close(self) -> None:
        """Nothing is kept."""

# SPDX-License-Identifier: Apache-2.0
"""A window method whose window is chosen while it runs (pace.py)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from paradiff.chain.table import Table
from paradiff.methods.adaptive.clock import RoundClock
from paradiff.methods.adaptive.pace import Pace, PaceControl
from paradiff.methods.adaptive.solver import AdaptiveSolver
from paradiff.methods.window.method import WindowMethod
from paradiff.methods.window.run import WindowRun
from paradiff.methods.window.setup import WindowSetup
from paradiff.methods.window.solver import window_of
from paradiff.solver.protocol import Problem
from paradiff.solver.solution import ErrorEstimate, Status


@dataclass(frozen=True, repr=False, eq=False)
class AdaptiveMethod(WindowMethod):
    """A window method that begins with one node, and widens and narrows its window by what its rounds take.

    Attributes:
        expected: Rounds that the chain is expected to take, by window, as pairs; the widths that may be used.
        seconds: Seconds of a call by its rows of a sample, as pairs, as far as they are known; empty where the run measures.
        pace: The tuned numbers.
    """

    expected: tuple[tuple[int, float], ...] = ()
    seconds: tuple[tuple[int, float], ...] = ()
    pace: PaceControl = dataclasses.field(default=PaceControl(), kw_only=True)

    def prepare(self, problem: Problem) -> AdaptiveRun:
        """The run on a problem.

        Raises:
            ValueError: If the method does not fit the problem's table.
        """
        return AdaptiveRun(self, problem)

    def width(self, table: Table) -> int:
        """The widest window that may be used."""
        steps = len(self.edges(table)) - 1
        return max([1, *(w for w, _ in self.expected if w <= steps)])


class AdaptiveRun:
    """What all samples share: the setup of their windows, and the pace (protocol.py's `Run`)."""

    def __init__(self, method: AdaptiveMethod, problem: Problem) -> None:
        self._problem = problem
        options = dataclasses.replace(method, window=max(2, method.width(problem.table)) if problem.table.steps > 1 else None)
        self._setup = WindowSetup(
            problem.table,
            options,
            problem.device,
            problem.dtype,
            problem.shared_window,
            problem.resolution,
            elements=problem.elements,
        )
        self._judge = WindowRun(options, problem)
        seconds = functools.partial(_seconds, dict(method.seconds)) if method.seconds else None
        self.pace = Pace(problem.table.steps, dict(method.expected), seconds, method.pace)
        self._clock = RoundClock(self.pace, self._setup)

    @property
    def t(self) -> Tensor:
        """`[N+1]` times of the chain."""
        return self._setup.t

    def solver(self, sample: int) -> AdaptiveSolver:
        """The solver of one sample."""
        problem = self._problem
        window = window_of(self._setup, problem, sample)
        return AdaptiveSolver(window, self._clock)

    def status(self, estimates: Sequence[ErrorEstimate]) -> tuple[Status, str]:
        """How the run ended, and how wide the windows were."""
        if self.pace.widest == 1:
            return Status.EXACT, f"{Status.EXACT.message()}; {self.pace.why}"
        status, message = self._judge.status(estimates)
        return status, f"{message}; {self.pace.why}"

    def close(self) -> None:
        """Nothing is kept."""


def _seconds(known: Mapping[int, float], width: int) -> float:
    """Seconds of a round by its width, straight between those that are known, and beyond in proportion."""
    return float(np.interp(width, [*known], [*known.values()])) * max(1.0, width / max(known))

# SPDX-License-Identifier: Apache-2.0
"""One window method on one problem."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from paradiff.chain.sensitivity import ABOVE_TOLERANCE
from paradiff.methods.window.anderson import AndersonUpdate
from paradiff.methods.window.march import march
from paradiff.methods.window.options import WindowOptions
from paradiff.methods.window.setup import WindowSetup
from paradiff.methods.window.solver import WindowSolver, window_of
from paradiff.solver.protocol import March, Problem
from paradiff.solver.solution import ErrorEstimate, Status

RULES = {
    "error": "the estimated error of every sample is at most {:g}",
    "residual": "every node passed with a residual of at most {:g}, or {:g} times its step's noise",
    "change": "every node passed with a change of at most {:g} times its step's noise",
}

DIVERGED = "; the Anderson mixing of sample{} {} diverged, and plain sweeps went on in its place"


class WindowRun:
    """What all samples share, and a window for each (protocol.py's `Run`)."""

    def __init__(self, options: WindowOptions, problem: Problem) -> None:
        self._options, self._problem = options, problem
        self._setup = WindowSetup(
            problem.table,
            options,
            problem.device,
            problem.dtype,
            problem.shared_window,
            problem.resolution,
            problem.symmetry,
            problem.renewed,
            problem.elements,
        )
        self._mixing: list[tuple[int, AndersonUpdate]] = []  # the samples that mix sweeps

    @property
    def t(self) -> Tensor:
        """`[N+1]` times of the chain."""
        return self._setup.t

    def solver(self, sample: int) -> WindowSolver:
        """The window of one sample."""
        problem = self._problem
        solver = window_of(self._setup, problem, sample)
        if isinstance(solver.update, AndersonUpdate):
            self._mixing.append((sample, solver.update))
        return solver

    def march(self) -> March | None:
        """All samples in step, where windows are of one node that copies the state before it, and nobody listens to states."""
        options, setup, problem = self._options, self._setup, self._problem
        plain = setup.width == 1 and setup.single and options.predictor == "copy" and options.sweeps is None
        alone = options.blocks is None and options.corrector is None
        heard = problem.on_final is not None or problem.shared_window
        return march(setup, problem) if plain and alone and not heard else None

    def status(self, estimates: Sequence[ErrorEstimate]) -> tuple[Status, str]:
        """How the run ended."""
        options, setup, corrector = self._options, self._setup, self._options.corrector
        corrected = corrector is None or corrector.sweeps >= corrector.steps
        if options.sweeps is not None and (options.sweeps < min(setup.exact_after, setup.width) or not corrected):
            return Status.STOPPED, Status.STOPPED.message(f"every node was swept {options.sweeps} times, as asked")
        fell = [str(sample) for sample, update in self._mixing if update.fell_back]
        beside = DIVERGED.format("s" if len(fell) > 1 else "", ", ".join(fell)) if fell else ""
        strict = options.tolerance == options.noise_tolerance == 0
        if (strict or setup.width == 1) and corrected:
            return Status.EXACT, Status.EXACT.message() + beside
        worst = max(e.estimated_error for e in estimates)
        if options.rule == "error" and worst > options.tolerance:
            return Status.STOPPED, Status.STOPPED.message(ABOVE_TOLERANCE.format(worst, options.tolerance))
        if corrector is not None and not corrected:
            beside += f"; not in it: the corrector's {corrector.steps} steps were swept {corrector.sweeps} times, as asked"
        return Status.CONVERGED, Status.CONVERGED.message(
            RULES[options.rule].format(options.tolerance, options.noise_tolerance) + beside
        )

    def close(self) -> None:
        """Nothing is kept."""

# SPDX-License-Identifier: Apache-2.0
"""quasi-DEER: the window loop with a diagonal Jacobian from random probes (solver.py), and its preset."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from paradiff.chain.slope import DATA_VARIANCE, shifted
from paradiff.chain.table import Table
from paradiff.errors import require_real, require_whole
from paradiff.methods.chain_method import ChainMethod
from paradiff.methods.deer.solver import DeerSolver
from paradiff.methods.face import Face, settle
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.methods.window.control import WindowControl
from paradiff.methods.window.method import WindowMethod
from paradiff.methods.window.run import WindowRun
from paradiff.solver.protocol import Problem
from paradiff.solver.solution import ErrorEstimate, Status

DIVERGED = "; the diagonal Jacobian of sample{} {} diverged, and plain sweeps went on in its place"


@dataclass(frozen=True, repr=False, eq=False)
class DeerMethod(ChainMethod, Face):
    """quasi-DEER; see `methods.quasi_deer`.

    Attributes:
        name: The method's name.
        window: Nodes solved at once; None for all.
        tolerance: Root mean square error that the sample may have by estimate.
        probes: Probes of each state in a sweep.
        warmup: Steps taken one after the other before the window opens.
        divergence: The diagonal is given up for a sample whose root mean square residual exceeds that of its first sweep by
            this factor; positive.

    Raises:
        ValueError: If a value is out of its range.
    """

    name: str = "quasi_deer"
    window: int | None = None
    tolerance: float = DEFAULT_TOLERANCE
    probes: int = 1
    warmup: int = 0
    divergence: float = 100.0

    def __post_init__(self) -> None:
        if self.window is not None:
            require_whole("the window", self.window, 1, ", or None for the whole chain")
        require_real("the tolerance", self.tolerance)
        require_whole("probes", self.probes, 1)
        require_whole("warmup", self.warmup, 0)
        require_real("divergence", self.divergence, positive=True)
        settle(self, "window", "probes", "warmup", numbers=["tolerance", "divergence"])

    @property
    def windowed(self) -> WindowMethod:
        """The window loop that it runs in: Newton sweeps lower changes sooner than errors, so that the estimate has the caution
        of deterministic chains on all."""
        control = WindowControl(stochastic_caution=WindowControl.deterministic_caution)
        return WindowMethod(
            self.name,
            shifted(DATA_VARIANCE),
            self.window,
            warmup=self.warmup,
            predictor="copy",
            tolerance=self.tolerance,
            control=control,
        )

    @property
    def dense_output(self) -> bool:
        """Whether all states become known: they do."""
        return True

    def edges(self, table: Table) -> list[int]:
        """All nodes.

        Raises:
            ValueError: If the method does not fit the table.
        """
        return self.windowed.edges(table)

    def prepare(self, problem: Problem) -> DeerRun:
        """The run on a problem.

        Raises:
            ValueError: If the method does not fit the problem's table.
        """
        return DeerRun(self, problem)

    def width(self, table: Table) -> int:
        """Nodes of a full window, and their probes."""
        nodes = self.windowed.width(table)
        return nodes if nodes == 1 else nodes * (1 + self.probes)

    def progress(self, table: Table) -> tuple[int, str]:
        """The number of nodes."""
        return self.windowed.progress(table)

    def in_loop(self, table: Table, least: float) -> DeerMethod:
        """With a first step alone, as a loop's first pass takes just that."""
        fitted = self.windowed.in_loop(table, least)
        return dataclasses.replace(self, window=fitted.window, tolerance=fitted.tolerance, warmup=fitted.warmup)


class DeerRun:
    """What all samples share, and a window for each (protocol.py's `Run`)."""

    def __init__(self, method: DeerMethod, problem: Problem) -> None:
        self._method, self._run = method, WindowRun(method.windowed, problem)
        self._solvers: list[DeerSolver] = []

    @property
    def t(self) -> Tensor:
        """`[N+1]` times of the chain."""
        return self._run.t

    def solver(self, sample: int) -> DeerSolver:
        """The window of one sample."""
        self._solvers.append(DeerSolver(self._run.solver(sample), self._method.probes, self._method.divergence))
        return self._solvers[-1]

    def status(self, estimates: Sequence[ErrorEstimate]) -> tuple[Status, str]:
        """How the run ended."""
        status, message = self._run.status(estimates)
        fell = [str(solver.sample) for solver in self._solvers if solver.update.fell_back]
        return status, message + (DIVERGED.format("s" if len(fell) > 1 else "", ", ".join(fell)) if fell else "")

    def close(self) -> None:
        """Nothing is kept."""


def quasi_deer(
    window: int | None = None, tolerance: float = DEFAULT_TOLERANCE, *, probes: int = 1, warmup: int = 0
) -> DeerMethod:
    """quasi-DEER: Newton sweeps with a diagonal Jacobian, from one random probe a state.

    Source: Lim, Zhu, Selfridge and Kasim, "Parallelizing non-linear sequential models over the sequence length" (DEER), ICLR
    2024, arXiv 2309.12252; Gonzalez, Warrington, Smith and Linderman, "Towards Scalable and Stable Parallelization of Nonlinear
    RNNs" (quasi-DEER), NeurIPS 2024, arXiv 2407.19115. The diagonal from random probes is that of stochastic estimators.

    Differs from the papers in: the diagonal is estimated, where theirs is computed; a window that slides, and the error rule of
    the window methods; a sample whose residuals grow a hundredfold goes on with the slope of Gaussian data. Probes are finite
    differences, which need no derivatives of the network; `paradiff.methods.ForwardProbes(model)` is an evaluator that answers
    them by `torch.func.jvp`.

    Args:
        window: Nodes solved at once; None for all. A round has 1 + probes rows a node, all of which are counted.
        tolerance: Root mean square error that the sample may have by estimate, in the data's units.
        probes: Random directions of each state in a sweep, whose products are averaged.
        warmup: Steps taken one after the other before the window opens.

    Raises:
        ValueError: If a number is out of its range.
    """
    return DeerMethod("quasi_deer", window, tolerance, probes, warmup)

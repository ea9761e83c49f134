# SPDX-License-Identifier: Apache-2.0
"""The run of what `auto` chose: it says why, and leaves what it took for later ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from paradiff.methods.adaptive.method import AdaptiveMethod
from paradiff.planning.cost import Trace
from paradiff.planning.curves import keep
from paradiff.planning.latency import LatencyCurve, quick_latency
from paradiff.planning.picking import PLAIN, Known, Picked
from paradiff.planning.traces import Traces
from paradiff.solver.protocol import March, Marches, Problem, Run, Solver
from paradiff.solver.solution import ErrorEstimate, Status

SHARE = 0.04
"""Share of the plain chain's rows that measuring may cost."""

ENOUGH = 3
"""Traces of a choice after which no further run leaves its own; one is enough of the plain chain, whose rounds are known."""


class AutoRun:
    """The run of a choice (protocol.py's `Run`).

    Args:
        known: What is known of the model; None where nothing is, and nothing is left.
        picked: The choice.
        problem: What is solved.
    """

    def __init__(self, known: Known | None, picked: Picked, problem: Problem) -> None:
        self._begin = time.perf_counter()
        self._known, self._picked, self._problem = known, picked, problem
        self._run: Run = picked.method.prepare(problem)
        self._solvers: list[Solver[Any]] = []
        self._calls: list[float] = []

    @property
    def t(self) -> Tensor:
        """`[N+1]` times of the chain."""
        return self._run.t

    def solver(self, sample: int) -> Solver[Any]:
        """The solver of one sample."""
        self._solvers.append(self._run.solver(sample))
        return self._solvers[-1]

    def march(self) -> March | None:
        """All samples in step, where the choice can be."""
        march = self._run.march() if isinstance(self._run, Marches) else None
        return march if march is None or self._known is None else self._clocked(march)

    def _clocked(self, march: March) -> March:
        """A march whose calls are timed."""
        batch = next(march)
        while True:
            begin = time.perf_counter()
            answer = yield batch
            self._calls.append(time.perf_counter() - begin)
            try:
                batch = march.send(answer)
            except StopIteration as end:
                return end.value

    def status(self, estimates: Sequence[ErrorEstimate]) -> tuple[Status, str]:
        """How the run ended, what was chosen, and why."""
        status, message = self._run.status(estimates)
        return status, self.explained(message)

    def explained(self, message: str) -> str:
        """A run's message with what was chosen, and why."""
        notes = () if self._known is None else self._known.notes
        return "; ".join([message, f"chosen: {self._picked}", *notes])

    def close(self) -> None:
        """Leaves the trace of the run, or a further point of the curve."""
        self._run.close()
        known, problem = self._known, self._problem
        if known is None or problem.trajectory is not None:
            return
        if known.curve is not None:
            self._keep_trace(known, known.curve)
        elif self._calls and known.evaluator is not None and SHARE * problem.table.steps >= 2:
            most = SHARE * problem.table.steps
            curve = quick_latency(known.evaluator, problem.table, problem.noise, most, warm=self._calls)
            keep(known.evaluator, problem.noise, curve)

    def _keep_trace(self, known: Known, curve: LatencyCurve) -> None:
        label, samples = repr(self._picked.method), self._problem.noise.samples
        enough = 1 if self._picked.method == PLAIN else ENOUGH
        if not isinstance(known.traces, Traces):
            return
        if isinstance(self._picked.method, AdaptiveMethod) or len(known.traces.of(label, samples)) >= enough:
            return  # rounds of several widths are no trace of one window
        seconds = time.perf_counter() - self._begin
        if self._calls:
            rounds, rows = len(self._calls), len(self._calls) * samples
        else:
            estimates = [solver.error_estimate for solver in self._solvers]
            rounds, rows = max(e.rounds for e in estimates), sum(e.evaluations for e in estimates)
        seconds /= self._pace(known, curve, seconds)
        beside = max(seconds - curve.within(rows / rounds) * rounds, 0.0)
        known.traces.add({label: [Trace(((rows / rounds, rounds),), samples, beside)]})

    def _pace(self, known: Known, curve: LatencyCurve, seconds: float) -> float:
        """How many times as long as on the curve the model's calls take now. It is measured, by two calls, where a run took so
        long that it would not be made again: the machine may have been busy."""
        table, noise = self._problem.table, self._problem.noise
        plain = curve.within(noise.samples)
        if self._calls:
            return max(1.0, statistics.median(self._calls) / plain)
        if known.evaluator is None or seconds < plain * table.steps:
            return 1.0
        (now,) = quick_latency(known.evaluator, table, noise, 2).points.values()
        return max(1.0, now / plain)

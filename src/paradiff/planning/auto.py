# SPDX-License-Identifier: Apache-2.0
"""`auto`: the method that is chosen for a model and a chain, and corrects itself while it runs.

What is known decides: the stored latency curve of the model on this machine, stored traces of its runs, the library's own
models on like chains (planning/choice.py). A choice has to pay by its slowest known run, too. Where no curve is known,

- a chain of which a method evaluates so few nodes that it pays even where a call takes time in proportion to its rows is solved
  by that method;
- a long chain begins with a few calls that measure the curve, within a share of its own seconds;
- a shorter one is walked, and what its end has left of that share measures a point of the curve for the next run;
- within a pipeline's loop, whose calls cannot be made by themselves, the window widens as its rounds show that it pays
  (methods/adaptive/pace.py).

A window that was chosen is watched, and narrowed where it falls behind the plain chain.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.table import Table
from paradiff.errors import require_kind, require_real, require_whole
from paradiff.methods.adaptive.method import AdaptiveMethod
from paradiff.methods.chain_method import ChainMethod
from paradiff.methods.face import Face
from paradiff.methods.presets import sequential
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.methods.window.method import WindowMethod
from paradiff.planning.choice import SEQUENTIAL, Choice, choices
from paradiff.planning.cost import Trace
from paradiff.planning.curves import keep, stored_curve
from paradiff.planning.identity import evaluator_key
from paradiff.planning.latency import LatencyCurve, quick_latency
from paradiff.planning.plan import Plan
from paradiff.planning.traces import Traces, traces_of
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.protocol import Evaluate, March, Marches, Method, Problem, Run, Solver
from paradiff.solver.sharded import Sharded
from paradiff.solver.solution import ErrorEstimate, Status

STEEP = LatencyCurve({1: 1.0, 2: 2.0})
"""A call that takes time in proportion to its rows: what nothing is known of is taken to be no worse."""

SURE = 1.2
"""The least gain on that curve, by the slowest known run, at which a method is taken though nothing is known of the model."""

MARGIN = {"trace": 1.1, "library": 1.15}
"""The least predicted gain of a choice, by where its cost is known from."""

ROUGH = 1.3
"""The same on a curve of a few single calls, where the model itself was never run with the choice."""

BEYOND = 4
"""How many times the rows of the widest call on such a curve a window may have."""

SHORTEST = 12
"""Steps of a chain that is walked without a question where no curve is known: what is beside its steps would cost more."""

MANY = 8
"""Most samples whose windows are watched; of more, the solvers' own time beside a walked step would be felt."""

FEW_FOR_MANY = 1.25
"""The least predicted gain for more samples, whose window is not watched."""

ENOUGH = 3
"""Traces of a choice after which no further run leaves its own."""

SHARE = 0.04
"""Share of the plain chain's rows that measuring may cost."""

FEWEST = 8
"""Rows that measuring at the beginning needs: a warm call and one of each of 1, 2 and 4 rows."""

NOTHING = "sequential: nothing is known of other methods on such a chain"

Picked = tuple[Method, str]
"""A method, and why it was chosen."""


@dataclass(frozen=True, eq=False, repr=False)
class Known:
    """What is known of a model on a chain.

    Attributes:
        evaluator: The model.
        curve: Its latency curve on this machine; None where it is not known.
        traces: Traces of its runs.
    """

    evaluator: Evaluator
    curve: LatencyCurve | None
    traces: Traces


@dataclass(frozen=True, repr=False, eq=False)
class AutoMethod(ChainMethod, Face):
    """The method that chooses; `auto` makes one.

    Attributes:
        tolerance: Root mean square error that a sample may have by estimate.
        window: Most rows of a sample in a round; None for no bound.
        plan: A plan that decides; None for what is known.
        name: Its name.
        known: What is known of the model; None before a model is seen.
        clocked: Whether the clock may decide: not on ranks, which have to choose alike.

    Raises:
        ValueError: If a value is of another kind, or out of its range.
    """

    tolerance: float = DEFAULT_TOLERANCE
    window: int | None = None
    plan: Plan | None = None
    name: str = "auto"
    known: Known | None = dataclasses.field(default=None, kw_only=True)
    clocked: bool = dataclasses.field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        require_real("the tolerance", self.tolerance, positive=True)
        if self.window is not None:
            require_whole("the window", self.window, 1, ", or None for no bound on rows")
        if self.plan is not None:
            require_kind("the plan", self.plan, Plan, ", as paradiff.plan returns it, or None")

    def edges(self, table: Table) -> list[int]:
        """Those of the choice."""
        return self.pick(table)[0].edges(table)

    def width(self, table: Table) -> int:
        """That of the choice."""
        return self.pick(table)[0].width(table)

    def progress(self, table: Table) -> tuple[int, str]:
        """That of the choice."""
        return self.pick(table)[0].progress(table)

    def in_loop(self, table: Table, least: float) -> Method:
        """The choice as a pipeline's own loop can be driven by it."""
        return self.pick(table)[0].in_loop(table, least)

    def prepare(self, problem: Problem) -> AutoRun:
        """The run of the choice.

        Raises:
            ValueError: If the choice does not fit the problem.
        """
        method, why = self.pick(problem.table, problem.noise.samples)
        return AutoRun(self, method, why, problem)

    def for_model(self, evaluate: Evaluate, table: Table, noise: Noise) -> AutoMethod:
        """The same with what is known of a model; a long chain's curve is measured, within a share of its seconds."""
        if self.plan is not None or not isinstance(evaluate, Evaluator):
            return self
        if isinstance(evaluate.bound.crew, Sharded):
            return self.on_ranks()
        key = evaluator_key(evaluate)
        curve, _ = stored_curve(evaluate, noise, key=key)
        rows = SHARE * table.steps
        if curve is None and rows >= FEWEST:
            curve = quick_latency(evaluate, table, noise, rows)
            keep(evaluate, noise, curve)
        return dataclasses.replace(self, known=Known(evaluate, curve, traces_of(evaluate, table, noise.shape, key=key)))

    def reason(self, table: Table) -> str:
        """What is chosen for a chain, and why."""
        return self.pick(table)[1]

    def on_ranks(self) -> AutoMethod:
        """The same without a clock, so that all ranks choose alike."""
        return dataclasses.replace(self, clocked=False)

    def pick(self, table: Table, samples: int = 1) -> Picked:
        """The choice for a chain, and why; made once, and kept for the chain that was asked about last.

        Raises:
            ValueError: If the plan is of another chain.
        """
        of, kept = vars(self).get("_kept", (None, {}))
        if of is not table:
            kept = {}
            object.__setattr__(self, "_kept", (table, kept))
        if samples not in kept:
            kept[samples] = self._picked(table, samples)
        return kept[samples]

    def _picked(self, table: Table, samples: int) -> Picked:
        if self.plan is not None:
            if self.plan.steps != table.steps or self.plan.stochastic != table.stochastic:
                raise ValueError(
                    f"the plan is of a {'stochastic' if self.plan.stochastic else 'deterministic'} chain of {self.plan.steps} "
                    f"steps, and this one is {'stochastic' if table.stochastic else 'deterministic'} and has {table.steps}; "
                    "plan this one, or leave the plan out"
                )
            return self.plan.method, f"as planned: {self.plan.why()}"
        if table.steps == 1:
            return sequential(), "one step has nothing to be solved in parallel"
        if self.known is None or self.known.curve is None:
            return self._unknown(table, samples)
        curve, traces = self.known.curve, self.known.traces
        found = choices(table, samples, self.tolerance, curve, known=traces.of, most=self.window)
        plain = next(one for one in found if one.sequential)
        rough = curve.spread is None
        margin = MARGIN | ({"library": ROUGH} if rough else {})
        if samples > MANY:
            margin = {source: max(least, FEW_FOR_MANY) for source, least in margin.items()}
        if rough:
            widest = BEYOND * max(curve.points) / samples
            found = [one for one in found if one.sequential or one.cost.rows / one.cost.rounds / samples <= widest]
        others = [one for one in found if not one.sequential]
        for best in others:
            gain = plain.seconds / best.seconds
            if gain >= margin[best.cost.source] and best.slowest <= plain.seconds:
                why = f"{best.label}, {gain:.1f} times faster than the plain chain by {best.cost.about()}"
                return best.method if samples > MANY else self._watched(best, found, curve, samples), why
        if not others:
            return sequential(), NOTHING
        gain = plain.seconds / others[0].seconds
        said = f"sequential, since {others[0].label} would be {gain:.2f} times as fast, by {others[0].cost.about()}"
        return sequential(), said

    def _unknown(self, table: Table, samples: int) -> Picked:
        """The choice where no curve is known."""
        if table.steps <= SHORTEST:
            return sequential(), "sequential: the chain is short, and nothing is known of this model's calls"
        found = choices(table, samples, self.tolerance, STEEP, most=self.window)
        plain = next(one for one in found if one.sequential)
        sure = [one for one in found if not one.sequential and plain.seconds / one.slowest >= SURE]
        if sure:
            best = min(
                sure, key=lambda one: one.cost.rounds ** (1 / 3) * one.cost.rows ** (2 / 3)
            )  # calls that grow as W^(2/3)
            share = best.cost.rows / samples / table.steps
            return best.method, f"{best.label}, which evaluates about {share:.0%} as many states as the chain has steps"
        if self.known is not None or not self.clocked:
            return sequential(), "sequential: nothing is known of this model's calls yet; `paradiff plan` measures them"
        families = [one for one in found if isinstance(one.method, WindowMethod) and not one.sequential]
        if not families:
            return sequential(), NOTHING
        return self._adaptive(families[0], found, (), samples), "a window that widens where its rounds show that it pays"

    def _watched(self, best: Choice, found: Sequence[Choice], curve: LatencyCurve, samples: int) -> Method:
        """A choice whose window is watched, where it has one that can be."""
        if not isinstance(best.method, WindowMethod):
            return best.method
        beside = min(trace.beside / trace.rounds for trace in best.cost.traces)
        widths = sorted({1, *(self._rows(one) for one in found if one.family == best.family)} - {0})
        seconds = tuple((w, curve.within(w * samples) + (beside if w > 1 else 0.0)) for w in widths)
        return self._adaptive(best, found, seconds, samples)

    def _adaptive(self, best: Choice, found: Sequence[Choice], seconds: tuple[tuple[int, float], ...], samples: int) -> Method:
        method = best.method
        assert isinstance(method, WindowMethod)
        family = [one for one in found if one.family == best.family and one.window is not None]
        expected = tuple(sorted((self._rows(one), one.cost.rounds) for one in family))
        if seconds and best.window is not None:
            expected = tuple(pair for pair in expected if pair[0] <= best.window)
        if best.window is None or not expected:
            return method  # the whole chain at once cannot be narrowed step by step
        return AdaptiveMethod(
            self.name, method.slope, tolerance=self.tolerance, secants=method.secants, expected=expected, seconds=seconds
        )

    def _rows(self, one: Choice) -> int:
        return 0 if one.window is None or one.family == SEQUENTIAL else one.window


class AutoRun:
    """The run of a choice, which says why it was chosen, and leaves what it took for later ones (protocol.py's `Run`)."""

    def __init__(self, auto: AutoMethod, method: Method, why: str, problem: Problem) -> None:
        self._begin = time.perf_counter()
        self._auto, self._method, self._why, self._problem = auto, method, why, problem
        self._run: Run = method.prepare(problem)
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
        return None if march is None else self._clocked(march)

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
        return status, f"{message}; chosen: {self._why}"

    def close(self) -> None:
        """Leaves the trace of the run, or a further point of the curve."""
        self._run.close()
        known, problem = self._auto.known, self._problem
        if known is None:
            return
        if known.curve is not None:
            self._keep_trace(known, known.curve)
        elif self._calls and SHARE * problem.table.steps >= 2:
            curve = quick_latency(known.evaluator, problem.table, problem.noise, SHARE * problem.table.steps, warm=self._calls)
            keep(known.evaluator, problem.noise, curve)

    def _keep_trace(self, known: Known, curve: LatencyCurve) -> None:
        samples, seconds = self._problem.noise.samples, time.perf_counter() - self._begin
        if self._calls:
            rounds, rows = len(self._calls), len(self._calls) * samples
        else:
            estimates = [solver.error_estimate for solver in self._solvers]
            rounds, rows = max(e.rounds for e in estimates), sum(e.evaluations for e in estimates)
        beside = max(seconds - curve.within(rows / rounds) * rounds, 0.0)
        if isinstance(self._method, AdaptiveMethod) or len(known.traces.of(repr(self._method), samples)) >= ENOUGH:
            return  # rounds of several widths are no trace of one window
        known.traces.add({repr(self._method): [Trace(((rows / rounds, rounds),), samples, beside)]})


def auto(window: int | None = None, tolerance: float = DEFAULT_TOLERANCE, *, plan: Plan | None = None) -> AutoMethod:
    """Chooses method and window for the model, the chain and the machine, and says in the message what it chose and why.

    The choice is made by what was measured before, here and on the library's own models (`paradiff plan` measures a model); it
    is the plain chain where nothing is faster. The first runs of a model measure what they can within 4 % of their seconds.

    Our own.

    Args:
        window: Most rows of a sample in a round; None for no bound.
        tolerance: Root mean square error that the sample may have by estimate, in the data's units.
        plan: A plan of `paradiff.plan`, which then decides.
    """
    return AutoMethod(tolerance, window, plan)

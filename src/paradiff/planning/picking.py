# SPDX-License-Identifier: Apache-2.0
"""How `auto` chooses: by what is known of a model on a chain, for what is asked (wish.py).

A choice has to pay by its slowest known run, too. Where no latency curve is known,

- a chain of which a method evaluates so few nodes that it pays even where a call takes time in proportion to its rows is solved
  by that method;
- within a pipeline's loop, whose calls cannot be made by themselves, the window widens as its rounds show that it pays
  (methods/adaptive/pace.py);
- any other chain is walked.

A window that was chosen is watched, and narrowed where it falls behind the plain chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from paradiff.chain.table import Table
from paradiff.methods.adaptive.method import AdaptiveMethod
from paradiff.methods.presets import collocation, quasi_newton, sequential
from paradiff.methods.window.method import WindowMethod
from paradiff.planning import library
from paradiff.planning.candidates import WHOLE, called
from paradiff.planning.choice import CHECKED, SEQUENTIAL, Choice, choices
from paradiff.planning.cost import Trace
from paradiff.planning.latency import LatencyCurve
from paradiff.planning.wish import Wish
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.protocol import Method

STEEP = LatencyCurve({1: 1.0, 2: 2.0})
"""A call that takes time in proportion to its rows: what nothing is known of is taken to be no worse."""

HALF = LatencyCurve({1: 1.0, 2: 1.5})
"""A call on several devices that were given to share its rows: they are taken to be worth it."""

SURE = 1.2
"""The least gain on that curve, by the slowest known run, at which a method is taken though nothing is known of the model."""

MARGIN = {"trace": 1.1, "library": 1.15}
"""The least predicted gain of a choice, by where its cost is known from."""

ROUGH = 1.3
"""The same on a curve of a few single calls, where the model itself was never run with the choice."""

BEYOND = 4
"""How many times the rows of the widest call on such a curve a window may have."""

SHORTEST = 12
"""Steps of a chain that is walked without a question: what is beside its steps would cost more than any method gains."""

SHORT = "since the chain is short: what is beside its steps would cost more than any method gains"
"""Why it is."""

UNSEEN = 48
"""Steps of a deterministic chain from which on collocation is taken though it was never run on the model. On shorter ones a
first mesh that fails costs more than it gains: an untrained network took 36 rounds for 25 steps."""

WARM = 0.8
"""The share of a cold run's seconds that one from a trajectory is taken to need; changes that were measured left 0.3 to 0.9."""

MANY = 8
"""Most samples whose windows are watched; of more, the solvers' own time beside a walked step would be felt."""

FEW_FOR_MANY = 1.25
"""The least predicted gain for more samples, whose window is not watched."""

LOOSER = (1e-2, 4e-2)
"""Tolerances beyond the one that was asked for, with which a deadline may be kept."""

SPARE = 0.9
"""The share of a deadline into which the slowest known run of a choice has to fit."""


@dataclass(frozen=True, eq=False)
class Picked:
    """A choice.

    Attributes:
        method: The method.
        call: The call by which it is asked for by name.
        why: Why it was chosen.
        warning: What the caller is warned of; None for nothing.
    """

    method: Method
    call: str
    why: str
    warning: str | None = None

    def __str__(self) -> str:
        return f"{self.call}, {self.why}"


class Seen(Protocol):
    """Traces of a model's runs."""

    def of(self, label: str, samples: int, /) -> Sequence[Trace]:
        """Those of a method's label for so many samples."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Known:
    """What is known of a model, or a pipeline's call, on a chain.

    Attributes:
        curve: Its latency curve on this machine; None where it is not known.
        traces: Traces of its runs.
        evaluator: The model; None for a pipeline's call.
        notes: Sentences: which stored file was left out, and why.
    """

    curve: LatencyCurve | None
    traces: Seen
    evaluator: Evaluator | None = None
    notes: Sequence[str] = ()


PLAIN = sequential()


def plain(why: str) -> Picked:
    """The plain chain."""
    return Picked(PLAIN, f"{SEQUENTIAL}()", why)


def pick(wish: Wish, known: Known | None, table: Table, samples: int) -> Picked:
    """The choice for a chain.

    Args:
        wish: What is asked for.
        known: What is known of the model; None for nothing.
        table: The chain.
        samples: Samples that are solved together.

    Raises:
        ValueError: If the plan is of another chain.
    """
    if wish.plan is not None:
        return _as_planned(wish, table)
    if table.steps == 1:
        return plain("since one step has nothing to be solved in parallel")
    if wish.objective == "memory":
        return plain("which holds one state a sample, the fewest")
    curve, evaluator = (None, None) if known is None else (known.curve, known.evaluator)
    if wish.objective == "evaluations":
        return _fewest(wish, known, table, samples)
    if wish.objective == "anytime":
        return _anytime(wish, table)
    if wish.deadline is not None:
        return _in_time(wish, wish.deadline, known, curve, table, samples)
    if table.steps <= SHORTEST and wish.devices.count == 1:
        return plain(SHORT)
    if curve is None:
        return _unknown(wish, known, table, samples)
    found = _found(wish, wish.tolerance, known, curve, table, samples)
    first = next(one for one in found if one.sequential)
    rough = curve.spread is None
    margin = MARGIN | ({"library": ROUGH} if rough else {})
    if samples > MANY:
        margin = {source: max(least, FEW_FOR_MANY) for source, least in margin.items()}
    if rough:
        widest = BEYOND * max(curve.points) / samples
        found = [one for one in found if one.sequential or one.cost.rows / one.cost.rounds / samples <= widest]
        if evaluator is None:  # single passes of a loop were timed: only a choice that is watched is safe
            found = [
                one for one in found if one.sequential or one.cost.source == "trace" or isinstance(one.method, WindowMethod)
            ]
    others = [one for one in found if not one.sequential]
    share, begins = (WARM, " and a trajectory to begin from") if wish.begins else (1.0, "")
    for best in others:
        gain = first.seconds / (share * best.seconds)
        if gain >= margin[best.cost.source] and share * best.slowest <= first.seconds:
            why = f"{gain:.1f} times faster than the plain chain by {_about(best, table, wish.tolerance)}{begins}"
            method = best.method if samples > MANY else _watched(wish, best, found, curve, samples)
            return Picked(method, best.call, why)
    if not others:
        return plain("since nothing is known of other methods on such a chain")
    gain = first.seconds / (share * others[0].seconds)
    return plain(f"since {others[0].label} would be {gain:.2f} times as fast, by {_about(others[0], table, wish.tolerance)}")


def _found(wish: Wish, tolerance: float, known: Known | None, curve: LatencyCurve, table: Table, samples: int) -> list[Choice]:
    """The choices that can do what is asked, fastest first, and the plain chain."""
    of = {} if known is None else {"known": known.traces.of}
    found = choices(table, samples, tolerance, curve, devices=wish.devices, most=wish.window, **of)
    if not table.stochastic and table.steps < UNSEEN:
        found = [one for one in found if one.family != "collocation" or one.cost.source == "trace"]
    return [one for one in found if one.sequential or wish.allows(one.method)]


def _about(one: Choice, table: Table, tolerance: float) -> str:
    """Where the cost of a choice is known from, and a clause where that was measured at another tolerance."""
    other = library.beyond(table, tolerance) if one.cost.source == "library" else None
    return one.cost.about() if other is None else f"{one.cost.about()} ({other})"


def _as_planned(wish: Wish, table: Table) -> Picked:
    plan = wish.plan
    assert plan is not None
    if plan.steps != table.steps or plan.stochastic != table.stochastic:
        raise ValueError(
            f"the plan is of a {'stochastic' if plan.stochastic else 'deterministic'} chain of {plan.steps} "
            f"steps, and this one is {'stochastic' if table.stochastic else 'deterministic'} and has {table.steps}; "
            "plan this one, or leave the plan out"
        )
    if wish.allows(plan.method):
        return Picked(plan.method, plan.call, f"as planned: {plan.why() if plan.answer is None else plan.answer}")
    best = next(one for one in plan.choices if wish.allows(one.method))
    needs = "the states of all nodes are read" if wish.dense else "states are changed between steps"
    return Picked(best.method, best.call, f"the fastest of the plan's that can be taken where {needs}")


def _unknown(wish: Wish, known: Known | None, table: Table, samples: int) -> Picked:
    """The choice where no curve is known."""
    if wish.devices.count > 1:
        return _shared(wish, table, samples)
    found = _found(wish, wish.tolerance, None, STEEP, table, samples)
    first = next(one for one in found if one.sequential)
    sure = [one for one in found if not one.sequential and first.seconds / one.slowest >= SURE]
    if sure:
        best = min(sure, key=lambda one: one.cost.rounds ** (1 / 3) * one.cost.rows ** (2 / 3))  # calls that grow as W^(2/3)
        share = best.cost.rows / samples / table.steps
        return Picked(best.method, best.call, f"which evaluates about {share:.0%} as many states as the chain has steps")
    if wish.remembers:
        found = collocation(window=wish.window, tolerance=wish.tolerance)
        what = "a trajectory begins it" if wish.begins else "its trajectory is kept"
        if wish.allows(found):
            return Picked(
                found, called("collocation", wish.window, wish.tolerance), f"since {what}, and nothing is known of calls"
            )
        found = quasi_newton(wish.window, wish.tolerance)
        return Picked(
            found, called("quasi_newton", wish.window, wish.tolerance), f"since {what}, and nothing is known of calls"
        )
    if not wish.clocked or (known is not None and known.evaluator is not None):
        return plain("since nothing is known of this model's calls yet; `paradiff plan` measures them")
    families = [one for one in found if isinstance(one.method, WindowMethod) and not one.sequential]
    if not families:
        return plain("since nothing is known of other methods on such a chain")
    method = _adaptive(wish, families[0], found, ())
    return Picked(method, families[0].family, "with a window that widens where its rounds show that it pays")


def _shared(wish: Wish, table: Table, samples: int) -> Picked:
    """The choice of devices that share rounds, without a clock."""
    best = _found(wish, wish.tolerance, None, HALF, table, samples)[0]
    if best.sequential:
        return plain(f"since {wish.devices.count} devices that share rounds gain nothing on such a chain")
    return Picked(best.method, best.call, f"since {wish.devices.count} devices share rounds")


def _fewest(wish: Wish, known: Known | None, table: Table, samples: int) -> Picked:
    """The fewest evaluations, those that check the model counted."""
    found = _found(wish, wish.tolerance, known, STEEP, table, samples)
    others = [one for one in found if not one.sequential]
    best = min(others, key=lambda one: one.cost.rows, default=None)
    steps = table.steps * samples
    if best is None or max(trace.rows for trace in best.cost.traces) + CHECKED >= steps:
        return plain(f"since its {steps} evaluations are the fewest")
    rows = best.cost.rows + CHECKED
    return Picked(best.method, best.call, f"which takes about {rows:.0f} evaluations for {steps} of the plain chain")


def _anytime(wish: Wish, table: Table) -> Picked:
    """A method that holds the whole sample from its first round on: a window of the whole chain, or a mesh over a long one."""
    whole = wish.window is None or wish.window >= table.steps
    first = "whose first round gives a preview of the sample"
    if whole and table.steps <= WHOLE:
        return Picked(quasi_newton(None, wish.tolerance), called("quasi_newton", None, wish.tolerance), first)
    if not (wish.dense or wish.edits) and table.steps > WHOLE:
        found = collocation(window=wish.window, tolerance=wish.tolerance)
        return Picked(found, called("collocation", wish.window, wish.tolerance), first)
    later = "which gives previews of the sample once its window has reached the chain's end"
    window = wish.window or WHOLE
    return Picked(quasi_newton(window, wish.tolerance), called("quasi_newton", window, wish.tolerance), later)


def _in_time(
    wish: Wish, deadline: float, known: Known | None, curve: LatencyCurve | None, table: Table, samples: int
) -> Picked:
    """The most exact choice that fits into a deadline; where none does, what comes nearest to its end, with a warning."""
    if curve is None:
        picked = _anytime(wish, table)
        why = "nothing is known of this model's calls yet" if wish.clocked else "ranks choose alike, by no clock"
        return Picked(picked.method, picked.call, f"{picked.why}: {why}")
    limit = SPARE * deadline
    found = _found(wish, wish.tolerance, known, curve, table, samples)
    first = next(one for one in found if one.sequential)
    if first.slowest <= limit:
        return plain(f"which fits into {deadline:g} s, about {first.seconds:.2g} s")
    least = None
    for tolerance in (wish.tolerance, *(looser for looser in LOOSER if looser > wish.tolerance)):
        for one in _found(wish, tolerance, known, curve, table, samples):
            if one.sequential or one.family == "srds":  # which has no preview of the sample if it has to be ended
                continue
            least = one if least is None or one.seconds < least.seconds else least
            if one.slowest <= limit:
                what = "" if tolerance == wish.tolerance else f" at a tolerance of {tolerance:g}"
                return Picked(one.method, one.call, f"which fits into {deadline:g} s{what}, about {one.seconds:.2g} s")
    picked = _soonest(wish, curve, table, samples, limit)
    needs = "" if least is None else f"; the fastest, {least.label}, takes about {least.seconds:.2g} s"
    said = f"the deadline of {deadline:g} s is out of reach for a finished sample{needs}: the best known by then is given"
    return Picked(picked.method, picked.call, f"{picked.why}; {said}", said)


def _soonest(wish: Wish, curve: LatencyCurve, table: Table, samples: int, limit: float) -> Picked:
    """What has a preview within a limit, in seconds; where nothing has, what has one first."""
    picked = _anytime(wish, table)
    coarse = collocation(window=wish.window, tolerance=max(*LOOSER, wish.tolerance))
    if not wish.allows(coarse):
        return picked
    first, other = (curve.within(method.width(table) * samples) for method in (picked.method, coarse))
    if first <= limit or other >= first:
        return picked
    return Picked(
        coarse, called("collocation", wish.window, coarse.tolerance), "whose first round gives a preview of few nodes"
    )


def _watched(wish: Wish, best: Choice, found: Sequence[Choice], curve: LatencyCurve, samples: int) -> Method:
    """A choice whose window is watched, where it has one that can be."""
    if not isinstance(best.method, WindowMethod) or wish.remembers:
        return best.method
    beside = min(trace.beside / trace.rounds for trace in best.cost.traces)
    widths = sorted({1, *(_rows(one) for one in found if one.family == best.family)} - {0})
    seconds = tuple((w, curve.within(w * samples) + (beside if w > 1 else 0.0)) for w in widths)
    return _adaptive(wish, best, found, seconds)


def _adaptive(wish: Wish, best: Choice, found: Sequence[Choice], seconds: tuple[tuple[int, float], ...]) -> Method:
    method = best.method
    assert isinstance(method, WindowMethod)
    family = [one for one in found if one.family == best.family and one.window is not None]
    expected = tuple(sorted((_rows(one), one.cost.rounds) for one in family))
    if seconds and best.window is not None:
        expected = tuple(pair for pair in expected if pair[0] <= best.window)
    if best.window is None or not expected:
        return method  # the whole chain at once cannot be narrowed step by step
    return AdaptiveMethod(
        "auto", method.slope, tolerance=wish.tolerance, secants=method.secants, expected=expected, seconds=seconds
    )


def _rows(one: Choice) -> int:
    return 0 if one.window is None or one.family == SEQUENTIAL else one.window

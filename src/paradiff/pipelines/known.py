# SPDX-License-Identifier: Apache-2.0
"""What is known of a pipeline's call, for the choice of its method: seconds of a pass by its states, and traces of its runs.

Both are kept in the user's cache folder, by the pipeline's networks and by the arguments of the call that its seconds and
rounds depend on: numbers, such as the guidance scale, shapes, and how many texts there are, but not what they say.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from paradiff.chain.table import Table
from paradiff.methods.adaptive.method import AdaptiveMethod
from paradiff.pipelines.host.host import Host
from paradiff.pipelines.loop.driver import LoopSolver
from paradiff.planning.auto_run import ENOUGH
from paradiff.planning.cost import Trace
from paradiff.planning.curves import read_curve
from paradiff.planning.identity import machine_facts, model_facts, table_key
from paradiff.planning.latency import LatencyCurve
from paradiff.planning.picking import Known
from paradiff.planning.store import Store, digest
from paradiff.planning.traces import Traces

STEPS = ("num_inference_steps", "timesteps", "sigmas")
"""Arguments that a pass does not depend on, since the chain is known by itself."""

OWN = ("generator", "callback", "callback_on_step_end", "callback_steps")
"""Arguments of a call that pilots and calibrations leave out."""


def call_key(host: Host, given: Mapping[str, Any]) -> str:
    """The key of a call's curve.

    Args:
        host: What owns the chain.
        given: The call's arguments by name.
    """
    plain = {k: v for k, v in given.items() if isinstance(v, bool | int | float) and k not in STEPS}
    shapes = {k: [*v.shape] for k, v in given.items() if isinstance(v, Tensor)}
    texts = {k: 1 if isinstance(v, str) else len(v) for k, v in given.items() if _is_text(v)}
    facts = {name: model_facts(network) for name, network in host.networks.items()}
    return digest(host.kind.__qualname__, facts, plain, shapes, texts)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value))


PLAIN_CALLS: dict[tuple[str, str], tuple[str, int, int]] = {}
"""Calls for which the plain one was chosen: why, for how many more of them it is, and how many these were at first."""
FEWEST, MOST_CALLS = 2, 64
"""Calls after which the choice is made anew: a window may have been slow by what the machine did beside. They are twice as many
each time that it comes out the same."""
MOST = 64
"""Calls that are kept as plain ones, and calls that are kept as parallel ones."""
PARALLEL_CALLS: dict[tuple[str, str], None] = {}
"""Calls for which a parallel one was made last."""
CREDITS: dict[tuple[str, str], float] = {}
"""Rows of a pass that calls which were not measured would have had for it."""


def forget_calls() -> None:
    """Forgets what was chosen for the calls of this process."""
    for kept in (PLAIN_CALLS, PARALLEL_CALLS, CREDITS):
        kept.clear()


class CallKnown:
    """What is known of one call. Objects are compared by identity.

    Args:
        host: What owns the chain.
        given: The call's arguments by name.

    Attributes:
        key: That of its curve.
    """

    def __init__(self, host: Host, given: Mapping[str, Any]) -> None:
        self.key = call_key(host, given)
        self._call = digest(self.key, type(host.scheduler).__qualname__, {k: repr(given[k]) for k in STEPS if k in given})
        self._device, self._facts = host.device, machine_facts(host.device)
        self._found: Known | None = None
        self._measured: LatencyCurve | None = None

    def plain(self, method: object) -> str | None:
        """Why the plain call is chosen; None where it is not known to be.

        Args:
            method: The method that chooses.
        """
        found = PLAIN_CALLS.get((self._call, repr(method)))
        if found is None:
            return None
        reason, left, most = found
        PLAIN_CALLS[self._call, repr(method)] = reason, left - 1, most
        return reason if left > 0 else None

    def keep_plain(self, method: object, reason: str) -> None:
        """Keeps that the plain call was chosen, for the next calls of this process."""
        _, _, before = PLAIN_CALLS.pop((self._call, repr(method)), ("", 0, FEWEST // 2))
        PARALLEL_CALLS.pop((self._call, repr(method)), None)
        count = min(2 * before, MOST_CALLS)
        _put(PLAIN_CALLS, (self._call, repr(method)), (reason, count, count))

    def keep_parallel(self, method: object) -> None:
        """A parallel call came to its end: the next one is made so, too, and one that does not pay is tried again soon."""
        PLAIN_CALLS.pop((self._call, repr(method)), None)
        _put(PARALLEL_CALLS, (self._call, repr(method)), None)

    def parallel(self, method: object) -> bool:
        """Whether a parallel call was made last."""
        return (self._call, repr(method)) in PARALLEL_CALLS

    def credit(self, method: object, rows: float) -> float:
        """The rows that a call may take to be measured: its own share, and those of calls before it that took none."""
        return CREDITS.pop((self._call, repr(method)), 0.0) + rows

    def keep_credit(self, method: object, rows: float) -> None:
        """Keeps the rows that a call did not take."""
        _put(CREDITS, (self._call, repr(method)), rows)

    def curve(self) -> tuple[LatencyCurve | None, list[str]]:
        """The stored curve, else what this call measured, and a sentence where one was left out."""
        curve, notes = read_curve(Store("curve"), self.key, self._facts)
        return self._measured if curve is None else curve, notes

    def keep_curve(self, curve: LatencyCurve) -> None:
        """Stores a curve."""
        Store("curve").write(self.key, self._facts, curve.to_json())

    def keep_measured(self, curve: LatencyCurve) -> LatencyCurve:
        """Stores a curve of single calls together with those before, of each number of rows the least seconds; returns it. A
        curve of many calls is left as it is, and returned."""
        known, _ = self.curve()
        if known is not None and known.spread is not None:
            return known
        before = {} if known is None else known.points
        points = {rows: min(seconds, before.get(rows, seconds)) for rows, seconds in curve.points.items()}
        self._measured = LatencyCurve({**before, **points})
        self.keep_curve(self._measured)
        return self._measured

    def __call__(self, table: Table) -> Known:
        """What is known of the call on its chain."""
        curve, notes = self.curve()
        self._found = Known(curve, Traces(digest(self.key, table_key(table), "loop"), self._device), notes=notes)
        return self._found

    def keep(self, solver: LoopSolver) -> None:
        """Keeps what a run took: points of the curve where none is known, else a trace."""
        known, method = self._found, solver.fitted
        if known is None or solver.interrupted or len(solver.times) < 2:
            return
        if known.curve is None or known.curve.spread is None:
            if (curve := curve_of_passes(solver.times)) is not None:
                self.keep_measured(curve)
            if known.curve is None:
                return
        label = repr(solver.chosen)
        assert isinstance(known.traces, Traces)
        if isinstance(method, AdaptiveMethod) or len(known.traces.of(label, 1)) >= ENOUGH:
            return
        rows = statistics.mean(rows for rows, _ in solver.times)
        rounds, seconds = len(solver.times), sum(seconds for _, seconds in solver.times) / pace_of(solver.times, known.curve)
        beside = max(seconds - known.curve.within(rows) * rounds, 0.0)
        known.traces.add({label: [Trace(((rows, rounds),), 1, beside)]})


def _put(kept: dict[Any, Any], key: Any, value: Any) -> None:
    """Keeps a value, of MOST at once."""
    kept.pop(key, None)
    while len(kept) >= MOST:
        del kept[next(iter(kept))]
    kept[key] = value


def curve_of_passes(times: Sequence[tuple[int, float]]) -> LatencyCurve | None:
    """The curve of passes, as rows and seconds; None where all had the same number of rows, or none had one."""
    seconds: dict[int, list[float]] = {}
    for rows, taken in times[1:]:  # the first sets things up
        seconds.setdefault(rows, []).append(taken)
    points = {rows: statistics.median_low(of) for rows, of in seconds.items() if taken_twice(of)}
    return LatencyCurve(points) if len(points) > 1 and min(points) == 1 and min(points.values()) > 0 else None


def pace_of(times: Sequence[tuple[int, float]], curve: LatencyCurve) -> float:
    """How many times as long as on a curve passes of one row took, 1 at least: the machine may have been busy. It is by the
    fastest of those after the first pass, which sets things up."""
    single = [seconds for rows, seconds in times[1:] if rows == 1]
    return max(1.0, min(single) / curve(1)) if single else 1.0


def taken_twice(seconds: Sequence[float]) -> bool:
    """Whether there are enough passes of a width: one alone may be slow by chance."""
    return len(seconds) > 1

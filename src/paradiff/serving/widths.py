# SPDX-License-Identifier: Apache-2.0
"""How many rows a request has in a round: by the load, and by what rounds of so many rows take.

Let t(R) be the seconds of a network call of R rows, A the requests at once, N the steps of a chain, and R(W) the rounds that a
request takes with a window of W. Where all requests have the same window, one of them takes

    R(W) (t(A r) + A h),      r = E(W) / R(W),      R(1) = N,                                                      (1)

with E(W) its evaluations, and h the seconds that a solver takes in a round beside the network; single steps take none. The
window is the one that makes (1) the least: it makes the latency least, and the throughput, A requests in that time, greatest. A
call that takes no longer on more rows favours wide windows; once A rows fill the device t is in proportion to them, and W = 1.

R and E are the library's (planning/library.py), scaled by what the model's own rounds show: nodes passed, over the rounds that
they took. h is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable
from dataclasses import dataclass

from paradiff.chain.table import Table
from paradiff.errors import require_between, require_real
from paradiff.planning import library
from paradiff.planning.candidates import FAMILIES, WINDOWS
from paradiff.planning.latency import LatencyCurve
from paradiff.serving.request import AUTO, SampleRequest
from paradiff.serving.state import RequestState
from paradiff.serving.stepwise import WALKED

MANY = 1024
"""Kinds of requests whose figures are kept."""

STANDS = 512
"""How often a decision is asked for before it is made anew, by the figures that came meanwhile."""


@dataclass(frozen=True, kw_only=True)
class WidthControl:
    """The tuned numbers of the choice.

    Attributes:
        worth: Share of the seconds with the present window that another one has to stay below, 0 to 1: a window that is changed
            loses the pairs of earlier sweeps.
        beside: Seconds that a solver takes in a round beside the network, before any was measured.
        forgetting: Share of the measured seconds that the next measurement leaves, 0 to 1.
        weight: Runs of the chain that the library's figures count for beside the model's own rounds.
    """

    worth: float = 0.9
    beside: float = 1.5e-3
    forgetting: float = 0.9
    weight: float = 0.5

    def __post_init__(self) -> None:
        require_between("the worth of another window", self.worth, 0, 1)
        require_real("the seconds beside the network", self.beside)
        require_between("the share that is kept of measured seconds", self.forgetting, 0, 1)
        require_real("the weight of the library's figures", self.weight)


class Widths:
    """Chooses windows.

    Args:
        curve: t.
        control: The tuned numbers.

    Attributes:
        curve: As given.
        beside: h, in seconds.
    """

    def __init__(self, curve: LatencyCurve, control: WidthControl | None = None) -> None:
        self.curve, self._control = curve, WidthControl() if control is None else control
        self.beside = self._control.beside
        self._costs: dict[Hashable, dict[int, tuple[float, float]]] = {}
        self._seen: dict[Hashable, tuple[float, float]] = {}  # nodes passed, and rounds that they took, by family and window
        self._decided: dict[Hashable, int] = {}  # what `rows` said since figures were taken last
        self._families: dict[Hashable, str] = {}
        self._asked = 0

    def family(self, request: SampleRequest, table: Table, load: int) -> str:
        """The method that a request is begun with: its own, or for `auto` the one that takes the least by (1).

        Args:
            request: The request.
            table: Its chain.
            load: Requests at once, A.
        """
        if request.method != AUTO:
            return request.method
        key = table.name, table.steps, table.stochastic, request.allowed, request.window, load
        if key not in self._families:
            if len(self._families) > MANY:
                self._families.clear()
            found = {name: self._best(name, table, request, load, request.window)[1] for name in (WALKED, "collocation")}
            self._families[key] = min(found, key=lambda name: found[name])
        return self._families[key]

    def rows(self, state: RequestState, load: int) -> int:
        """The rows of a request's next rounds.

        Args:
            state: The request.
            load: Requests at once, A.
        """
        if state.most == 1:
            return 1
        key = state.kind, state.rows, load
        self._asked += 1
        if self._asked % STANDS == 0:
            self._decided.clear()
        if key not in self._decided:
            self._decided[key] = self._rows(state, load)
        return self._decided[key]

    def _rows(self, state: RequestState, load: int) -> int:
        table, request = state.chain.table, state.request
        width, seconds = self._best(state.family, table, request, load, state.most)
        present = self._seconds(state.family, table, request, load, state.rows)
        if width != state.rows and present is not None and seconds > self._control.worth * present:
            return state.rows
        return width

    def foretold(self, state: RequestState, load: int) -> float:
        """The seconds that a request of its kind takes by (1)."""
        return self._best(state.family, state.chain.table, state.request, load, state.most)[1]

    def saw(self, state: RequestState, width: int, passed: int) -> None:
        """Takes what a sweep of a window made final."""
        key = state.chain.table.name, state.family, width
        nodes, rounds = self._seen.get(key, (0.0, 0.0))
        self._seen[key] = nodes + passed, rounds + 1

    def took(self, seconds: float, solvers: int) -> None:
        """Takes the seconds that solvers took in a round beside the network."""
        if solvers:
            share = self._control.forgetting
            self.beside = share * self.beside + (1 - share) * seconds / solvers

    def _best(self, family: str, table: Table, request: SampleRequest, load: int, most: int | None) -> tuple[int, float]:
        """The window that makes (1) the least, and its seconds; 1 where a method's rows are its own."""
        found = [(self._plain(table, load), 1)]
        for width in self._costs_of(family, table, request.allowed):
            if most is None or width <= most:
                seconds = self._seconds(family, table, request, load, width)
                assert seconds is not None
                found.append((seconds, width))
        seconds, width = min(found)
        return width, seconds

    def _plain(self, table: Table, load: int) -> float:
        return table.steps * self._call(load)

    def _call(self, rows: float) -> float:
        """t; beyond the rows that were measured in proportion to them: a device that has more to give shows it in them."""
        widest = max(self.curve.points)
        return self.curve.within(rows) if rows <= widest else self.curve.within(widest) * rows / widest

    def _seconds(self, family: str, table: Table, request: SampleRequest, load: int, width: int) -> float | None:
        """(1); None of a window of which nothing is known."""
        costs = self._costs_of(family, table, request.allowed)
        if width == 1 and family != "collocation":
            return self._plain(table, load)
        if width not in costs:
            return None
        rounds, evaluations = costs[width]
        nodes, seen = self._seen.get((table.name, family, width), (0.0, 0.0))
        weight = self._control.weight
        factor = (weight + seen / rounds) / (weight + nodes / table.steps) if seen else 1.0
        rows = max(1.0, evaluations / rounds)
        return min(rounds * factor, table.steps) * (self._call(load * rows) + load * self.beside)

    def _costs_of(self, family: str, table: Table, tolerance: float) -> dict[int, tuple[float, float]]:
        """Rounds and evaluations by window, of those whose figures are known."""
        key = family, table.name, table.steps, table.stochastic, tolerance
        if key not in self._costs:
            if len(self._costs) > MANY:
                self._costs.clear()
            self._costs[key] = self._known(family, table, tolerance)
        return self._costs[key]

    def _known(self, family: str, table: Table, tolerance: float) -> dict[int, tuple[float, float]]:
        found: dict[int, tuple[float, float]] = {}
        for width in [w for w in WINDOWS if w < table.steps]:
            cost = library.known(table, family if family in FAMILIES else WALKED, width, tolerance)
            if cost is not None:
                rounds = statistics.median(trace.rounds for trace in cost.traces)
                found[width] = rounds, statistics.median(trace.rows for trace in cost.traces)
        if not found and family != "collocation":  # no chain of the kind was measured: windows of half a rate
            found = {w: (table.steps / w**0.5, table.steps * w**0.5) for w in WINDOWS if w < table.steps}
        return found

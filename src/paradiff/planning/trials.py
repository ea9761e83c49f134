# SPDX-License-Identifier: Apache-2.0
"""Which pilots are made for a plan, and what they say of the choices that were not tried.

Pilots are made of the choice that looks fastest, until that was tried; of one in any case, so that what is said of a model was
seen on it. One that takes longer than the plain chain is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from paradiff.chain.table import Table
from paradiff.methods.presets import sequential
from paradiff.planning import library
from paradiff.planning.candidates import FAMILIES, windows_of
from paradiff.planning.choice import Choice, choices, fits
from paradiff.planning.cost import Devices, Trace
from paradiff.planning.latency import LatencyCurve
from paradiff.planning.picking import Known, pick
from paradiff.planning.plan import PAYS, Answer, Plan
from paradiff.planning.wish import Wish

TRIED = 4
"""Most choices that pilots are made of."""

APART = 1.5
"""How far the slowest pilot of a choice may be from its fastest, as a factor, before further ones are made."""

MOST_PILOTS = 5
"""Most pilots of a choice."""

ASKED = {"evaluations": "the fewest evaluations", "memory": "the fewest states", "anytime": "previews from the first round on"}
"""The objectives in words."""

FIRST = 8
"""The window of a first pilot of methods of which the library knows nothing."""


class Pilot(Protocol):
    """Makes a pilot of a choice."""

    def __call__(self, one: Choice, number: int, plain: float, /) -> Trace | None:
        """Its trace, cut where it takes much longer than the plain chain; None where it did not run in parallel.

        Args:
            one: The choice.
            number: Which pilot of it, from 0.
            plain: Seconds that the plain chain takes.
        """
        ...


class Trials:
    """The pilots of one plan.

    Args:
        table: The chain.
        samples: Samples that are solved together.
        tolerance: The tolerance of the methods.
        curve: The latency curve.
        devices: Devices that share a round's rows.
        most: Most rows of a sample in a round; None for no bound.
        stored: Traces of earlier runs by a method's label.

    Attributes:
        made: Traces of the pilots by a method's label.
        tried: What was tried, in words.
        beside: Seconds of the call outside of its loop, which are in every trace, and are taken out of each.
    """

    def __init__(
        self,
        table: Table,
        samples: int,
        tolerance: float,
        curve: LatencyCurve,
        devices: Devices,
        most: int | None,
        stored: Mapping[str, list[Trace]],
    ) -> None:
        self._table, self._samples, self._tolerance, self._most = table, samples, tolerance, most
        self._curve, self._devices, self._stored = curve, devices, stored
        self._given_up: set[str] = set()
        self.made: dict[str, list[Trace]] = {}
        self.tried: list[str] = []
        self.beside = 0.0

    def known(self, label: str, samples: int) -> list[Trace]:
        """Traces of a method: of runs of so many samples where there are any."""
        found = [*self._stored.get(label, []), *self.made.get(label, [])]
        same = [trace for trace in found if trace.samples == samples]
        found = same or [trace.of(samples) for trace in found]
        return [Trace(t.runs, t.samples, max(t.beside - self.beside, 0.0)) for t in found]

    def choices(self) -> list[Choice]:
        """The choices by what is known, fastest first; without those whose pilots were given up."""
        found = choices(
            self._table,
            self._samples,
            self._tolerance,
            self._curve,
            known=self.known,
            devices=self._devices,
            most=self._most,
        )
        return [one for one in found if one.label not in self._given_up]

    def of(self, label: str, samples: int) -> list[Trace]:
        """As `known`."""
        return self.known(label, samples)

    def _answer(self, wish: Wish) -> Answer | None:
        """What is chosen where something else than the least seconds is asked for."""
        if wish.deadline is None and wish.objective in (None, "latency"):
            return None
        asked = f"a deadline of {wish.deadline:g} s" if wish.deadline is not None else ASKED[str(wish.objective)]
        found = pick(wish, Known(self._curve, self), self._table, self._samples)
        return Answer(asked, found.method, found.call, found.why)

    def plan(self, notes: Sequence[str], wish: Wish, *, simulated: bool) -> Plan:
        """The plan by what is known.

        Args:
            notes: What was measured, and what was left out.
            wish: What is asked for.
            simulated: Whether the curve is one that was given.
        """
        found = self.choices()
        other = library.beyond(self._table, self._tolerance)
        foreseen = any(one.cost.source == "library" and not one.sequential for one in found)
        return Plan(
            chain=self._table.name,
            steps=self._table.steps,
            samples=self._samples,
            stochastic=self._table.stochastic,
            tolerance=self._tolerance,
            curve=self._curve,
            choices=found,
            alternative=library.alternative(self._table),
            devices=self._devices,
            simulated=simulated or self._devices.count > 1,
            beside=self.beside,
            notes=[*notes, *([other] if foreseen and other is not None else [])],
            answer=self._answer(wish),
        )

    def make(self, pilots: int, plain: Callable[[], Trace], pilot: Pilot, *, outside: bool = False) -> None:
        """Makes pilots until the choice that looks fastest was tried.

        Args:
            pilots: Runs of each choice.
            plain: Walks the plain chain, or a part of it.
            pilot: Makes a pilot.
            outside: Whether the plain chain's time beside the network is mostly outside of the loop, as in a pipeline's call.
        """
        label = repr(sequential())
        if not self.known(label, self._samples):
            self.made[label] = [plain()]
        if outside:
            self.beside = min(trace.beside for trace in [*self._stored.get(label, []), *self.made.get(label, [])])
        begun = sum(one.cost.source == "trace" and not one.sequential for one in self.choices())
        for _ in range(max(0, TRIED - begun)):
            one = self._next()
            if one is None:
                return
            self.tried.append(one.label)
            self._try(one, pilots, pilot)

    def _next(self) -> Choice | None:
        """The choice that looks fastest, if it was not tried; None where it was, or where no other than one tried could pay."""
        found = self.choices()
        bound = min(one.seconds for one in found if one.cost.source == "trace")
        none_tried = all(one.sequential for one in found if one.cost.source == "trace")
        for one in found:
            if one.cost.source == "library" and not one.sequential and (none_tried or one.fastest * PAYS < bound):
                return one
        if any(one.cost.source == "library" and not one.sequential for one in found):
            return None
        begun = {one.family for one in found} | {label.split(",")[0] for label in self.tried}
        for family, build in FAMILIES.items():  # the library knows of no such chain: each method in turn
            windows = windows_of(self._table.steps, self._most)
            window = FIRST if FIRST in windows else windows[-1]
            method = build(window, self._tolerance)
            if family not in begun and fits(method, self._table):
                plain = next(one for one in found if one.sequential)
                return Choice(family, window, method, plain.cost, plain.seconds, plain.seconds, plain.seconds)
        return None

    def _try(self, one: Choice, pilots: int, pilot: Pilot) -> None:
        """Makes the pilots of one choice: of several, further ones while they lie far apart and take less than the plain chain
        together, since samples of long stochastic chains differ."""
        plain = next(other for other in self.choices() if other.sequential).seconds
        found: list[float] = []
        for number in range(max(pilots, MOST_PILOTS if pilots > 1 else 1)):
            if number >= pilots and (max(found) <= APART * min(found) or sum(found) + max(found) > plain):
                return
            trace = pilot(one, number, plain)
            if trace is None:
                self._given_up.add(one.label)
                return
            found.append(trace.seconds(self._curve, self._devices))
            self.made.setdefault(repr(one.method), []).append(trace)

# SPDX-License-Identifier: Apache-2.0
"""A plan: which way of walking a chain is fastest on this machine, what it gains, and what else there is."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paradiff.lazy import naming_the_extra
from paradiff.planning.choice import Choice
from paradiff.planning.cost import ONE, Devices
from paradiff.planning.latency import LatencyCurve
from paradiff.planning.library import Alternative
from paradiff.solver.protocol import Method
from paradiff.whole_file import write_whole

PAYS = 1.05
"""The least predicted gain at which the plan leaves the sequential chain."""

ELSEWHERE = (
    "where another sample would do: a distilled model takes 1 to 8 steps, and a cache of features skips parts of the network "
    "at most steps. torch.compile, and several devices for one call, leave the sample as it is and go together with all of this"
)


@dataclass(frozen=True)
class Answer:
    """What a plan advises where something else than the least seconds was asked for.

    Attributes:
        asked: What was, in words.
        method: The method.
        call: The call by which it is asked for by name.
        why: Why.
    """

    asked: str
    method: Method
    call: str
    why: str

    def __str__(self) -> str:
        return f"for {self.asked}: {self.call}, {self.why}"


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What `paradiff.plan` found. Plans are compared by identity.

    Attributes:
        chain: The chain's name.
        steps: Its steps.
        samples: Samples that are solved together.
        stochastic: Whether the chain adds noise.
        tolerance: The tolerance of the methods.
        curve: Seconds of a network call by its rows.
        choices: All ways of which anything is known, the sequential chain among them, fastest first.
        alternative: A shorter sequential chain of another solver; None where none is known.
        devices: The devices that share a round's rows, simulated where they are several.
        simulated: Whether the seconds are of a curve that was given, or of devices that are not here.
        beside: Seconds of the call outside of the loop, the same in every choice.
        notes: Sentences: what was measured, and what was left out.
        answer: What is advised for an objective or a deadline; None where the least seconds were asked for.
    """

    chain: str
    steps: int
    samples: int
    stochastic: bool
    tolerance: float
    curve: LatencyCurve
    choices: Sequence[Choice]
    alternative: Alternative | None = None
    devices: Devices = ONE
    simulated: bool = False
    beside: float = 0.0
    notes: Sequence[str] = field(default=())
    answer: Answer | None = None

    @property
    def sequential(self) -> Choice:
        """The plain chain."""
        return next(one for one in self.choices if one.sequential)

    @property
    def parallel(self) -> Choice | None:
        """The fastest choice that is not the plain chain; None where nothing is known of any."""
        return next((one for one in self.choices if not one.sequential), None)

    @property
    def best(self) -> Choice:
        """The fastest choice; the plain chain where that gains less than 5 %."""
        found = self.parallel
        return found if found is not None and self.gain_of(found) >= PAYS else self.sequential

    @property
    def method(self) -> Method:
        """What the plan advises: the method of the answer, where something else was asked for; else of the best choice."""
        return self.best.method if self.answer is None else self.answer.method

    @property
    def call(self) -> str:
        """The call by which that is asked for by name."""
        return self.best.call if self.answer is None else self.answer.call

    @property
    def gain(self) -> float:
        """How many times as fast as the plain chain the best choice is, predicted, whole clock."""
        return self.gain_of(self.best)

    @property
    def pays(self) -> bool:
        """Whether the best choice is a parallel one."""
        return not self.best.sequential

    def gain_of(self, one: Choice) -> float:
        """How many times as fast as the plain chain a choice is."""
        return (self.sequential.seconds + self.beside) / (one.seconds + self.beside)

    def spread_of(self, one: Choice) -> tuple[float, float]:
        """The least and the largest gain of a choice over all that is known of it."""
        plain = self.sequential.seconds + self.beside
        return plain / (one.slowest + self.beside), plain / (one.fastest + self.beside)

    def why(self) -> str:
        """The decision in words, with its break-even."""
        found = self.parallel
        if found is None:
            return "sequential is what is left: nothing is known of other methods on chains like this one; a pilot run tells"
        width = max(1, round(found.cost.rows / found.cost.rounds / self.samples))
        price = self.curve.within(width * self.samples) / self.curve.within(self.samples)
        call = f"a call on {width} {'row' if width == 1 else 'rows'}" + (
            f" a sample ({self.samples} samples)" if self.samples > 1 else ""
        )
        costs = f"{call} costs {price:.1f} single calls"
        low, high = self.spread_of(found)
        if self.pays:
            return (
                f"{costs}; {self.steps} steps in {found.cost.rounds:.0f} rounds: {self.gain:.1f} times faster ({low:.1f} to "
                f"{high:.1f}), with {found.label}"
            )
        even = self.steps / max(found.cost.rounds, 1.0)
        return (
            f"sequential is faster here: {costs}, and the best parallel choice, {found.label}, takes "
            f"{found.cost.rounds:.0f} rounds for {self.steps} steps: {self.gain_of(found):.2f} times as fast ({low:.2f} to "
            f"{high:.2f}); it would pay where such a call costs less than {even:.1f} single ones"
        )

    def sequential_alternative(self) -> str:
        """The best sequential alternative in words."""
        if self.stochastic:
            return (
                "sequential alternative: none with this sample, which depends on every step's noise; a deterministic solver of "
                "high order (dpmpp_2m, unipc) of 15 to 30 steps draws another sample of the same model"
            )
        found = self.alternative
        if found is None:
            return "sequential alternative: a solver of high order with fewer steps; none was measured on chains like this one"
        steps = f"{found.fewest}" if found.fewest == found.most else f"{found.fewest} to {found.most}"
        if found.most > 0.9 * self.steps:
            return (
                f"sequential alternative: none that is surely shorter: on the library's models {found.solver} takes {steps} "
                f"steps to be as near to the exact solution as {self.steps} of these"
            )
        gain = self.steps / found.most
        return (
            f"sequential alternative: {found.solver} of {steps} steps is as near to the exact solution on the library's "
            f"models: {gain:.1f} times fewer calls than {self.steps} steps; it ends at another sample, about as far from this "
            "one as this one is from the exact solution"
        )

    def __str__(self) -> str:
        kind = "stochastic" if self.stochastic else "deterministic"
        samples = f"{self.samples} sample{'s' * (self.samples > 1)}"
        answer = [] if self.answer is None else [str(self.answer)]
        lines = [f"{self.chain}, {self.steps} steps, {kind}, {samples}, tolerance {self.tolerance:g}", *answer, self.why(), ""]
        head = ("", "seconds", "gain", "from", "to", "rounds", "rows", "known from")
        cells = [head, *(self._cells(one) for one in self._shown())]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            padded = [
                c.ljust(w) if k in (0, len(head) - 1) else c.rjust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True))
            ]
            lines.append("  ".join(padded).rstrip())
        lines += ["", self.sequential_alternative(), ELSEWHERE]
        if self.simulated:
            what = (
                "the curve that was given" if self.devices.count == 1 else f"{self.devices.count} devices that share each round"
            )
            lines.append(f"simulated: the seconds are of {what}, and no such run was made")
        most = self.curve.most
        if most is not None:
            why = "" if self.curve.failed is None else f": the model failed on more ({self.curve.failed})"
            lines.append(f"a call has at most {most} rows{why}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _shown(self) -> list[Choice]:
        """The best window of each family, and the sequential chain."""
        found: dict[str, Choice] = {}
        for one in self.choices:
            found.setdefault(one.family, one)
        return [*found.values()]

    def _cells(self, one: Choice) -> tuple[str, ...]:
        low, high = self.spread_of(one)
        return (
            one.label,
            f"{one.seconds + self.beside:.3g}",
            f"{self.gain_of(one):.2f}x",
            f"{low:.2f}x",
            f"{high:.2f}x",
            f"{one.cost.rounds:.0f}",
            f"{one.cost.rows:.0f}",
            one.cost.about() if not one.sequential or one.cost.source != "library" else "the latency curve",
        )

    def __repr__(self) -> str:
        return f"Plan({self.steps} steps: {self.best.label}, {self.gain:.2f}x; print it for the reasons)"

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "chain": self.chain,
            "steps": self.steps,
            "samples": self.samples,
            "stochastic": self.stochastic,
            "tolerance": self.tolerance,
            "curve": self.curve.to_json(),
            "devices": self.devices.count,
            "simulated": self.simulated,
            "beside": self.beside,
            "best": self.best.label,
            "why": self.why(),
            "answer": None if self.answer is None else {**vars(self.answer), "method": repr(self.answer.method)},
            "alternative": self.sequential_alternative(),
            "notes": list(self.notes),
            "choices": [
                {
                    "family": one.family,
                    "window": one.window,
                    "method": repr(one.method),
                    "seconds": one.seconds,
                    "gain": self.gain_of(one),
                    "gain_spread": list(self.spread_of(one)),
                    "rounds": one.cost.rounds,
                    "rows": one.cost.rows,
                    "source": one.cost.source,
                }
                for one in self.choices
            ],
        }

    def save(self, path: str | Path) -> None:
        """Writes `to_json` into a file, whole or not at all.

        Raises:
            ValueError: If it cannot be written.
        """
        write_whole(Path(path), f"{json.dumps(self.to_json(), indent=1)}\n".encode())

    def plot(self, path: str | Path) -> None:
        """Draws seconds against the window, a line for each method, into a PNG file, whole or not at all.

        Raises:
            MissingPackage: If matplotlib is not installed.
            ValueError: If it cannot be written.
        """
        with naming_the_extra("Plan.plot"):
            from paradiff.planning.plan_plot import draw
        points: dict[str, list[tuple[int, float, float, float]]] = {}
        for one in self.choices:
            if not one.sequential:
                window = self.steps if one.window is None else one.window
                add = self.beside
                points.setdefault(one.family, []).append((window, one.seconds + add, one.fastest + add, one.slowest + add))
        picture = io.BytesIO()
        draw(
            f"{self.chain}, {self.steps} steps, {self.samples} sample{'s' * (self.samples > 1)}",
            {family: sorted(of) for family, of in points.items()},
            self.sequential.seconds + self.beside,
        ).savefig(picture, dpi=150, format="png")
        write_whole(Path(path), picture.getvalue())

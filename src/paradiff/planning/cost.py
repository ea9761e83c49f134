# SPDX-License-Identifier: Apache-2.0
"""What a sample costs by a method: the rows of its rounds, as a run of it took them, and the seconds that follow from a latency
curve.

A run is kept as a `Trace`: the rows of its rounds, one number and a count for equal ones in turn, and the seconds that passed
beside the network. Its seconds on a curve t are the sum of t over its rounds, with that time beside the network added.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from paradiff.errors import number_of, require_real, require_whole, shown
from paradiff.planning.latency import LatencyCurve

Source = Literal["trace", "library"]

SAID: dict[Source, str] = {
    "trace": "runs of this model",
    "library": "the library's models, like chains",
}


@dataclass(frozen=True)
class Devices:
    """Devices that share the rows of each round, as they are simulated.

    Attributes:
        count: How many.
        latency: Seconds of a round's exchange, whatever its size.
        seconds_a_row: Further seconds for each row that is sent.
    """

    count: int = 1
    latency: float = 5e-5
    seconds_a_row: float = 0.0

    def __post_init__(self) -> None:
        require_whole("devices", self.count, 1)
        require_real("the latency of an exchange", self.latency)
        require_real("the seconds of a row's exchange", self.seconds_a_row)

    def seconds(self, curve: LatencyCurve, rows: float) -> float:
        """Seconds of a round: the largest share of its rows, and the exchange."""
        if self.count == 1:
            return curve.within(rows)
        share = max(rows / self.count, min(rows, 1.0)) if rows % 1 else -(-rows // self.count)
        return curve.within(share) + (self.latency + self.seconds_a_row * rows if rows > 1 else 0.0)


ONE = Devices()


@dataclass(frozen=True)
class Trace:
    """What one run took.

    Attributes:
        runs: Rows of a round, and how many rounds in turn had so many.
        samples: Samples that were solved together.
        beside: Seconds of the run beside the network's calls.
        factor: How many times as long as that a run takes on this model and machine, where the trace is of another.
    """

    runs: tuple[tuple[float, int], ...]
    samples: int
    beside: float
    factor: float = 1.0

    @classmethod
    def of_widths(cls, widths: Sequence[int], samples: int, beside: float) -> Trace:
        """The trace of rounds of so many rows each."""
        return cls(tuple((rows, len([*of])) for rows, of in itertools.groupby(widths)), samples, max(beside, 0.0))

    @property
    def rounds(self) -> int:
        """Rounds."""
        return sum(count for _, count in self.runs)

    @property
    def rows(self) -> float:
        """Rows of all rounds."""
        return sum(rows * count for rows, count in self.runs)

    def seconds(self, curve: LatencyCurve, devices: Devices = ONE) -> float:
        """Seconds on a curve."""
        return self.factor * (self.beside + sum(devices.seconds(curve, rows) * count for rows, count in self.runs))

    def of(self, samples: int) -> Trace:
        """As it would be for another number of samples, whose rounds run side by side."""
        if samples == self.samples:
            return self
        factor = samples / self.samples
        runs = tuple((rows * factor, count) for rows, count in self.runs)
        return dataclasses.replace(self, runs=runs, samples=samples, beside=self.beside * max(1.0, factor))

    def to_json(self) -> dict[str, Any]:
        """The trace as JSON has it."""
        return {"runs": [list(run) for run in self.runs], "samples": self.samples, "beside": float(f"{self.beside:.4g}")}

    @classmethod
    def of_json(cls, content: Any) -> Trace:
        """The trace of `to_json`.

        Raises:
            ValueError: If the content is none.
        """
        try:
            runs = tuple((float(rows), int(count)) for rows, count in content["runs"])
            found = cls(runs, int(content["samples"]), float(content["beside"]))
        except (TypeError, KeyError, ValueError, OverflowError) as error:
            raise ValueError(f"the trace is {shown(content)}; give what Trace.to_json returns") from error
        numbers = [found.beside, *(number_of(rows) for rows, _ in runs)]
        if (
            not runs
            or not all(0 <= n < float("inf") for n in numbers)
            or min(count for _, count in runs) < 1
            or found.samples < 1
        ):
            raise ValueError(f"the trace is {shown(content)}; its numbers are out of their range")
        return found


@dataclass(frozen=True)
class Cost:
    """What a sample, or a batch, costs by a method.

    Attributes:
        traces: What is known, one entry a run.
        source: Where they come from.
    """

    traces: Sequence[Trace]
    source: Source

    @property
    def rounds(self) -> float:
        """Mean rounds."""
        return statistics.mean(trace.rounds for trace in self.traces)

    @property
    def rows(self) -> float:
        """Mean rows."""
        return statistics.mean(trace.rows for trace in self.traces)

    def seconds(self, curve: LatencyCurve, devices: Devices = ONE) -> list[float]:
        """Seconds of each run on a curve, rising."""
        return sorted(trace.seconds(curve, devices) for trace in self.traces)

    def about(self) -> str:
        """Where it comes from, in words."""
        return SAID[self.source]


def costs_of_json(content: Mapping[str, Any]) -> dict[str, list[Trace]]:
    """Traces by a method's label.

    Raises:
        ValueError: If the content holds none.
    """
    if not all(isinstance(of, list) for of in content.values()):
        raise ValueError(f"the traces are {shown(content)}; give lists of traces by a method's label")
    return {label: [Trace.of_json(one) for one in of] for label, of in content.items()}

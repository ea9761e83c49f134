# SPDX-License-Identifier: Apache-2.0
"""Methods side by side on a user's own model: what each costs, and how far its samples are from the sequential ones."""

from __future__ import annotations

import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paradiff.errors import require_real, shown
from paradiff.lazy import naming_the_extra
from paradiff.planning.effectivity import Effectivity, index_of
from paradiff.planning.latency import LatencyCurve
from paradiff.solver.solution import ROUNDING
from paradiff.whole_file import write_whole

EQUAL = 4e-3
"""Root mean square error below which a sample counts as the sequential one: half a grey level of data in -1 ... 1."""


@dataclass(frozen=True)
class SampleCost:
    """One sample of one method.

    Attributes:
        rounds: Rounds in which the sample took part.
        evaluations: Its rows.
        error: Root mean square difference to the sequential sample, in units of `Comparison.unit`.
        estimated_error: The method's own estimate of it; infinite for a sequential chain of another table, which has none.
        widths: Rows of each of the network's calls.
        seconds: The whole clock of its run, noise and bookkeeping included; of a run of several samples its share.
    """

    rounds: int
    evaluations: int
    error: float
    estimated_error: float
    widths: Sequence[int] = field(repr=False)
    seconds: float

    @property
    def held(self) -> bool:
        """Whether the error is at most the estimate."""
        return self.error <= max(self.estimated_error, ROUNDING)

    @property
    def effectivity(self) -> float:
        """The estimate over the error (the effectivity index of error control), each at least the rounding of float32."""
        return index_of(self.estimated_error, self.error)


@dataclass(frozen=True)
class Compared:
    """A method's row.

    Attributes:
        label: Its name in the table.
        method: The method as the call that makes it; of a rival the table.
        samples: One entry a sample.
        status: How the run ended, of several the one of least trust.
        rival: Whether it is a sequential chain of another table.
    """

    label: str
    method: str
    samples: Sequence[SampleCost]
    status: str
    rival: bool = False

    @property
    def rounds(self) -> float:
        """Mean rounds of a sample."""
        return statistics.mean(s.rounds for s in self.samples)

    @property
    def rounds_max(self) -> int:
        """Most rounds of a sample."""
        return max(s.rounds for s in self.samples)

    @property
    def evaluations(self) -> float:
        """Mean evaluations of a sample."""
        return statistics.mean(s.evaluations for s in self.samples)

    @property
    def error_max(self) -> float:
        """The worst sample's error."""
        return max(s.error for s in self.samples)

    @property
    def error_median(self) -> float:
        """The median sample's error."""
        return statistics.median(s.error for s in self.samples)

    @property
    def seconds(self) -> float:
        """Mean seconds of a sample."""
        return statistics.mean(s.seconds for s in self.samples)

    @property
    def held(self) -> float | None:
        """The share of samples whose error is at most the estimate; None for a rival."""
        return None if self.rival else statistics.mean(s.held for s in self.samples)

    @property
    def effectivity(self) -> Effectivity | None:
        """The samples' estimates over their errors; None for a rival."""
        return None if self.rival else Effectivity.of((s.estimated_error, s.error) for s in self.samples)


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` measured. Comparisons are compared by identity.

    Attributes:
        table: The chain, its name and steps.
        rows: The sequential chain first, then the methods and rivals in the order in which they were given.
        refused: Methods that do not fit the table, by label, with the reason.
        alone: Whether each sample was run by itself, as at batch 1.
        unit: What errors are divided by: the standard deviation of the sequential samples, or 1.
        peak: Range of the data in that unit, for the signal-to-noise ratio in decibels.
        curve: The latency curve of the gains; None for this machine's own clock.
    """

    table: str
    rows: Sequence[Compared]
    refused: Mapping[str, str]
    alone: bool
    unit: float
    peak: float
    curve: LatencyCurve | None = None

    def __getitem__(self, label: str) -> Compared:
        """The row of a label.

        Raises:
            KeyError: If there is none.
        """
        return next((row for row in self.rows if row.label == label), None) or self._missing(label)

    def _missing(self, label: str) -> Compared:
        raise KeyError(f"no row is called {shown(label)}; rows are {', '.join(row.label for row in self.rows)}")

    def gain(self, row: Compared) -> float:
        """How many times faster than the sequential chain, by the curve, or by the clock of the same run."""
        mine, plain = (self._seconds(r) for r in (row, self.rows[0]))
        return plain / mine

    def _seconds(self, row: Compared) -> float:
        if self.curve is None:
            return row.seconds
        runs = row.samples if self.alone else row.samples[:1]
        return sum(self.curve.of_rounds(s.widths) for s in runs)

    @property
    def _clock(self) -> str:
        return "this machine's clock" if self.curve is None else "the latency curve"

    def decibels(self, error: float) -> float:
        """The peak signal-to-noise ratio of an error."""
        return math.inf if error == 0 else 20 * math.log10(self.peak / error)

    def best(self, error: float = EQUAL) -> Compared:
        """The fastest row all of whose samples err by less; the sequential chain if there is no other.

        Args:
            error: The bound, in `unit`s.
        """
        require_real("the error", error, positive=True)
        return max((row for row in self.rows if row.error_max < error), key=self.gain)

    def pareto(self) -> list[Compared]:
        """The rows of which no other is both faster and nearer, fastest first."""
        found: list[Compared] = []
        for row in sorted(self.rows, key=lambda r: (-self.gain(r), r.error_max)):
            if all(row.error_max < other.error_max for other in found):
                found.append(row)
        return found

    def to_json(self) -> dict[str, Any]:
        """All that was measured, as JSON has it."""
        return {
            "table": self.table,
            "alone": self.alone,
            "refused": dict(self.refused),
            "unit": self.unit,
            "peak": self.peak,
            "curve": None if self.curve is None else {str(rows): seconds for rows, seconds in self.curve.points.items()},
            "rows": [
                {
                    "label": row.label,
                    "method": row.method,
                    "rival": row.rival,
                    "status": row.status,
                    "seconds": row.seconds,
                    "gain": self.gain(row),
                    "rounds": row.rounds,
                    "rounds_max": row.rounds_max,
                    "evaluations": row.evaluations,
                    "error_median": row.error_median,
                    "error_max": row.error_max,
                    "decibels": None if row.error_max == 0 else self.decibels(row.error_max),
                    "held": row.held,
                    "effectivity": None if row.effectivity is None else row.effectivity.to_json(),
                    "samples": [
                        {
                            "rounds": s.rounds,
                            "evaluations": s.evaluations,
                            "error": s.error,
                            "estimated_error": s.estimated_error if math.isfinite(s.estimated_error) else None,
                            "seconds": s.seconds,
                            "widths": list(s.widths),
                        }
                        for s in row.samples
                    ],
                }
                for row in self.rows
            ],
        }

    def save(self, path: str | Path) -> None:
        """Writes `to_json` into a file, whole or not at all.

        Raises:
            ValueError: If the file system refuses it.
        """
        write_whole(Path(path), f"{json.dumps(self.to_json(), indent=1)}\n".encode())

    def plot(self, path: str | Path) -> None:
        """Draws errors against rounds, evaluations and gain into a PNG file.

        Raises:
            MissingPackage: If matplotlib is not installed.
            ValueError: If the file system refuses it.
        """
        with naming_the_extra("Comparison.plot"):
            from paradiff.planning.comparison_plot import draw
        figure = draw(
            f"{self.table}: the worst sample's error, in units of {self.unit:.3g}",
            [row.label for row in self.rows],
            [row.error_max for row in self.rows],
            [row.rival for row in self.rows],
            {
                "mean rounds": [row.rounds for row in self.rows],
                "mean evaluations": [row.evaluations for row in self.rows],
                f"times faster than sequential, by {self._clock}": [self.gain(row) for row in self.rows],
            },
        )
        picture = io.BytesIO()
        figure.savefig(picture, dpi=150, format="png")
        write_whole(Path(path), picture.getvalue())

    def __str__(self) -> str:
        head = ("", "rounds", "most", "evaluations", "error, worst", "dB", "held", "estimate/error", "1 to 10", "gain")
        cells = [head, *(self._cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            " ".join(c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in cells
        ]
        lines += [f"{label}: {reason}" for label, reason in self.refused.items()]
        how = "each alone" if self.alone else "in one batch"
        lines.append(f"{self.table}, {len(self.rows[0].samples)} samples, {how}")
        lines[-1] += f"; errors in units of {self.unit:.3g}, gains by {self._clock}"
        return "\n".join(line.rstrip() for line in lines)

    def _cells(self, row: Compared) -> tuple[str, ...]:
        decibels, found = self.decibels(row.error_max), row.effectivity
        return (
            row.label,
            f"{row.rounds:.1f}",
            str(row.rounds_max),
            f"{row.evaluations:.0f}",
            f"{row.error_max:.1e}",
            "-" if math.isinf(decibels) else f"{decibels:.0f}",
            "-" if row.held is None else f"{row.held:.0%}",
            *(("-", "-") if found is None else (f"{found.median:.1f}", f"{found.within:.0%}")),
            f"{self.gain(row):.2f}x",
        )

    def __repr__(self) -> str:
        best = self.best()
        return (
            f"Comparison({len(self.rows)} rows on {self.table}; print it for the table,\n"
            f"           fastest below {EQUAL:g}: {best.label}, {self.gain(best):.3g}x)"
        )

# SPDX-License-Identifier: Apache-2.0
"""The latency curve t(W): the seconds of a network call by its rows."""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.table import Table
from paradiff.errors import is_whole, require_kind, require_real, require_whole, shown
from paradiff.solver.evaluator import Denoiser, Evaluator
from paradiff.solver.protocol import Batch

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of rows at which a curve is measured."""

REPEATS = 9
"""Most timed calls of one number of rows."""


@dataclass(frozen=True, eq=False)
class LatencyCurve:
    """Seconds of a network call by its rows: straight between points, and beyond the last as between the last two.

    With one point the seconds are in proportion to the rows. Curves are compared by identity.

    Args:
        points: Seconds by rows, such as `{1: 1.0, 2: 1.1, 4: 1.44}`; the unit is the caller's where only ratios count.
        spread: The relative spread of the seconds, by rows: the range between quartiles over the median. Empty if the curve
            was not measured.
        most: The most rows of one call, by the evaluator's bound or the device's memory; None if no call was cut.

    Raises:
        ValueError: If there is no point, a number of rows is no whole number of at least 1, or seconds are not positive.
    """

    points: Mapping[int, float]
    spread: Mapping[int, float] | None = None
    most: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.points, Mapping) or not self.points:
            raise ValueError(f"the latency curve is {shown(self.points)}; give seconds by rows, such as {{1: 1.0, 4: 1.44}}")
        for rows, seconds in self.points.items():
            require_whole("a number of rows of the latency curve", rows, 1)
            require_real(f"the latency of {rows} rows", seconds, positive=True)
        object.__setattr__(self, "points", {int(r): float(self.points[r]) for r in sorted(self.points)})

    @classmethod
    def of_text(cls, text: str) -> LatencyCurve:
        """A curve from `ROWS:SECONDS` pairs, such as `1:1,2:1.1,4:1.44`.

        Raises:
            ValueError: If the text is no such list, or names a number of rows twice.
        """
        points: dict[int, float] = {}
        for part in text.split(","):
            rows, colon, seconds = (piece.strip() for piece in part.partition(":"))
            try:
                pair = int(rows), float(seconds)
            except ValueError:
                pair = None
            if not colon or pair is None or pair[0] in points:
                raise ValueError(
                    f"the latency curve is {shown(text)}, of which {shown(part.strip())} is no further pair; give rows and "
                    "seconds, such as 1:1,2:1.1,4:1.44"
                )
            points[pair[0]] = pair[1]
        return cls(points)

    def __call__(self, rows: float) -> float:
        """Seconds of a call; 0 of one without rows."""
        known, seconds = [*self.points], [*self.points.values()]
        if rows <= 0:
            return 0.0
        if len(known) == 1:
            return seconds[0] * rows / known[0]
        k = min(max(bisect.bisect_left(known, rows), 1), len(known) - 1)
        slope = (seconds[k] - seconds[k - 1]) / (known[k] - known[k - 1])
        return max(seconds[k - 1] + slope * (rows - known[k - 1]), min(seconds[0], seconds[0] * rows / known[0]))

    def of_rounds(self, rows: Sequence[int]) -> float:
        """Seconds of rounds of so many rows each."""
        return sum(map(self, rows))

    def __repr__(self) -> str:
        first = next(iter(self.points.values()))
        calls = ", ".join(f"{rows}: {seconds / first:.3g}" for rows, seconds in self.points.items())
        least = next(iter(self.points))
        return f"LatencyCurve({first:.3g} s on {least} {'row' if least == 1 else 'rows'}; in such calls {calls})"


def measure_latency(
    denoiser: Denoiser | Evaluator, table: Table, noise: Noise, *, rows: Sequence[int] = ROWS, seconds: float = 2.0
) -> LatencyCurve:
    """Measures the latency curve of a model on its device: medians of calls that were warmed up.

    Args:
        denoiser: The model, or an evaluator of it.
        table: Its times are those that the calls have.
        noise: The states' shape. With an evaluator whose model has conditioning, the rows take turns in its samples.
        rows: The numbers of rows, in increasing order.
        seconds: How long the measurement takes, about: no further number of rows is begun after it.

    Raises:
        ValueError: If an argument is of another kind, or the model fails on one row.
    """
    require_kind("the table", table, Table)
    require_real("the seconds of the measurement", seconds, positive=True)
    if not rows or not all(is_whole(r) and r >= 1 for r in rows) or list(rows) != sorted(set(rows)):
        raise ValueError(f"rows are {shown(rows)}; give rising whole numbers of at least 1, such as (1, 2, 4, 8)")
    evaluator = denoiser if isinstance(denoiser, Evaluator) else Evaluator(denoiser)
    start = torch.stack([noise.start(k) for k in range(noise.samples)]).to(evaluator.device)
    begin = time.perf_counter()
    points: dict[int, float] = {}
    spread: dict[int, float] = {}
    most = None
    for count in rows:
        if points and time.perf_counter() - begin > seconds:
            break
        found = _timed(evaluator, _batch(table, start, count), seconds / len(rows))
        bound = evaluator.bound.max_rows
        if bound is not None and bound < count:  # the call was cut in parts
            most = bound
            break
        points[count] = statistics.median(found)
        quartiles = statistics.quantiles(found, n=4) if len(found) > 1 else (0.0, 0.0, 0.0)
        spread[count] = (quartiles[2] - quartiles[0]) / points[count]
    return LatencyCurve(points, spread, most)


def _batch(table: Table, start: Tensor, count: int) -> Batch:
    """Rows spread over the chain and the samples."""
    nodes = torch.linspace(0, table.steps - 1, count).long()
    samples = torch.arange(count) % len(start)
    x = start[samples.to(start.device)] * table.start_scale
    scale = table.scale[nodes].to(x).view(-1, *[1] * (x.ndim - 1))
    return Batch(x * scale, table.t[nodes], nodes, samples)


@torch.inference_mode()
def _timed(evaluator: Evaluator, batch: Batch, seconds: float) -> list[float]:
    """The seconds of warm calls, three at least."""
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < 4 or (len(found) < REPEATS + 1 and time.perf_counter() - begin < seconds):
        since = time.perf_counter()
        evaluator.evaluate_again(batch).flatten()[-1:].tolist()
        found.append(time.perf_counter() - since)
    return found[1:]

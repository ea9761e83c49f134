# SPDX-License-Identifier: Apache-2.0
"""The latency curve t(W): the seconds of a network call by its rows."""

from __future__ import annotations

import bisect
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        most: The most rows of one call, by the evaluator's bound, the device's memory, or what the model takes; None if no
            call was cut or failed.
        memory: Bytes that the device held at most during a call, by rows; None where the device does not tell.
        failed: What the model said at the first number of rows above `most`; None if it did not fail.

    Raises:
        ValueError: If there is no point, a number of rows is no whole number of at least 1, or seconds are not positive.
    """

    points: Mapping[int, float]
    spread: Mapping[int, float] | None = None
    most: int | None = None
    memory: Mapping[int, int] | None = None
    failed: str | None = None

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
        if not isinstance(text, str):
            raise ValueError(f"the latency curve is {shown(text)}; give a text of rows and seconds, such as 1:1,2:1.1,4:1.44")
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

    def within(self, rows: float) -> float:
        """As a call, of rounds whose rows are cut into calls of at most `most` rows."""
        if self.most is None or rows <= self.most:
            return self(rows)
        calls = int(rows // self.most)
        return calls * self(self.most) + self(rows - calls * self.most)

    def to_json(self) -> dict[str, Any]:
        """The curve as JSON has it."""

        def by_rows(values: Mapping[int, float] | None) -> dict[str, float] | None:
            return None if values is None else {str(rows): value for rows, value in values.items()}

        return {
            "points": by_rows(self.points),
            "spread": by_rows(self.spread),
            "most": self.most,
            "memory": by_rows(self.memory),
            "failed": self.failed,
        }

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> LatencyCurve:
        """The curve of `to_json`.

        Raises:
            ValueError: If the content is none.
        """
        try:
            points, *others = (
                None if content.get(name) is None else {int(rows): value for rows, value in content[name].items()}
                for name in ("points", "spread", "memory")
            )
        except (AttributeError, TypeError) as error:
            raise ValueError(f"the latency curve is {shown(content)}; give what LatencyCurve.to_json returns") from error
        most, failed = content.get("most"), content.get("failed")
        return cls(points or {}, others[0], most if is_whole(most) else None, others[1], failed)

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
        ValueError: If an argument is of another kind. What the model raises on the fewest rows is passed on; where it fails on
            more, the curve ends there, and says so.
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
    memory: dict[int, int] = {}
    most = failed = None
    cuda = evaluator.device.type == "cuda"
    for count in rows:
        if points and time.perf_counter() - begin > seconds:
            break
        if cuda:
            torch.cuda.reset_peak_memory_stats(evaluator.device)
        try:
            found = _timed(evaluator, _batch(table, start, count), seconds / len(rows))
        except Exception as error:
            if not points:
                raise
            failed = f"{type(error).__name__}: {error}".splitlines()[0]
            most = _largest(evaluator, table, start, max(points), count)
            break
        bound = evaluator.bound.max_rows
        if bound is not None and bound < count:  # the call was cut in parts
            most = bound
            break
        points[count] = statistics.median(found)
        quartiles = statistics.quantiles(found, n=4) if len(found) > 1 else (0.0, 0.0, 0.0)
        spread[count] = (quartiles[2] - quartiles[0]) / points[count]
        if cuda:
            memory[count] = torch.cuda.max_memory_allocated(evaluator.device)
    return LatencyCurve(points, spread, most, memory or None, failed)


def quick_latency(evaluator: Evaluator, table: Table, noise: Noise, most: float, *, warm: Sequence[float] = ()) -> LatencyCurve:
    """A curve of single calls, of 1, 2, 4, ... rows a sample, for no more than so many rows in all.

    Args:
        evaluator: The model.
        table: Its times are those that the calls have.
        noise: The states' shape and the number of samples.
        most: Rows a sample that the calls may have together.
        warm: Seconds of calls of one row a sample that were made before; without them, one is made and timed.
    """
    samples = noise.samples
    start = torch.stack([noise.start(k) for k in range(samples)]).to(evaluator.device)
    known = sorted(warm)
    left = most if known else most - 2
    points = {samples: known[len(known) // 2] if known else _timed(evaluator, _batch(table, start, samples), 0.0, calls=2)[0]}
    failed, width, limit = None, 2, None
    while width <= min(left, table.steps):
        try:
            times = _timed(evaluator, _batch(table, start, samples * width), 0.0, calls=1 + (3 * width <= left), cold=0)
        except Exception as error:
            failed, limit = f"{type(error).__name__}: {error}".splitlines()[0], max(points)
            break
        points[samples * width] = min(times)
        left -= width * len(times)
        width *= 2
    return LatencyCurve(points, None, limit, None, failed)


def _largest(evaluator: Evaluator, table: Table, start: Tensor, works: int, fails: int) -> int:
    """The largest number of rows that a model takes, between one that works and one that fails."""
    while fails - works > 1:
        middle = (works + fails) // 2
        try:
            _timed(evaluator, _batch(table, start, middle), 0.0, calls=1)
        except Exception:
            fails = middle
        else:
            works = middle
    return works


def _batch(table: Table, start: Tensor, count: int) -> Batch:
    """Rows spread over the chain and the samples."""
    nodes = torch.linspace(0, table.steps - 1, count).long()
    samples = torch.arange(count) % len(start)
    x = start[samples.to(start.device)] * table.start_scale
    scale = table.scale[nodes].to(x).view(-1, *[1] * (x.ndim - 1))
    return Batch(x * scale, table.times[nodes], nodes, samples)


@torch.inference_mode()
def _timed(evaluator: Evaluator, batch: Batch, seconds: float, *, calls: int = 3, cold: int = 1) -> list[float]:
    """The seconds of calls, `calls` at least, without the first ones that are cold."""
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < calls or (len(found) < REPEATS + 1 and time.perf_counter() - begin < seconds):
        since = time.perf_counter()
        evaluator.evaluate_again(batch).flatten()[-1:].tolist()
        found.append(time.perf_counter() - since)
    return found[cold:]

# SPDX-License-Identifier: Apache-2.0
"""Plans against measured runs: predicted and measured gains, and `auto` beside the best fixed choice.

A cell is a model, a chain, a number of samples and a tolerance. Its plan is made with pilots of their own noise; then the
sequential chain, `auto`, and the fixed choices that looked best are run on other seeds, one after the other in turns. Models of
stated t(W) are closed forms behind a sleep: the sleep is what is left of the stated time when the closed form has answered, so
that curves of other devices are replayed. Gains are of the whole clock, of the median of the turns. On a machine with other
work, `--only processor` takes the processor's time on one thread for the clock, and adds the sleep without sleeping.

    python benchmarks/plan.py --threads 1 --json benchmarks/results/plan.json

`--minutes` cuts it into pieces, of which `--resume` makes the next one.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from harness import Results, console, options
from torch import Tensor

import paradiff
from paradiff.chain.noise import Keyed
from paradiff.chain.table import Table
from paradiff.planning.choice import Choice
from paradiff.planning.harness import family
from paradiff.planning.plan import Plan
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.loop import sample
from paradiff.solver.protocol import Method

CURVES: dict[str, Callable[[int], float]] = {
    "flat 8 ms": lambda rows: 8e-3,
    "flat to 8": lambda rows: 8e-3 * max(1.0, rows / 8),
    "half": lambda rows: 6e-3 * (0.5 + 0.5 * rows),
    "steep": lambda rows: 5e-3 * rows,
}
"""Seconds of a call by its rows: a device that no rows fill, one that eight fill, one between, one that a single row fills."""

WALL, PROCESSOR = "wall", "processor"

FIXED = 3
"""Fixed choices that `auto` is compared with: those that looked best, of several methods where there are."""

TURNS = {0.0: 9, 1.0: 3, 6.0: 2}
"""Turns of a cell by the seconds of its plain chain, at least: short runs differ more."""


@dataclass(frozen=True)
class Cell:
    """What is planned and measured."""

    model: str
    curve: str
    chain: str
    steps: int
    samples: int
    tolerance: float

    def label(self) -> str:
        """The cell in words."""
        return f"{self.model}, {self.curve}, {self.chain} {self.steps}, batch {self.samples}, {self.tolerance:g}"


def cells() -> Iterator[Cell]:
    """The cells."""
    for curve in CURVES:
        for chain, steps in (("ddim", 10), ("ddim", 50), ("ddim", 100), ("ddpm", 100), ("ddpm", 250), ("flow", 28)):
            yield Cell("mixture-64", curve, chain, steps, 1, 4e-3)
    yield Cell("digits", "own", "ddim", 10, 16, 4e-3)
    yield Cell("digits", "own", "ddim", 10, 1, 4e-3)
    yield Cell("digits", "own", "ddim", 50, 1, 4e-3)
    for curve in ("flat 8 ms", "flat to 8", "half"):
        yield Cell("mixture-64", curve, "ddim", 50, 4, 4e-3)
        yield Cell("mixture-64", curve, "ddim", 50, 1, 1e-3)
    for curve in ("flat 8 ms", "flat to 8"):
        yield Cell("mixture-64", curve, "ddpm", 1000, 1, 4e-3)
        yield Cell("mixture-64", curve, "ddim", 25, 64, 4e-3)
        yield Cell("mixture-512", curve, "ddim", 50, 1, 4e-3)
    yield Cell("digits", "own", "ddpm", 1000, 1, 4e-3)
    yield Cell("shapes", "own", "ddim", 25, 1, 4e-3)
    yield Cell("shapes", "own", "ddim", 50, 1, 4e-3)
    yield Cell("digits", "own", "ddim", 200, 1, 4e-3)
    yield Cell("digits", "own", "ddpm", 100, 1, 4e-3)
    yield Cell("digits", "own", "ddim", 50, 4, 4e-3)


class Replayed:
    """A model whose calls take the time that a curve states.

    Args:
        model: The model.
        curve: Seconds by rows.
    """

    def __init__(self, model: Any, curve: Callable[[int], float], name: str) -> None:
        self._model, self._curve, self.name = model, curve, name

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The model's outputs, when their time has come."""
        end = time.perf_counter() + self._curve(len(x))
        found = self._model(x, t)
        left = end - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return found


class ProcessorsClock:
    """The processor's time of this process, and what it would have slept: the whole clock of a machine without other work.

    It stands in for the clock and the sleep of `time`, as attributes of that module: what a model's own functions name is
    compared from run to run, and a number there that moves on would make of it a model that changes.
    """

    def __init__(self) -> None:
        self._slept = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return time.process_time() + self._slept

    def sleep(self, seconds: float) -> None:
        """Lets time pass on this clock alone."""
        self._slept += seconds


def evaluator_of(cell: Cell, table: Table) -> Evaluator:
    """The model of a cell."""
    of = family(cell.model)
    if cell.curve == "own":
        return of.evaluator(table, range(cell.samples))
    # A key of its own in the cache, though all replayed models are of one class.
    kind = type(f"Replayed {cell.label()}", (Replayed,), {})
    return Evaluator(kind(of.denoiser(table), CURVES[cell.curve], cell.curve))


def timed(evaluator: Evaluator, table: Table, noise: Keyed, method: Method) -> tuple[float, Any]:
    """The whole clock of a run."""
    begin = time.perf_counter()
    found = sample(evaluator, table, noise, method)
    return time.perf_counter() - begin, found


def fixed(plan: Plan) -> list[Choice]:
    """The choices that `auto` is compared with: the best two, and the best of another method."""
    parallel = [one for one in plan.choices if not one.sequential]
    found = parallel[: FIXED - 1]
    others = [one for one in parallel if one.family not in {f.family for f in found}]
    return [*found, *others[: FIXED - len(found)]]


def measure(cell: Cell) -> dict[str, Any]:
    """A row."""
    of = family(cell.model)
    table = of.table(cell.chain, cell.steps)
    evaluator = evaluator_of(cell, table)
    begin = time.perf_counter()
    plan = paradiff.plan(evaluator, table, Keyed(of.shape, 0, cell.samples), tolerance=cell.tolerance, seconds=1.0, pilots=2)
    planned = time.perf_counter() - begin
    methods = {one.label: one.method for one in fixed(plan)}
    methods = {"sequential": paradiff.sequential(), "auto": paradiff.auto(tolerance=cell.tolerance), **methods}
    turns = next(turns for least, turns in reversed(TURNS.items()) if plan.sequential.seconds >= least)
    seconds: dict[str, list[float]] = {label: [] for label in methods}
    errors: list[float] = []
    chosen = ""
    for turn in range(turns):
        noise = Keyed(of.shape, 100 + turn, cell.samples)
        reference = None
        for label, method in methods.items():
            taken, found = timed(evaluator, table, noise, method)
            seconds[label].append(taken)
            if label == "sequential":
                reference = found.sample
            elif label == "auto":
                assert reference is not None
                errors += (found.sample - reference).double().square().flatten(1).mean(1).sqrt().tolist()
                chosen = found.message.partition("; chosen: ")[2]
    usual = {label: statistics.median(of) for label, of in seconds.items()}
    plain = usual["sequential"]
    target = plan.parallel
    row: dict[str, Any] = {
        "model": cell.model,
        "curve": cell.curve,
        "chain": cell.chain,
        "steps": cell.steps,
        "samples": cell.samples,
        "tolerance": cell.tolerance,
        "turns": turns,
        "planned_seconds": planned,
        "sequential_seconds": plain,
        "best": plan.best.label,
        "predicted": {one.label: plan.gain_of(one) for one in fixed(plan)},
        "measured": {label: plain / usual[label] for label in methods if label != "sequential"},
        "auto": chosen,
        "auto_error": max(errors),
        # The ratio of each turn, since what else runs here slows a whole turn down.
        "auto_loss": statistics.median(a / s for a, s in zip(seconds["auto"], seconds["sequential"], strict=True)) - 1,
    }
    if target is not None:
        pairs = zip(seconds["sequential"], seconds[target.label], strict=True)
        row["measured_gain"] = statistics.median(s / p for s, p in pairs)
        row["predicted_gain"] = plan.gain_of(target)
        row["relative_error"] = abs(row["predicted_gain"] / row["measured_gain"] - 1)
    best = max([1.0, *(plain / usual[label] for label in methods if label not in ("sequential", "auto"))])
    row["best_fixed"] = best
    row["auto_of_best"] = row["measured"]["auto"] / best
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the claims."""
    errors = sorted(row["relative_error"] for row in rows if "relative_error" in row)
    pays = [row for row in rows if row["auto"].startswith("sequential")]
    return {
        "cells": len(rows),
        "relative_error_median": statistics.median(errors),
        "relative_error_worst": errors[-1],
        "within_40_percent": sum(error < 0.4 for error in errors) / len(errors),
        "auto_of_best_median": statistics.median(row["auto_of_best"] for row in rows),
        "auto_loss_worst": max(row["auto_loss"] for row in rows),
        "auto_loss_median_where_sequential": statistics.median([row["auto_loss"] for row in pays]) if pays else math.nan,
        "auto_error_worst": max(row["auto_error"] for row in rows),
    }


def main() -> None:
    """Measures the cells until the time is over."""
    given = options(__doc__, [WALL, PROCESSOR], minutes=14.0, resumes=True)
    begin = time.monotonic()
    results = Results(given.json, keep=given.resume)
    clock = PROCESSOR if given.only == [PROCESSOR] else WALL
    if clock == PROCESSOR:
        instead = ProcessorsClock()
        time.perf_counter, time.sleep = instead, instead.sleep
    fields = [field.name for field in dataclasses.fields(Cell)]
    had = {Cell(**{name: row[name] for name in fields}) for row in results.rows}
    wanted = [cell for cell in list(cells())[:: 6 if given.quick else 1] if cell not in had]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        os.environ["PARADIFF_CACHE"] = folder
        for number, cell in enumerate(wanted):
            if time.monotonic() - begin > 60 * given.minutes:
                console.print(f"the time is over after {number} of {len(wanted)} cells")
                break
            row = measure(cell)
            results.add(row)
            results.save(summary=summary(results.rows), clock=clock)
            console.print(
                f"{cell.label()}: predicted {row.get('predicted_gain', 1):.2f}, measured {row.get('measured_gain', 1):.2f}; "
                f"auto {row['measured']['auto']:.2f} of {row['best_fixed']:.2f} ({row['auto'][:60]})"
            )
    results.save(summary=summary(results.rows), clock=clock)
    console.print(results.contents["summary"])


if __name__ == "__main__":
    main()

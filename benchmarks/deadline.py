# SPDX-License-Identifier: Apache-2.0
"""How well `auto` keeps deadlines, and how far its samples are from the plain chain's, with what it estimated.

For each model and chain the plain chain is timed; deadlines are shares of its seconds. A run that ends within a tenth of its
deadline kept it; one that was said beforehand to be out of reach is counted by itself. The clock is the whole one, so the
machine has to be quiet; on one with other work, `--only processor` takes the processor's time on one thread for the clock, and
adds the stated seconds of calls without a sleep. A first preview is the round and the estimate of the first one that an
observer was shown.

    python benchmarks/deadline.py --threads 1 --json benchmarks/results/deadline.json
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from harness import Results, console, options
from plan import PROCESSOR, WALL, processors_time, rest

import paradiff
from paradiff.chain.noise import Keyed
from paradiff.planning.harness import family
from paradiff.solver.loop import sample
from paradiff.solver.previews import Preview, Previews

CELLS = (
    ("digits", "ddim", 50),
    ("digits", "ddpm", 100),
    ("digits", "ddpm", 1000),
    ("mixture-64", "ddim", 50),
    ("mixture-64", "flow", 28),
    ("shapes", "ddim", 50),
)
SHARES = (0.15, 0.3, 0.5, 0.8, 1.3)
"""Deadlines, as shares of the plain chain's seconds."""

RUNS = 8
SLEPT = 8e-3
"""Seconds of a call of a closed form, whatever its rows."""


class Slow:
    """A closed form whose calls take as long as those of a network on a device that no rows fill."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The model's outputs, when their time has come."""
        end = time.perf_counter() + SLEPT
        found = self._model(x, t)
        rest(max(0.0, end - time.perf_counter()))
        return found


def measure(name: str, chain: str, steps: int, runs: int) -> list[dict[str, Any]]:
    """The rows of a model and a chain."""
    of = family(name)
    table = of.table(chain, steps)
    evaluator = of.evaluator(table, [0])
    if name.startswith("mixture"):
        evaluator = paradiff.Evaluator(Slow(of.denoiser(table)))
    paradiff.plan(evaluator, table, Keyed(of.shape), seconds=1.0)
    plain = []
    for seed in range(3):
        begin = time.perf_counter()
        sample(evaluator, table, Keyed(of.shape, seed), paradiff.sequential())
        plain.append(time.perf_counter() - begin)
    whole = statistics.median(plain)
    rows = []
    for share in SHARES:
        for seed in range(100, 100 + runs):
            noise = Keyed(of.shape, seed)
            reference = sample(evaluator, table, noise, paradiff.sequential()).sample
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                begin = time.perf_counter()
                found = sample(evaluator, table, noise, paradiff.auto(deadline=share * whole))
                taken = time.perf_counter() - begin
            rows.append(
                {
                    "model": name,
                    "chain": chain,
                    "steps": steps,
                    "seed": seed,
                    "deadline": share * whole,
                    "share": share,
                    "seconds": taken,
                    "late": taken / (share * whole) - 1,
                    "said": bool(said),
                    "status": found.status.code,
                    "chosen": found.message.partition("; chosen: ")[2],
                    "error": float((found.sample - reference).square().mean().sqrt()),
                    "estimated_error": found.estimated_error,
                }
            )
    return rows


def first_preview(name: str, chain: str, steps: int) -> dict[str, Any]:
    """The first preview of a sample, its error and its estimate."""
    of = family(name)
    table = of.table(chain, steps)
    evaluator, noise = of.evaluator(table, [0]), Keyed(of.shape, 100)
    plain = sample(evaluator, table, noise, paradiff.sequential()).sample
    shown: list[Preview] = []
    sample(evaluator, table, noise, paradiff.auto(objective="anytime"), observer=Previews(shown.append))
    error = float((shown[0].sample - plain).square().mean().sqrt())
    return {"round": shown[0].round, "error": error, "estimated_error": shown[0].estimated_error}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the claims."""
    unsaid = [row for row in rows if not row["said"]]
    return {
        "runs": len(rows),
        "said_beforehand": len(rows) - len(unsaid),
        "kept": sum(row["late"] <= 0.1 for row in unsaid) / max(len(unsaid), 1),
        "kept_of_all": sum(row["late"] <= 0.1 for row in rows) / len(rows),
        "latest": max(row["late"] for row in rows),
        "errors_within_estimates": sum(row["error"] <= row["estimated_error"] + 1e-6 for row in rows) / len(rows),
    }


def main() -> None:
    """Measures the cells until the time is over."""
    given = options(__doc__, [WALL, PROCESSOR], minutes=10.0)
    clock = PROCESSOR if given.only == [PROCESSOR] else WALL
    if clock == PROCESSOR:
        time.perf_counter = processors_time
    begin = time.monotonic()
    results = Results(given.json)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        os.environ["PARADIFF_CACHE"] = folder
        for cell in CELLS[:: 3 if given.quick else 1]:
            if time.monotonic() - begin > 60 * given.minutes:
                console.print(f"the time is over before {cell}")
                break
            rows = measure(*cell, runs=2 if given.quick else RUNS)
            for row in rows:
                results.add(row)
            first = first_preview(*cell)
            console.print(
                f"{' '.join(map(str, cell))}: first preview in round {first['round']}, error {first['error']:.2g}, estimated "
                f"{first['estimated_error']:.2g}; {summary(rows)}"
            )
    results.save(summary=summary(results.rows), clock=clock)
    console.print(results.contents["summary"])


if __name__ == "__main__":
    main()

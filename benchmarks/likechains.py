# SPDX-License-Identifier: Apache-2.0
"""What each method takes on the library's own chains: rounds, evaluations and the solver's own time, by window and tolerance.

`paradiff.plan` falls back on these figures for chains of the same kind where nothing was measured on the user's own model. They
are written into the package, src/paradiff/planning/library.json, a few numbers a row. Beside them stands, for DDIM chains, how
many steps of a multistep solver of second order end as near to the exact solution of the probability-flow ODE.

    python benchmarks/likechains.py --json src/paradiff/planning/library.json
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import Results, console, options
from torch import Tensor

from paradiff.chain.table import Table
from paradiff.methods.presets import sequential
from paradiff.planning.candidates import FAMILIES, windows_of
from paradiff.planning.harness import FLOW, Family, family
from paradiff.samplers import ddim, dpmpp_2m
from paradiff.samplers.schedule import Schedule
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.loop import sample
from paradiff.solver.protocol import Batch, Round

CHAINS: dict[str, list[tuple[str, int]]] = {
    "mixture-64": [
        *(("ddim", steps) for steps in (25, 50, 100, 1000)),
        *(("ddpm", steps) for steps in (100, 1000)),
        *((FLOW, steps) for steps in (10, 20, 28, 50)),
    ],
    "digits": [
        *(("ddim", steps) for steps in (10, 25, 50, 100, 250, 1000)),
        *(("ddpm", steps) for steps in (25, 50, 100, 250, 1000)),
        *(("dpmpp_2m", steps) for steps in (20, 50)),
    ],
    "shapes": [*(("ddim", steps) for steps in (25, 50, 100, 500)), ("ddpm", 100), ("dpmpp_2m", 25)],
    "shapes-flow": [(FLOW, steps) for steps in (10, 20, 28, 50, 500)],
}
GUIDED = ("shapes", "shapes-flow")
TOLERANCES = (4e-3, 1e-2, 1e-3)
SHORT = 100
"""Most steps of a chain that is measured at every tolerance."""
SEEDS = 3
EXACT = 1000
"""Steps of the DDIM chain that stands for the exact solution."""
STEPS = (10, 25, 50, 100)
"""DDIM chains whose error is compared, on the linear schedule."""
FEWER = (5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 80, 120)


class Clocked:
    """An evaluator that keeps the processor's seconds of its calls."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator, self.device, self.dtype, self.seconds = evaluator, evaluator.device, evaluator.dtype, 0.0

    def __call__(self, batch: Batch) -> Tensor:
        begin = time.process_time()
        outputs = self._evaluator(batch)
        self.seconds += time.process_time() - begin
        return outputs


def given_up(most: int) -> Any:
    """An observer that ends a run after so many rounds."""

    def observe(round: Round) -> bool:
        return round.number >= most

    return observe


def measure(of: Family, name: str, table: Table, method: str, window: int | None, tolerance: float) -> dict[str, Any] | None:
    """A row; None where a method does not fit the chain, or takes more rounds than the chain has steps.

    `own` is the processor's time of a round beside the network. In the file as it is it was measured on the digits network and
    chains of 50 steps, for each method and window.
    """
    rounds, evaluations, own = [], [], []
    for seed in range(SEEDS):
        evaluate = Clocked(of.evaluator(table, [seed]))
        begin = time.process_time()
        try:
            found = sample(
                evaluate,
                table,
                of.noise([seed]),
                FAMILIES[method](window, tolerance),
                observer=given_up(table.steps),
                check="off",
            )
        except ValueError:
            return None
        seconds = time.process_time() - begin
        rounds.append(found.rounds)
        evaluations.append(found.evaluations)
        own.append((seconds - evaluate.seconds) / found.rounds)
    if max(rounds) >= table.steps:
        return None
    return {
        "problem": name,
        "chain": table.name,
        "steps": table.steps,
        "stochastic": table.stochastic,
        "flow": table.prediction == "flow",
        "guided": name in GUIDED,
        "method": method,
        "window": window,
        "tolerance": tolerance,
        "rounds": rounds,
        "evaluations": evaluations,
        "own": float(f"{sorted(own)[len(own) // 2]:.3g}"),
    }


def equal_steps(name: str) -> list[dict[str, Any]]:
    """For DDIM chains, the steps of dpmpp_2m whose error to the exact solution is the same, in the median of the seeds."""
    of, schedule = family(name), Schedule.linear()

    def ended(make: Callable[[Schedule, int], Table], steps: int) -> Tensor:
        table = make(schedule, steps)
        evaluator, noise = of.evaluator(table, range(SEEDS)), of.noise(range(SEEDS))
        return sample(evaluator, table, noise, sequential(), check="off").sample

    exact = ended(ddim, EXACT)

    def error(make: Callable[[Schedule, int], Table], steps: int) -> float:
        return float((ended(make, steps) - exact).double().square().flatten(1).mean(1).sqrt().median())

    rival = [(error(dpmpp_2m, steps), steps) for steps in FEWER]
    rival.sort()
    found = []
    for steps in STEPS:
        own = error(ddim, steps)
        calls = np.exp(np.interp(math.log(own), [math.log(e) for e, _ in rival], [math.log(n) for _, n in rival]))
        found.append(
            {"problem": name, "chain": "ddim", "steps": steps, "solver": "dpmpp_2m", "calls": round(float(calls)), "error": own}
        )
    return found


def main() -> None:
    """Measures what is not in the file yet."""
    given = options(__doc__, [*CHAINS])
    results = Results(given.json, keep=True)
    done = {(r["problem"], r["chain"], r["steps"], r["method"], r["window"], r["tolerance"]) for r in results.rows}
    equal = results.contents.setdefault("equal", [])
    with torch.inference_mode():
        for tolerance in TOLERANCES:
            for name in given.only:
                of = family(name)
                for chain, steps in CHAINS[name]:
                    if tolerance != TOLERANCES[0] and steps > SHORT:
                        continue
                    table = of.table(chain, steps)
                    console.print(f"{name}, {chain} {steps}, {tolerance:g}")
                    for method in FAMILIES:
                        for window in windows_of(table.steps):
                            of_all = (name, table.name, table.steps, method, window)
                            if tolerance != TOLERANCES[0] and (*of_all, TOLERANCES[0]) not in done:
                                continue  # it takes no fewer rounds than the chain has steps
                            if (*of_all, tolerance) not in done:
                                row = measure(of, name, table, method, window, tolerance)
                                if row is not None:
                                    results.add(row)
                                    done.add((*of_all, tolerance))
        for name in ("digits", "mixture-64"):
            if name in given.only and not any(e["problem"] == name for e in equal):
                equal += equal_steps(name)
    results.save()
    if given.json is not None:
        given.json.write_text(by_lines(results.contents), encoding="utf-8")


def by_lines(contents: dict[str, Any]) -> str:
    """The file with one row a line."""
    parts = []
    for name, value in contents.items():
        rows = ",\n  ".join(json.dumps(row) for row in value) if isinstance(value, list) else ""
        parts.append(f'"{name}": [\n  {rows}\n ]' if isinstance(value, list) else f'"{name}": {json.dumps(value)}')
    return "{" + ",\n ".join(parts) + "}\n"


if __name__ == "__main__":
    main()

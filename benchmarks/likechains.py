# SPDX-License-Identifier: Apache-2.0
"""What each method takes on the library's own chains: rounds, evaluations and the solver's own time, by window and tolerance.

`paradiff.plan` falls back on these figures for chains of the same kind where nothing was measured on the user's own model. They
are written into the package, src/paradiff/planning/library.json, a few numbers a row. Beside them stands, for deterministic
chains, how many steps of a multistep solver of high order end as near to the exact solution of the probability-flow ODE.

    python benchmarks/likechains.py --json src/paradiff/planning/library.json
"""

from __future__ import annotations

import time
from typing import Any

import torch
from harness import Results, console, options
from torch import Tensor

from paradiff.chain.table import Table
from paradiff.methods.presets import sequential
from paradiff.planning.candidates import FAMILIES, windows_of
from paradiff.planning.harness import FLOW, Family, family
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.loop import sample
from paradiff.solver.protocol import Batch, Round

CHAINS: dict[str, list[tuple[str, int]]] = {
    "mixture-64": [("ddim", 25), ("ddim", 50), ("ddim", 100), ("ddim", 1000), ("ddpm", 100), ("ddpm", 1000), (FLOW, 28)],
    "digits": [
        *(("ddim", steps) for steps in (10, 25, 50, 100, 250, 1000)),
        *(("ddpm", steps) for steps in (25, 50, 100, 250, 1000)),
        *(("dpmpp_2m", steps) for steps in (20, 50)),
    ],
    "shapes": [*(("ddim", steps) for steps in (25, 50, 100, 500)), ("ddpm", 100), ("dpmpp_2m", 25)],
    "shapes-flow": [(FLOW, steps) for steps in (10, 28, 50, 100)],
}
GUIDED = ("shapes", "shapes-flow")
TOLERANCES = (4e-3, 1e-3)
SHORT = 100
"""Most steps of a chain that is measured at every tolerance."""
SEEDS = 3
EXACT = 1000
"""Steps of the DDIM chain that stands for the exact solution."""
EQUAL = 250
"""Most steps of a chain whose error is then its own."""
FEWER = (4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 80)
RIVALS = ("unipc", "dpmpp_2m")


class Clocked:
    """An evaluator that keeps the seconds of its calls."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator, self.device, self.dtype, self.seconds = evaluator, evaluator.device, evaluator.dtype, 0.0

    def __call__(self, batch: Batch) -> Tensor:
        begin = time.perf_counter()
        outputs = self._evaluator(batch)
        self.seconds += time.perf_counter() - begin
        return outputs


def given_up(most: int) -> Any:
    """An observer that ends a run after so many rounds."""

    def observe(round: Round) -> bool:
        return round.number >= most

    return observe


def measure(of: Family, name: str, table: Table, method: str, window: int | None, tolerance: float) -> dict[str, Any] | None:
    """A row; None where a method does not fit the chain, or takes more rounds than the chain has steps."""
    rounds, evaluations, own = [], [], []
    for seed in range(SEEDS):
        evaluate = Clocked(of.evaluator(table, [seed]))
        begin = time.perf_counter()
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
        seconds = time.perf_counter() - begin
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


def equal_steps(of: Family, name: str, chain: str, steps: int) -> dict[str, Any] | None:
    """The fewest steps of a solver of higher order that end as near to the exact solution as a chain does, over the seeds."""

    def ended(kind: str, count: int) -> Tensor:
        table = of.table(kind, count)
        return sample(of.evaluator(table, range(SEEDS)), table, of.noise(range(SEEDS)), sequential(), check="off").sample

    exact = ended("ddim", EXACT)

    def error(kind: str, count: int) -> float:
        return float((ended(kind, count) - exact).double().square().flatten(1).mean(1).sqrt().median())

    bound = error(chain, steps)
    for count in FEWER:
        if count >= steps:
            break
        for kind in RIVALS:
            if error(kind, count) <= bound:
                return {
                    "problem": name,
                    "chain": chain,
                    "steps": steps,
                    "solver": kind,
                    "calls": count,
                    "error": float(f"{bound:.2g}"),
                }
    return None


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
                            if (name, table.name, table.steps, method, window, tolerance) not in done:
                                row = measure(of, name, table, method, window, tolerance)
                                if row is not None:
                                    results.add(row)
        for name in given.only:
            for chain, steps in CHAINS[name]:
                before = any((e["problem"], e["steps"]) == (name, steps) for e in equal)
                if chain == "ddim" and steps <= EQUAL and not before:
                    found = equal_steps(family(name), name, chain, steps)
                    if found is not None:
                        equal.append(found)
    results.save()


if __name__ == "__main__":
    main()

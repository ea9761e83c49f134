# SPDX-License-Identifier: Apache-2.0
"""How often calibrated bounds hold, and how large they are, on seeds that they were not calibrated on.

Claim measured: of samples of fresh seeds, 95 of 100 err by at most the bound of a calibration on 39 seeds, whatever the method,
model and chain, where the estimate itself is too large for most and too small for some. A row is one model, chain and method:
`factor`, what estimates are multiplied by; `covered`, the fresh seeds whose error is at most the bound; and for the estimate
(`raw`) and the bound (`calibrated`) how large they are beside the true error: the median of the ratios, the share of them from
1 to 10, and the share below 1. Errors are in the data's units. Seeds whose runs were stopped have no bound and are counted.

    python benchmarks/calibration.py --quick
    python benchmarks/calibration.py --json benchmarks/results/calibration.json
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from harness import Results, Row, console, options, show

from paradiff import Keyed, collocation, parasolver, quasi_newton, srds
from paradiff.planning.calibrations import calibration_of, runs_of
from paradiff.planning.effectivity import Effectivity
from paradiff.planning.harness import family
from paradiff.solver.protocol import Method

CALIBRATED, FRESH = range(8000, 8039), range(9000, 9100)
COLUMNS = ("problem", "chain", "steps", "method", "factor", "covered", "fresh", "stopped", "held")

CELLS: dict[str, tuple[str, str, int, Callable[[], Method]]] = {
    "digits-ddim-collocation": ("digits", "ddim", 50, lambda: collocation(window=3)),
    "mixture-ddim-srds": ("mixture-64", "ddim", 50, srds),
    "mixture-ddim-collocation": ("mixture-64", "ddim", 50, lambda: collocation(window=4)),
    "mixture-ddpm-parasolver": ("mixture-64", "ddpm", 100, lambda: parasolver(window=8)),
    "digits-ddim-quasi_newton": ("digits", "ddim", 50, lambda: quasi_newton(window=8)),
    "digits-ddpm-parasolver": ("digits", "ddpm", 100, lambda: parasolver(window=8)),
    "shapes-ddim-quasi_newton": ("shapes", "ddim", 50, lambda: quasi_newton(window=4)),
}
"""Model, chain, steps and method by name."""


def cell(problem: str, chain: str, steps: int, method: Method, calibrated: range, fresh: range) -> Row:
    """The row of one model, chain and method."""
    own = family(problem)
    table = own.table(chain, steps)
    with tempfile.TemporaryDirectory() as folder:
        evaluator = own.evaluator(table, calibrated)
        found = calibration_of(evaluator, table, method, calibrated, shape=own.shape, folder=Path(folder))
    bound = found.bound
    runs = runs_of(own.evaluator(table, fresh), table, Keyed(own.shape, fresh), method)
    pairs = [(estimate, error) for error, estimate in runs]
    covered = sum(error <= bound.of(estimate) for error, estimate in runs)
    return {
        "problem": problem,
        "chain": chain,
        "steps": steps,
        "method": repr(method),
        "coverage": bound.coverage,
        "seeds": bound.seeds,
        "factor": bound.factor,
        "fresh": len(runs),
        "covered": covered,
        "held": sum(error <= bound.of(estimate) / bound.factor for error, estimate in runs),
        "stopped": [found.stopped, len(fresh) - len(runs)],
        "raw": Effectivity.of(pairs).to_json(),
        "calibrated": Effectivity.of((bound.of(estimate), error) for estimate, error in pairs).to_json(),
        "calibration": {"errors": list(found.errors), "estimates": list(found.estimates)},
        "samples": {"errors": [error for error, _ in runs], "estimates": [estimate for _, estimate in runs]},
    }


def main() -> None:
    given = options(__doc__, tuple(CELLS))
    results = Results(given.json, given.keep)
    calibrated, fresh = CALIBRATED, FRESH[: min(10 if given.quick else len(FRESH), given.seeds)]
    for name in given.only:
        problem, chain, steps, make = CELLS[name]
        results.drop(row for row in results.rows if row["name"] != name)
        results.add({"name": name, **cell(problem, chain, steps, make(), calibrated, fresh)})
        results.save()
        console.print(" ".join(f"{results.rows[-1].get(c)}" for c in COLUMNS))
    show(results.rows, COLUMNS)


if __name__ == "__main__":
    main()

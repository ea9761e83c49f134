# SPDX-License-Identifier: Apache-2.0
"""Short deterministic chains in small windows: how many rounds the window loop takes, and how many sparse nodes take.

Claim measured: on average collocation needs no more rounds than `quasi_newton` does in the same window, and from 50 steps on
far fewer; every error is below 4e-3. The trained digits network, DDIM of 25, 50 and 100 steps, at the default tolerance.
Parts are seeds: `tuning` 200 to 211, which numbers were chosen by; `held-out` 1200 to 1211.

    python benchmarks/small_windows.py --only held-out --json benchmarks/results/small_windows.json
"""

from __future__ import annotations

from harness import Results, options, show
from problem import trained

from paradiff import collocation, quasi_newton

SEEDS = {"tuning": range(200, 212), "held-out": range(1200, 1212)}
STEPS, WINDOWS = (25, 50, 100), (2, 3, 4, 8, 16)
COLUMNS = ("part", "steps", "window", "method", "rounds", "rounds_max", "evaluations", "error_median", "error_max", "estimated")


def main() -> None:
    given = options(__doc__, tuple(SEEDS))
    results = Results(given.json, given.keep)
    for part in given.only:
        results.drop(row for row in results.rows if row["part"] != part)
        for steps in STEPS[:1] if given.quick else STEPS:
            problem = trained("ddim", steps)
            for window in WINDOWS:
                for method in (quasi_newton(window), collocation(window=window)):
                    results.add(problem.measure(part, method, SEEDS[part][: given.seeds], alone=False))
    results.save()
    show(results.rows, COLUMNS)


if __name__ == "__main__":
    main()

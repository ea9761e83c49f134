# SPDX-License-Identifier: Apache-2.0
"""The whole clock of collocation on the digits network, DDPM 1000, against the chain as a plain loop.

Claim measured: processor time of one thread for a whole run, noise, network, bookkeeping and the check of rows included, and
that of a loop that makes the same steps and nothing else. Runs are paired: of each seed the loop and each window in turn, so
that other work on the machine falls on all alike. `gain` is the median of the seeds' ratios, `error_max` the largest root mean
square error. Seeds were not used for tuning.

- alone: eight seeds, one at a time.
- batch: 64 seeds in one run, once.

    python benchmarks/clock.py --quick
    python benchmarks/clock.py --json benchmarks/results/clock.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from harness import Results, Row, options, show
from problem import rms, trained
from torch import Tensor

from paradiff import Evaluator, Solution, collocation, sample

PARTS = ("alone", "batch")
WINDOWS = {"alone": (4, 8, 16, 32), "batch": (8,)}
FIRST_SEED = 1000
MOST_ROWS = 256
COLUMNS = (
    "part", "window", "samples", "rounds", "evaluations", "error_median", "error_max", "seconds", "loop_seconds", "gain",
    "gain_least",
)  # fmt: skip

Found = TypeVar("Found")
problem = trained("ddpm", 1000)


def clocked(call: Callable[[], Found]) -> tuple[Found, float]:
    """What a call returns, and its processor time."""
    begin = time.process_time()
    found = call()
    return found, time.process_time() - begin


@torch.inference_mode()
def loop(seeds: Sequence[int]) -> Tensor:
    """The chain, step by step, with the draws of a pipeline's call."""
    table, shape = problem.table, problem.shape
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def drawn() -> Tensor:
        return torch.stack([torch.randn(1, *shape, generator=generator)[0] for generator in generators])

    x = drawn() * table.start_scale
    a, b, c, times = (v.tolist() for v in (table.a[:, 0], table.b[:, 0], table.c, table.t))
    for step in range(table.steps):
        t = torch.full((len(seeds),), int(times[step]))
        m = problem.denoiser(x, t)
        x = a[step] * x + b[step] * m + c[step] * drawn()
    return x


def run(window: int, seeds: Sequence[int]) -> Solution:
    """The same samples by collocation."""
    return sample(
        Evaluator(problem.denoiser, max_rows=MOST_ROWS), problem.table, problem.noise(seeds), collocation(window=window)
    )


def measured(part: str, groups: Sequence[Sequence[int]]) -> list[Row]:
    """A row for each window, of groups of seeds that are sampled together."""
    windows = WINDOWS[part]
    loops, runs = [], {window: list[tuple[Solution, float, list[float]]]() for window in windows}
    for group in groups:
        wanted, seconds = clocked(lambda group=group: loop(group))
        loops.append(seconds)
        for window in windows:
            solution, seconds = clocked(lambda group=group, window=window: run(window, group))
            runs[window].append((solution, seconds, rms(solution.sample - wanted)))
    rows = []
    for window, found in runs.items():
        errors = [error for *_, own in found for error in own]
        gains = [plain / seconds for plain, (_, seconds, _) in zip(loops, found, strict=True)]
        estimates = [estimate for solution, *_ in found for estimate in solution.error_estimates]
        rows.append(
            {
                "part": part,
                "window": window,
                "samples": len(errors),
                "rounds": statistics.mean(estimate.rounds for estimate in estimates),
                "evaluations": statistics.mean(estimate.evaluations for estimate in estimates),
                "error_median": statistics.median(errors),
                "error_max": max(errors),
                "seconds": statistics.median(seconds for _, seconds, _ in found),
                "loop_seconds": statistics.median(loops),
                "gain": statistics.median(gains),
                "gain_least": min(gains),
                "gains": [round(gain, 2) for gain in gains],
            }
        )
    return rows


def main() -> None:
    given = options(__doc__, PARTS)
    torch.set_num_threads(1)
    results = Results(given.json, given.keep)
    results.drop([row for row in results.rows if row["part"] not in given.only])
    run(16, [FIRST_SEED - 1])  # the table keeps its coefficients
    if "alone" in given.only:
        for row in measured("alone", [[FIRST_SEED + k] for k in range(min(2 if given.quick else 8, given.seeds))]):
            results.add(row)
    if "batch" in given.only:
        for row in measured("batch", [range(FIRST_SEED, FIRST_SEED + min(4 if given.quick else 64, given.seeds))]):
            results.add(row)
    results.save()
    show(results.rows, COLUMNS)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Speed-up of whole runs on 2 and 4 ranks, of a network that takes a given time for each row.

A call of the network sleeps for `--row` milliseconds a row, so that ranks on one machine do not compete for its processor, as
GPUs do not. The chain is that of DDPM. The ideal is that of the rounds: all rows of a run, against the rows, summed over the
rounds, of the rank that has most of them. Both clocks are whole, but for the start of processes: noise, solver, exchanges and
the check of rows are in them.

`seconds` and `share_of_ideal` are those of a run whose network was seen to be right before, as in every run of a process but
its first: two rows are checked. `first_seconds` and `share_first` are those of the first run, with the ranks' handshake and the
whole check, of whose rows each rank makes most by itself.

Every rank repeats the solver's own work: on a box of GPUs on a core of its own, here on as many cores as there are. `own_core`
is the share of the ideal that ranks with a core each reach, by the seconds that the network's rows take and those of one rank's
processor.

    python benchmarks/ranks.py --json benchmarks/results/ranks.json
    python benchmarks/ranks.py --json benchmarks/results/ranks.json --row 200 --methods collocation
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from paradiff import Evaluator, Keyed, Schedule, collocation, parasolver, quasi_newton, sample
from paradiff.app.environment import environment
from paradiff.samplers import ddpm
from paradiff.solver import Ranks, Round

SHAPE = (4, 32, 32)
METHODS = {
    "parasolver, window 32": lambda: parasolver(window=32),
    "quasi_newton, window 32": lambda: quasi_newton(window=32),
    "collocation, window 32": lambda: collocation(window=32),
}


class Slow:
    """A network that sleeps for some seconds for each row."""

    def __init__(self, row: float) -> None:
        self.row = row

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        time.sleep(self.row * len(x))
        return 0.9 * x


class Rounds:
    """An observer that notes the rows so far."""

    def __init__(self, evaluator: Evaluator, counts: list[int]) -> None:
        self.evaluator, self.counts = evaluator, counts

    def __call__(self, _: Round) -> None:
        self.counts.append(self.evaluator.evaluations)


def measured(row: float, steps: int, repeats: int, names: list[str], ranks: Ranks | None) -> dict[str, Any]:
    """Of a first run and, the median, of later ones: seconds and checked rows, by method, of those whose names begin so. Of the
    last run: the rows of each round."""
    table, noise, found = ddpm(Schedule.linear(), steps), Keyed(SHAPE, [0]), {}
    for name, method in METHODS.items():
        if not name.startswith(tuple(names)):
            continue
        evaluator, counts = Evaluator(Slow(row), mesh=ranks), list[int]()
        seconds, own, checked = [], [], []
        for _ in range(repeats + 1):
            counts = [evaluator.evaluations]
            begin, processor = time.perf_counter(), time.process_time()
            solution = sample(evaluator, table, noise, method(), observer=Rounds(evaluator, counts))
            seconds.append(time.perf_counter() - begin)
            own.append(time.process_time() - processor)
            checked.append(solution.checked_rows)
        found[name] = {
            "first_seconds": seconds[0],
            "first_checked_rows": checked[0],
            "seconds": statistics.median(seconds[1:]),
            "processor": statistics.median(own[1:]),
            "rounds": [after - before for before, after in itertools.pairwise(counts)],
            "checked_rows": checked[-1],
        }
    return found


def worker(row: float, steps: int, repeats: int, names: list[str]) -> None:
    """One rank's part; the first prints the figures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("time",))
    found = measured(row, steps, repeats, names, Ranks(mesh))
    if dist.get_rank() == 0:
        print("FIGURES", json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", type=float, default=50.0, help="milliseconds that a row takes")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--methods", nargs="+", default=[""], help="how the methods' names begin; all by default")
    parser.add_argument("--json", type=Path, help="runs of other rows and methods in the file stay")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    row = given.row / 1000
    if given.worker:
        worker(row, given.steps, given.repeats, given.methods)
        return
    torch.set_num_threads(1)
    alone = measured(row, given.steps, given.repeats, given.methods, None)
    kept = json.loads(given.json.read_text())["runs"] if given.json and given.json.is_file() else []
    kept = [run for run in kept if (run.get("row_ms"), run["method"]) not in {(given.row, name) for name in alone}]
    result: dict[str, Any] = {"environment": environment(), "steps": given.steps, "runs": [v for v in kept if "row_ms" in v]}
    print(f"{'method':24} ranks rounds  seconds speed-up  ideal  share  first own core")
    for size in given.ranks:
        options = ["--worker", "--row", str(given.row), "--steps", str(given.steps), "--repeats", str(given.repeats)]
        options += ["--methods", *given.methods]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), __file__]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_FR_BUFFER_SIZE": "0"}
        output = subprocess.run([*torchrun, *options], env=variables, check=True, capture_output=True, text=True).stdout
        figures = json.loads(next(line for line in output.splitlines() if line.startswith("FIGURES"))[len("FIGURES") :])
        for name, one in figures.items():
            before = alone[name]
            assert one["rounds"] == before["rounds"], "the rounds of ranks are those of one process"
            rows = [sum(one["rounds"]), sum(-(-rows // size) for rows in one["rounds"])]
            ideal = rows[0] / rows[1]
            speedup = before["seconds"] / one["seconds"]
            asleep = [row * (count + of["checked_rows"]) for count, of in zip(rows, (before, one), strict=True)]
            own_core = (asleep[0] + before["processor"]) / (asleep[1] + one["processor"]) / ideal
            first = before["first_seconds"] / one["first_seconds"] / ideal
            result["runs"].append(
                {
                    "method": name,
                    "row_ms": given.row,
                    "ranks": size,
                    "rounds": len(one["rounds"]),
                    "evaluations": sum(one["rounds"]),
                    "checked_rows": one["checked_rows"],
                    "seconds_alone": round(before["seconds"], 4),
                    "seconds": round(one["seconds"], 4),
                    "speedup": round(speedup, 3),
                    "ideal": round(ideal, 3),
                    "share_of_ideal": round(speedup / ideal, 3),
                    "first_checked_rows": one["first_checked_rows"],
                    "first_seconds": round(one["first_seconds"], 4),
                    "share_first": round(first, 3),
                    "processor_alone": round(before["processor"], 4),
                    "processor": round(one["processor"], 4),
                    "own_core": round(own_core, 3),
                }
            )
            print(
                f"{name:24} {size:5} {len(one['rounds']):6} {one['seconds']:8.2f} {speedup:7.2f}x {ideal:5.2f}x "
                f"{speedup / ideal:6.0%} {first:6.0%} {own_core:8.0%}"
            )
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

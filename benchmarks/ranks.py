# SPDX-License-Identifier: Apache-2.0
"""Speed-up of whole runs on 2 and 4 ranks, of a network that takes a given time for each row.

A call of the network sleeps for `--row` milliseconds a row, so that ranks on one machine do not compete for its processor, as
GPUs do not. The chain is that of DDPM. The ideal is that of the rounds: all rows of a run, against the rows, summed over the
rounds, of the rank that has most of them. Both clocks are whole: noise, solver, exchanges and the check of rows are in them;
the start of processes, and the handshake of the first round, which an untimed run makes, are not.

Every rank repeats the solver's own work: on a box of GPUs on a core of its own, here on as many cores as there are. `own_core`
is the share of the ideal that ranks with a core each reach, by the seconds that calls sleep and those of one rank's processor.

    python benchmarks/ranks.py --json benchmarks/results/ranks.json
    python benchmarks/ranks.py --json benchmarks/results/ranks.json --row 200 --methods collocation
"""

from __future__ import annotations

import argparse
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
from paradiff.solver import Batch, Ranks

SHAPE = (4, 32, 32)
METHODS = {
    "parasolver, window 32": lambda: parasolver(window=32),
    "quasi_newton, window 32": lambda: quasi_newton(window=32),
    "collocation, window 32": lambda: collocation(window=32),
}


class Counted(Evaluator):
    """An evaluator that notes the rows of each round."""

    def __call__(self, batch: Batch) -> Tensor:
        counts.append(len(batch.x))
        return super().__call__(batch)


counts: list[int] = []


def measured(row: float, steps: int, repeats: int, names: list[str], ranks: Ranks | None) -> dict[str, Any]:
    """Seconds of runs, the median, and the rows of each round, by method; of those whose names begin so."""

    slept = [0.0]

    def network(x: Tensor, t: Tensor) -> Tensor:
        slept[0] += row * len(x)
        time.sleep(row * len(x))
        return 0.9 * x

    table, noise, found = ddpm(Schedule.linear(), steps), Keyed(SHAPE, [0]), {}
    for name, method in METHODS.items():
        if not name.startswith(tuple(names)):
            continue
        evaluator = Counted(network, mesh=ranks)
        seconds, own, checked = [], [], 0
        for _ in range(repeats + 1):
            counts.clear()
            slept[0] = 0.0
            begin, processor = time.perf_counter(), time.process_time()
            solution = sample(evaluator, table, noise, method())
            seconds.append(time.perf_counter() - begin)
            own.append(time.process_time() - processor)
            checked = solution.checked_rows
        found[name] = {
            "seconds": statistics.median(seconds[1:]),
            "slept": slept[0],
            "processor": statistics.median(own[1:]),
            "rounds": list(counts),
            "checked_rows": checked,
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
    print(f"{'method':24} {'ranks':>5} {'rounds':>6} {'seconds':>8} {'speed-up':>8} {'ideal':>6} {'share':>6} {'own core':>8}")
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
            ideal = sum(one["rounds"]) / sum(-(-rows // size) for rows in one["rounds"])
            speedup = before["seconds"] / one["seconds"]
            own_core = (before["slept"] + before["processor"]) / (one["slept"] + one["processor"]) / ideal
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
                    "processor_alone": round(before["processor"], 4),
                    "processor": round(one["processor"], 4),
                    "own_core": round(own_core, 3),
                }
            )
            print(
                f"{name:24} {size:5} {len(one['rounds']):6} {one['seconds']:8.2f} {speedup:7.2f}x {ideal:5.2f}x "
                f"{speedup / ideal:6.0%} {own_core:8.0%}"
            )
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

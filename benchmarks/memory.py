# SPDX-License-Identifier: Apache-2.0
"""The memory that a method holds beside the network's: its states, and the peak of the process.

A row is a method with a window, the median of three processes: one sample of 16384 numbers, DDPM of 1000 steps, and a network
that acts on each number by itself and holds a few copies of its batch. `peak_mib` is by how much the largest resident set of
the run exceeds that before it. `states_mib` is the memory of the method's own states in float64 where it solves in float64
(`collocation`: nodes of the last mesh) and in float32 elsewhere (nodes of the window).

    python benchmarks/memory.py --quick
    python benchmarks/memory.py --json benchmarks/results/memory.json
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

import torch
from harness import ROOT, Results, Row, options, show
from torch import Tensor

from paradiff import Keyed, Schedule, collocation, parasolver, quasi_newton, sample
from paradiff.chain.table import Table
from paradiff.samplers import ddpm
from paradiff.solver.protocol import Method

SIZE = 16384
MIB = 2**20
REPEATS = 3
"""Processes of each row."""
WINDOWS = (8, 16, 32, None)
COLUMNS = ("method", "window", "rounds", "evaluations", "nodes", "states_mib", "peak_mib")


def network(table: Table) -> Any:
    """Nearly Gaussian data of variance 1/4, number by number."""
    alpha, sigma, times = table.alpha.float(), table.sigma.float(), table.t

    def called(x: Tensor, t: Tensor) -> Tensor:
        at = torch.searchsorted(-times, -t.to(times)).clamp(max=len(times) - 1)
        a, s = alpha[at, None], sigma[at, None]
        return torch.sin(x * 3).mul_(0.05).add_(x * (s / (a**2 / 4 + s**2)))

    return called


def methods() -> list[Method]:
    """What is measured."""
    made: list[Method] = [collocation(window=window) for window in WINDOWS]
    return [*made, quasi_newton(32), parasolver(32)]


def measure(number: int, size: int) -> Row:
    """One method in this process."""
    method = methods()[number]
    table = ddpm(Schedule.linear(), 1000)
    model, noise = network(table), Keyed((size,), 0)
    sample(model, table, Keyed((16,), 0), method)  # libraries are loaded, and the table keeps its coefficients
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = sample(model, table, noise, method)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    nodes = max(getattr(record, "of", 0) for record in found.history) or getattr(method, "window", 0)
    width = 8 if method.name == "collocation" else 4
    return {
        "method": method.name,
        "window": getattr(method, "window", None),
        "rounds": found.rounds,
        "evaluations": found.evaluations,
        "nodes": nodes,
        "numbers": size,
        "states_mib": round(nodes * size * width / MIB, 1),
        "peak_mib": round(peak * 1024 / MIB, 1),
    }


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        torch.set_num_threads(1)
        print(json.dumps(measure(int(sys.argv[2]), int(sys.argv[3]))))
        return
    given = options(__doc__)
    results = Results(given.json)
    for number in range(len(methods())):
        line = [sys.executable, __file__, "--one", str(number), str(SIZE // 16 if given.quick else SIZE)]
        runs = [subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(REPEATS)]
        results.add(sorted((json.loads(ran.stdout) for ran in runs), key=lambda row: row["peak_mib"])[REPEATS // 2])
    results.save()
    show(results.rows, COLUMNS)


if __name__ == "__main__":
    main()

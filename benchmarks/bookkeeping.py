# SPDX-License-Identifier: Apache-2.0
"""What a round costs beside its network: the solver's own arithmetic, noises, checks and the loop.

Claim measured: milliseconds of processor time of one thread, a round, outside of the network's calls. A row is a method with a
window, one sample at a time, the least of several passes over the same seeds: other work on the machine only adds. What a table
keeps of a first sample (its mesh, its recurrence) is made before. Parts:

- digits: the bundled network, states of 64 numbers.
- long: a network that acts on each number by itself, states of 3 x 64 x 64 numbers; a pass over one such window of 512 states
  in float32 moves 25 MB through the processor's memory, and every method makes several.

    python benchmarks/bookkeeping.py --quick
    python benchmarks/bookkeeping.py --json benchmarks/results/bookkeeping.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import memory
import torch
from harness import Results, Row, options, show
from torch import Tensor

from paradiff import Keyed, Recorded, Schedule, collocation, parasolver, quasi_newton, sample, sequential
from paradiff.chain.noise import Noise
from paradiff.chain.table import Table
from paradiff.models.pixel import load
from paradiff.samplers import ddpm
from paradiff.solver.protocol import Method

LONG = (3, 64, 64)
COLUMNS = ("part", "chain", "method", "window", "rounds", "milliseconds")


class Timed:
    """A network that notes the processor time of its calls."""

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._network, self.seconds = network, 0.0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        begin = time.process_time()
        found = self._network(x, t)
        self.seconds += time.process_time() - begin
        return found


def measured(network: Any, table: Table, noises: list[Noise], method: Method, passes: int) -> tuple[int, float]:
    """Rounds of a pass, and milliseconds of a round outside of the network."""
    least, rounds, timed = float("inf"), 0, Timed(network)
    for _ in range(passes + 1):  # the first is not counted
        timed.seconds, rounds, begin = 0.0, 0, time.process_time()
        for noise in noises:
            rounds += sample(timed, table, noise, method).rounds
        taken = 1e3 * (time.process_time() - begin - timed.seconds) / rounds
        least = min(least, taken) if _ else least
    return rounds, least


def cases(quick: bool) -> Iterator[tuple[str, str, Any, Table, list[Noise], list[Method]]]:
    """Part, chain, network, table, noises and methods."""
    model = load("digits")
    seeds = range(100, 102 if quick else 108)
    noises: list[Noise] = [Recorded(model.shape, torch.Generator().manual_seed(seed)) for seed in seeds]
    windows = (16,) if quick else (4, 16, 32)
    several: list[Method] = [make(window) for make in (parasolver, quasi_newton) for window in windows]
    several += [collocation(window=window) for window in windows]
    yield "digits", "DDPM 1000", model, model.table("ddpm", 1000), noises[:4], several
    yield "digits", "DDIM 100", model, model.table("ddim", 100), noises, [sequential(), *several]
    if not quick:
        table = ddpm(Schedule.linear(), 1000)
        long: list[Method] = [parasolver(512), quasi_newton(512), collocation(window=32), collocation(window=512)]
        yield "long", "DDPM 1000", memory.network(table), table, [Keyed((3 * 64 * 64,), 0)], long


def main() -> None:
    given = options(__doc__)
    torch.set_num_threads(1)
    results = Results(given.json)
    for part, chain, network, table, noises, methods in cases(given.quick):
        for method in methods:
            rounds, spent = measured(network, table, noises, method, 1 if part == "long" else 5)
            row: Row = {"part": part, "chain": chain, "method": method.name, "window": getattr(method, "window", None)}
            results.add(row | {"rounds": rounds, "milliseconds": round(spent, 3)})
    results.save()
    show(results.rows, COLUMNS)


if __name__ == "__main__":
    main()

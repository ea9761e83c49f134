# SPDX-License-Identifier: Apache-2.0
"""What a round costs beside its network: the solver's own arithmetic, noises, checks and the loop.

Claim measured: milliseconds of processor time of one thread, a round, outside of the network's calls. A row is a method with a
window, one sample at a time, the least of several passes over the same seeds: other work on the machine only adds. What a table
keeps of a first sample (its mesh, its recurrence) is made before. `share` is the part that it has in the whole processor time.
Parts:

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
PARTS = ("digits", "long")
SECONDS = {"digits": 3.0, "long": 5.0}
"""Processor time of a row's passes after which no further one is begun."""

COLUMNS = ("part", "chain", "method", "window", "rounds", "milliseconds", "share")


class Timed:
    """A network that notes the processor time of its calls."""

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._network, self.seconds = network, 0.0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        begin = time.process_time()
        found = self._network(x, t)
        self.seconds += time.process_time() - begin
        return found


def measured(network: Any, table: Table, noises: list[Noise], method: Method, seconds: float) -> Row:
    """Rounds of a pass, milliseconds of a round outside of the network, and their share."""
    timed, found = Timed(network), list[tuple[float, float]]()
    sample(timed, table, noises[0], method)
    rounds, spent = 0, 0.0
    while not found or (spent < seconds and len(found) < 5):
        timed.seconds, rounds, begin = 0.0, 0, time.process_time()
        for noise in noises:
            rounds += sample(timed, table, noise, method).rounds
        taken = time.process_time() - begin
        spent += taken
        found.append(((taken - timed.seconds) / rounds, (taken - timed.seconds) / taken))
    least, share = min(found)
    return {"rounds": rounds, "milliseconds": round(1e3 * least, 3), "share": round(share, 3)}


def cases(only: list[str], quick: bool) -> Iterator[tuple[str, str, Any, Table, list[Noise], list[Method]]]:
    """Part, chain, network, table, noises and methods."""
    windows = (16,) if quick else (4, 16, 32)
    several: list[Method] = [make(window) for make in (parasolver, quasi_newton) for window in windows]
    several += [collocation(window=window) for window in windows]
    if "digits" in only:
        model = load("digits")
        noises: list[Noise] = [Recorded(model.shape, torch.Generator().manual_seed(seed)) for seed in range(100, 108)]
        for steps, seeds in ((50, 4), (100, 4)):
            table = model.table("ddim", steps)
            yield "digits", f"DDIM {steps}", model, table, noises[: 2 if quick else seeds], [sequential(), *several]
        yield "digits", "DDPM 1000", model, model.table("ddpm", 1000), noises[: 2 if quick else 3], several
    if "long" in only:
        table = ddpm(Schedule.linear(), 1000)
        long: list[Method] = [parasolver(32), quasi_newton(32), collocation(window=32)]
        long += [] if quick else [parasolver(512), quasi_newton(512), collocation(window=512)]
        yield "long", "DDPM 1000", memory.network(table), table, [Keyed((3 * 64 * 64,), 0)], long


def main() -> None:
    given = options(__doc__, PARTS)
    torch.set_num_threads(1)
    results = Results(given.json, given.keep)
    results.drop(row for row in results.rows if row["part"] not in given.only)
    for part, chain, network, table, noises, methods in cases(given.only, given.quick):
        for method in methods:
            row: Row = {"part": part, "chain": chain, "method": method.name, "window": getattr(method, "window", None)}
            results.add(row | measured(network, table, noises, method, SECONDS[part]))
            show(results.rows[-1:], COLUMNS)
    results.save()
    show(results.rows, COLUMNS)


if __name__ == "__main__":
    main()

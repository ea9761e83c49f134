# SPDX-License-Identifier: Apache-2.0
"""What a round costs beside its network: the solver's own arithmetic, noises, checks and the loop.

Claim measured: milliseconds of processor time of one thread, a round, outside of the network's calls, one sample at a time.
What a table keeps of a first sample (its mesh, its recurrence) is made before.

- `milliseconds`: the network's outputs are those of an earlier pass, so that a pass holds the solver's own work alone. The
  least of several passes over the same seeds: other work on the machine only adds.
- `beside`: between the network's calls, which leave the processor's caches full of their own; one pass. `share` is its part of
  the whole processor time.

Parts:

- digits: the bundled network, states of 64 numbers.
- long: a network that acts on each number by itself, states of 3 x 64 x 64 numbers; a pass over one such window of 512 states
  in float32 moves 25 MB through the processor's memory, and every method makes several.

    python benchmarks/bookkeeping.py --quick
    python benchmarks/bookkeeping.py --json benchmarks/results/bookkeeping.json
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
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
PASSES = 10
COLUMNS = ("part", "chain", "method", "window", "rounds", "milliseconds", "beside", "share")

Network = Callable[[Tensor, Tensor], Tensor]
Draw = Callable[[], Noise]


class Timed:
    """A network that notes the processor time of its calls, and their outputs."""

    def __init__(self, network: Network, outputs: list[Tensor] | None = None) -> None:
        self._network, self._outputs, self.seconds = network, outputs, 0.0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        begin = time.process_time()
        found = self._network(x, t)
        self.seconds += time.process_time() - begin
        if self._outputs is not None:
            self._outputs.append(found)
        return found


class Known:
    """A network whose outputs are known, in the order of its calls."""

    def __init__(self, outputs: list[Tensor]) -> None:
        self._outputs, self.seconds = iter(outputs), 0.0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return next(self._outputs)


def passed(networks: Sequence[Timed | Known], table: Table, noises: list[Draw], method: Method) -> tuple[int, float, float]:
    """Rounds of a pass, its seconds outside of the networks, and all of them."""
    rounds, begin = 0, time.process_time()
    for network, noise in zip(networks, noises, strict=True):
        rounds += sample(network, table, noise(), method).rounds
    taken = time.process_time() - begin
    return rounds, taken - sum(network.seconds for network in networks), taken


def measured(network: Network, table: Table, noises: list[Draw], method: Method, known: bool) -> Row:
    """Rounds of a pass, milliseconds of a round outside of the network, and their share."""
    sample(network, table, noises[0](), method)
    outputs: list[list[Tensor]] = [[] for _ in noises]
    rounds, own, taken = passed([Timed(network, v if known else None) for v in outputs], table, noises, method)
    row: Row = {"rounds": rounds, "milliseconds": None, "beside": round(1e3 * own / rounds, 3), "share": round(own / taken, 3)}
    if known:
        least = min(passed([Known(v) for v in outputs], table, noises, method)[1] for _ in range(PASSES))
        row["milliseconds"] = round(1e3 * least / rounds, 3)
    return row


def recorded(shape: tuple[int, ...], seed: int) -> Noise:
    """The draws of a plain call with a seed."""
    return Recorded(shape, torch.Generator().manual_seed(seed))


def cases(only: list[str], quick: bool) -> Iterator[tuple[str, str, Any, Table, list[Draw], list[Method]]]:
    """Part, chain, network, table, noises and methods."""
    windows = (16,) if quick else (4, 16, 32)
    several: list[Method] = [make(window) for make in (parasolver, quasi_newton) for window in windows]
    several += [collocation(window=window) for window in windows]
    if "digits" in only:
        model = load("digits")
        noises: list[Draw] = [functools.partial(recorded, model.shape, seed) for seed in range(100, 104)]
        for steps in (50, 100):
            table = model.table("ddim", steps)
            yield "digits", f"DDIM {steps}", model, table, noises[: 2 if quick else 4], [sequential(), *several]
        yield "digits", "DDPM 1000", model, model.table("ddpm", 1000), noises[: 2 if quick else 4], several
    if "long" in only:
        table = ddpm(Schedule.linear(), 1000)
        long: list[Method] = [parasolver(32), quasi_newton(32), collocation(window=32)]
        long += [] if quick else [parasolver(512), quasi_newton(512), collocation(window=512)]
        yield "long", "DDPM 1000", memory.network(table), table, [lambda: Keyed((3 * 64 * 64,), 0)], long


def main() -> None:
    given = options(__doc__, PARTS)
    torch.set_num_threads(1)
    results = Results(given.json, given.keep)
    results.drop(row for row in results.rows if row["part"] not in given.only)
    for part, chain, network, table, noises, methods in cases(given.only, given.quick):
        for method in methods:
            row: Row = {"part": part, "chain": chain, "method": method.name, "window": getattr(method, "window", None)}
            results.add(row | measured(network, table, noises, method, part == "digits"))
            show(results.rows[-1:], COLUMNS)
    results.save()
    show(results.rows, COLUMNS)


if __name__ == "__main__":
    main()

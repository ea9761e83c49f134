# SPDX-License-Identifier: Apache-2.0
"""The golden digest: rounds, evaluations and a hash of the samples of every table under every method, in float64.

`python tests/digest.py` records `digest.json` anew; a change that is meant to move no number must leave the file as it is, and
one that is meant to move numbers says in its commit which and why. Rounds and evaluations are exact. At tolerance 0 they would
hang on the last digit, since a node passes where a sum in another order gives the same number, so every method is stopped by a
tolerance, and the few entries of `UNSTEADY` are left out. Samples are hashed after rounding to multiples of `UNIT`:
processors, thread counts and linear algebra libraries sum in other orders, by which the samples differ up to the `NOISE` below
(measured between the kernels that torch has for plain x86-64, AVX2 and AVX-512, one and two threads, and MKL's for any
processor). The offset that is recorded beside each hash keeps every number of the sample away from the places where rounding
changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from problems import METHODS, TABLES, piadm
from torch import Tensor

import paradiff
from paradiff import Keyed, Schedule, Solution, Table
from paradiff.methods import WindowMethod

FILE = Path(__file__).parent / "digest.json"
UNIT, NOISE = 1e-6, 1e-9
TIGHT = 1e-4
SEEDS = (0, 1)
SHAPE = (2, 3)

LONG = {
    "ddpm, 200 steps": paradiff.samplers.ddpm(Schedule.linear(), 200),
    "ddim, 100 steps": paradiff.samplers.ddim(Schedule.linear(), 100),
    "dpmpp_2m, 60 steps": paradiff.samplers.dpmpp_2m(Schedule.linear(), 60),
    "flow_euler, 60 steps": paradiff.samplers.flow_euler(60, shift=3.0),
}

# Presets as they are, and with options that change what is computed, beside those of `problems.METHODS`.
PRESETS: dict[str, Callable[[Table], object]] = {
    "jacobi, window 8": lambda table: paradiff.jacobi(8),
    "paradigms": lambda table: paradiff.paradigms(),
    "parasolver, window 8": lambda table: paradiff.parasolver(8),
    "parasolver, stride 2": lambda table: paradiff.parasolver(stride=2, warmup=2),
    "quasi-Newton, window 8": lambda table: paradiff.quasi_newton(8),
    "quasi-Newton": lambda table: paradiff.quasi_newton(),
    "chords": lambda table: paradiff.chords(),
    "chords, 4 cores, answer 2": lambda table: paradiff.chords(4, answers=2),
    "quasi-DEER": lambda table: paradiff.quasi_deer(),
    "quasi-DEER, window 8, 2 probes": lambda table: paradiff.quasi_deer(8, probes=2),
    "parataa": lambda table: paradiff.parataa(),
    "parataa, window 8, order 4": lambda table: paradiff.parataa(8, 1e-2, order=4, history=2),
    "piadm": lambda table: piadm(table)(3),
    "piadm, 4 sweeps": lambda table: piadm(table)(3, 4),
    "srds": lambda table: paradiff.srds(),
    "srds, batched, 2 iterations": lambda table: paradiff.srds(3, ordering="batched", iterations=2),
    "srds, two step, rule change": lambda table: paradiff.srds(4, "two step", rule="change"),
    "srds, window 2, 3 rows": lambda table: paradiff.srds(4, window=2, rows=3),
    "srds, 2 coarse steps, rule sample": lambda table: paradiff.srds(3, 2, rule="sample"),
    "srds, by a slope": lambda table: paradiff.srds(3, paradiff.slopes.freeze_clean_data),
    "collocation": lambda table: paradiff.collocation(),
    "collocation, window 5": lambda table: paradiff.collocation(window=5),
    "collocation, 8 nodes, order 1": lambda table: paradiff.collocation(8, order=1, max_nodes=table.steps),
    "collocation, exact": lambda table: paradiff.collocation(exact=True),
}


def network(x: Tensor, t: Tensor) -> Tensor:
    """A nonlinear network, bounded, and entry by entry; its answer to the state changes along the chain."""
    t = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(0.7 * x + 0.1 * t / 1000) + 0.3 * torch.cos(t / 150) * torch.sin(x)


# Systems that amplify the last digit: counts differ between processors, or the sample does by more than NOISE.
UNSTEADY = {
    "ddpm, 200 steps | collocation, 8 nodes, order 1",
    "ddpm, 200 steps | collocation, window 5",
    "dpmpp_2m restarted | collocation",
    "dpmpp_2m restarted | collocation, window 5",
    "dpmpp_2m restarted | collocation, exact",
}

# Their sweeps do not converge, and the last digit of a matrix product says when they are handed over: 74 rounds, 101 with the
# kernels of torch 2.4, 108 with MKL_CBWR=COMPATIBLE. The samples are the same; the counts are not compared.
COUNTED_BY_CHANCE = {"ddpm, 200 steps | collocation", "ddpm, 200 steps | collocation, exact"}


def stopped(method: WindowMethod) -> WindowMethod:
    """The method with a small tolerance where it has none, so that its counts do not hang on the last digit."""
    if method.tolerance > 0 or method.window == 1 or method.sweeps is not None:
        return method
    return dataclasses.replace(method, tolerance=TIGHT)


def cases() -> dict[str, tuple[Table, Callable[[Table], object]]]:
    """Table and method of every entry, by its name."""
    short = {f"{t} | {m}": (TABLES[t], lambda table, m=m: stopped(METHODS[m](table))) for t in TABLES for m in METHODS}
    presets = {
        f"{t} | {m}": (table, PRESETS[m])
        for t, table in (TABLES | LONG).items()
        for m in PRESETS
        if not m.startswith("chords") or (table.band == 1 and not table.stochastic)
    }
    return {name: case for name, case in (short | presets).items() if name not in UNSTEADY}


def solve(table: Table, method: Callable[[Table], object]) -> Solution:
    """The solution in float64 for two seeds."""
    return paradiff.sample(network, table, Keyed(SHAPE, SEEDS), method(table), dtype=torch.float64)


def offset_of(values: Tensor) -> int:
    """Sixteenths of UNIT by which to shift, so that every value stays far from the places where its rounding changes."""
    parts = values.flatten() / UNIT
    distance = [float(((parts + k / 16) % 1 - 0.5).abs().amin()) for k in range(16)]
    assert max(distance) * UNIT > 4 * NOISE
    return distance.index(max(distance))


def hashed(values: Tensor, offset: int) -> str:
    whole = torch.floor(values.flatten() / UNIT + offset / 16 + 0.5).to(torch.int64)
    return hashlib.sha256(str(whole.tolist()).encode()).hexdigest()[:16]


def entry(found: Solution) -> list[object]:
    """What is recorded of a solution: rounds, evaluations, offset and hash."""
    offset = offset_of(found.sample)
    return [found.rounds, found.evaluations, offset, hashed(found.sample, offset)]


def main() -> None:
    torch.set_num_threads(1)
    lines = [f"{json.dumps(name)}: {json.dumps(entry(solve(*case)))}" for name, case in cases().items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

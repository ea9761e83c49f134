# SPDX-License-Identifier: Apache-2.0
"""`torch.set_default_dtype` in a script: tables, noises and runs are of their own dtypes all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from problems import METHODS, SHAPE, TABLES, fitted, network
from torch import Tensor

from paradiff import Keyed, Recorded, Schedule, Table, chords, collocation, quasi_deer, sample, solve, srds
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler, euler_ancestral, flow_euler, heun
from paradiff.solver import drive
from paradiff.solver.protocol import Batch, Method

OTHERS: dict[str, Callable[[], Method]] = {
    "srds": lambda: srds(3),
    "srds, two-step": lambda: srds(3, "two step", window=2),
    "collocation": collocation,
    "collocation, exact": lambda: collocation(6, exact=True),
    "quasi-DEER": quasi_deer,
    "chords": lambda: chords(3),
}
LINEAR = Schedule.linear()
MAKERS: dict[str, Callable[[], Table]] = {
    "ddim": lambda: ddim(LINEAR, 8),
    "ddpm": lambda: ddpm(LINEAR, 8),
    "dpmpp_2m": lambda: dpmpp_2m(LINEAR, 8, karras=True),
    "euler": lambda: euler(LINEAR, 8),
    "euler_ancestral": lambda: euler_ancestral(LINEAR, 8),
    "heun": lambda: heun(LINEAR, 8),
    "flow_euler": lambda: flow_euler(8, shift=3.0),
}


@contextmanager
def float64_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_methods_sample_as_without_it(name: str, dtype: torch.dtype) -> None:
    table, noise = TABLES["ddim" if name == "chords" else "ddpm"], Keyed(SHAPE, 0, 2)

    def found() -> tuple[Tensor, object]:
        method = OTHERS[name]() if name in OTHERS else fitted(METHODS[name](table), table, 5)
        solution = sample(network, table, noise, method, dtype=dtype)
        return solution.sample, solution.error_estimates

    wanted = found()
    with float64_default():
        other = found()
    assert other[0].dtype is dtype
    assert torch.equal(other[0], wanted[0])
    assert other[1] == wanted[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solve_yields_states_of_the_runs_dtype(dtype: torch.dtype) -> None:
    seen: set[torch.dtype] = set()

    def evaluate(batch: Batch) -> Tensor:
        seen.add(batch.x.dtype)
        return network(batch.x, batch.t)

    with float64_default():
        found = drive(solve(TABLES["ddpm"], Keyed(SHAPE, 0), OTHERS["collocation"](), dtype=dtype), evaluate)
    assert seen == {dtype} == {found.sample.dtype}


@pytest.mark.parametrize("name", MAKERS)
def test_tables_are_made_as_without_it(name: str) -> None:
    wanted = MAKERS[name]()
    with float64_default():
        found = MAKERS[name]()
    for part in ("a", "b", "c", "alpha", "sigma", "t", "scale"):
        assert torch.equal(getattr(found, part), getattr(wanted, part))


def test_the_draws_of_a_generator_are_those_of_a_pipeline_all_the_same() -> None:
    def start() -> Tensor:
        return Recorded(SHAPE, [torch.Generator().manual_seed(3)]).start(0)

    wanted = start()
    with float64_default():
        assert torch.equal(start(), wanted)

# SPDX-License-Identifier: Apache-2.0
"""One sample's window: what is exact after how many sweeps, what it holds, when it waits, and what it does about overflow."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from problems import (
    EXACT,
    METHODS,
    SHAPE,
    TABLES,
    arbitrary,
    chain,
    ends,
    gap,
    host_reads,
    network,
    run,
    sweep,
    uneven,
    window_of,
)
from torch import Tensor

from paradiff import Evaluator, Keyed, Recorded, Schedule, Table, paradigms, parasolver, sample
from paradiff.chain.slope import freeze_epsilon, identity
from paradiff.methods import Blocks, WindowMethod, underdamped_langevin
from paradiff.methods.window.solver import WindowSolver
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler, heun
from paradiff.solver.protocol import Query


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "sequential"])
def test_after_k_sweeps_the_first_k_nodes_are_exact(name: str, method: str) -> None:
    table = TABLES[name]
    given = dataclasses.replace(METHODS[method](table), warmup=0)
    if not isinstance(given.stride, int):
        given = dataclasses.replace(given, stride=uneven(table, 0))
    states, window = chain(network, table, Keyed(SHAPE)), window_of(table, given)
    wanted = states[given.edges(table)[1 : window.hi + 1]]  # all nodes, or those of the first block
    for k in range(1, len(wanted) + 1):
        sweep(window)
        assert gap(ends(window)[:k], wanted[:k]) < EXACT, f"after {k} sweeps"


@pytest.mark.parametrize("stride", [2, 3, 4])
def test_outputs_that_nodes_are_filled_with_are_those_of_the_frozen_clean_data(stride: int) -> None:
    table = dpmpp_2m(Schedule.linear(), 24)
    window = window_of(table, parasolver(3, 0.0, stride=stride))
    for round in range(4):  # the first fill knows no clean data
        norms = sweep(window, lambda x, t: constant_clean(table, x, t))
        last = window.hi
        window.advance(norms, round)
        nodes = torch.arange(window.setup.edges[window.hi - 1], window.setup.edges[window.hi])
        states, outputs = window.x[-1 - stride : -1], window.m[-stride:]
        assert window.hi == last or gap(outputs, constant_clean(table, states, table.t[nodes])) < EXACT


def constant_clean(table: Table, x: Tensor, t: Tensor) -> Tensor:
    """A network whose clean-data estimate is the same everywhere."""
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    places = [int((table.t[:-1] - time).abs().argmin()) for time in t]
    p, q = (values[places].view(-1, 1, 1) for values in (table.p, table.q))
    return (clean - p * x) / q


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("make", [ddpm, dpmpp_2m, heun])
def test_memory_is_of_the_size_of_the_window(make: object, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    width, steps, largest = 8, 200, Counter()
    table = make(Schedule.linear(), steps // 2 if make is heun else steps)
    ask = WindowSolver.ask

    def watched(window: WindowSolver) -> Query:
        for name, value in vars(window).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                # Views count with all that they keep alive.
                states = value.untyped_storage().nbytes() / (value.element_size() * 6)
                largest[name] = max(largest[name], states)
        return ask(window)

    monkeypatch.setattr(WindowSolver, "ask", watched)
    noise = Recorded(SHAPE, torch.Generator().manual_seed(0))
    sample(network, table, noise, parasolver(width, stride=stride, tolerance=1e-2))
    assert largest["x"] == width * stride + table.band
    assert max(largest.values()) <= width * stride + table.band, largest
    # The noise source keeps its last stretches, and one generator state of 5 kB for every 16 nodes.
    assert len(noise._kept) <= noise.STRETCHES


BLOCKED = [
    WindowMethod("in turn", freeze_epsilon, blocks=Blocks(3), predictor="copy", rule="sweeps", sweeps=2),
    WindowMethod("in flight", blocks=Blocks(4, stagger=1), tolerance=0.1),
]


@pytest.mark.parametrize("method", [paradigms(6), parasolver(6), parasolver(4, stride=3), parasolver(1), *BLOCKED])
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "heun", "euler", "ddim clipped"])
def test_the_host_reads_the_states_once_a_round(name: str, method: WindowMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = host_reads(monkeypatch)
    found = run(TABLES[name], method, samples=3, dtype=torch.float32)
    assert +reads == {"tolist": len({s.round for s in found.history})}
    assert reads["tolist"] <= found.rounds


@pytest.mark.parametrize("name", ["ddpm", "euler", "ddim clipped"])
def test_so_it_does_with_a_corrector(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = WindowMethod("corrected", blocks=Blocks(3), tolerance=0.1, corrector=underdamped_langevin(3, 2))
    test_the_host_reads_the_states_once_a_round(name, method, monkeypatch)


@pytest.mark.parametrize("method", ["sequential", "paradigms", "parasolver", "parasolver, stride 3", "zero from linear"])
@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "heun"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_output_that_is_not_finite_on_the_chain_is_named(name: str, method: str, bad: float) -> None:
    table, node = TABLES[name], 5

    def broken(x: Tensor, t: Tensor, k: Tensor) -> Tensor:
        hit = (t.double() == table.t[node]) & (k == 1)
        return torch.where(hit.view(-1, 1, 1), bad, network(x, t))

    evaluator = Evaluator(broken, conditioning={"k": torch.arange(3)})
    now = METHODS[method](table)
    edges = now.edges(table)
    # The sub-interval that holds the node; heun's nodes 5 and 6 share their time, and both are hit.
    first = max(edge for edge in edges if edge <= node)
    message = rf"sample 1 is not finite after node {first} \(time {float(table.t[first]):g}\), .* the model returned NaN or"
    with pytest.raises(ValueError, match=message):
        sample(evaluator, table, Keyed(SHAPE, samples=3), now, dtype=torch.float64)


def fragile(bad: float, limit: float = 6.0) -> object:
    """A network that fails on states larger than any of the chain's."""

    def fails(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x.abs().amax((1, 2), keepdim=True) > limit, bad, network(x, t))

    return fails


FRAGILE = {
    "copy": paradigms(20, 0.0),
    "linear": WindowMethod("", identity, 20, predictor="linear", tolerance=0.0),
    "clean": parasolver(20, 0.0),
    "wild slope": WindowMethod("", lambda table: 1.5 * arbitrary(table), 20, tolerance=0.0),
    "growing slope": WindowMethod("", lambda table: torch.full_like(table.c, 3.0), 10, tolerance=0.0),
    "growing slope, stride": WindowMethod("", lambda table: torch.full_like(table.c, 3.0), 6, 3, tolerance=0.0),
}


@pytest.mark.parametrize("method", FRAGILE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("make", [euler, heun])
def test_overflow_off_the_chain_is_salvaged(method: str, bad: float, make: object) -> None:
    table, network_ = make(Schedule.scaled_linear(), 40), fragile(bad)
    wanted = chain(network_, table, Keyed(SHAPE))[-1]
    assert wanted.isfinite().all()
    found = run(table, FRAGILE[method], network_)
    assert gap(found.sample[0], wanted) < 1e-10  # Slopes of up to 3 over 20 nodes enlarge roundings of 1e-16.
    assert found.rounds <= len(FRAGILE[method].edges(table)) * 3
    if make is euler and method in ("copy", "growing slope"):
        assert any(torch.inf in s.change for s in found.history), "nothing overflowed, so nothing was shown"


def test_float32_overflow_is_salvaged() -> None:
    table = euler(Schedule.scaled_linear(), 40)
    wild = WindowMethod("", lambda table: torch.full_like(table.c, -1e4), 20, tolerance=0.0)
    found = run(table, wild, dtype=torch.float32)
    assert any(torch.inf in s.change for s in found.history)
    # Float32, 40 steps.
    assert gap(found.sample[0], chain(network, table, Keyed(SHAPE))[-1]) < 1e-5


@pytest.mark.usefixtures("samples_of_any_size")
def test_one_overflow_costs_a_few_rounds_and_no_certificate() -> None:
    table, calls = ddim(Schedule.linear(), 50), Counter()

    def once(bad: float) -> object:
        def fails(x: Tensor, t: Tensor) -> Tensor:
            calls["all"] += 1
            m = network(x, t)
            if calls["all"] == 3:
                m[4:] = bad
            return m

        calls.clear()
        return fails

    plain = run(table, parasolver(20, 4e-3))
    for bad in (torch.nan, torch.inf, 1e200):
        found = run(table, parasolver(20, 4e-3), once(bad))
        assert found.rounds <= plain.rounds + 4
        assert found.estimated_error <= max(4e-3, 1.1 * plain.estimated_error)
        # The root mean square of the error is at most the tolerance; a single entry of six may hold all of it.
        assert gap(found.sample, plain.sample) < 2 * 4e-3 * 6**0.5

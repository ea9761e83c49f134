# SPDX-License-Identifier: Apache-2.0
"""Slices of tables: the tail of a chain from given states on, with the whole chain's noises."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from problems import network
from torch import Tensor

import paradiff
from paradiff import Keyed, Recorded, Table, collocation, quasi_newton, sequential, srds
from paradiff.chain import Noise
from paradiff.chain.draws import Draws
from paradiff.samplers.exploding import euler_ancestral, heun
from paradiff.samplers.preserving import ddim, ddpm, dpmpp_2m
from paradiff.samplers.schedule import Schedule
from paradiff.solver import drive

SHAPE = (2, 3)


TWO_A_STEP = Draws("TwoAStep", counts=(2,) * 20, terms=tuple(((2 * i, 0.6), (2 * i + 1, 0.8)) for i in range(20)))
TABLES = {
    "ddim": ddim(Schedule.linear(), 20),
    "ddpm": ddpm(Schedule.linear(), 20),
    "euler_ancestral": euler_ancestral(Schedule.scaled_linear(), 20),
    "heun": heun(Schedule.scaled_linear(), 10),
    "two draws a step": dataclasses.replace(ddpm(Schedule.linear(), 20), draws=TWO_A_STEP),
}
NOISES = {
    "keyed": lambda: Keyed(SHAPE, 7, samples=2),
    "recorded": lambda: Recorded(SHAPE, [torch.Generator().manual_seed(s) for s in (3, 4)]),
}


class Only:
    """One sample of a source of noise."""

    samples, shape = 1, SHAPE

    def __init__(self, noise: Noise, k: int) -> None:
        self._noise, self._k = noise, k

    def start(self, sample: int) -> Tensor:
        return self._noise.start(self._k)

    def draw(self, sample: int, nodes: range) -> Tensor:
        return self._noise.draw(self._k, nodes)


def states(table: Table, noise: Noise) -> Tensor:
    """`[N+1, B, ...]` the states of the plain loop."""
    own = noise.along(table.draws) if isinstance(noise, Recorded) else noise
    walked = []
    for k in range(noise.samples):
        found = [noise.start(k) * table.start_scale]
        rounds = paradiff.solve(table, Only(own, k), sequential(), on_final=lambda node, x, found=found: found.extend(x))
        drive(rounds, paradiff.Evaluator(network))
        walked.append(torch.stack(found))
    return torch.stack(walked, 1)


@pytest.mark.parametrize("source", NOISES)
@pytest.mark.parametrize("name", TABLES)
def test_the_tail_of_a_chain_is_the_loop_s_own_bit_for_bit(name: str, source: str) -> None:
    table, noise = TABLES[name], NOISES[source]()
    walked = states(table, noise)
    whole = paradiff.sample(network, table, noise, sequential()).sample
    assert torch.equal(walked[-1], whole)
    for begin in (table.restarts[1], table.restarts[len(table.restarts) // 2], table.restarts[-2]):
        tail = table[begin:]
        assert tail.steps == len(tail) == table.steps - begin
        assert tail.first == begin
        found = paradiff.sample(network, tail, noise, sequential(), start=walked[begin])
        assert torch.equal(found.sample, whole)
        assert torch.equal(table[begin - table.steps :].c, tail.c)  # a negative index counts from the end


@pytest.mark.parametrize("method", [quasi_newton(8), srds(), collocation()], ids=lambda m: m.name)
def test_methods_solve_a_slice(method: paradiff.Method) -> None:
    table, noise = ddpm(Schedule.linear(), 100), Keyed(SHAPE, 7, samples=2)
    start = states(table, noise)[70]
    plain = paradiff.sample(network, table[70:], noise, sequential(), start=start).sample
    found = paradiff.sample(network, table[70:], noise, method, start=start)
    assert (found.sample - plain).square().mean().sqrt() < 4e-3  # the methods' tolerance


def test_a_slice_of_a_slice_and_the_head_of_a_chain() -> None:
    table, noise = TABLES["ddpm"], NOISES["keyed"]()
    walked = states(table, noise)
    assert table[5:][5:] == table[10:]
    assert table[:] is table
    assert table[10:].first == 10
    assert "from node 10 of its chain on" in repr(table[10:])
    head = paradiff.sample(network, table[:10], noise, sequential()).sample
    assert torch.equal(head, walked[10])
    middle = paradiff.sample(network, table[4:10], noise, sequential(), start=walked[4]).sample
    assert torch.equal(middle, walked[10])


def test_what_is_no_slice_of_steps_is_refused() -> None:
    table = TABLES["ddpm"]
    for steps, text in (
        (slice(20, None), r"the slice \[20:\] of table 'ddpm' is empty: the chain has 20 steps; keep one at least"),
        (slice(5, 5), r"the slice \[5:5\] of table 'ddpm' is empty"),
        (slice(0, 20, 2), r"a table was sliced with a step of 2; its steps follow each other"),
        (slice(None, None, -1), r"a table was sliced with a step of -1"),
        (slice(1.5, None), r"the begin of a table's slice is 1.5; it must be a whole number, or left out"),
        (slice(True, None), r"the begin of a table's slice is True"),
        (3, r"a table was asked for 3; give a slice of its 20 steps, such as table\[70:\]"),
        ("a", r"a table was asked for 'a'; give a slice"),
    ):
        with pytest.raises(ValueError, match=text):
            table[steps]  # pyright: ignore[reportArgumentType]
    two = TABLES["heun"]
    with pytest.raises(ValueError, match=r"begins at node 7, where a step reads states before it; the nearest .* is [68]$"):
        two[7:]
    with pytest.raises(ValueError, match=r"begins at node 5, where a step reads states before it"):
        dpmpp_2m(Schedule.linear(), 20)[5:]


def test_a_slice_needs_states_to_begin_from() -> None:
    table = TABLES["ddpm"]
    with pytest.raises(ValueError, match=r"table 'ddpm' begins at node 5 of its chain, .* a tensor of shape \(2, 2, 3\)$"):
        paradiff.sample(network, table[5:], NOISES["keyed"](), sequential())
    with pytest.raises(ValueError, match=r"start has shape \(1, 2, 3\); the noise has \(2, 2, 3\)"):
        paradiff.sample(network, table[5:], NOISES["keyed"](), sequential(), start=torch.zeros(1, *SHAPE))

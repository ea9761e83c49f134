# SPDX-License-Identifier: Apache-2.0
"""A collocation system is the fine chain with interpolated forcings: against plain walks of the fine chain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paradiff import Keyed, Schedule, Table
from paradiff.methods.collocation.control import DefectControl
from paradiff.methods.collocation.defect import DoubledIntervals, directions, interpolation_defects, sensitivity
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.system import CollocationSystem, draw, noise_states
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler_ancestral, flow_euler, heun

TABLES = {
    "ddim": ddim(Schedule.linear(), 40),
    "ddim eta": ddim(Schedule.linear(), 40, eta=0.5),
    "ddpm": ddpm(Schedule.linear(), 40),
    "euler_ancestral": euler_ancestral(Schedule.scaled_linear(), 40),
    "heun": heun(Schedule.scaled_linear(), 20),
    "dpmpp_2m": dpmpp_2m(Schedule.linear(), 40),
    "flow_euler": flow_euler(40),
}
VARIANCE = 0.25
POINTS = [0, 2, 4, 10, 16, 24, 30, 38]  # where a two-stage sampler starts afresh


def system_of(name: str, order: int) -> CollocationSystem:
    table = TABLES[name]
    return CollocationSystem(Recurrence(table, VARIANCE), [*POINTS, table.steps], order)


def walk(table: Table, x0: Tensor, forcings: Tensor, noise: Keyed | None = None) -> list[Tensor]:
    """The fine chain whose clean-data estimate is u/nu + g x at every node, step by step."""
    x = [x0]
    for i in range(table.steps):
        new = torch.zeros_like(x0)
        if noise is not None:
            new = table.c[i] * noise.draw(0, range(i, i + 1))[0].double()
        for j in range(min(table.band, i + 1)):
            alpha, sigma = table.alpha[i - j], table.sigma[i - j]
            total = alpha**2 * VARIANCE + sigma**2
            clean = forcings[i - j] * sigma**2 / total + alpha * VARIANCE / total * x[i - j]
            m = (clean - table.p[i - j] * x[i - j]) / table.q[i - j]
            new = new + table.a[i, j] * x[i - j] + table.b[i, j] * m
        x.append(new)
    return x


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_states_and_sample_are_those_of_the_fine_chain_with_interpolated_forcings(name: str, order: int) -> None:
    table, system = TABLES[name], system_of(name, order)
    noise = Keyed((5,), 3)
    u, x0 = random(len(system.intervals), 5), random(5, seed=1)
    wanted = walk(table, x0, system.interpolation @ u, noise if table.stochastic else None)
    found = system.initial[:, None] * x0 + system.influence @ u
    if table.stochastic:
        found = found + system.noises([draw(g, noise, 0) for g in system.intervals])
    # Noises are float32 and so are their sums; without noise all is float64.
    limit = 1e-5 if table.stochastic else 1e-11
    assert (found[-1] - wanted[-1]).abs().max() < limit
    if order:
        for k, point in enumerate(system.points[:-1]):
            assert (found[k] - wanted[point]).abs().max() < limit * max(1.0, float(wanted[point].abs().max()))


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral"])
def test_averaged_states_are_those_of_each_interval(name: str) -> None:
    table, system = TABLES[name], system_of(name, 0)
    noise = Keyed((5,), 3)
    u, x0 = random(len(system.intervals), 5), random(5, seed=1)
    states = walk(table, x0, system.interpolation @ u, noise)
    found = system.initial[:, None] * x0 + system.influence @ u + system.noises([draw(g, noise, 0) for g in system.intervals])
    for k, interval in enumerate(system.intervals):
        z = noise.draw(0, range(interval.left, interval.right)).double()
        wanted = interval.state_carry[0] * states[interval.left] + interval.state_forcing * u[k] + interval.state_noise @ z
        assert (found[k] - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_interpolation_is_exact_for_polynomials_in_log_snr(order: int) -> None:
    system = system_of("ddim", order)
    place = system.recurrence.log_snr
    for power in range(order + 1):
        values = (place / 5) ** power
        found = system.interpolation @ values[system.points[:-1]]
        assert (found - values).abs().max() < 1e-10 * float(values.abs().max())
    assert (
        system.interpolation @ ((place / 5) ** (order + 1))[system.points[:-1]] - (place / 5) ** (order + 1)
    ).abs().max() > 1e-3


def test_order_0_holds_each_intervals_own_forcing() -> None:
    system = system_of("ddpm", 0)
    for k, interval in enumerate(system.intervals):
        unit = torch.zeros(len(system.intervals), dtype=torch.float64)
        unit[k] = 1
        assert torch.equal(
            system.interpolation[interval.left : interval.right], unit.expand(interval.right - interval.left, -1)
        )


@pytest.mark.parametrize("order", [0, 1, 3])
def test_with_every_fine_node_forcings_are_not_interpolated_and_reach_later_states_only(order: int) -> None:
    table = TABLES["ddim eta"]
    system = CollocationSystem(Recurrence(table, VARIANCE), list(range(table.steps + 1)), order)
    assert torch.allclose(system.interpolation, torch.eye(table.steps, dtype=torch.float64))
    assert not system.influence[:-1].triu().any()


def test_too_few_nodes_for_the_order_are_refused() -> None:
    table = TABLES["ddim"]
    with pytest.raises(ValueError, match=r"interpolation of order 3 was asked for on 3 nodes; it needs at least 4"):
        CollocationSystem(Recurrence(table, VARIANCE), [0, 10, 20, table.steps], 3)


def test_an_intervals_noise_does_not_depend_on_what_was_drawn_before() -> None:
    recurrence = Recurrence(TABLES["ddpm"], VARIANCE)
    noise, interval = Keyed((3,), 1, 4), recurrence.interval(4, 10)
    before = draw(interval, noise, 2)
    for place in ((30, 38), (0, 2), (4, 10)):
        draw(recurrence.interval(*place), noise, 1)
    again = draw(interval, noise, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
    other = draw(interval, noise, 1)
    assert not torch.equal(before[0], other[0])


def test_intervals_of_twice_the_length_weigh_forcings_as_the_chain_does() -> None:
    table, system = TABLES["ddpm"], system_of("ddpm", 0)
    doubled = DoubledIntervals(system, DefectControl())
    assert doubled.first == [0, 2, 4, 6]
    for j, n in enumerate(doubled.first):
        assert (doubled.intervals[j].left, doubled.intervals[j].right) == (
            system.intervals[n].left,
            system.intervals[n + 1].right,
        )
        # A forcing that is the same in both intervals leaves no defect.
        assert float(doubled.weights[j].sum()) == pytest.approx(float(doubled.weight[j]), rel=1e-10)
        assert doubled.spans[j] == tuple(system.points[n : n + 3])
    assert (
        DoubledIntervals(CollocationSystem(Recurrence(table, VARIANCE), list(range(table.steps + 1)), 0), DefectControl()).first
        == []
    )


def test_the_averaged_states_of_doubled_intervals_are_those_of_the_coarser_table() -> None:
    system, noise = system_of("ddpm", 0), Keyed((3,), 4)
    doubled = DoubledIntervals(system, DefectControl())
    left = [interval.left for interval in doubled.intervals]
    coarse = CollocationSystem(system.recurrence, [*left, TABLES["ddpm"].steps], 0)
    assert coarse.nodes.tolist() == doubled.nodes.tolist()
    generator = torch.Generator().manual_seed(1)
    x0, forcings = noise.start(0).double(), torch.randn(4, 3, generator=generator, dtype=torch.float64)

    def states(table: CollocationSystem, forcings: Tensor) -> Tensor:
        return (
            table.initial[:, None] * x0
            + table.influence @ forcings
            + table.noises([draw(interval, noise, 0) for interval in table.intervals])
        )

    # With the same forcing in both halves of every interval the two tables are one chain.
    fine = forcings.repeat_interleave(2, 0)
    share = doubled.own(noise, 0) + noise_states(
        doubled.noise_weights, [draw(interval, noise, 0) for interval in system.intervals]
    )
    found = doubled.initial[:, None] * x0 + doubled.influence @ fine + share
    torch.testing.assert_close(found, states(coarse, forcings)[:-1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states(system, fine)[-1], states(coarse, forcings)[-1], rtol=1e-9, atol=1e-9)


def test_a_sample_responds_to_defects_more_strongly_before_it_is_decided_than_after() -> None:
    found = sensitivity(torch.tensor([-20.0, -2.0, 0.0, 2.0, 20.0], dtype=torch.float64), DefectControl()).tolist()
    assert found == sorted(found, reverse=True)
    assert (found[0], found[2], found[4]) == pytest.approx((3.4, 2.05, 0.7))
    doubled = DoubledIntervals(system_of("ddpm", 0), DefectControl())
    middles = [middle for _, middle, _ in doubled.spans]
    place = Recurrence(TABLES["ddpm"], VARIANCE).log_snr
    assert doubled.sensitivity.tolist() == pytest.approx(sensitivity(place[middles], DefectControl()).tolist())


def test_a_defect_is_carried_in_its_neighbours_directions_at_its_own_size() -> None:
    defects = torch.eye(6, dtype=torch.float64)[:, None] * torch.arange(1.0, 7.0, dtype=torch.float64)[:, None, None]
    several = directions(defects, 2)
    assert torch.equal(several[2], defects)
    for found in several:
        torch.testing.assert_close(found.norm(dim=2), defects.norm(dim=2))
    assert several[3][2].argmax() == 3


@pytest.mark.parametrize("order", [1, 3])
def test_the_defect_of_a_polynomial_forcing_is_zero(order: int) -> None:
    system = system_of("ddim", order)
    gone, weights = interpolation_defects(system)
    assert gone == [1, 3, 5]
    place = system.recurrence.log_snr[system.nodes] / 5
    assert (weights @ place**order).abs().max() < 1e-10 * float((place**order).abs().max())
    assert (weights @ place ** (order + 1)).abs().max() > 1e-3


def test_nothing_is_left_out_where_nodes_are_too_few() -> None:
    table = TABLES["ddim"]
    gone, weights = interpolation_defects(CollocationSystem(Recurrence(table, VARIANCE), [0, 10, 20, 30, table.steps], 3))
    assert gone == []
    assert weights.shape == (0, 4)

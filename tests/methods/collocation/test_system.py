# SPDX-License-Identifier: Apache-2.0
"""A collocation system is the fine chain with interpolated forcings: against plain walks of the fine chain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import paradiff.methods.collocation.noises
import paradiff.methods.stretch
from paradiff import Keyed, Schedule, Table
from paradiff.methods.collocation.control import DefectControl
from paradiff.methods.collocation.defect import DoubledIntervals, interpolation_defects, sensitivity
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.noises import MeshNoises
from paradiff.methods.collocation.system import CollocationSystem, noise_states
from paradiff.methods.stretch import NUMBERS
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


def states_of_noises(system: CollocationSystem, noise: Keyed) -> Tensor:
    """`[M+1, ...]` n of equation (1), for sample 0."""
    drawn = MeshNoises.of(system, None, noise, 0, torch.zeros(1, *noise.shape, dtype=torch.float64))
    found = noise_states(system.noise_weights, drawn.ends)
    if system.averaged:
        found[:-1] += drawn.averaged
    return found[:, 0]


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
        found = found + states_of_noises(system, noise)
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
    found = system.initial[:, None] * x0 + system.influence @ u + states_of_noises(system, noise)
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


@pytest.mark.parametrize("numbers", [NUMBERS, 1])
def test_a_meshs_noises_are_its_own_and_those_of_common_intervals_are_kept(
    numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (paradiff.methods.stretch, paradiff.methods.collocation.noises):
        monkeypatch.setattr(module, "NUMBERS", numbers)
    system, control = system_of("ddpm", 0), DefectControl()
    finer = CollocationSystem(system.recurrence, sorted({*system.points, 3, 17}), 0)
    noise, like = Keyed((3,), 1, 4), torch.zeros(1, 3, dtype=torch.float64)
    doubled = {mesh: DoubledIntervals(mesh, control) for mesh in (system, finer)}
    before = MeshNoises.of(system, doubled[system], noise, 2, like)
    for j, interval in enumerate(doubled[system].intervals):
        z = noise.draw(2, range(interval.left, interval.right)).double()
        torch.testing.assert_close(before.doubled[j, 0], interval.state_noise @ z)
    for k, interval in enumerate(system.intervals):
        z = noise.draw(2, range(interval.left, interval.right)).double()
        torch.testing.assert_close(before.ends[k, :, 0], interval.noise @ z)
        torch.testing.assert_close(before.averaged[k, 0], interval.state_noise @ z)
    alone = MeshNoises.of(finer, doubled[finer], noise, 2, like)
    drawn: list[int] = []
    draw = noise.draw
    monkeypatch.setattr(noise, "draw", lambda sample, nodes: (drawn.extend(nodes), draw(sample, nodes))[1])
    found = MeshNoises.of(finer, doubled[finer], noise, 2, like, before)
    for name in ("ends", "averaged", "doubled"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name))
    if numbers == 1:
        assert 0 < len(drawn) < system.points[-1]
        assert len(drawn) == len({*drawn})  # each once
    else:  # all of them were kept
        assert drawn == []
    other = MeshNoises.of(system, doubled[system], noise, 1, like)
    assert not torch.equal(before.ends, other.ends)


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
        return table.initial[:, None] * x0 + table.influence @ forcings + states_of_noises(table, noise)

    # With the same forcing in both halves of every interval the two tables are one chain.
    fine = forcings.repeat_interleave(2, 0)
    drawn = MeshNoises.of(system, doubled, noise, 0, torch.zeros(1, 3, dtype=torch.float64))
    share = (drawn.doubled + noise_states(doubled.noise_weights, drawn.ends))[:, 0]
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

"""A sparse table is the fine chain with interpolated drives: against plain walks of the fine chain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paradiff import Keyed, Schedule, Table, ddim, ddpm, dpmpp_2m, euler_ancestral, flow_euler, heun
from paradiff.methods.collocation.control import DefectControl
from paradiff.methods.collocation.defect import DoubledIntervals, answer, directions, left_out
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.system import CollocationSystem, draw, spread

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
EDGES = [0, 2, 4, 10, 16, 24, 30, 38]  # where a two-stage sampler starts afresh


def sparse_of(name: str, order: int) -> CollocationSystem:
    table = TABLES[name]
    return CollocationSystem(Recurrence(table, VARIANCE), [*EDGES, table.steps], order)


def walk(table: Table, x0: Tensor, drives: Tensor, noise: Keyed | None = None) -> list[Tensor]:
    """The fine chain whose clean-data estimate is u/nu + g x at every node, step by step."""
    x = [x0]
    for i in range(table.steps):
        new = torch.zeros_like(x0)
        if noise is not None:
            new = table.c[i] * noise.draw(0, range(i, i + 1))[0].double()
        for j in range(min(table.band, i + 1)):
            alpha, sigma = table.alpha[i - j], table.sigma[i - j]
            total = alpha**2 * VARIANCE + sigma**2
            clean = drives[i - j] * sigma**2 / total + alpha * VARIANCE / total * x[i - j]
            m = (clean - table.p[i - j] * x[i - j]) / table.q[i - j]
            new = new + table.a[i, j] * x[i - j] + table.b[i, j] * m
        x.append(new)
    return x


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_states_and_sample_are_those_of_the_fine_chain_with_interpolated_drives(name: str, order: int) -> None:
    table, sparse = TABLES[name], sparse_of(name, order)
    noise = Keyed((5,), 3)
    u, x0 = random(len(sparse.gaps), 5), random(5, seed=1)
    wanted = walk(table, x0, sparse.interpolation @ u, noise if table.stochastic else None)
    found = sparse.start[:, None] * x0 + sparse.reach @ u
    if table.stochastic:
        found = found + sparse.noises([draw(g, noise, 0) for g in sparse.gaps])
    # Noises are float32 and so are their sums; without noise all is float64.
    limit = 1e-5 if table.stochastic else 1e-11
    assert (found[-1] - wanted[-1]).abs().max() < limit
    if order:
        for k, edge in enumerate(sparse.edges[:-1]):
            assert (found[k] - wanted[edge]).abs().max() < limit * max(1.0, float(wanted[edge].abs().max()))


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral"])
def test_averaged_states_are_those_of_each_gap(name: str) -> None:
    table, sparse = TABLES[name], sparse_of(name, 0)
    noise = Keyed((5,), 3)
    u, x0 = random(len(sparse.gaps), 5), random(5, seed=1)
    states = walk(table, x0, sparse.interpolation @ u, noise)
    found = sparse.start[:, None] * x0 + sparse.reach @ u + sparse.noises([draw(g, noise, 0) for g in sparse.gaps])
    for k, gap in enumerate(sparse.gaps):
        z = noise.draw(0, range(gap.left, gap.right)).double()
        wanted = gap.state_carry[0] * states[gap.left] + gap.state_drive * u[k] + gap.state_noise @ z
        assert (found[k] - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_interpolation_is_exact_for_polynomials_in_log_snr(order: int) -> None:
    sparse = sparse_of("ddim", order)
    place = sparse.recurrence.log_snr
    for power in range(order + 1):
        values = (place / 5) ** power
        found = sparse.interpolation @ values[sparse.edges[:-1]]
        assert (found - values).abs().max() < 1e-10 * float(values.abs().max())
    assert (
        sparse.interpolation @ ((place / 5) ** (order + 1))[sparse.edges[:-1]] - (place / 5) ** (order + 1)
    ).abs().max() > 1e-3


def test_order_0_holds_each_gaps_own_drive() -> None:
    sparse = sparse_of("ddpm", 0)
    for k, gap in enumerate(sparse.gaps):
        unit = torch.zeros(len(sparse.gaps), dtype=torch.float64)
        unit[k] = 1
        assert torch.equal(sparse.interpolation[gap.left : gap.right], unit.expand(gap.right - gap.left, -1))


@pytest.mark.parametrize("order", [0, 1, 3])
def test_with_every_fine_node_drives_are_not_interpolated_and_reach_later_states_only(order: int) -> None:
    table = TABLES["ddim eta"]
    sparse = CollocationSystem(Recurrence(table, VARIANCE), list(range(table.steps + 1)), order)
    assert torch.allclose(sparse.interpolation, torch.eye(table.steps, dtype=torch.float64))
    assert not sparse.reach[:-1].triu().any()


def test_too_few_nodes_for_the_order_are_refused() -> None:
    table = TABLES["ddim"]
    with pytest.raises(ValueError, match=r"interpolation of order 3 was asked for on 3 nodes; it needs at least 4"):
        CollocationSystem(Recurrence(table, VARIANCE), [0, 10, 20, table.steps], 3)


def test_a_gaps_noise_does_not_depend_on_what_was_drawn_before() -> None:
    recurrence = Recurrence(TABLES["ddpm"], VARIANCE)
    noise, gap = Keyed((3,), 1, 4), recurrence.gap(4, 10)
    before = draw(gap, noise, 2)
    for place in ((30, 38), (0, 2), (4, 10)):
        draw(recurrence.gap(*place), noise, 1)
    again = draw(gap, noise, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
    other = draw(gap, noise, 1)
    assert not torch.equal(before[0], other[0])


def test_gaps_of_twice_the_length_weigh_drives_as_the_chain_does() -> None:
    table, sparse = TABLES["ddpm"], sparse_of("ddpm", 0)
    doubled = DoubledIntervals(sparse, DefectControl())
    assert doubled.first == [0, 2, 4, 6]
    for j, n in enumerate(doubled.first):
        assert (doubled.gaps[j].left, doubled.gaps[j].right) == (sparse.gaps[n].left, sparse.gaps[n + 1].right)
        # A drive that is the same in both gaps leaves no defect.
        assert float(doubled.weights[j].sum()) == pytest.approx(float(doubled.weight[j]), rel=1e-10)
        assert doubled.places[j] == tuple(sparse.edges[n : n + 3])
    assert (
        DoubledIntervals(CollocationSystem(Recurrence(table, VARIANCE), list(range(table.steps + 1)), 0), DefectControl()).first
        == []
    )


def test_the_averaged_states_of_doubled_gaps_are_those_of_the_coarser_table() -> None:
    sparse, noise = sparse_of("ddpm", 0), Keyed((3,), 4)
    doubled = DoubledIntervals(sparse, DefectControl())
    left = [gap.left for gap in doubled.gaps]
    coarse = CollocationSystem(sparse.recurrence, [*left, TABLES["ddpm"].steps], 0)
    assert coarse.nodes.tolist() == doubled.nodes.tolist()
    generator = torch.Generator().manual_seed(1)
    x0, drives = noise.start(0).double(), torch.randn(4, 3, generator=generator, dtype=torch.float64)

    def states(table: CollocationSystem, drives: Tensor) -> Tensor:
        return table.start[:, None] * x0 + table.reach @ drives + table.noises([draw(gap, noise, 0) for gap in table.gaps])

    # With the same drive in both halves of every gap the two tables are one chain.
    fine = drives.repeat_interleave(2, 0)
    share = doubled.own(noise, 0) + spread(doubled.spread, [draw(gap, noise, 0) for gap in sparse.gaps])
    found = doubled.start[:, None] * x0 + doubled.reach @ fine + share
    torch.testing.assert_close(found, states(coarse, drives)[:-1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states(sparse, fine)[-1], states(coarse, drives)[-1], rtol=1e-9, atol=1e-9)


def test_a_sample_answers_to_defects_more_strongly_before_it_is_decided_than_after() -> None:
    found = answer(torch.tensor([-20.0, -2.0, 0.0, 2.0, 20.0], dtype=torch.float64), DefectControl()).tolist()
    assert found == sorted(found, reverse=True)
    assert (found[0], found[2], found[4]) == pytest.approx((3.4, 2.05, 0.7))
    doubled = DoubledIntervals(sparse_of("ddpm", 0), DefectControl())
    middles = [middle for _, middle, _ in doubled.places]
    place = Recurrence(TABLES["ddpm"], VARIANCE).log_snr
    assert doubled.answer.tolist() == pytest.approx(answer(place[middles], DefectControl()).tolist())


def test_a_defect_is_carried_in_its_neighbours_directions_at_its_own_size() -> None:
    defects = torch.eye(6, dtype=torch.float64)[:, None] * torch.arange(1.0, 7.0, dtype=torch.float64)[:, None, None]
    several = directions(defects, 2)
    assert torch.equal(several[2], defects)
    for found in several:
        torch.testing.assert_close(found.norm(dim=2), defects.norm(dim=2))
    assert several[3][2].argmax() == 3


@pytest.mark.parametrize("order", [1, 3])
def test_the_defect_of_a_polynomial_drive_is_zero(order: int) -> None:
    sparse = sparse_of("ddim", order)
    gone, weights = left_out(sparse)
    assert gone == [1, 3, 5]
    place = sparse.recurrence.log_snr[sparse.nodes] / 5
    assert (weights @ place**order).abs().max() < 1e-10 * float((place**order).abs().max())
    assert (weights @ place ** (order + 1)).abs().max() > 1e-3


def test_nothing_is_left_out_where_nodes_are_too_few() -> None:
    table = TABLES["ddim"]
    gone, weights = left_out(CollocationSystem(Recurrence(table, VARIANCE), [0, 10, 20, 30, table.steps], 3))
    assert gone == []
    assert weights.shape == (0, 4)

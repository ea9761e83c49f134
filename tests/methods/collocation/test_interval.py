# SPDX-License-Identifier: Apache-2.0
"""An interval's eliminated form is the plain recurrence, and its averaged state the plain weighted average."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from paradiff import Schedule, Table
from paradiff.methods.collocation.interval import Interval, Recurrence, finite_log_snr
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler, euler_ancestral, flow_euler, heun

TABLES = {
    "ddim": ddim(Schedule.linear(), 30),
    "ddim eta": ddim(Schedule.scaled_linear(), 30, eta=0.5, prediction="v"),
    "ddim pure noise": ddim(Schedule.linear(rescale_zero_snr=True), 30, spacing="trailing", prediction="v", eta=0.5),
    "ddpm": ddpm(Schedule.linear(), 30),
    "euler": euler(Schedule.scaled_linear(), 30),
    "euler_ancestral": euler_ancestral(Schedule.scaled_linear(), 30),
    "heun": heun(Schedule.scaled_linear(), 16),
    "dpmpp_2m": dpmpp_2m(Schedule.linear(), 30),
    "flow_euler": flow_euler(30, shift=3.0),
}
STOCHASTIC = [name for name, table in TABLES.items() if table.stochastic]
INTERVALS = [(0, 1), (0, 7), (4, 5), (6, 8), (2, 20), (15, 29), (25, 30), (29, 30)]
VARIANCE = 0.3
ROUNDING = 1e-12

each_table = pytest.mark.parametrize("name", TABLES)
each_stochastic = pytest.mark.parametrize("name", STOCHASTIC)
each_interval = pytest.mark.parametrize("place", INTERVALS, ids=str)


def random(count: int, seed: int) -> list[float]:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def gaussian(table: Table, node: int) -> tuple[float, float]:
    """g and nu of a node, from the levels."""
    alpha, sigma = float(table.alpha[node]), float(table.sigma[node])
    total = alpha**2 * VARIANCE + sigma**2
    return alpha * VARIANCE / total, total / sigma**2


def walked(
    table: Table,
    interval: Interval,
    past: Sequence[float],
    forcings: dict[int, float],
    z: Sequence[float],
    clean: float | None = None,
) -> dict[int, float]:
    """Fine states from the interval's left point on, one step after the other, in plain numbers.

    Args:
        table: The sampler.
        interval: The interval.
        past: x[l], x[l-1] ...
        forcings: u at fine nodes.
        z: Noises from node l on.
        clean: The clean-data estimate, if it is held fixed; forcings are then not read.
    """
    x = {interval.left - p: value for p, value in enumerate(past)}
    for i in range(interval.left, interval.right):
        new = float(table.c[i]) * z[i - interval.left]
        for j in range(min(table.band, i + 1)):
            g, nu = gaussian(table, i - j)
            estimate = forcings[i - j] / nu + g * x[i - j] if clean is None else clean
            m = (estimate - float(table.p[i - j]) * x[i - j]) / float(table.q[i - j])
            new += float(table.a[i, j]) * x[i - j] + float(table.b[i, j]) * m
        x[i + 1] = new
    return x


def given(table: Table, interval: Interval, seed: int) -> tuple[list[float], dict[int, float], list[float]]:
    """States, forcings and noises; what is before node 0 is nothing."""
    past = [v if interval.left - p >= 0 else 0.0 for p, v in enumerate(random(table.band, seed))]
    nodes = range(interval.left - table.band + 1, interval.right)
    forcings = {n: v if n >= 0 else 0.0 for n, v in zip(nodes, random(len(nodes), seed + 1), strict=True)}
    return past, forcings, random(interval.right - interval.left, seed + 2)


def eliminated(interval: Interval, past: list[float], forcings: dict[int, float], z: list[float]) -> Tensor:
    x, u, noise = (torch.tensor(v, dtype=torch.float64) for v in (past, list(forcings.values()), z))
    return interval.carry @ x + interval.forcing @ u + interval.noise @ noise


def size(interval: Interval, past: list[float], forcings: dict[int, float], z: list[float]) -> Tensor:
    """What the terms of an interval's end states come to without their signs."""
    x, u, noise = (torch.tensor(v, dtype=torch.float64).abs() for v in (past, list(forcings.values()), z))
    return interval.carry.abs() @ x + interval.forcing.abs() @ u + interval.noise.abs() @ noise


@each_table
@each_interval
def test_the_eliminated_interval_is_the_plain_recurrence(name: str, place: tuple[int, int]) -> None:
    table = TABLES[name]
    interval = Recurrence(table, VARIANCE).interval(*place)
    assert (interval.left, interval.right) == place
    for seed in range(3):
        past, forcings, z = given(table, interval, seed)
        x = walked(table, interval, past, forcings, z)
        wanted = torch.tensor([x[interval.right - p] for p in range(table.band)], dtype=torch.float64)
        found = eliminated(interval, past, forcings, z)
        assert ((found - wanted).abs() <= ROUNDING * size(interval, past, forcings, z).clamp(min=1e-3)).all()


@each_table
def test_an_interval_of_one_step_is_the_chain_itself(name: str) -> None:
    table = TABLES[name]
    recurrence = Recurrence(table, VARIANCE)
    for i in range(table.steps):
        interval = recurrence.interval(i, i + 1)
        assert interval.node == i
        assert interval.noise[0, 0] == table.c[i]
        assert interval.state_carry.tolist() == [1.0, *[0.0] * (table.band - 1)]
        assert interval.state_forcing == 0
        assert not interval.state_noise.any()


@each_table
def test_two_intervals_in_a_row_are_the_interval_over_both(name: str) -> None:
    table = TABLES[name]
    recurrence = Recurrence(table, VARIANCE)
    first, second, both = recurrence.interval(3, 11), recurrence.interval(11, 19), recurrence.interval(3, 19)
    past, forcings, z = given(table, both, 5)
    early = {n: u for n, u in forcings.items() if n < 11}
    late = {n: u for n, u in forcings.items() if n > 11 - table.band}
    middle = eliminated(first, past, early, z[:8])
    found = eliminated(second, middle.tolist(), late, z[8:])
    assert ((found - eliminated(both, past, forcings, z)).abs() <= ROUNDING * size(both, past, forcings, z)).all()


@pytest.mark.parametrize("name", [name for name in TABLES if name not in STOCHASTIC])
def test_a_deterministic_interval_is_evaluated_at_its_left_point(name: str) -> None:
    interval = Recurrence(TABLES[name], VARIANCE).interval(4, 20)
    assert interval.node == 4
    assert interval.state_carry[0] == 1
    assert interval.state_forcing == 0
    assert not interval.noise.any()


@each_stochastic
@pytest.mark.parametrize("place", [p for p in INTERVALS if p[1] - p[0] > 1], ids=str)
def test_the_averaged_state_is_the_plain_weighted_average(name: str, place: tuple[int, int]) -> None:
    """Weights are those of the forcings in the interval's end; the average is of alpha x/sigma^2, with the
    clean-data estimate fixed; it is then scaled, and given signal, to be a state of the node whose ratio of signal to noise it
    has."""
    table = TABLES[name]
    interval = Recurrence(table, VARIANCE).interval(*place)
    inside, still = range(interval.left, interval.right), [0.0] * (interval.right - interval.left)
    weights = []
    for n in inside:
        unit = {k: float(k == n) for k in inside}
        at_end = walked(table, interval, [0.0], unit, still)[interval.right]
        weights.append(at_end * gaussian(table, n)[1])  # of the estimate, whose forcing is nu times it
    alpha, sigma = table.alpha.tolist(), table.sigma.tolist()

    def average(x: float, clean: float, z: Sequence[float]) -> float:
        states = walked(table, interval, [x], {}, z, clean)
        scaled = [w * alpha[n] / sigma[n] ** 2 * states[n] for w, n in zip(weights, inside, strict=True)]
        return sum(scaled) / sum(weights)

    units = [[float(k == n) for k in range(len(still))] for n in range(len(still))]
    variance = average(sigma[interval.left], 0.0, still) ** 2 + sum(average(0.0, 0.0, unit) ** 2 for unit in units)
    signal = average(alpha[interval.left], 1.0, still)
    snr = {n: (alpha[n] / sigma[n]) ** 2 for n in inside if n > 0}
    assert interval.node == min(snr, key=lambda n: abs(torch.tensor(snr[n] / variance).log().item()))

    (x,), _, z = given(table, interval, 7)
    u = 0.7
    noise = torch.tensor(z, dtype=torch.float64)
    found = float(interval.state_carry[0] * x + interval.state_forcing * u + interval.state_noise @ noise)
    g, nu = gaussian(table, interval.node)
    clean = u / nu + g * found
    scale = (snr[interval.node] / variance) ** 0.5
    s = scale * average(x, clean, z) + (snr[interval.node] - scale * signal) * clean
    assert found == pytest.approx(s * sigma[interval.node] ** 2 / alpha[interval.node], rel=1e-10)


@each_stochastic
@pytest.mark.parametrize("place", [(1, 7), (2, 20), (15, 29)], ids=str)
def test_the_averaged_state_of_a_known_datum_has_the_levels_of_its_node(name: str, place: tuple[int, int]) -> None:
    table = TABLES[name]
    interval = Recurrence(table, VARIANCE).interval(*place)
    g, nu = gaussian(table, interval.node)
    datum, (alpha, sigma) = 0.8, (float(v[interval.node]) for v in (table.alpha, table.sigma))
    past = float(table.alpha[interval.left]) * datum
    forcing = nu * (datum - g * alpha * datum)
    assert float(interval.state_carry[0]) * past + interval.state_forcing * forcing == pytest.approx(alpha * datum, rel=1e-9)
    # The estimate moves with the state, so the noise is taken at an estimate that does not: y (1 - g dy/dD) there.
    fixed = 1 + interval.state_forcing * nu * g
    noise = torch.cat([interval.state_carry[:1] * table.sigma[interval.left], interval.state_noise]) / fixed
    assert float(noise.square().sum().sqrt()) == pytest.approx(sigma, rel=1e-9)


@each_stochastic
def test_an_averaged_state_has_less_noise_than_the_state_it_starts_from(name: str) -> None:
    table = TABLES[name]
    interval = Recurrence(table, VARIANCE).interval(4, 20)
    assert interval.left < interval.node < interval.right


@pytest.mark.parametrize("name", ["ddim", "ddim pure noise", "flow_euler"])
def test_log_snr_is_finite_and_increases_from_pure_noise_too(name: str) -> None:
    found = finite_log_snr(TABLES[name])
    assert torch.isfinite(found).all()
    assert (found.diff() > 0).all()


def test_an_interval_is_made_once() -> None:
    recurrence = Recurrence(TABLES["ddpm"], VARIANCE)
    assert recurrence.interval(2, 5) is recurrence.interval(2, 5)

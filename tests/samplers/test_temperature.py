# SPDX-License-Identifier: Apache-2.0
"""Chains whose noise is scaled: the loop that scales it, estimates that hold, and the levels' shortfall."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from problems import SHAPE, TABLES, network

from paradiff import Keyed, Schedule, Table, collocation, models, parasolver, quasi_newton, sample, sequential
from paradiff.chain.shortfall import coldness, shortfall
from paradiff.methods.collocation.control import ORDER_ZERO
from paradiff.methods.collocation.interval import Recurrence
from paradiff.samplers import alphafold3, ddim, ddpm, with_noise_scale


@pytest.mark.parametrize("name", ["ddpm", "ddim eta", "euler_ancestral", "dpmpp_2m"])
def test_a_step_adds_so_much_of_its_noise(name: str) -> None:
    table = TABLES[name]
    if not table.stochastic:
        with pytest.raises(ValueError, match="give the table of a sampler that adds noise"):
            with_noise_scale(table, 0.6)
        return
    cold, noise = with_noise_scale(table, 0.6), Keyed(SHAPE)

    class Less:
        """The same noise at six tenths, but at the start."""

        shape, samples = SHAPE, 1
        start = noise.start

        def draw(self, sample: int, nodes: range) -> torch.Tensor:
            return 0.6 * noise.draw(sample, nodes).double()

    found = sample(network, cold, noise, parasolver(tolerance=0.0), dtype=torch.float64).sample
    expected = sample(network, table, Less(), sequential(), dtype=torch.float64).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert with_noise_scale(table, 1.0) is table
    assert not with_noise_scale(table, 0.0).stochastic


def test_the_shortfall_is_what_levels_say_too_much() -> None:
    table = ddpm(Schedule.linear(), 100)
    assert shortfall(table) == shortfall(ddim(Schedule.linear(), 100)) == 0
    assert shortfall(dataclasses.replace(table, exact_variance=False)) == pytest.approx(0, abs=1e-9)
    assert shortfall(ddpm(Schedule.linear(), 100, variance="fixed_large")) == pytest.approx(0, abs=1e-9)
    assert shortfall(with_noise_scale(table, 0.6)) == pytest.approx(0.4, abs=1e-3)
    assert 0.5 < shortfall(alphafold3(50)) < 1


def lumps(count: int) -> models.Mixture:
    """So many Gaussians in a box of 16 dimensions."""
    means = 2 * torch.rand(count, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    return models.Mixture(torch.full((count,), 1 / count), means, torch.full((count,), 0.01))


def test_collocation_interpolates_cold_chains_and_errors_stay_below_their_estimates() -> None:
    table, noise = with_noise_scale(ddpm(Schedule.linear(), 400), 0.6), Keyed((16,), seed=list(range(12)))
    model = lumps(64).denoiser(table)
    plain = sample(model, table, noise, sequential(), check="off").sample
    found = sample(model, table, noise, collocation(), check="off")
    errors = (found.sample - plain).square().mean(1).sqrt().tolist()
    assert all(error <= e.estimated_error for error, e in zip(errors, found.error_estimates, strict=True))
    assert all(0 < e.interpolation_error < 4e-3 for e in found.error_estimates)


def test_errors_of_a_network_on_a_cold_chain_stay_below_their_estimates() -> None:
    digits = models.load("digits")
    table, noise = with_noise_scale(ddpm(Schedule.linear(), 200), 0.8), Keyed(digits.shape, seed=500)

    def epsilon(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return digits.unet(x, t).sample

    plain = sample(epsilon, table, noise, sequential(), check="off").sample
    for method in (collocation(), quasi_newton(window=32)):
        found = sample(epsilon, table, noise, method, check="off")
        errors = (found.sample - plain).square().mean((1, 2, 3)).sqrt().tolist()
        assert all(error <= e.estimated_error for error, e in zip(errors, found.error_estimates, strict=True))


@pytest.mark.parametrize(
    ("table", "order", "said"),
    [
        (with_noise_scale(ddpm(Schedule.linear(), 200), 0.3), None, "its states hold 70 % less noise than their levels say"),
        (with_noise_scale(ddim(Schedule.linear(), 200, eta=0.5), 0.6), None, "less noise than their levels say"),
        (with_noise_scale(ddpm(Schedule.linear(), 200), 0.6), 1, "its states hold 40 % less noise than their levels say"),
    ],
    ids=["colder", "not ancestral", "not averaged"],
)
def test_collocation_leaves_cold_chains_that_it_does_not_know_to_the_window_method(
    table: Table, order: int | None, said: str
) -> None:
    assert said in sample(lumps(2).denoiser(table), table, Keyed((16,)), collocation(order=order)).message


@pytest.mark.parametrize("scale", [0.3, 0.6, 0.9])
def test_a_cold_interval_is_evaluated_where_its_states_average_leaves_no_error_of_first_order(scale: float) -> None:
    """A forcing that is a quadratic of the evidence s, and a martingale at full noise, s^2 - tau, averaged over drawn paths."""
    table = with_noise_scale(ddpm(Schedule.linear(), 1000), scale)
    recurrence = Recurrence(table, 0.25)
    interval = recurrence.interval(500, 560)
    inside = slice(interval.left, interval.right)
    weights = interval.forcing[0] * recurrence.nu[inside]
    weights /= weights.sum()
    added = (recurrence.evidence[interval.left + 1 : interval.right] * table.c[interval.left : interval.right - 1])[:, None]
    draws = torch.randn(len(added), 20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    paths = torch.cat([torch.zeros(1, 20000, dtype=torch.float64), (added * draws).cumsum(0)])
    average = weights @ (paths**2 - recurrence.snr[inside][:, None])
    at = (weights @ paths) ** 2 - recurrence.snr[interval.node]
    spread = float(recurrence.snr[interval.right - 1] - recurrence.snr[interval.left])
    assert float((average - at).mean()) == pytest.approx(0, abs=0.03 * spread)


def test_estimates_of_cold_chains_are_larger_by_their_shortfall() -> None:
    table, noise = with_noise_scale(ddpm(Schedule.linear(), 400), 0.6), Keyed((16,), seed=0)
    told = []
    for safety in (ORDER_ZERO.error.cold_safety, 0.0):
        control = dataclasses.replace(ORDER_ZERO, error=dataclasses.replace(ORDER_ZERO.error, cold_safety=safety))
        method = collocation(nodes=60, max_nodes=60, tolerance=0.1, control=control)
        told += sample(lumps(8).denoiser(table), table, noise, method).error_estimates
    first, second = (e.interpolation_error for e in told)
    assert first / second == pytest.approx(1 + 0.4 * ORDER_ZERO.error.cold_safety, rel=0.02)


def test_what_is_told_of_cold_chains_is_larger_by_their_shortfall() -> None:
    table, noise = with_noise_scale(ddpm(Schedule.linear(), 400), 0.6), Keyed((16,), seed=0)
    told = []
    for cold in (0.5, 0.0):
        control = dataclasses.replace(ORDER_ZERO, error=dataclasses.replace(ORDER_ZERO.error, cold_told=cold))
        method = collocation(nodes=60, max_nodes=60, tolerance=0.1, control=control)
        told += sample(lumps(8).denoiser(table), table, noise, method).error_estimates
    first, second = (e.estimated_error for e in told)
    assert first / second == pytest.approx(1 + 0.4 * 0.5, rel=1e-3)


def test_the_first_mesh_of_a_cold_chain_has_more_nodes_while_the_chain_has_room_for_them() -> None:
    usual, cold = ((lambda steps, scale=scale: with_noise_scale(ddpm(Schedule.linear(), steps), scale)) for scale in (1.0, 0.6))
    assert collocation().count(usual(1000)) == ORDER_ZERO.nodes
    assert collocation().count(cold(1000)) == round(ORDER_ZERO.nodes * (1 + 0.4 * ORDER_ZERO.cold_nodes))
    assert collocation().count(cold(360)) == 62 < collocation().count(cold(1000))  # half of 35 % of its nodes
    assert collocation().count(cold(200)) == ORDER_ZERO.nodes
    finer = collocation(tolerance=1e-3)
    assert finer.count(cold(500)) == finer.count(usual(500))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_chains_with_all_their_noise_are_not_cold(variance: Literal["fixed_small", "fixed_large"]) -> None:
    table = ddpm(Schedule.linear(), 100, variance=variance)
    assert coldness(dataclasses.replace(table, exact_variance=False)) == 0
    assert coldness(with_noise_scale(ddpm(Schedule.linear(), 100), 0.9)) == pytest.approx(0.1, abs=1e-3)
    assert coldness(with_noise_scale(ddim(Schedule.linear(), 100, eta=0.5), 0.6)) == 0


@pytest.mark.parametrize("scale", [-0.1, float("nan"), "warm"])
def test_a_factor_that_is_none_is_refused(scale: object) -> None:
    with pytest.raises(ValueError, match="noise_scale is"):
        with_noise_scale(TABLES["ddpm"], scale)  # type: ignore[arg-type]

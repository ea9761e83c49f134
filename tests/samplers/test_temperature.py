# SPDX-License-Identifier: Apache-2.0
"""Chains whose noise is scaled: the loop that scales it, estimates that hold, and the levels' shortfall."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from problems import SHAPE, TABLES, network

from paradiff import Keyed, Schedule, collocation, models, parasolver, quasi_newton, sample, sequential
from paradiff.chain.shortfall import shortfall
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


def test_collocation_leaves_cold_chains_to_the_window_method_and_errors_stay_below_their_estimates() -> None:
    digits = models.load("digits")
    table, noise = with_noise_scale(ddpm(Schedule.linear(), 200), 0.8), Keyed(digits.shape, seed=[500, 501])

    def epsilon(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return digits.unet(x, t).sample

    plain = sample(epsilon, table, noise, sequential(), check="off").sample
    for method in (collocation(), quasi_newton(window=32)):
        found = sample(epsilon, table, noise, method, check="off")
        errors = (found.sample - plain).square().mean((1, 2, 3)).sqrt().tolist()
        assert all(error <= e.estimated_error for error, e in zip(errors, found.error_estimates, strict=True))
        if method.name == "collocation":
            assert "its states hold 20 % less noise than their levels say" in found.message


@pytest.mark.parametrize("scale", [-0.1, float("nan"), "warm"])
def test_a_factor_that_is_none_is_refused(scale: object) -> None:
    with pytest.raises(ValueError, match="noise_scale is"):
        with_noise_scale(TABLES["ddpm"], scale)  # type: ignore[arg-type]

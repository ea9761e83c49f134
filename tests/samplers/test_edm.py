# SPDX-License-Identifier: Apache-2.0
"""EDM's and AlphaFold 3's samplers: equal to loops written from the papers, with the same draws, and solved in parallel."""

from __future__ import annotations

import itertools
import math
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import paradiff
from paradiff import Keyed, Recorded, collocation, parasolver, piadm_ode, quasi_newton, sample, sequential, srds
from paradiff.samplers import alphafold3, dpmpp_2s, edm, from_scheduler
from paradiff.samplers.schedule import karras_ratios

SHAPE = (3, 8)
CENTRES = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(7))


def denoiser(x: Tensor, sigma: Any) -> Tensor:
    """The clean data D(x, sigma) of five points with a spread of 0.3 around each."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    centres = CENTRES.to(x.dtype)
    variance = sigma**2 + 0.09
    distance = ((x[:, None] - centres) ** 2).flatten(2).sum(-1)
    weight = torch.softmax(-distance / (2 * variance.flatten()[:, None]), 1)
    middle = torch.einsum("bk,k...->b...", weight, centres)
    return middle + 0.09 / variance * (x - middle)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def published(steps: int, heun: bool, churn: float, low: float, high: float, noise: float) -> Tensor:
    """Algorithm 2 of arXiv 2206.00364, from its text, in float64."""
    draw = generator()
    step = torch.arange(steps, dtype=torch.float64)
    ratios = (80 ** (1 / 7) + step / (steps - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    t = torch.cat([ratios, torch.zeros(1, dtype=torch.float64)])
    x = torch.randn(1, *SHAPE, generator=draw).double() * t[0]
    for i in range(steps):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= t[i] <= high else 0.0
        raised = t[i] + gamma * t[i]
        y = x + (raised**2 - t[i] ** 2).sqrt() * noise * torch.randn(1, *SHAPE, generator=draw).double()
        slope = (y - denoiser(y, raised)) / raised
        x = y + (t[i + 1] - raised) * slope
        if heun and i < steps - 1:
            second = (x - denoiser(x, t[i + 1])) / t[i + 1]
            x = y + (t[i + 1] - raised) * (slope + second) / 2
    return x


SETTINGS = {
    "ode": (0.0, 0.0, math.inf, 1.0),
    "churn": (40.0, 0.05, 50.0, 1.003),
    "churn from the start": (10.0, 0.0, math.inf, 1.0),
    "colder": (10.0, 0.0, math.inf, 0.6),
}


@pytest.mark.parametrize("heun", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_edm_is_the_loop_of_the_paper(name: str, heun: bool) -> None:
    churn, low, high, noise = SETTINGS[name]
    table = edm(18, solver="heun" if heun else "euler", s_churn=churn, s_min=low, s_max=high, s_noise=noise)
    assert table.steps == (35 if heun else 18)
    found = sample(denoiser, table, Recorded(SHAPE, generator()), sequential(), dtype=torch.float64)
    plain = published(18, heun, churn, low, high, noise)
    assert torch.allclose(found.sample, plain, rtol=1e-5, atol=1e-5)


def af3(steps: int) -> Tensor:
    """Algorithm 18 of AlphaFold 3's supplement without line 3, in float64."""
    draw, data = generator(), 16.0
    part = torch.arange(steps + 1, dtype=torch.float64) / steps
    c = data * (160 ** (1 / 7) + part * (4e-4 ** (1 / 7) - 160 ** (1 / 7))) ** 7
    x = c[0] * torch.randn(1, *SHAPE, generator=draw).double()
    for tau in range(1, steps + 1):
        gamma = 0.8 if c[tau] > 1.0 else 0.0
        raised = c[tau - 1] * (gamma + 1)
        y = x + 1.003 * (raised**2 - c[tau - 1] ** 2).sqrt() * torch.randn(1, *SHAPE, generator=draw).double()
        x = y + 1.5 * (c[tau] - raised) * (y - denoiser(y, raised)) / raised
    return x


def test_alphafold3_is_the_loop_of_its_supplement() -> None:
    found = sample(denoiser, alphafold3(40), Recorded(SHAPE, generator()), sequential(), dtype=torch.float64)
    assert torch.allclose(found.sample, af3(40), rtol=1e-5, atol=1e-5)


TWO_STAGE = [edm(20, s_churn=15.0), edm(20, solver="midpoint", s_churn=15.0), dpmpp_2s(20), dpmpp_2s(20, eta=1.0)]


@pytest.mark.parametrize("table", [*TWO_STAGE, edm(40, solver="euler", s_churn=30.0, s_noise=0.7), alphafold3(60)])
@pytest.mark.parametrize(
    "method", [parasolver(window=12), quasi_newton(), collocation(), srds(), parasolver(window=4, tolerance=1e-4)], ids=str
)
def test_methods_give_the_sequential_sample(table: paradiff.Table, method: Any) -> None:
    noise = Keyed(SHAPE, [5, 6, 7])
    plain = sample(denoiser, table, noise, sequential()).sample
    found = sample(denoiser, table, noise, method)
    error = (found.sample - plain).flatten(1).square().mean(1).sqrt()
    told = torch.tensor([one.estimated_error for one in found.error_estimates])
    assert bool((error <= told.clamp(min=1e-5) * 2).all()), (error, told)


def test_a_raw_network_behind_the_preconditioning_gives_the_same_sample() -> None:
    def raw(x: Tensor, time: Tensor) -> Tensor:
        """F of eq. 7, from D."""
        sigma = (4 * time).exp().reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        square = sigma**2 + 0.25
        state = x * square.sqrt()
        return (denoiser(state, sigma) - 0.25 / square * state) / (sigma * 0.5 / square.sqrt())

    noise = Keyed(SHAPE, 3)
    plain = sample(denoiser, edm(18, s_churn=10), noise, sequential(), dtype=torch.float64).sample
    found = sample(raw, edm(18, s_churn=10, preconditioned=True), noise, sequential(), dtype=torch.float64).sample
    assert torch.allclose(plain, found, rtol=1e-5, atol=1e-5)


def test_without_churn_it_is_the_scheduler_of_diffusers() -> None:
    scheduler: Any = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(20)
    other, own = from_scheduler(scheduler), edm(20, solver="euler", preconditioned=True)
    assert torch.allclose(other.a, own.a, atol=1e-5)
    assert torch.allclose(other.b, own.b, atol=1e-5)


def test_own_ratios_may_be_given() -> None:
    ratios = karras_ratios(0.01, 10.0, 12)
    table = edm(12, ratios=ratios, s_churn=3.0)
    assert torch.allclose(table.sigma[1:-1:2], ratios[1:])


def midpoint(steps: int, churn: float, low: float, high: float, noise: float) -> Tensor:
    """k-diffusion's `sample_dpm_2`, written out in float64, with noise drawn in every step as algorithm 2 draws it."""
    draw = generator()
    t = [*karras_ratios(0.002, 80.0, steps, 7.0).tolist(), 0.0]
    x = torch.randn(1, *SHAPE, generator=draw).double() * t[0]
    for i in range(steps):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= t[i] <= high else 0.0
        raised, added = t[i] * (gamma + 1), torch.randn(1, *SHAPE, generator=draw).double() * noise
        x = x + added * math.sqrt(max(raised**2 - t[i] ** 2, 0.0))
        d = (x - denoiser(x, raised)) / raised
        if t[i + 1] == 0:
            x = x - d * raised
            continue
        middle = math.exp(0.5 * (math.log(raised) + math.log(t[i + 1])))
        half = x + d * (middle - raised)
        x = x + (half - denoiser(half, middle)) / middle * (t[i + 1] - raised)
    return x


@pytest.mark.parametrize("name", SETTINGS)
def test_midpoint_steps_are_the_loop_of_dpm_solver_2(name: str) -> None:
    churn, low, high, noise = SETTINGS[name]
    table = edm(18, solver="midpoint", s_churn=churn, s_min=low, s_max=high, s_noise=noise)
    found = sample(denoiser, table, Recorded(SHAPE, generator()), sequential(), dtype=torch.float64)
    assert torch.allclose(found.sample, midpoint(18, churn, low, high, noise), rtol=1e-5, atol=1e-5)


def ancestral(steps: int, eta: float, noise: float) -> Tensor:
    """k-diffusion's `sample_dpmpp_2s_ancestral`, written out in float64."""
    draw = generator()
    sigmas = [*karras_ratios(0.002, 80.0, steps, 7.0).tolist(), 0.0]
    x = torch.randn(1, *SHAPE, generator=draw).double() * sigmas[0]
    for s, after in itertools.pairwise(sigmas):
        denoised = denoiser(x, s)
        up = min(after, eta * math.sqrt(after**2 * (s**2 - after**2) / s**2))
        down = math.sqrt(after**2 - up**2)
        if down == 0:
            x = x + (x - denoised) / s * (down - s)
        else:
            t, to = -math.log(s), -math.log(down)
            h, u = to - t, t + 0.5 * (to - t)
            half = math.exp(t - u) * x - math.expm1(-0.5 * h) * denoised
            x = math.exp(t - to) * x - math.expm1(-h) * denoiser(half, math.exp(-u))
        if after > 0:
            x = x + torch.randn(1, *SHAPE, generator=draw).double() * noise * up
    return x


@pytest.mark.parametrize(("eta", "noise"), [(0.0, 1.0), (1.0, 1.0), (0.5, 1.003), (1.0, 0.6)])
def test_dpmpp_2s_is_the_published_loop(eta: float, noise: float) -> None:
    table = dpmpp_2s(18, eta=eta, s_noise=noise)
    assert table.steps == 35
    drawn = Recorded(SHAPE, generator())
    if eta == 0:  # the loop draws what it then multiplies by 0
        assert not table.stochastic
    found = sample(denoiser, table, drawn, sequential(), dtype=torch.float64)
    assert torch.allclose(found.sample, ancestral(18, eta, noise), rtol=1e-5, atol=1e-5)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"solver": "heunn"}, "solver is 'heunn'; it must be one of heun, euler, midpoint; did you mean 'heun'"),
    ({"s_churn": -1}, "s_churn is -1; it must be a finite number of at least 0"),
    ({"s_noise": math.nan}, "s_noise is nan"),
    ({"s_max": "x"}, "s_max is 'x'"),
    ({"sigma_min": 100.0}, "Karras ratios were asked from"),
    ({"sigma_data": 0}, "sigma_data is 0; it is the data's standard deviation"),
    ({"preconditioned": 1}, "preconditioned is 1"),
    ({"ratios": torch.ones(3)}, "the ratios are"),
    ({"ratios": torch.ones(10)}, "the ratios do not fall"),
]


@pytest.mark.parametrize(("options", "complaint"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_arguments_of_edm_are_refused_in_a_sentence(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        edm(10, **options)


@pytest.mark.parametrize("steps", [0, -1, 1.5, "10", None])
def test_a_bad_number_of_steps_is_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps"):
        alphafold3(steps)
    with pytest.raises(ValueError, match="steps"):
        edm(steps)
    with pytest.raises(ValueError, match="steps"):
        dpmpp_2s(steps)


def test_an_eta_that_adds_more_noise_than_there_is_is_refused() -> None:
    for eta, complaint in ((1.5, "eta is 1.5; it must be between 0"), (-1, "eta is -1"), ("x", "eta is 'x'")):
        with pytest.raises(ValueError, match=complaint):
            dpmpp_2s(10, eta=eta)  # type: ignore[arg-type]


def test_piadm_has_its_own_grids() -> None:
    assert sample(denoiser, edm(10), Keyed(SHAPE, 1), piadm_ode(blocks=2)).sample.shape == (1, *SHAPE)

# SPDX-License-Identifier: Apache-2.0
"""A learned variance: the samples of diffusers' own loop, in fewer rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from textbook import betas_of, times_of
from torch import Tensor

from paradiff import Keyed, Method, Recorded, Schedule, collocation, parasolver, quasi_newton, sample, sequential
from paradiff.chain import Clip
from paradiff.models import Mixture, learned_variance
from paradiff.samplers import ddim, ddpm, edm

SHAPE = (2, 4, 4)
SCHEDULE = Schedule.linear()
ALPHA, SIGMA = SCHEDULE.alpha, SCHEDULE.sigma
METHODS: list[Callable[[], Method]] = [
    sequential,
    lambda: parasolver(window=16, tolerance=0.0),
    lambda: quasi_newton(window=16, tolerance=0.0),
    lambda: collocation(tolerance=1e-8),
]


def network(x: Tensor, t: Tensor) -> Tensor:
    """A clean datum of -1 or 1 in every entry, and a variance that depends on the state."""
    a, s = ALPHA[t].to(x).view(-1, 1, 1, 1), SIGMA[t].to(x).view(-1, 1, 1, 1)
    clean = torch.tanh(a * x / (s**2 + 0.05))
    return torch.cat([(x - a * clean) / s, torch.tanh(x + 0.3)], dim=1)


def published(steps: int) -> Tensor:
    """The loop of Nichol & Dhariwal, by numpy's betas, with the draws of a generator."""
    bar = np.cumprod(1 - betas_of("linear"))
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((1, *SHAPE), generator=generator, dtype=torch.float64)
    times = times_of(steps, "leading", 0).astype(int)
    for t, before in zip(times, [*times[1:], None], strict=True):
        ours, theirs = float(bar[t]), 1.0 if before is None else float(bar[before])
        beta = 1 - ours / theirs
        output, v = network(x, torch.tensor([t])).chunk(2, 1)
        clean = (x - math.sqrt(1 - ours) * output) / math.sqrt(ours)
        x = math.sqrt(theirs) * beta / (1 - ours) * clean + math.sqrt(1 - beta) * (1 - theirs) / (1 - ours) * x
        if before is not None:
            least = (1 - theirs) / (1 - ours) * beta
            log = (v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(least)
            x = x + (log / 2).exp() * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x


def of_diffusers(steps: int) -> Tensor:
    """The loop of diffusers' scheduler, which keeps its betas in float32."""
    scheduler: Any = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn((1, *SHAPE), generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t[None]), t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("method", METHODS, ids=["sequential", "parasolver", "quasi_newton", "collocation"])
@pytest.mark.parametrize("steps", [20, 50])
def test_the_sample_is_that_of_the_published_loop_and_of_diffusers(steps: int, method: Callable[[], Method]) -> None:
    table = ddpm(SCHEDULE, steps)
    noise = Recorded(SHAPE, torch.Generator().manual_seed(4), samples=1, dtype=torch.float64)
    found = sample(learned_variance(network, table, noise), table, noise, method(), dtype=torch.float64).sample
    assert float((found - published(steps)).abs().max()) < 1e-7
    assert float((found - of_diffusers(steps)).abs().max()) < 1e-4


def test_a_hundred_steps_take_fifteen_rounds() -> None:
    table, noise = ddpm(SCHEDULE, 100), Keyed(SHAPE, seed=range(70, 78))
    model = learned_variance(network, table, noise)
    plain = sample(model, table, noise, sequential()).sample
    found = sample(model, table, noise, quasi_newton(tolerance=4e-3))
    assert float((found.sample - plain).square().mean((1, 2, 3)).sqrt().max()) < 4e-3
    assert sum(e.rounds for e in found.error_estimates) / 8 <= 15


def test_other_tables_and_networks_are_refused() -> None:
    table = ddpm(SCHEDULE, 10)
    noise = Keyed(SHAPE)
    for other, what in (
        (ddim(SCHEDULE, 10), "is that of steps that add noise"),
        (ddpm(SCHEDULE, 10, clip=Clip(1.0)), "limits the clean data"),
        (edm(10, solver="euler", s_churn=20.0), "does not preserve variance"),
    ):
        with pytest.raises(ValueError, match=what):
            learned_variance(network, other, noise)
    with pytest.raises(ValueError, match="one that predicts variances returns 4 channels"):
        sample(learned_variance(lambda x, t: x, table, noise), table, noise, parasolver())
    data = Mixture(torch.ones(1), torch.zeros(1, *SHAPE), torch.ones(1))
    with pytest.raises(ValueError, match="returned shape"):
        sample(lambda x, t: torch.cat([data.denoiser(table)(x, t)] * 2, 1), table, noise, parasolver())

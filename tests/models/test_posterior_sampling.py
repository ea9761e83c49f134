# SPDX-License-Identifier: Apache-2.0
"""Gradients in the evaluation: a posterior is sampled with the gradient of a likelihood, taken through the network."""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff import Keyed, Schedule, models, quasi_newton, sample, sequential
from paradiff.samplers import ddpm

SCHEDULE = Schedule.linear()
ALPHA, SIGMA = SCHEDULE.alpha.float(), SCHEDULE.sigma.float()


def test_the_lower_half_of_a_measured_digit_takes_fifteen_rounds() -> None:
    """Diffusion posterior sampling (Chung et al. 2023, equation 16), its gradient as a part of epsilon: 100 steps."""
    digits = models.load("digits")
    table, network = ddpm(SCHEDULE, 100), digits.unet

    def prior(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t).sample

    measured = torch.zeros(digits.shape)
    measured[..., :4, :] = 1
    truth = sample(prior, table, Keyed(digits.shape, seed=900), sequential(), check="off").sample * measured

    def posterior(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = ALPHA[t].view(-1, 1, 1, 1), SIGMA[t].view(-1, 1, 1, 1)
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            epsilon = prior(state, t)
            clean = (state - sigma * epsilon) / alpha
            misfit = ((clean - truth) * measured).square().flatten(1).sum(1).sqrt()
            (gradient,) = torch.autograd.grad(misfit.sum(), state)
        return epsilon.detach() + 3 * sigma * gradient

    def misfit(found: Tensor) -> float:
        return float(((found - truth) * measured).square().mean().sqrt())

    noise = Keyed(digits.shape, seed=[20, 21])
    plain = sample(posterior, table, noise, sequential(), check="off").sample
    assert misfit(plain) < 0.5 * misfit(sample(prior, table, noise, sequential(), check="off").sample)
    found = sample(posterior, table, noise, quasi_newton())
    errors = (found.sample - plain).square().mean((1, 2, 3)).sqrt().tolist()
    assert max(errors) < 4e-3
    assert all(error <= e.estimated_error for error, e in zip(errors, found.error_estimates, strict=True))
    assert found.rounds <= 15

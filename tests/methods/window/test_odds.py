# SPDX-License-Identifier: Apache-2.0
"""Errors of nodes that may have made another sample: by how much they shift the odds of two outcomes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paradiff import Keyed, Recorded, Schedule, parasolver, quasi_newton, sample, sequential
from paradiff.chain.step import Step
from paradiff.chain.table import Table
from paradiff.methods.window.odds import Odds
from paradiff.models import load
from paradiff.models.exact import Mixture
from paradiff.samplers import ddim
from paradiff.solver.protocol import Method
from paradiff.solver.solution import Status

TABLE = ddim(Schedule.linear(), 100)
SHARP = 62
"""A node of `TABLE` at which data of 64 numbers, one of two, are decided sharply."""


def of_two(table: Table, node: int, error: Tensor, way: Tensor, most: float) -> float:
    """What is said of an error `[d]` of a node whose estimate lies in the middle between two data, `way` `[d]` apart."""
    estimate = 0.25 * way * float(table.alpha[node] / table.sigma[node] ** 2 * (way @ error))
    outputs = (estimate - table.p[node] * error) / table.q[node]
    return float(Odds(Step(table, torch.device("cpu"), torch.float64), most)(node, error[None, None], outputs[None, None]))


def shifts(table: Table, node: int, error: Tensor, way: Tensor) -> float:
    """By how much the logarithm of their odds is shifted, as Bayes' rule has it."""
    return float(table.alpha[node] / table.sigma[node] ** 2 * (way @ error).abs())


def test_two_data_are_as_far_apart_as_their_odds_and_the_estimate_say() -> None:
    way = 2 * torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for size in (1e-6, 1e-3):
        error = size * way / way.norm()
        shifted = shifts(TABLE, SHARP, error, way)
        assert of_two(TABLE, SHARP, error, way, 0.99 * shifted) == pytest.approx(float(way.square().mean().sqrt()), rel=1e-9)
        assert of_two(TABLE, SHARP, error, way, 1.01 * shifted) == 0


def test_nothing_is_said_where_errors_shrink() -> None:
    way = 0.05 * torch.ones(64, dtype=torch.float64)
    error = way / way.norm()
    assert shifts(TABLE, SHARP, error, way) > 0.01
    assert of_two(TABLE, SHARP, error, way, 0.01) == 0


def test_members_are_told_apart() -> None:
    way = 2 * torch.ones(64, dtype=torch.float64)
    errors = torch.stack([1e-9 * way, 1e-2 * way])[None, None]  # [n, w, b, d]
    answers = 0.25 * way * (TABLE.alpha[SHARP] / TABLE.sigma[SHARP] ** 2 * (errors @ way))[..., None]
    outputs = (answers - TABLE.p[SHARP] * errors) / TABLE.q[SHARP]
    told = Odds(Step(TABLE, torch.device("cpu"), torch.float64, shared_window=True), 0.1)(SHARP, errors, outputs)
    assert told[0] == 0
    assert float(told[1]) == pytest.approx(2.0)


@pytest.mark.parametrize("method", [quasi_newton(window=4), quasi_newton(window=8), parasolver(window=4), parasolver(window=8)])
def test_a_sample_that_may_be_another_one_is_told_so(method: Method) -> None:
    points = 0.6 * torch.randn(8, 512, generator=torch.Generator().manual_seed(11))
    network = Mixture(torch.full((8,), 1 / 8), points, torch.full((8,), 0.01)).denoiser(TABLE)
    noise = Keyed((512,), 3000, 32)
    wanted = sample(network, TABLE, noise, sequential()).sample
    found = sample(network, TABLE, noise, method)
    errors = (found.sample - wanted).square().mean(1).sqrt().tolist()
    told = [estimate.estimated_error for estimate in found.error_estimates]
    nearest = min(float((a - b).square().mean().sqrt()) for k, a in enumerate(points) for b in points[:k])
    for error, estimate in zip(errors, told, strict=True):
        assert error < 2 * estimate
        assert estimate < 4e-3 * (1 + 1e-9) or estimate > nearest / 2  # the tolerance, or that there is another point
    assert max(told) > nearest / 2  # that of the one that passes through the middle, whichever it comes to
    assert found.status is Status.STOPPED
    assert sum(estimate > 4e-3 * (1 + 1e-9) for estimate in told) <= 2
    assert all(map(math.isfinite, told))


@pytest.mark.parametrize("method", [quasi_newton(window=4), quasi_newton(window=16), parasolver(window=8)])
def test_a_trained_network_that_draws_another_digit_is_told_so(method: Method) -> None:
    model = load("digits")
    table, seeds = model.table("ddim", 100), (8001, 8032, 8003)
    wanted, found = (
        sample(model, table, Recorded(model.shape, [torch.Generator().manual_seed(seed) for seed in seeds]), which)
        for which in (sequential(), method)
    )
    errors = (found.sample - wanted.sample).square().flatten(1).mean(1).sqrt().tolist()
    told = [estimate.estimated_error for estimate in found.error_estimates]
    for error, estimate in zip(errors, told, strict=True):
        assert error < 2 * estimate
    assert told[1] > 0.1  # it passes through the middle between two digits, whichever it comes to
    assert max(told[0], told[2]) < 4e-3 * (1 + 1e-9)

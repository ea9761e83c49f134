# SPDX-License-Identifier: Apache-2.0
"""Data whose mean square is far from 1 are found out: the estimate is that of such data, and the status says so."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from paradiff import Keyed, Schedule, collocation, parasolver, quasi_newton, sample, sequential, srds
from paradiff.chain.data_scale import LARGE, held_to, seen, unusual
from paradiff.chain.sensitivity import sensitivity
from paradiff.samplers import ddim, ddpm
from paradiff.solver.protocol import Method
from paradiff.solver.solution import Status

LINEAR = Schedule.linear()
TABLE = ddim(LINEAR, 200)


def network(variance: float):  # noqa: ANN201
    """Nearly Gaussian data of that variance."""
    alpha, sigma = TABLE.alpha, TABLE.sigma

    def called(x: Tensor, t: Tensor) -> Tensor:
        at = (TABLE.t[None] - t[:, None]).abs().argmin(1)
        a, s = alpha[at, None].to(x), sigma[at, None].to(x)
        return s / (a**2 * variance + s**2) * x + 0.05 * torch.sin(3 * x / math.sqrt(variance + 1))

    return called


METHODS: list[Method] = [parasolver(), quasi_newton(), srds(), collocation(), collocation(window=16)]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("variance", [1e-2, 1e2, 1e4])
def test_errors_are_within_twice_the_estimate_at_every_scale(method: Method, variance: float) -> None:
    noise = Keyed((16,), 0, 4)
    exact = sample(network(variance), TABLE, noise, sequential(), dtype=torch.float64).sample
    found = sample(network(variance), TABLE, noise, method, dtype=torch.float64)
    errors = (found.sample - exact).square().mean(1).sqrt()
    for error, estimate in zip(errors.tolist(), found.error_estimates, strict=True):
        assert error <= 2 * estimate.estimated_error + 1e-9 * math.sqrt(variance)
    above = found.estimated_error > method.tolerance
    assert (found.status is Status.STOPPED) == above
    assert not above or variance > LARGE


def test_a_run_whose_estimate_is_above_its_tolerance_says_why() -> None:
    found = sample(network(1e4), TABLE, Keyed((16,), 0), parasolver(tolerance=1e-2), dtype=torch.float64)
    assert found.estimated_error > 1e-2
    assert found.message == (
        f"stopped: an estimated error of {found.estimated_error:.2g} was reached, where 0.01 was asked for: the samples' mean "
        "square is far above 1, for which nodes pass; give a tolerance that is smaller by this ratio, or data in about -1 ... 1"
    )


@pytest.mark.parametrize("make", [ddim, ddpm])
def test_larger_data_are_unit_data_on_higher_signal_levels(make: object) -> None:
    table, size = make(LINEAR, 100), 64.0  # pyright: ignore[reportCallIssue]
    higher = replace(table, alpha=8 * table.alpha, exact_levels=False, clean=torch.stack([table.p, table.q], 1))
    found, wanted = sensitivity(table, size), 8 * sensitivity(higher)
    away = (sensitivity(higher) > 1.01 * sensitivity(higher).amin()) & (found > 1.01 * found.amin())  # from the floors
    assert away.sum() > 20
    assert torch.allclose(found[away], wanted[away])
    assert torch.equal(sensitivity(table, 1.0), sensitivity(table))

# SPDX-License-Identifier: Apache-2.0
"""The volatility of chains, and what collocation makes of one that is too rough."""

from __future__ import annotations

import pytest
import torch

from paradiff import Keyed, Schedule, collocation, sample
from paradiff.chain.volatility import volatility
from paradiff.samplers import alphafold3, ddim, ddpm, edm, euler, euler_ancestral, heun


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_ancestral_chains_have_a_volatility_of_one(steps: int) -> None:
    schedule = Schedule.scaled_linear()
    for table in (ddpm(schedule, steps), euler_ancestral(schedule, steps), ddim(schedule, steps, eta=1.0)):
        assert volatility(table) == pytest.approx(1, rel=1e-3)


def test_deterministic_chains_have_none() -> None:
    schedule = Schedule.scaled_linear()
    for table in (ddim(schedule, 20), euler(schedule, 20), heun(schedule, 20), edm(20)):
        assert volatility(table) == 0


def test_churn_raises_it_in_proportion() -> None:
    found = [volatility(edm(100, solver="euler", s_churn=churn)) for churn in (5.0, 10.0, 20.0)]
    assert found[1] / found[0] == pytest.approx(2, rel=0.1)
    assert found[2] / found[0] == pytest.approx(4, rel=0.2)


def test_collocation_leaves_a_rough_chain_to_the_window_method() -> None:
    found = sample(lambda x, t: torch.zeros_like(x), alphafold3(200), Keyed((4,), 1), collocation(window=16))
    assert "the chain adds 24.2 times as much noise on its way as an ancestral sampler" in found.message

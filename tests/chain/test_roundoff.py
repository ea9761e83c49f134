# SPDX-License-Identifier: Apache-2.0
"""What rounding leaves of a chain's sample, beside the difference of runs in float32 and float64."""

from __future__ import annotations

import dataclasses

import diffusers
import pytest
import torch
from problems import TABLES

from paradiff import Keyed, Table, from_scheduler, quasi_newton, sample, sequential
from paradiff.chain.roundoff import TOLD, roundoff
from paradiff.models.exact import Gaussian
from paradiff.samplers.scheduler.probe import probe
from paradiff.solver import Status

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' own
SINGLE = torch.finfo(torch.float32).eps
EXTREME = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
KINDS = {"heun": diffusers.HeunDiscreteScheduler, "kdpm2": diffusers.KDPM2DiscreteScheduler}
GAUSSIAN = Gaussian(torch.zeros(64, dtype=torch.float64), torch.full((64,), 0.25, dtype=torch.float64))


def scheduler(kind: str, steps: int) -> diffusers.SchedulerMixin:
    found = KINDS[kind](**EXTREME)
    found.set_timesteps(steps)
    return found


@pytest.mark.parametrize("name", TABLES)
def test_ordinary_chains_are_told_nothing(name: str) -> None:
    assert 0 < roundoff(TABLES[name], SINGLE) < TOLD / 4


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_far_from_float64_as_is_told(kind: str, steps: int) -> None:
    table, noise = from_scheduler(scheduler(kind, steps)), Keyed((64,), range(8))
    network = GAUSSIAN.denoiser(table)
    single, double = (
        sample(network, table, noise, sequential(), dtype=dtype, check="off").sample.double()
        for dtype in (torch.float32, torch.float64)
    )
    error = float((single - double).square().mean().sqrt())
    assert 2 * TOLD < error <= roundoff(table, SINGLE) <= 16 * error


def test_the_schedulers_own_arithmetic_counts_in_its_loop() -> None:
    """Its step adds to states of 20,000 what leaves 2 of them."""
    own = scheduler("heun", 4)
    looped = probe(own)
    assert looped.rounding is not None
    assert float(looped.rounding[0]) > 1e3  # of eps: the first step's state is of size 2
    assert roundoff(looped, SINGLE) > 1e3 * roundoff(from_scheduler(own), SINGLE)
    ordinary = probe(_ordinary())
    assert ordinary.rounding is not None
    assert float(ordinary.rounding.amax()) < 4


def _ordinary() -> diffusers.DDIMScheduler:
    found = diffusers.DDIMScheduler(clip_sample=False)
    found.set_timesteps(20)
    return found


def test_slices_keep_the_steps_roundings_and_tables_are_equal_without() -> None:
    whole = probe(_ordinary())
    part = whole[5:9]
    assert whole.rounding is not None
    assert part.rounding is not None
    assert torch.equal(part.rounding, whole.rounding[5:9])
    assert dataclasses.replace(whole, rounding=None) == whole


def test_the_datas_size_counts() -> None:
    assert roundoff(TABLES["ddim"], SINGLE, 2.0**12) > 16 * roundoff(TABLES["ddim"], SINGLE)


def _run(table: Table, dtype: torch.dtype, tolerance: float) -> tuple[Status, str, float]:
    found = sample(GAUSSIAN.denoiser(table), table, Keyed((64,), range(2)), quasi_newton(tolerance=tolerance), dtype=dtype)
    return found.status, found.message, found.estimated_error


def test_runs_tell_it_in_their_estimates() -> None:
    table = from_scheduler(scheduler("kdpm2", 4))
    told = roundoff(table, SINGLE)
    status, message, error = _run(table, torch.float32, 2 * told)
    assert status is Status.CONVERGED
    assert "rounding in float32" in message
    assert error >= told
    status, message, error = _run(table, torch.float32, told / 2)
    assert status is Status.STOPPED
    assert "states and networks of float64" in message
    status, message, error = _run(table, torch.float32, 0.0)
    assert status is Status.CONVERGED
    assert "by the chain's own steps, but" in message
    assert error == pytest.approx(told)
    for tolerance in (2 * told, told / 2):
        status, message, _ = _run(table, torch.float64, tolerance)
        assert status is Status.CONVERGED
        assert "rounding" not in message
    status, message, error = _run(table, torch.float64, 0.0)
    assert status is Status.EXACT
    assert error == 0


def test_the_sequential_run_of_the_same_arithmetic_is_exact() -> None:
    table = from_scheduler(scheduler("kdpm2", 4))
    found = sample(GAUSSIAN.denoiser(table), table, Keyed((64,), range(2)), sequential())
    assert found.status is Status.EXACT
    assert found.estimated_error == 0


def test_magnified_outputs_and_other_slopes_count() -> None:
    table = probe(_ordinary())
    plain = roundoff(table, SINGLE)
    assert roundoff(table, SINGLE, output=0.5) == plain  # data's own outputs are more
    assert roundoff(table, SINGLE, output=64.0) > 4 * plain
    assert roundoff(table, SINGLE, apart=8.0) > 1.1 * plain
    assert roundoff(table, SINGLE, output=64.0, apart=8.0) > roundoff(table, SINGLE, output=64.0)

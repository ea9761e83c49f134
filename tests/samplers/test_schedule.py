# SPDX-License-Identifier: Apache-2.0
"""samplers/schedule.py against diffusers' schedulers and against formulas written out here."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from paradiff.samplers.schedule import (
    Schedule,
    cosine_betas,
    flow_sigmas,
    fractional_times,
    karras_ratios,
    linear_betas,
    scaled_linear_betas,
    spaced_times,
    zero_snr_betas,
)

# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

BETAS = {
    "linear": (linear_betas, {"beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (scaled_linear_betas, {"beta_start": 0.00085, "beta_end": 0.012}),
    "squaredcos_cap_v2": (cosine_betas, {}),
}


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("train_steps", [50, 1000])
def test_betas_are_those_of_diffusers(name: str, train_steps: int) -> None:
    make, options = BETAS[name]
    theirs = diffusers.DDIMScheduler(num_train_timesteps=train_steps, beta_schedule=name, **options).betas
    # Theirs are float32: an absolute 1e-7 beside 1, and they are exact to 1e-6 of their own size.
    torch.testing.assert_close(make(train_steps), theirs.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", BETAS)
def test_zero_snr_betas_are_those_of_diffusers_and_end_in_pure_noise(name: str) -> None:
    make, options = BETAS[name]
    theirs = diffusers.DDIMScheduler(beta_schedule=name, rescale_betas_zero_snr=True, **options).alphas_cumprod
    schedule = Schedule(zero_snr_betas(make()))
    # Float32 cumulative products of 1000 factors: 1e-5.
    torch.testing.assert_close(schedule.alpha_bar, theirs.double(), rtol=0, atol=1e-5)
    assert schedule.alpha_bar[-1] == 0
    torch.testing.assert_close(schedule.alpha_bar[0], 1 - make()[0])
    assert schedule.ratio.isfinite().all()
    assert schedule.ratio[-1] == math.sqrt(2**24 - 1)


def test_constructors_name_the_betas() -> None:
    for schedule, betas in [
        (Schedule.linear(100, 1e-3, 0.1), linear_betas(100, 1e-3, 0.1)),
        (Schedule.scaled_linear(100, 1e-3, 0.1), scaled_linear_betas(100, 1e-3, 0.1)),
        (Schedule.cosine(100, 0.9), cosine_betas(100, 0.9)),
        (Schedule.linear(100, rescale_zero_snr=True), zero_snr_betas(linear_betas(100))),
        (Schedule.scaled_linear(100, rescale_zero_snr=True), zero_snr_betas(scaled_linear_betas(100))),
        (Schedule.cosine(100, rescale_zero_snr=True), zero_snr_betas(cosine_betas(100))),
    ]:
        assert torch.equal(schedule.betas, betas)
        assert schedule.train_steps == 100


def test_levels_are_cumulative_products_and_the_ratio_their_quotient() -> None:
    schedule = Schedule(torch.tensor([0.1, 0.2, 0.5], dtype=torch.float32))
    assert schedule.betas.dtype == torch.float64
    wanted = torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64)
    # The betas were given in float32.
    torch.testing.assert_close(schedule.alpha_bar, wanted, rtol=1e-7, atol=0)
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(schedule.ratio, schedule.sigma / schedule.alpha)


@pytest.mark.parametrize("name", BETAS)
def test_time_of_and_ratio_at_are_those_of_diffusers(name: str) -> None:
    schedule = Schedule(BETAS[name][0]())
    euler = diffusers.EulerDiscreteScheduler()
    levels = schedule.ratio.numpy()
    asked = np.concatenate([np.geomspace(levels[0] / 2, levels[-1] * 2, 301), levels[[0, 1, 500, -2, -1]]])
    theirs = euler._sigma_to_t(asked, np.log(levels))
    # Float64 on both sides; times up to 999.
    np.testing.assert_allclose(schedule.time_of(torch.from_numpy(asked)).numpy(), theirs, rtol=0, atol=1e-9)
    times = np.linspace(-1, 1000, 777)
    ours = schedule.ratio_at(torch.from_numpy(times)).numpy()
    np.testing.assert_allclose(ours, np.interp(times, np.arange(1000), levels), rtol=1e-12)
    whole = torch.arange(1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.time_of(schedule.ratio_at(whole)), whole, rtol=0, atol=1e-9)


@pytest.mark.parametrize("train_steps", [50, 333, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spaced_times_are_those_of_diffusers_for_every_number_of_steps(train_steps: int, spacing: str) -> None:
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=train_steps, timestep_spacing=spacing)
    for steps in range(1, train_steps + 1):
        scheduler.set_timesteps(steps)
        ours = spaced_times(train_steps, steps, spacing)
        assert ours.dtype == torch.int64
        assert len(ours) == steps
        assert (ours.diff() < 0).all()
        # Rounding errors give diffusers' trailing times an extra -1 at some numbers of steps.
        assert torch.equal(ours, scheduler.timesteps[:steps])
        assert (scheduler.timesteps[steps:] == -1).all()


def test_trailing_times_have_no_entry_before_the_first_training_time() -> None:
    assert len(spaced_times(1000, 61, "trailing")) == 61
    assert spaced_times(1000, 61, "trailing")[-1] == 15


def test_offset_shifts_leading_times() -> None:
    assert torch.equal(spaced_times(1000, 50, "leading", 1), spaced_times(1000, 50, "leading") + 1)
    assert spaced_times(1000, 50, "leading", 19)[0] == 999


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 37, 100, 999, 1000])
def test_fractional_times_are_those_of_the_euler_scheduler(spacing: str, steps: int) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    # Theirs are float32, up to 999: 1e-4.
    ours = fractional_times(1000, steps, spacing)
    torch.testing.assert_close(ours, scheduler.timesteps.double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 18, 100])
@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras_ratios_are_equation_5(steps: int, rho: float) -> None:
    ours = karras_ratios(0.02, 80.0, steps, rho)
    top, bottom = 80 ** (1 / rho), 0.02 ** (1 / rho)
    wanted = [(top + i / max(steps - 1, 1) * (bottom - top)) ** rho for i in range(steps)]
    np.testing.assert_allclose(ours.numpy(), wanted, rtol=1e-12)
    assert ours[0] == 80
    assert steps == 1 or ours[-1] == 0.02


@pytest.mark.parametrize("steps", [1, 2, 5, 28, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("train_steps", [100, 1000])
def test_flow_sigmas_are_those_of_diffusers(steps: int, shift: float, train_steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=train_steps, shift=shift)
    scheduler.set_timesteps(steps)
    # Theirs are float32 numbers of order 1.
    ours = flow_sigmas(steps, shift, train_steps)
    torch.testing.assert_close(ours, scheduler.sigmas.double(), rtol=0, atol=2e-7)
    assert ours[0] == 1
    assert ours[-1] == 0


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([[0.1, 0.2]], r"betas have shape \(1, 2\); a schedule needs one row of at least two"),
        ([0.1], r"betas have shape \(1,\); a schedule needs one row of at least two"),
        ([0.1, 0.0, 0.1], "beta is 0 at training time 1; every beta must be above 0 and below 1"),
        ([0.1, -0.2, 0.1], "beta is -0.2 at training time 1; every beta must be above 0"),
        (
            [0.1, 1.0, 0.1],
            "beta is 1 at training time 1; every beta must be above 0 and below 1, only the last may be 1",
        ),
        ([0.1, 0.2, 1.5], "beta is 1.5 at training time 2"),
        ([math.nan, 0.2], "beta is nan at training time 0"),
        ([0.1, math.inf], "beta is inf at training time 1"),
    ],
)
def test_a_schedule_refuses_betas_that_are_none(betas: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(torch.tensor(betas))


def test_the_last_beta_may_be_one() -> None:
    assert Schedule(torch.tensor([0.1, 1.0])).alpha[-1] == 0


@pytest.mark.parametrize("times", [spaced_times, fractional_times])
@pytest.mark.parametrize(
    ("steps", "spacing", "offset", "message"),
    [
        (0, "leading", 0, "0 steps were asked of a schedule that can give 1 to 1000"),
        (-3, "linspace", 0, "-3 steps were asked"),
        (
            1001,
            "trailing",
            0,
            "1001 steps were asked of a schedule that can give 1 to 1000, one for each training time",
        ),
        (
            10,
            "trialing",
            0,
            "spacing is 'trialing'; it must be one of leading, trailing, linspace; did you mean 'trailing'",
        ),
        (10, "xyz", 0, "spacing is 'xyz'; it must be one of leading, trailing, linspace$"),
        (
            50,
            "leading",
            20,
            r"an offset of 20 moves the times of 50 steps to 20 ... 1000, outside the training times 0",
        ),
        (
            1000,
            "leading",
            1,
            r"an offset of 1 moves the times of 1000 steps to 1 ... 1000, outside .* use a smaller offset",
        ),
        (50, "leading", -1, r"an offset of -1 moves the times of 50 steps to -1 ... 979"),
        (50, "trailing", 1, "the offset is 1 with trailing spacing; only leading spacing has one"),
        (50, "linspace", 2, "the offset is 2 with linspace spacing; only leading spacing has one, so leave it at 0"),
    ],
)
def test_times_that_no_schedule_has_are_refused(times: Callable, steps: int, spacing: str, offset: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        times(1000, steps, spacing, offset)


@pytest.mark.parametrize("arguments", [(0.0, 1.0, 3), (2.0, 1.0, 3), (0.1, math.inf, 3), (0.1, 1.0, 0), (0.1, 1.0, 3, 0.0)])
def test_karras_ratios_refuse_what_they_cannot_space(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"Karras ratios were asked from .* they need 0 < low <= high"):
        karras_ratios(*arguments)


@pytest.mark.parametrize("arguments", [(0, 1.0, 1000), (3, 0.0, 1000), (3, math.nan, 1000), (3, 1.0, 1)])
def test_flow_sigmas_refuse_what_they_cannot_space(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"flow levels were asked for .* a positive shift and at least two training steps"):
        flow_sigmas(*arguments)


@pytest.mark.parametrize("make", [Schedule.linear, Schedule.scaled_linear, Schedule.cosine])
@pytest.mark.parametrize("times", ["a", 2.5, True, None, 0, -1, 10**30])
def test_what_is_no_number_of_training_times_is_refused(make: Any, times: object) -> None:
    with pytest.raises(ValueError, match=r"train_steps is .*; it must be a whole number, at least 1 and at most 1000000"):
        make(times)


@pytest.mark.parametrize("value", ["a", None, True, -1.0, math.nan, math.inf])
def test_what_is_no_beta_is_refused(value: Any) -> None:
    for make, name in (
        (Schedule.linear, "start"),
        (Schedule.linear, "end"),
        (Schedule.scaled_linear, "start"),
        (Schedule.scaled_linear, "end"),
        (Schedule.cosine, "max_beta"),
    ):
        with pytest.raises(ValueError, match=rf"{name} is .*; it must be a number, 0 or more, and finite"):
            make(10, **{name: value})


@pytest.mark.parametrize("betas", ["abc", None, {}, ["a"], [[0.1], [0.1, 0.2]]])
def test_what_are_no_betas_is_refused(betas: Any) -> None:
    with pytest.raises(ValueError, match=r"betas is .*; it must be a row of at least two numbers"):
        Schedule(betas)


def test_a_shift_may_be_a_fraction() -> None:
    half: Any = Fraction(1, 2)
    assert torch.equal(flow_sigmas(4, half), flow_sigmas(4, 0.5))

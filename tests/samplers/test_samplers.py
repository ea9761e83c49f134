# SPDX-License-Identifier: Apache-2.0
"""The samplers against the textbook loops of textbook.py; its errors, each by its text."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from textbook import (
    BETAS,
    PREDICTIONS,
    SPACINGS,
    betas_of,
    dpm_nodes,
    exploding_nodes,
    landings,
    largest_gap,
    same,
    schedule_of,
    start_and_noise,
    textbook_ancestral,
    textbook_ddim,
    textbook_ddpm,
    textbook_dpmpp_2m,
    textbook_euler,
    textbook_flow,
    textbook_heun,
    times_of,
    walk,
)
from torch import Tensor

from paradiff.chain.clipping import Clip, DynamicThreshold
from paradiff.chain.table import Table
from paradiff.samplers.exploding import euler, euler_ancestral, heun
from paradiff.samplers.flow import flow_euler
from paradiff.samplers.preserving import ddim, ddpm, dpmpp_2m
from paradiff.samplers.schedule import Schedule

# Both sides are float64; coefficients up to 1e4 (epsilon at the cosine schedule's first levels) cost some digits.
TEXTBOOK = 1e-12


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("steps", [5, 20, 37, 100])
def test_every_sampler_is_its_textbook_loop(betas: str, prediction: str, spacing: str, offset: int, steps: int) -> None:
    bar, schedule = np.cumprod(1 - betas_of(betas)), schedule_of(betas)
    x, noise = start_and_noise(2 * steps)
    options = {"spacing": spacing, "offset": offset, "prediction": prediction}
    times = times_of(steps, spacing, offset)
    for eta, landing, to_one in [(0.0, "next", True), (0.5, "stride", True), (1.0, "next", False)]:
        table = ddim(schedule, steps, eta=eta, landing=landing, set_alpha_to_one=to_one, **options)
        landed = landings(bar, times, landing, to_one)
        wanted = textbook_ddim(bar, times, landed, x, noise, prediction, eta, None, False)
        assert largest_gap(walk(table, x, noise), wanted) < TEXTBOOK
    for variance in ("fixed_small", "fixed_large"):
        table = ddpm(schedule, steps, variance=variance, **options)
        wanted = textbook_ddpm(bar, times, x, noise, prediction, variance, None)
        assert largest_gap(walk(table, x, noise), wanted) < TEXTBOOK

    for karras in (False, True):
        times, ratio = exploding_nodes(bar, steps, spacing, offset, karras)
        y = x * ratio[0]
        # The loops subtract numbers of the size of one state to make the next: digits go where the ratio falls steeply
        # (the cosine schedule's 20000 to 3).
        tolerance = max(TEXTBOOK, 1e-13 * (ratio[:-2] / ratio[1:-1]).max())
        table = euler(schedule, steps, karras=karras, **options)
        assert largest_gap(walk(table, y, noise), textbook_euler(times, ratio, y, prediction)) < tolerance
        table = heun(schedule, steps, karras=karras, **options)
        assert table.steps == 2 * steps - 1
        wanted = textbook_heun(times, ratio, y, prediction, same)
        assert largest_gap(walk(table, y, noise), wanted) < tolerance
        start = ratio[0] if spacing != "leading" else math.hypot(ratio[0], 1)
        assert table.start_scale == pytest.approx(start, rel=1e-12)
    times, ratio = exploding_nodes(bar, steps, spacing, offset)
    tolerance = max(TEXTBOOK, 1e-13 * (ratio[:-2] / ratio[1:-1]).max())
    wanted = textbook_ancestral(times, ratio, y := x * ratio[0], noise, prediction)
    assert largest_gap(walk(euler_ancestral(schedule, steps, **options), y, noise), wanted) < tolerance
    times, ratio = exploding_nodes(bar, steps, spacing, offset, False, "sigma_min")
    table = euler(schedule, steps, final="sigma_min", **options)
    assert largest_gap(walk(table, y, noise), textbook_euler(times, ratio, y, prediction)) < tolerance

    for karras, final, lower in [(False, "zero", True), (True, "zero", True), (False, "sigma_min", False)]:
        times, ratio = dpm_nodes(bar, steps, spacing, offset, karras, final)
        table = dpmpp_2m(schedule, steps, karras=karras, final=final, lower_order_final=lower, **options)
        first_order = {0, steps - 1} if final == "zero" else {0}
        wanted = textbook_dpmpp_2m(times, ratio, x, prediction, first_order, same)
        assert largest_gap(walk(table, x, noise), wanted) < TEXTBOOK


@pytest.mark.parametrize("steps", [1, 5, 20, 37, 100])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_its_textbook_loop(steps: int, shift: float) -> None:
    x, noise = start_and_noise(steps)
    assert largest_gap(walk(flow_euler(steps, shift=shift), x, noise), textbook_flow(steps, shift, x)) < TEXTBOOK


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("limit", [Clip(), Clip(0.3), DynamicThreshold(0.8, 1.5)], ids=["clip", "clip-0.3", "threshold"])
@pytest.mark.parametrize("steps", [5, 37])
def test_limits_are_those_of_the_textbook_loop(prediction: str, limit: Callable, steps: int) -> None:
    bar, schedule = np.cumprod(1 - betas_of("linear")), Schedule.linear()
    x, noise = start_and_noise(2 * steps)
    x = 2 * x
    free = walk(ddpm(schedule, steps, prediction=prediction), x, noise)

    def once(clean: Tensor) -> Tensor:
        return limit(clean[None])[0]

    times = times_of(steps, "leading", 0)
    for eta in (0.0, 0.5):
        for clipped in (False, True):
            table = ddim(schedule, steps, prediction=prediction, eta=eta, clip=limit, clipped_epsilon=clipped)
            landed = landings(bar, times, "next", True)
            wanted = textbook_ddim(bar, times, landed, x, noise, prediction, eta, limit, clipped)
            assert largest_gap(walk(table, x, noise), wanted) < TEXTBOOK
    wanted = textbook_ddpm(bar, times, x, noise, prediction, "fixed_small", limit)
    assert largest_gap(walk(ddpm(schedule, steps, prediction=prediction, clip=limit), x, noise), wanted) < TEXTBOOK
    assert largest_gap(wanted, free) > 1e-3  # The limit was at work.
    times, ratio = dpm_nodes(bar, steps, "linspace", 0, False, "zero")
    wanted = textbook_dpmpp_2m(times, ratio, x, prediction, {0, steps - 1}, once)
    assert largest_gap(walk(dpmpp_2m(schedule, steps, prediction=prediction, clip=limit), x, noise), wanted) < TEXTBOOK
    times, ratio = exploding_nodes(bar, steps, "linspace", 0)
    wanted = textbook_heun(times, ratio, x * ratio[0], prediction, once)
    table = heun(schedule, steps, prediction=prediction, clip=limit)
    assert largest_gap(walk(table, x * ratio[0], noise), wanted) < TEXTBOOK


def test_restarts_and_low_final_order_are_of_order_one() -> None:
    bar, schedule = np.cumprod(1 - betas_of("linear")), Schedule.linear()
    x, noise = start_and_noise(20)
    times, ratio = dpm_nodes(bar, 20, "linspace", 0, False, "zero")
    table = dpmpp_2m(schedule, 20, restarts=[7, 12])
    wanted = textbook_dpmpp_2m(times, ratio, x, "epsilon", {0, 7, 12, 19}, same)
    assert largest_gap(walk(table, x, noise), wanted) < TEXTBOOK
    for steps, lower, order_one in [(14, True, True), (14, False, False), (15, True, False)]:
        table = dpmpp_2m(schedule, steps, lower_order_final=lower, final="sigma_min")
        assert bool(table.b[-1, 1] == 0) is order_one


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "steps", "options", "message"),
    [
        (ddim, 10, {"eta": 1.5}, r"eta is 1.5; it must lie in \[0, 1\]"),
        (ddim, 10, {"eta": -0.1}, r"eta is -0.1; it must lie in \[0, 1\]"),
        (ddim, 10, {"landing": "strde"}, "landing is 'strde'; it must be one of next, stride; did you mean 'stride'"),
        (
            ddim,
            10,
            {"set_alpha_to_one": False, "clip": Clip()},
            "clip was given for a last step that begins and ends at",
        ),
        (ddim, 10, {"prediction": "eps"}, "prediction is 'eps'; it must be one of epsilon, sample, v, flow"),
        (ddim, 0, {}, "0 steps were asked of a schedule that can give 1 to 1000"),
        (ddim, 1001, {}, "1001 steps were asked of a schedule that can give 1 to 1000"),
        (
            ddim,
            10,
            {"spacing": "linear"},
            "spacing is 'linear'; it must be one of leading, trailing, linspace; did you",
        ),
        (ddim, 1000, {"offset": 1}, "an offset of 1 moves the times of 1000 steps to 1 ... 1000"),
        (ddpm, 10, {"variance": "learned"}, "variance is 'learned'; it must be one of fixed_small, fixed_large"),
        (euler, 10, {"final": "sigma_max"}, "final is 'sigma_max'; it must be one of zero, sigma_min; did you mean"),
        (euler, 10, {"offset": 1}, "the offset is 1 with linspace spacing; only leading spacing has one"),
        (euler_ancestral, 1001, {}, "1001 steps were asked of a schedule that can give 1 to 1000"),
        (heun, 10, {"spacing": "trail"}, "spacing is 'trail'; .* did you mean 'trailing'"),
        (dpmpp_2m, 1000, {}, "1000 steps were asked of dpmpp_2m with linspace spacing, which can take 1 to 999"),
        (dpmpp_2m, 0, {"spacing": "trailing"}, "0 steps were asked of dpmpp_2m with trailing .* can take 1 to 1000"),
        (dpmpp_2m, 10, {"spacing": "trail"}, "spacing is 'trail'; .* did you mean 'trailing'"),
        (dpmpp_2m, 10, {"final": "one"}, "final is 'one'; it must be one of zero, sigma_min"),
        (dpmpp_2m, 10, {"restarts": [3, 10]}, r"restarts are \[3, 10\]; each must be the index of one of the 10 steps"),
        (dpmpp_2m, 10, {"restarts": [-1]}, r"restarts are \[-1\]; each must be .* from 0 to 9"),
    ],
)
def test_every_error_says_what_was_given_and_what_was_expected(
    sampler: Callable[..., Table], steps: int, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(Schedule.linear(), steps, **options)


SAMPLERS = [ddim, ddpm, dpmpp_2m, euler, euler_ancestral, heun]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [2.5, 5.0, True, "abc", None, [5], np.ones(2)])
def test_what_is_no_number_of_steps_is_refused(sampler: Callable[..., Table], steps: object) -> None:
    with pytest.raises(ValueError, match=r"the number of steps is .*; it must be a whole number"):
        sampler(Schedule.linear(), steps)
    with pytest.raises(ValueError, match=r"the number of steps is .*; it must be a whole number"):
        flow_euler(steps)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_numbers_of_numpy_are_steps(sampler: Callable[..., Table]) -> None:
    assert sampler(Schedule.linear(), np.int64(5)) == sampler(Schedule.linear(), 5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", ["abc", None, 5, np.ones(3)])
def test_what_is_no_schedule_is_refused(sampler: Callable[..., Table], schedule: object) -> None:
    with pytest.raises(ValueError, match=r"the schedule is .*; it must be a Schedule"):
        sampler(schedule, 5)


@pytest.mark.parametrize("sampler", SAMPLERS[:3])
@pytest.mark.parametrize("offset", [0.5, True, "a", None])
def test_what_is_no_offset_is_refused(sampler: Callable[..., Table], offset: object) -> None:
    with pytest.raises(ValueError, match=r"the offset is .*; it must be a whole number"):
        sampler(Schedule.linear(), 5, spacing="leading", offset=offset)


@pytest.mark.parametrize("eta", ["a", None, True, [1]])
def test_what_is_no_eta_is_refused(eta: object) -> None:
    with pytest.raises(ValueError, match=r"eta is .*; it must lie in \[0, 1\]"):
        ddim(Schedule.linear(), 5, eta=eta)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("restarts", [5, "a", [0.5], None])
def test_what_are_no_restarts_is_refused(restarts: object) -> None:
    with pytest.raises(ValueError, match=r"restarts is .*; it must be a sequence of steps, from 0 to 4"):
        dpmpp_2m(Schedule.linear(), 5, restarts=restarts)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("sampler", [euler, euler_ancestral, heun, dpmpp_2m])
def test_ratios_that_rise_are_refused(sampler: Callable[..., Table]) -> None:
    # The capped last ratio, 4096, is below its neighbour's 15406.
    schedule = Schedule.linear(rescale_zero_snr=True)
    with pytest.raises(ValueError, match=r"the noise ratio rises from 4096 to 15406 at step 0; it must fall"):
        sampler(schedule, 1000, spacing="trailing", prediction="v")


def test_flow_euler_refuses_a_shift_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"flow levels were asked for 10 steps with shift -1.0"):
        flow_euler(10, shift=-1.0)

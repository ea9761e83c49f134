# SPDX-License-Identifier: Apache-2.0
"""The samplers against diffusers' schedulers of those names, over whole trajectories, node by node."""

from __future__ import annotations

import diffusers
import pytest
import torch
from scheduler_walks import gap_to_scheduler
from textbook import (
    BETAS,
    PREDICTIONS,
    SPACINGS,
    THEIRS,
    betas_of,
    schedule_of,
)

from paradiff.chain.clipping import Clip, DynamicThreshold
from paradiff.samplers.exploding import euler, euler_ancestral, heun
from paradiff.samplers.flow import flow_euler
from paradiff.samplers.preserving import ddim, ddpm, dpmpp_2m
from paradiff.samplers.schedule import Schedule

# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


def scheduler_of(kind: str, betas: str, steps: int, *, zero_snr: bool = False, **options: object) -> diffusers.SchedulerMixin:
    """A diffusers scheduler whose tables are float64: its own are products of 1000 float32 factors, off by about 1e-5
    at the noisy end, which would hide errors of that size."""
    name = {"ddim": "DDIM", "ddpm": "DDPM", "euler": "EulerDiscrete", "euler_ancestral": "EulerAncestralDiscrete"}
    name |= {"heun": "HeunDiscrete", "dpmpp_2m": "DPMSolverMultistep"}
    scheduler = getattr(diffusers, name[kind] + "Scheduler")(beta_schedule=betas, **options)
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.from_numpy(betas_of(betas, zero_snr)), dim=0)
    if zero_snr and kind not in ("ddim", "ddpm"):
        scheduler.alphas_cumprod[-1] = 2**-24
    if options.get("set_alpha_to_one") is False:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    return scheduler


# Float64 on both sides. The Heun step from the cosine schedule's ratio of 20000 to one of 10 costs three digits.
SCHEDULER = 1e-9


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("steps", [5, 37, 100])
def test_ddim_and_ddpm_are_those_of_diffusers(betas: str, prediction: str, spacing: str, offset: int, steps: int) -> None:
    schedule = schedule_of(betas)
    options = {"spacing": spacing, "offset": offset, "prediction": prediction}
    theirs = {"timestep_spacing": spacing, "steps_offset": offset, "prediction_type": THEIRS[prediction]}
    for eta, to_one in [(0.0, True), (0.5, True), (1.0, False)]:
        table = ddim(schedule, steps, eta=eta, landing="stride", set_alpha_to_one=to_one, **options)
        scheduler = scheduler_of("ddim", betas, steps, clip_sample=False, set_alpha_to_one=to_one, **theirs)
        # All in float64.
        assert gap_to_scheduler(table, scheduler, eta=eta) < 1e-11
    for variance in ("fixed_small", "fixed_large"):
        table = ddpm(schedule, steps, variance=variance, **options)
        scheduler = scheduler_of("ddpm", betas, steps, clip_sample=False, variance_type=variance, **theirs)
        assert gap_to_scheduler(table, scheduler, every=False) < 1e-11


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [5, 50])
def test_limits_are_those_of_diffusers(prediction: str, spacing: str, steps: int) -> None:
    schedule, options = Schedule.linear(), {"spacing": spacing, "prediction": prediction}
    theirs = {"timestep_spacing": spacing, "prediction_type": THEIRS[prediction]}
    threshold = {"dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5, "thresholding": True}
    for clip, limit in [(Clip(0.7), {"clip_sample_range": 0.7}), (DynamicThreshold(0.8, 1.5), threshold)]:
        for eta, clipped in [(0.0, False), (0.0, True), (0.5, False)]:
            table = ddim(schedule, steps, eta=eta, clip=clip, clipped_epsilon=clipped, landing="stride", **options)
            scheduler = scheduler_of("ddim", "linear", steps, **theirs, **limit)
            assert gap_to_scheduler(table, scheduler, scale=2, eta=eta, use_clipped_model_output=clipped) < 1e-11
        table = ddpm(schedule, steps, clip=clip, **options)
        assert gap_to_scheduler(table, scheduler_of("ddpm", "linear", steps, **theirs, **limit), False, 2) < 1e-11
    table = dpmpp_2m(schedule, steps, clip=DynamicThreshold(0.8, 1.5), **options)
    assert gap_to_scheduler(table, scheduler_of("dpmpp_2m", "linear", steps, **theirs, **threshold)) < SCHEDULER
    table = heun(schedule, steps, clip=Clip(0.7), **options)
    scheduler = scheduler_of("heun", "linear", steps, clip_sample=True, clip_sample_range=0.7, **theirs)
    assert gap_to_scheduler(table, scheduler) < SCHEDULER


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("steps", [5, 37, 100])
def test_samplers_in_the_noise_ratio_are_those_of_diffusers(
    betas: str, prediction: str, spacing: str, offset: int, steps: int
) -> None:
    schedule = schedule_of(betas)
    options = {"spacing": spacing, "offset": offset, "prediction": prediction}
    theirs = {"timestep_spacing": spacing, "steps_offset": offset, "prediction_type": THEIRS[prediction]}
    gaps = {}
    for karras in (False, True):
        more = {**theirs, "use_karras_sigmas": karras}
        for final in ("zero",) if karras else ("zero", "sigma_min"):
            table = euler(schedule, steps, karras=karras, final=final, **options)
            scheduler = scheduler_of("euler", betas, steps, final_sigmas_type=final, **more)
            assert table.start_scale == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
            gaps["euler", karras, final] = gap_to_scheduler(table, scheduler)
            table = dpmpp_2m(schedule, steps, karras=karras, final=final, **options)
            scheduler = scheduler_of("dpmpp_2m", betas, steps, final_sigmas_type=final, **more)
            if karras and betas == "squaredcos_cap_v2":
                # diffusers cuts these times to integers; ours are rounded, which samplers/preserving.py states.
                assert (scheduler.timesteps - table.t[:-1]).abs().max() <= 1
                scheduler.timesteps = table.t[:-1]
            gaps["dpmpp_2m", karras, final] = gap_to_scheduler(table, scheduler)
        gaps["heun", karras] = gap_to_scheduler(
            heun(schedule, steps, karras=karras, **options), scheduler_of("heun", betas, steps, **more)
        )
    table = euler_ancestral(schedule, steps, **options)
    gaps["euler_ancestral"] = gap_to_scheduler(table, scheduler_of("euler_ancestral", betas, steps, **theirs))
    assert {case: gap for case, gap in gaps.items() if not gap < SCHEDULER} == {}


@pytest.mark.parametrize("steps", [5, 37, 100])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_that_of_diffusers(steps: int, shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.scale_model_input = lambda x, t: x
    scheduler.set_timesteps(steps)
    table = flow_euler(steps, shift=shift)
    assert gap_to_scheduler(table, scheduler) < SCHEDULER


@pytest.mark.parametrize("steps", [5, 37])
def test_zero_terminal_snr_is_that_of_diffusers(steps: int) -> None:
    schedule = Schedule.scaled_linear(rescale_zero_snr=True)
    ours = {"spacing": "trailing", "prediction": "v"}
    theirs = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    # At eta 1 diffusers takes the root of a rounding error from pure noise, of either sign.
    for eta in (0.0, 0.9):
        table = ddim(schedule, steps, eta=eta, landing="stride", **ours)
        assert table.alpha[0] == 0
        scheduler = scheduler_of("ddim", "scaled_linear", steps, zero_snr=True, clip_sample=False, **theirs)
        assert gap_to_scheduler(table, scheduler, eta=eta) < 1e-11
    scheduler = scheduler_of("ddpm", "scaled_linear", steps, zero_snr=True, clip_sample=False, **theirs)
    assert gap_to_scheduler(ddpm(schedule, steps, **ours), scheduler, every=False) < 1e-11
    for sampler in (euler, euler_ancestral, dpmpp_2m):
        scheduler = scheduler_of(sampler.__name__, "scaled_linear", steps, zero_snr=True, **theirs)
        assert gap_to_scheduler(sampler(schedule, steps, **ours), scheduler) < SCHEDULER

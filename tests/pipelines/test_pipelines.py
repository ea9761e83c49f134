# SPDX-License-Identifier: Apache-2.0
"""Every kind of pipeline, run in parallel over time by its own call, against the plain call with the same seed.

A result that agrees does not prove that states were batched rightly: the first state of every window is right whatever happens
to the others, and after as many rounds as steps so is the sample. So rounds must be fewer than steps, and every row of every
batched network call is compared with a call of its own (`check="every"`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prologue import computed, outside
from tiny import CASES, Case

from paradiff import parallelize, parasolver
from paradiff.chain.slope import freeze_clean_data, freeze_epsilon, shifted
from paradiff.methods import WindowMethod
from paradiff.pipelines.report import Report

BOUND = 1e-5
"""Of the largest value of the plain call's result: float32, whose rounding differs with the rows of a network call."""

SATURATED = ("ddim_clip",)
"""This random network's clean-data estimate lies at its limit nearly everywhere, and diffusers' DDIM then keeps the raw noise
estimate: no slope says how such a step answers to its state, and the chain takes all its rounds. test_trained_pipelines.py has
the same scheduler on a trained network."""

FLOW = ("sd3", "flux", "sana", "qwen", "z_image", "wan", "cogvideox", "ltx", "hunyuan", "stable_audio")
"""Their random networks answer to their state so strongly that ten steps take ten rounds; they are given twenty."""

LANES = {
    "sd_inpaint4",
    "sd_inpaint9",
    "sd_controlnet",
    "sd_controlnet_half",
    "sd3",
    "sd3_without_t5",
    "sd3_skip_layers",
    "z_image",
    "z_image_truncated",
    "wan",
    "wan_euler",
    "wan22",
    "wan22_expand_timesteps",
    "cogvideox",
    "cogvideox_dynamic_cfg",
    "ltx_image_to_video",
}
"""Cases whose loop reads its step number, or mixes states of two rounds."""


def arguments(case: Case) -> tuple[WindowMethod, dict[str, Any]]:
    """A method that suits the case's network, and its number of steps. Its tolerance leaves most of `BOUND` to rounding, which
    from one processor to another differs by up to 2e-6 in these chains."""
    if case.name in ("ddpm_clip", "ddpm_threshold"):
        return parasolver(tolerance=2e-6), {"num_inference_steps": 20}
    if case.name.startswith(FLOW):
        return parasolver(tolerance=5e-6, rule="change", slope=shifted(0.5)), {"num_inference_steps": 20}
    tolerance = 5e-6 if case.name.startswith(("ddpm", "ddim")) else 1e-4  # pictures in -1 ... 1; latents of size 20 to 100
    if case.name == "lcm":
        tolerance = 5e-5  # at 1e-4 the error is 8e-6 of the largest value
    return parasolver(tolerance=tolerance, slope=freeze_clean_data if case.name in SATURATED else freeze_epsilon), {}


def compare(case: Case, method: WindowMethod, *, seed: int = 3, **options: Any) -> tuple[float, Report]:
    """Largest difference of the parallel call to the plain one, in units of the largest value, and the report."""
    other = case.make()
    plain, once = outside(other, lambda: case.run(other, seed, **options))
    pipe = case.make()
    kind, scheduler = type(pipe), pipe.scheduler
    with parallelize(pipe, method, check="every") as run:
        found, calls = computed(pipe, once, lambda: case.run(pipe, seed, **options))
    assert calls == once + once  # the check makes the plain call, too
    assert type(pipe) is kind
    assert pipe.scheduler is scheduler
    assert all("forward" not in vars(part) for part in pipe.components.values() if isinstance(part, torch.nn.Module))
    return float((found.double() - plain.double()).abs().max() / plain.double().abs().max()), run.report


@pytest.mark.parametrize("name", CASES)
def test_gives_the_plain_calls_result_in_fewer_rounds(name: str) -> None:
    case = CASES[name]
    method, options = arguments(case)
    error, report = compare(case, method, **options)
    assert error < BOUND
    assert report.executor == ("lanes" if name in LANES else "vector")
    assert report.steps == options.get("num_inference_steps", case.steps)
    assert report.passes < report.steps or name in SATURATED

# SPDX-License-Identifier: Apache-2.0
"""Pipelines of pixels keep their times on the CPU, beside states on the device. Their calls are parallel there all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from pipelines import tiny_unet
from problems import gap
from test_device_pipelines import ROUNDING
from torch import Tensor

import paradiff
from paradiff.pipelines.settings import Executor
from paradiff.pipelines.tensor.windowed import Windowed

KINDS = {"DDIMPipeline": (DDIMPipeline, DDIMScheduler), "DDPMPipeline": (DDPMPipeline, DDPMScheduler)}
METHOD = paradiff.quasi_newton(window=6)


def pixels(name: str) -> Any:
    pipeline, scheduler = KINDS[name]
    pipe = pipeline(tiny_unet(3), scheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.as_tensor(pipe(batch_size=2, generator=generator, num_inference_steps=12, output_type="np").images)


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("name", KINDS)
def test_times_on_the_cpu_go_with_states_on_the_device(name: str, executor: Executor) -> None:
    pipe = pixels(name)
    plain = call(pipe)
    with paradiff.parallelize(pipe, METHOD, executor=executor) as at_home:
        parallel = call(pipe)
    pipe.to("pseudo")
    assert gap(call(pipe), plain) < ROUNDING
    with paradiff.parallelize(pipe, METHOD, executor=executor) as run:
        found = call(pipe)
    assert run.report.executor == executor
    assert run.report.rounds == at_home.report.rounds
    assert gap(found, parallel) < ROUNDING


def test_numbers_of_a_window_meet_tensors_of_a_device() -> None:
    times = Windowed.wrap(torch.tensor([3, 2, 1]), None)
    states = Windowed.wrap(torch.ones(3, 2, 4, device="pseudo"), None)
    plain = torch.arange(8.0, device="pseudo").view(2, 4)
    for found, wanted in [
        (states * times, lambda w: plain * 0 + 3 - w),
        (times + plain, lambda w: plain + 3 - w),
        (torch.where(plain > times, plain, 0.0), lambda w: torch.where(plain > 3 - w, plain, 0.0)),
        (torch.lerp(states, states * 2, times.float().to("pseudo")), lambda w: plain * 0 + 4 - w),
        (torch.addcmul(states, states, times, value=0.5), lambda w: plain * 0 + 1 + 0.5 * (3 - w)),
        (plain.flatten()[times], lambda w: torch.tensor(3.0 - w, device="pseudo")),
    ]:
        assert found.device.type == "pseudo"
        for w in range(3):
            assert torch.equal(found.window[w], wanted(w))

# SPDX-License-Identifier: Apache-2.0
"""Loops that write into the states and outputs that they gave their scheduler, which may keep them without a copy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from paradiff import parallelize, parasolver
from paradiff.pipelines.loop.given import WRITTEN

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' own


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) + t.reshape(-1, 1) / 300))


def buffered(net: nn.Module, s: Any) -> Callable[[Tensor], Tensor]:
    def loop(x: Tensor) -> Tensor:
        buffer = torch.empty_like(x)
        for t in s.timesteps:
            v = net(s.scale_model_input(x, t), t)
            buffer.copy_(s.step(v, t, x)[0])
            x = buffer
        return x

    return loop


def old_state(net: nn.Module, s: Any) -> Callable[[Tensor], Tensor]:
    def loop(x: Tensor) -> Tensor:
        x = x.clone()
        for t in s.timesteps:
            old = x
            v = net(s.scale_model_input(x, t), t)
            x = s.step(v, t, x)[0]
            old.mul_(0.5)
        return x

    return loop


def old_output(net: nn.Module, s: Any) -> Callable[[Tensor], Tensor]:
    def loop(x: Tensor) -> Tensor:
        for t in s.timesteps:
            v = net(s.scale_model_input(x, t), t)
            x = s.step(v, t, x)[0]
            v.mul_(0.5)
        return x

    return loop


KEPT = {
    "singlestep": (lambda: diffusers.DPMSolverSinglestepScheduler(), (buffered, old_state)),
    "unipc": (lambda: diffusers.UniPCMultistepScheduler(), (buffered, old_state)),
    "heun": (lambda: diffusers.HeunDiscreteScheduler(), (buffered, old_state)),
    "pndm": (lambda: diffusers.PNDMScheduler(skip_prk_steps=True), (buffered, old_state, old_output)),
    "of samples": (lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="sample"), (old_output,)),
}
"""Schedulers, and what writes into what they keep."""

FREE = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(),
}


def called(make: Any, loop: Any, executor: Any) -> tuple[Tensor, Any]:
    """The difference of a parallel call to the plain one, and the run's report."""
    found = []
    for parallel in (False, True):
        scheduler, net = make(), Net()
        scheduler.set_timesteps(16)
        call: Any = loop(net, scheduler)
        if parallel:
            call = parallelize(call, parasolver(tolerance=1e-4), executor=executor, scheduler=scheduler, networks=[net])
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)) * scheduler.init_noise_sigma
            found.append(call(x))
    return found[1] - found[0], call.report


@pytest.mark.parametrize("executor", ["auto", "lanes"])
@pytest.mark.parametrize(("name", "loop"), [(name, loop) for name, (_, loops) in KEPT.items() for loop in loops])
def test_a_loop_that_writes_into_what_its_scheduler_keeps_is_called_plainly(name: str, loop: Any, executor: str) -> None:
    difference, report = called(KEPT[name][0], loop, executor)
    assert (report.executor, float(difference.abs().max())) == ("sequential", 0)
    assert WRITTEN in " ".join(report.warnings)


@pytest.mark.parametrize("executor", ["auto", "lanes"])
@pytest.mark.parametrize("loop", [buffered, old_output])
@pytest.mark.parametrize("name", FREE)
def test_a_loop_whose_scheduler_keeps_nothing_of_that_runs_in_parallel(name: str, loop: Any, executor: str) -> None:
    difference, report = called(FREE[name], loop, executor)
    assert report.executor != "sequential"
    assert float(difference.square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error + 1e-4

# SPDX-License-Identifier: Apache-2.0
"""Loops that hold a method of their scheduler from before the call, or call it by its class."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from paradiff import parallelize, quasi_newton
from paradiff.pipelines.loop.scheduler_proxy import is_proxy, make_proxy, real_scheduler, seal

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # diffusers' own
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),  # torchsde's
    pytest.mark.filterwarnings("ignore:the loop was called sequentially:RuntimeWarning"),
]
SCHEDULERS = [
    *("DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
]


class Network(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * torch.tanh(x.roll(1, -1)) + 0.1 * torch.cos(torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1) / 300)


Scale = Callable[[Tensor, Any], Tensor]
Step = Callable[[Tensor, Any, Tensor], Any]


def held_scale(scheduler: Any) -> tuple[Scale, Step]:
    return scheduler.scale_model_input, lambda v, t, x: scheduler.step(v, t, x)


def scale_of_the_class(scheduler: Any) -> tuple[Scale, Step]:
    kind = type(scheduler)
    return lambda x, t: kind.scale_model_input(scheduler, x, t), lambda v, t, x: scheduler.step(v, t, x)


def held_step(scheduler: Any) -> tuple[Scale, Step]:
    return lambda x, t: scheduler.scale_model_input(x, t), functools.partial(scheduler.step, return_dict=False)


def step_of_the_class(scheduler: Any) -> tuple[Scale, Step]:
    kind = type(scheduler)
    return lambda x, t: scheduler.scale_model_input(x, t), lambda v, t, x: kind.step(scheduler, v, t, x)


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("held", [held_scale, scale_of_the_class, held_step, step_of_the_class])
@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_the_sample_is_the_plain_calls(name: str, held: Callable[[Any], tuple[Scale, Step]], executor: Any) -> None:
    """A method of a scheduler of two stages asks whether there is a state of the first one, which a parallel step never has."""

    def made() -> tuple[Any, nn.Module, Callable[[Tensor], Tensor]]:
        options = {"noise_sampler_seed": 0} if name == "DPMSolverSDEScheduler" else {}
        scheduler, network = getattr(diffusers, name)(**options), Network()
        scheduler.set_timesteps(12)
        scale, step = held(scheduler)

        def loop(x: Tensor) -> Tensor:
            for t in scheduler.timesteps:
                x = step(network(scale(x, t), t), t, x)[0]
            return x

        return scheduler, network, loop

    scheduler, _, loop = made()
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    torch.manual_seed(1)
    plain = loop(x.clone())
    scheduler, network, loop = made()
    run = parallelize(loop, quasi_newton(8), executor=executor, scheduler=scheduler, networks=[network])
    torch.manual_seed(1)
    found = run(x.clone())
    if run.report.executor == "sequential":
        assert torch.equal(found, plain)
        assert ("held from before the call" in run.report.warnings[0]) == (held in (held_step, step_of_the_class))
        return
    error = float((found - plain).square().mean().sqrt())
    assert error <= 2 * run.report.error_estimate.estimated_error + 1e-4 * float(plain.std())


class Handler:
    def rounds(self, timesteps: Tensor) -> Any:
        return iter(timesteps)

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        return sample

    def step(self, *_: Any) -> Any:
        return None


def test_a_sealed_attribute_is_not_asked_for_its_presence_alone() -> None:
    from paradiff.errors import Unsupported

    scheduler = diffusers.KDPM2DiscreteScheduler()
    scheduler.set_timesteps(4)
    proxy = make_proxy(scheduler, Handler())
    assert proxy.state_in_first_order
    seal(proxy, {"sample"})
    for read in (lambda: proxy.sample is None, lambda: proxy.state_in_first_order, lambda: hasattr(proxy, "sample")):
        with pytest.raises(Unsupported, match="reads the scheduler's sample, which changes from step to step"):
            read()
    assert is_proxy(proxy)
    assert proxy.__class__ is type(scheduler)
    assert isinstance(proxy, diffusers.KDPM2DiscreteScheduler)
    assert type(proxy).__name__ == "KDPM2DiscreteScheduler"
    assert type(real_scheduler(proxy)) is type(scheduler)
    seal(proxy, {"dt"})
    assert type(proxy).__mro__[1] is type(scheduler)

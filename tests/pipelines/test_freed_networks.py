# SPDX-License-Identifier: Apache-2.0
"""Nothing refers to a network, or to what holds it, once a run and its owner are gone."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from adversary import Net
from tiny import CASES
from torch import Tensor, nn

from paradiff import Keyed, Policy, Schedule, auto, collocation, parallelize, parasolver, quasi_newton, sample
from paradiff.samplers import ddim

TABLE = ddim(Schedule.linear(), 12)
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def sampled(method: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        net = Net()
        with torch.no_grad():
            sample(net, TABLE, Keyed((8,), range(2)), method)
        return net

    return made


def planned() -> nn.Module:
    net = Net()
    policy = Policy(lambda x, t, observation: net(x, t) + 0 * observation, TABLE, (8,))
    for _ in range(3):
        policy.act(torch.zeros(2, 8))
    return net


def walked(**options: Any) -> Callable[[], nn.Module]:
    """A function whose loop has the network in a variable."""

    def made() -> nn.Module:
        net, scheduler = Net(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

        @torch.no_grad()
        def loop(x: Tensor) -> Tensor:
            scheduler.set_timesteps(20)
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t), t, x)[0]
            return x

        parallelize(loop, **options)(X)
        return net

    return made


def owned() -> nn.Module:
    """An object whose class has the network in a variable."""
    net = Net()

    class Walker:
        def __init__(self) -> None:
            self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

        def walk(self, x: Tensor) -> Tensor:
            self.scheduler.set_timesteps(20)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(net(x, t), t, x)[0]
            return x

    with torch.no_grad():
        parallelize(Walker(), parasolver(window=4), networks=[net])(X)
    return net


def piped(method: Any, **options: Any) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        pipe = CASES["sd"].make()
        with parallelize(pipe, method, **options):
            CASES["sd"].run(pipe, 3, num_inference_steps=6)
        return pipe.unet

    return made


USES: dict[str, Callable[[], nn.Module]] = {
    "sample": sampled(quasi_newton()),
    "collocation": sampled(collocation()),
    "a policy": planned,
    "a function": walked(method=parasolver(window=4)),
    "a function, by lanes": walked(method=parasolver(window=4), executor="lanes"),
    "a function, auto": walked(),
    "a function, compared": walked(method=parasolver(window=4), check="every"),
    "an object": owned,
    "a pipeline": piped(parasolver(window=4)),
    "a pipeline, by lanes": piped(parasolver(window=4), executor="lanes"),
    "a pipeline, auto": piped(auto()),
    "a pipeline, collocation": piped(collocation(), keep_trajectory=True),
}


@pytest.mark.parametrize("use", USES)
def test_a_network_is_freed_with_its_owner(use: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        left = weakref.ref(USES[use]())
    gc.collect()
    assert left() is None

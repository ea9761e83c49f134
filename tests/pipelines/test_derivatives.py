# SPDX-License-Identifier: Apache-2.0
"""Calls whose sample has derivatives are the plain one: a parallel call keeps none."""

from __future__ import annotations

import contextlib
from typing import Any

import diffusers
import pytest
import torch
from adversary import Net
from torch import Tensor

from paradiff import auto, parallel, parasolver
from paradiff.solver import Method

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # diffusers' schedulers call numpy
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # of torch's own, within jvp
]
METHODS = [parasolver(tolerance=1e-4), auto()]


def loops(method: Method) -> tuple[Any, Any, Net]:
    """A loop in parallel, the plain one, and their network."""
    net, scheduler = Net(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    def denoise(x: Tensor, weight: float | Tensor = 1.0) -> Tensor:
        scheduler.set_timesteps(20)
        for t in scheduler.timesteps:
            x = scheduler.step(weight * net(x, t), t, x)[0]
        return x

    return parallel(method)(denoise), denoise, net


def warned(method: Method, reason: str) -> contextlib.AbstractContextManager[Any]:
    """Expects the warning of a method that was named; `auto` chooses the plain call of so short a loop by itself."""
    return contextlib.nullcontext() if method is METHODS[1] else pytest.warns(RuntimeWarning, match=reason)


X = torch.linspace(-1, 1, 16).view(2, 8)


@pytest.mark.parametrize("method", METHODS, ids=["parasolver", "auto"])
def test_gradients_of_the_weights_are_those_of_the_plain_loop(method: Method) -> None:
    denoise, plain, net = loops(method)
    (wanted,) = torch.autograd.grad(plain(X).sum(), net.b.weight)
    with warned(method, r"its sample would have derivatives.* within torch\.no_grad"):
        found = denoise(X)
    assert torch.equal(torch.autograd.grad(found.sum(), net.b.weight)[0], wanted)
    assert denoise.run.report.executor == "sequential"


@pytest.mark.parametrize("method", METHODS, ids=["parasolver", "auto"])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_of_torch_are_those_of_the_plain_loop(transform: str, method: Method) -> None:
    denoise, plain, _ = loops(method)

    def transformed(loop: Any) -> Any:
        def summed(weight: Tensor) -> Tensor:
            return loop(X, weight).sum()

        if transform == "jvp":
            return torch.func.jvp(summed, (torch.ones(()),), (torch.ones(()),))[1]
        return getattr(torch.func, transform)(summed)(torch.tensor([1.0, 0.5]) if transform == "vmap" else torch.ones(()))

    with warned(method, r"within a transform of torch\.func"):
        found = transformed(denoise)
    assert torch.equal(found, transformed(plain))


def test_a_loop_without_derivatives_is_parallel_where_gradients_are_on() -> None:
    denoise, plain, net = loops(METHODS[0])
    net.requires_grad_(False)
    found = denoise(X)
    assert denoise.run.report.executor != "sequential"
    torch.testing.assert_close(found, plain(X), atol=2e-4, rtol=0)


@pytest.mark.parametrize("executor", ["auto", "vector", "lanes"])
@pytest.mark.parametrize("begin", [0, 6])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_a_network_within_a_transform_in_the_loop_is_named_as_the_reason(transform: str, begin: int, executor: Any) -> None:
    net, scheduler = Net(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    calls: dict[str, Any] = {
        "grad": lambda x, t: torch.func.grad(lambda y: net(y, t).square().sum())(x),
        "vmap": lambda x, t: torch.vmap(lambda row: net(row[None], t)[0])(x),
        "jvp": lambda x, t: torch.func.jvp(lambda y: net(y, t), (x,), (torch.ones_like(x),))[1],
    }

    def denoise(x: Tensor) -> Tensor:
        scheduler.set_timesteps(20)
        for i, t in enumerate(scheduler.timesteps):
            v = net(x, t) if i < begin else calls[transform](x, t)
            x = scheduler.step(v, t, x)[0]
        return x

    run = parallel(parasolver(tolerance=1e-4), executor=executor)(denoise)
    told = r"within a transform of torch\.func" if executor != "vector" else r"transform of torch\.func|reads its step number"
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=told):
        found = run(X)
    with torch.no_grad():
        assert torch.equal(found, denoise(X))

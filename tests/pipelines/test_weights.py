# SPDX-License-Identifier: Apache-2.0
"""Loops that change their network's weights are refused, with the plain call's result and the network as it was."""

from __future__ import annotations

import functools
import operator
import warnings
from typing import Any

import diffusers
import pytest
import torch
from adversary import Adversary
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from tiny import FURTHER
from tiny.edits import XL_EMBEDDED
from torch import Tensor, nn

from paradiff import parallelize, parasolver

LOOP = """
def loop(self, x, generator):
    layer, net = self.net.b, self.net
    SETUP
    for i, t in enumerate(self.scheduler.timesteps):
        BEFORE
        x = self.scheduler.step(self.net(x, t), t, x)[0]
    END
    return x
"""
CHANGED = {
    # name: (before the loop, in each pass, after the loop, words of the reason)
    "values": ("w = layer.weight.data.clone()", "layer.weight.data.copy_(w * (1 - 0.02 * i))", "layer.weight.data.copy_(w)"),
    "a scale": ("pass", "layer.weight.mul_(0.98)", "layer.weight.mul_(0.98 ** -30)"),
    "one pass": ("pass", "layer.weight.mul_(0.8 if i == 15 else 1.0)", "layer.weight.div_(0.8)"),
    "all of them": ("pass", "[p.mul_(0.99) for p in net.parameters()]", "[p.mul_(0.99 ** -30) for p in net.parameters()]"),
    "memory": ("w = layer.weight.data", "layer.weight.data = w * (1 - 0.02 * i)", "layer.weight.data = w"),
    "parameter": (
        "one, two = layer.weight, nn.Parameter(0.8 * layer.weight.data)",
        "layer.weight = one if i % 2 else two",
        "layer.weight = one",
    ),
    "module": ("other = nn.Linear(2048, 8)", "net.b = layer if i % 2 else other", "net.b = layer"),
    "before the loop": ("layer.weight.mul_(0.8); box = SimpleNamespace(v=0.0)", "box.v = i", "layer.weight.div_(0.8)"),
}


class Wide(nn.Module):
    """A network with a layer that is too large for its values to be looked at in every call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 2048), nn.Linear(2048, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x) + t.reshape(-1, 1) / 300))


def called(text: str, network: nn.Module, executor: Any) -> tuple[Tensor, list[str]]:
    """The sample of a call, and the warnings of its report; the plain call's for `None`."""
    pipe = Adversary.of(text)(network, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    call: Any = pipe if executor is None else parallelize(pipe, parasolver(tolerance=1e-4), executor=executor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = call(generator=torch.Generator().manual_seed(3))
    return found, [] if executor is None else call.report.warnings


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("name", CHANGED)
def test_a_loop_that_changes_weights_is_refused_and_the_network_is_as_it_was(name: str, executor: Any) -> None:
    setup, before, end = CHANGED[name]
    text = LOOP.replace("SETUP", setup).replace("BEFORE", before).replace("END", end)
    plain, _ = called(text, Wide(), None)
    found, told = called(text, network := Wide(), executor)
    assert torch.equal(found, plain)
    reasons = (
        "writes to the weights net.b.weight|writes to the weights net.a.weight|exchanges parts of net|reads its step number"
    )
    with pytest.raises(AssertionError, match=reasons):
        raise AssertionError(told[0])
    torch.testing.assert_close(network.b.weight, Wide().b.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_weights_that_go_to_another_dtype_and_back_before_the_loop_are_the_same(executor: Any) -> None:
    text = LOOP.replace("SETUP", "net.double(), net.float()").replace("BEFORE", "pass").replace("END", "pass")
    plain, _ = called(text, Wide(), None)
    found, told = called(text, Wide(), executor)
    assert not any("sequentially" in line for line in told)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_weights_that_come_back_otherwise_before_the_loop_are_refused(executor: Any) -> None:
    text = LOOP.replace("SETUP", "net._apply(lambda w: 0.5 * w)").replace("BEFORE", "pass").replace("END", "pass")
    plain, _ = called(text, Wide(), None)
    found, told = called(text, network := Wide(), executor)
    assert torch.equal(found, plain)
    assert "writes to the weights net.a.weight" in told[0]
    assert torch.equal(network.b.weight, 0.5 * Wide().b.weight)


@pytest.mark.parametrize("name", ["sdxl_img2img", "sdxl_inpaint"])
def test_an_autoencoder_that_is_upcast_before_the_loop_leaves_it_parallel(name: str) -> None:
    case = FURTHER[name]
    pipe = case.make().to(torch.float16)
    assert pipe.vae.config.force_upcast
    given = {key: value.half() for key, value in XL_EMBEDDED.items() if isinstance(value, Tensor)}
    plain = case.run(pipe, **given)
    with parallelize(pipe, parasolver()) as run:
        found = case.run(pipe, **given)
    assert run.report.executor != "sequential"
    assert not any("writes to the weights" in line for line in run.report.warnings)
    torch.testing.assert_close(found, plain, rtol=0, atol=0.2)
    assert pipe.vae.dtype == torch.float16


class Scaled:
    """An object that writes to weights, of which the pipeline's own functions show nothing."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @torch.no_grad()
    def apply(self) -> None:
        for parameter in self.network.parameters():
            parameter.data.mul_(0.98)


class Through(Scaled):
    """The same, by a method of its own."""

    def apply(self) -> None:
        self.exchange(self.network.get_submodule("b"))

    def exchange(self, layer: Any) -> None:
        layer.weight.data = layer.weight.data * 0.98


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("kind", [Scaled, Through])
def test_weights_that_an_object_of_the_loop_writes_to_are_put_back(kind: type[Scaled], executor: Any) -> None:
    text = LOOP.replace("SETUP", "self.s = STORE['s']").replace("BEFORE", "self.s.apply()").replace("END", "pass")
    held = Adversary.of(text).loop.__globals__["STORE"]
    samples, weights, told = [], [], []
    try:
        for one in (None, executor):
            held["s"] = kind(network := Wide())
            sample, told = called(text, network, one)
            samples.append(sample)
            weights.append(network.b.weight.detach().clone())
    finally:
        del held["s"]
    assert torch.equal(*samples)
    assert torch.equal(*weights)
    assert "writes to the weights" in told[0]


def test_weights_that_cannot_be_put_back_end_the_call_in_a_sentence() -> None:
    text = LOOP.replace("SETUP", "pass").replace("BEFORE", "[STORE['s'](w) for w in STORE['all']]").replace("END", "pass")
    network = Wide()
    held = Adversary.of(text).loop.__globals__["STORE"]
    held |= {"s": operator.methodcaller("mul_", 0.98), "all": list(network.parameters())}
    try:
        with pytest.raises(
            RuntimeError, match=r"writes to the weights net\.a\.weight, and the parallel run.* load the network"
        ):
            called(text, network, "vector")
    finally:
        del held["s"], held["all"]


def test_weights_that_are_left_alone_are_not_copied() -> None:
    text = LOOP.replace("SETUP", "pass").replace("BEFORE", "pass").replace("END", "pass")
    plain, _ = called(text, Wide(), None)
    found, told = called(text, Wide(), "vector")
    assert told == []
    assert float((found - plain).square().mean().sqrt()) < 1e-4


class Pipe(diffusers.DiffusionPipeline):
    """A pipeline that calls a callback after each step."""

    _callback_tensor_inputs = ("latents",)

    def __init__(self, net: Wide, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, generator: torch.Generator, callback_on_step_end: Any = None) -> Tensor:
        self.scheduler.set_timesteps(20)
        latents = torch.randn(2, 8, generator=generator)
        for i, t in enumerate(self.scheduler.timesteps):
            latents = self.scheduler.step(self.net(latents, t), t, latents)[0]
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {"latents": latents})
        return latents


def scaled(pipe: Any, step: int, time: Any, tensors: Any, by: float = 0.8) -> Any:
    """Writes to weights after a step, of which torch counts a version."""
    if step == 7:
        pipe.net.b.weight.mul_(by)
    return tensors


def through_data(by: float, pipe: Any, step: int, time: Any, tensors: Any) -> Any:
    """The same, of which it counts none."""
    if step == 7:
        pipe.net.b.weight.data.mul_(by)
    return tensors


class Object:
    """What is called is an object, or a method of one."""

    def __call__(self, *given: Any) -> Any:
        return self.scaled(*given)

    def scaled(self, *given: Any) -> Any:
        return through_data(0.8, *given)


class Derived(PipelineCallback):
    """What is called is a method of diffusers, which calls one of the user's."""

    tensor_inputs = ("latents",)

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Any) -> Any:
        return through_data(0.8, pipeline, step_index, timestep, callback_kwargs)


class Holding:
    """An object that has the function from its maker."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *given: Any) -> Any:
        return self.function(*given)


class Operators:
    """An object that gets to weights, and writes to them, by operators: no function names what they do."""

    def __init__(self) -> None:
        self.get, self.write = operator.attrgetter("net.b.weight.data"), operator.methodcaller("mul_", 0.8)

    def __call__(self, pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        if step == 7:
            self.write(self.get(pipe))
        return tensors


CALLBACKS: dict[str, Any] = {
    "a function": lambda: scaled,
    "a function, through data": lambda: lambda *given: through_data(0.8, *given),
    "a partial": lambda: functools.partial(through_data, 0.8),
    "an object": Object,
    "a method": lambda: Object().scaled,
    "an object that holds a function": lambda: Holding(functools.partial(through_data, 0.8)),
    "an object that holds operators": Operators,
    "one of diffusers": lambda: Derived(cutoff_step_ratio=None, cutoff_step_index=7),
    "several of diffusers": lambda: MultiPipelineCallbacks([Derived(cutoff_step_ratio=None, cutoff_step_index=7)]),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_that_changes_weights_is_refused(name: str) -> None:
    samples, weights, told = [], [], []
    for parallel in (False, True):
        pipe: Any = Pipe(network := Wide(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
        call = parallelize(pipe, parasolver(tolerance=1e-3)) if parallel else pipe
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples.append(call(generator=torch.Generator().manual_seed(3), callback_on_step_end=CALLBACKS[name]()))
        weights.append(network.b.weight.detach().clone())
        told = call.report.warnings if parallel else told
    assert torch.equal(*samples)
    assert torch.equal(*weights)
    assert "writes to the weights net.b.weight" in told[0]

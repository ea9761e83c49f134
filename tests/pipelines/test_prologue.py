# SPDX-License-Identifier: Apache-2.0
"""What precedes a loop is computed once: the dry walk and the lanes play the results of networks' methods from a log."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from adversary import Net
from tiny import CASES, FURTHER
from torch import Tensor, nn

from paradiff import parallelize, parasolver
from paradiff.pipelines.network.call_log import copied

PICTURES = {
    "sd_img2img": "vector",
    "sd_inpaint9": "lanes",
    "sd_controlnet_img2img": "lanes",
    "sdxl_inpaint": "lanes",
    "flux_fill": "vector",
    "flux_inpaint": "lanes",
    "kandinsky_inpaint": "lanes",
    "wan_video": "vector",
    "cogvideox_video": "lanes",
    "sdxl_adapter": "lanes",
    "z_image_img2img": "lanes",  # after a refused try, as the next
    "ltx_image_to_video": "lanes",
}


def modules_called(pipe: Any, call: Any) -> tuple[Tensor, collections.Counter[str]]:
    """What a call returns, and how often the inner modules of networks outside of the loop were called in it."""
    looping = ("unet", "transformer", "controlnet")
    names = {
        id(module): f"{part}.{name}"
        for part, network in vars(pipe).items()
        if isinstance(network, nn.Module) and part not in looping
        for name, module in network.named_modules()
        if name  # An entry of a network itself may be answered from the log.
    }
    counts = collections.Counter[str]()

    def count(module: nn.Module, _: Any) -> None:
        if id(module) in names:
            counts[names[id(module)]] += 1

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        return call(), counts
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PICTURES)
def test_an_encoder_is_called_as_often_as_in_the_plain_call(name: str) -> None:
    case = (CASES | FURTHER)[name]
    pipe = case.make()
    _, plain = modules_called(pipe, lambda: case.run(pipe, 3))
    with parallelize(pipe, parasolver(window=4)) as run:
        _, parallel = modules_called(pipe, lambda: case.run(pipe, 3))
    assert run.report.executor == PICTURES[name]
    assert sum(plain.values()) > 10
    assert parallel == plain


@dataclass
class Distribution:
    """What an encoder returns, as an object of its own."""

    mean: Tensor
    counts: np.ndarray[Any, Any]


CALLS = collections.Counter[str]()


class Encoder(nn.Module):
    """Methods of many kinds, which count their calls."""

    def encode(self, x: Tensor) -> Distribution:
        CALLS["encode"] += 1
        return Distribution(2 * x, np.ones(2))

    def sampled(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        CALLS["sampled"] += 1
        return x + torch.randn(x.shape, generator=generator) + float(np.random.rand())

    def into(self, x: Tensor) -> Tensor:
        CALLS["into"] += 1
        return x.mul_(0.5)

    def rows(self, x: Tensor) -> Iterator[Tensor]:
        CALLS["rows"] += 1
        return iter(x)

    def filled(self, cache: Any) -> Tensor:
        CALLS["filled"] += 1
        cache.mean = cache.mean + 1
        return cache.mean

    def scale(self) -> float:
        CALLS["scale"] += 1
        return 0.5

    def forward(self, x: Tensor) -> Tensor:
        CALLS["forward"] += 1
        return x + torch.rand(())


class Pipe(diffusers.DiffusionPipeline):
    """A loop after all of an encoder's methods."""

    def __init__(self, net: Net, encoder: Encoder, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(net=net, encoder=encoder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, generator: torch.Generator) -> Tensor:
        self.scheduler.set_timesteps(12)
        found = self.encoder.encode(torch.ones(2, 8))
        found.mean += 1  # What it returned is the caller's own.
        found.counts += 1
        x = 0.1 * found.mean + self.encoder.sampled(torch.zeros(2, 8), generator)
        x = x + self.encoder(0 * x) + self.encoder.sampled(0 * x, None)
        half = torch.ones(2, 8)
        self.encoder.into(half)
        x = x + half + sum(self.encoder.rows(x)) + self.encoder.scale() * self.encoder.filled(found) + found.mean
        x = 0.2 * x + torch.randn(2, 8, generator=generator) + torch.randn(2, 8) + float(found.counts.sum())
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.net(x, t), t, x).prev_sample
        return x


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_what_a_method_drew_or_wrote_is_so_again(executor: Any) -> None:
    ends = []
    for parallel in (False, True):
        pipe = Pipe(Net(), Encoder(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
        generator = torch.Generator().manual_seed(3)
        CALLS.clear()
        torch.manual_seed(5)
        np.random.seed(7)
        run = parallelize(pipe, parasolver(window=4, tolerance=1e-5), executor=executor) if parallel else pipe
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found: Any = run(generator=generator)
        if parallel:
            assert run.report.executor == executor
        states = (
            generator.get_state(),
            torch.get_rng_state(),
            torch.as_tensor(np.random.get_state(legacy=False)["state"]["key"].astype(np.int64)),
        )
        ends.append((found, states, CALLS.copy()))
    (plain, before, once), (parallel, after, calls) = ends
    torch.testing.assert_close(parallel, plain, rtol=0, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [calls[name] for name in ("encode", "sampled", "forward")] == [1, 2, 1]
    assert once == {"encode": 1, "sampled": 2, "forward": 1, "into": 1, "rows": 1, "filled": 1, "scale": 1}
    assert min(calls[name] for name in ("into", "rows", "filled", "scale")) > 1  # made anew


class Part(nn.Module):
    """A module within a network, which counts its calls."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        CALLS[self.name] += 1
        return x + torch.rand(())


class Nested(nn.Module):
    """A network of parts, which a pipeline may call by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = Part("embedding"), Part("inner")
        self.blocks = nn.ModuleList([Part("block"), Part("second block")])

    def get_input_embeddings(self) -> Part:
        return self.embedding

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](self.inner(self.get_input_embeddings()(x))))


class OfParts(diffusers.DiffusionPipeline):
    """A loop after calls of a network's parts."""

    def __init__(self, net: Net, encoder: Nested, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(net=net, encoder=encoder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, generator: torch.Generator) -> Tensor:
        self.scheduler.set_timesteps(12)
        x = torch.randn(2, 8, generator=generator)
        x = x + 0.1 * self.encoder.inner(0 * x) + 0.1 * self.encoder.blocks[0](0 * x)
        x = x + 0.1 * self.encoder.get_input_embeddings()(0 * x) + 0.1 * self.encoder(0 * x)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.net(x, t), t, x).prev_sample
        return x


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_the_parts_of_a_network_are_computed_as_often_as_in_the_plain_call(executor: Any) -> None:
    ends, counts = [], []
    for parallel in (False, True):
        pipe = OfParts(Net(), Nested(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
        CALLS.clear()
        torch.manual_seed(5)
        run = parallelize(pipe, parasolver(window=4, tolerance=1e-5), executor=executor) if parallel else pipe
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ends.append(run(generator=torch.Generator().manual_seed(3)))
        counts.append(CALLS.copy())
        assert all("forward" not in vars(part) for part in pipe.encoder.modules())
    assert counts[0] == {"embedding": 2, "inner": 2, "block": 2, "second block": 1}
    assert counts[1] == counts[0]
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-4)


def test_a_boundary_before_a_method_is_gone_after_the_call() -> None:
    pipe = Pipe(Net(), Encoder(), diffusers.FlowMatchEulerDiscreteScheduler())
    own = pipe.encoder.sampled
    pipe.encoder.encode = lambda x: Distribution(x, np.zeros(2))  # a user's own
    users = pipe.encoder.encode
    before = set(vars(pipe.encoder))
    parallelize(pipe, parasolver(window=4))(generator=torch.Generator())
    assert set(vars(pipe.encoder)) == before
    assert pipe.encoder.sampled == own
    assert pipe.encoder.encode is users


def test_copies_share_no_tensor_and_iterators_have_none() -> None:
    inner = Distribution(torch.zeros(2), np.zeros(2))
    value: dict[str, Any] = {"a": [torch.ones(2), inner], "b": (inner, {1}, "text", nn.Linear(1, 1))}
    own = copied(value)
    assert own["a"][1] is own["b"][0] is not inner
    own["a"][0].zero_()
    own["a"][1].mean += 1
    own["a"][1].counts += 1
    own["b"][1].add(2)
    assert float(value["a"][0].sum()) == 2.0
    assert float(inner.mean.sum() + inner.counts.sum()) == 0.0
    assert value["b"][1] == {1}
    assert own["b"][3] is value["b"][3]
    with pytest.raises(TypeError, match="an iterator"):
        copied([iter([1])])

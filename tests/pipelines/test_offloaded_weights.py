# SPDX-License-Identifier: Apache-2.0
"""Loops that change the weights of networks which are offloaded, or cast, are refused, and others stay parallel."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from adversary import Adversary
from diffusers import hooks
from test_weights import LOOP, Wide
from torch import Tensor

from paradiff import parallelize, parasolver

HERE = torch.device("cpu")


def in_groups(network: Wide, **options: Any) -> None:
    hooks.apply_group_offloading(network, HERE, HERE, "leaf_level", **options)


OFFLOADED: dict[str, Callable[[Wide], Any]] = {
    "as a whole": lambda network: accelerate.cpu_offload_with_hook(network, HERE),
    "layer by layer": lambda network: accelerate.cpu_offload(network, HERE),
    "in groups": in_groups,
    "cast": lambda network: hooks.apply_layerwise_casting(network, torch.bfloat16, torch.float32),
}
CHANGED = {
    # name: (before the loop, in each pass, after the loop, words of the reason)
    "a scale": ("pass", "net.b.weight.mul_(0.98)", "pass", r"writes to the weights net\.b\.weight"),
    "behind the version": ("pass", "net.b.weight.data.mul_(0.98)", "pass", r"writes to the weights net\.b\.weight"),
    "memory": ("w = net.b.weight.data", "net.b.weight.data = w * (1 - 0.02 * i)", "pass", r"net\.b\.weight|step number"),
    "module": (
        "other = nn.Linear(2048, 8)",
        "net.b = layer if i % 2 else other",
        "net.b = layer",
        "exchanges parts of net|step",
    ),
    "what is mapped": (
        "pass",
        "net.b._hf_hook.weights_map['weight'].mul_(0.98)",
        "pass",
        r"writes to the weights net\.b\.weight",
    ),
}
APPLIED = [
    *((offload, change) for offload in ("as a whole", "in groups", "cast") for change in ("a scale", "behind the version")),
    ("as a whole", "memory"),
    ("in groups", "memory"),
    *((offload, "module") for offload in OFFLOADED),
    ("layer by layer", "what is mapped"),
]


def called(text: str, network: Wide, executor: Any) -> tuple[Tensor, list[str]]:
    """The sample of a call, and the warnings of its report; the plain call's for `None`."""
    torch.manual_seed(1)  # for modules that the loop makes
    pipe = Adversary.of(text)(network, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    call: Any = pipe if executor is None else parallelize(pipe, parasolver(tolerance=1e-4), executor=executor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = call(generator=torch.Generator().manual_seed(3))
    return found, [] if executor is None else call.report.warnings


def of(offload: str) -> Wide:
    network = Wide().requires_grad_(False)
    OFFLOADED[offload](network)
    return network


def values(network: Wide) -> list[Tensor]:
    """The weights between two calls, wherever they are."""
    hook: Any = getattr(network.b, "_hf_hook", None)
    return [hook.weights_map["weight"]] if getattr(hook, "offload", False) else [w.clone() for w in network.parameters()]


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize(("offload", "change"), APPLIED)
def test_a_loop_that_changes_them_is_refused_and_the_network_is_as_after_the_plain_call(
    offload: str, change: str, executor: Any
) -> None:
    setup, before, end, reason = CHANGED[change]
    text = LOOP.replace("SETUP", setup).replace("BEFORE", before).replace("END", end)
    plain, _ = called(text, one := of(offload), None)
    found, told = called(text, other := of(offload), executor)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(told)
    assert torch.equal(found, plain)
    assert all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("offload", OFFLOADED)
def test_weights_that_are_written_out_of_sight_end_the_call_in_a_sentence(offload: str, executor: Any) -> None:
    text = LOOP.replace("SETUP", "pass").replace("BEFORE", "[STORE['s'](w) for w in STORE['all']]").replace("END", "pass")
    network = of(offload)
    hook: Any = getattr(network.b, "_hf_hook", None)
    weights = list(hook.weights_map.dataset.values() if offload == "layer by layer" else network.parameters())
    held = Adversary.of(text).loop.__globals__["STORE"]
    held |= {"s": operator.methodcaller("mul_", 0.98), "all": weights}
    try:
        with pytest.raises(RuntimeError, match=r"writes to the weights net\..*, and the parallel run.* load the network"):
            called(text, network, executor)
    finally:
        del held["s"], held["all"]


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("offload", [*OFFLOADED, "in files"])
def test_a_loop_that_leaves_them_alone_is_parallel(offload: str, executor: Any, tmp_path: Path) -> None:
    text = LOOP.replace("SETUP", "pass").replace("BEFORE", "pass").replace("END", "pass")
    network = Wide().requires_grad_(False)
    if offload == "in files":
        in_groups(network, offload_to_disk_path=str(tmp_path))
    else:
        OFFLOADED[offload](network)
    plain, _ = called(text, network, None)
    found, told = called(text, network, executor)
    assert told == []
    assert float((found - plain).square().mean().sqrt()) < 3e-4 if offload != "cast" else 1e-2


@pytest.mark.parametrize("offload", ["as a whole", "in groups", "layer by layer"])
def test_weights_of_another_kind_in_memory_are_no_change(offload: str) -> None:
    """A function that names weights has them compared by value, also NaN, half precision and channels that are last."""
    text = LOOP.replace("SETUP", "pass").replace("BEFORE", "net.a.weight.shape").replace("END", "pass")
    network = Wide().requires_grad_(False)
    unused = torch.full((3, 4, 5, 5), float("nan"), dtype=torch.float16).to(memory_format=torch.channels_last)
    network.register_parameter("unused", torch.nn.Parameter(unused, requires_grad=False))
    OFFLOADED[offload](network)
    found, told = called(text, network, "vector")
    assert told == []
    assert bool(found.isfinite().all())

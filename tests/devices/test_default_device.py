# SPDX-License-Identifier: Apache-2.0
"""`torch.set_default_device` in a script: tensors that are given no device are made there, and a solver's tables and indices
stay on the CPU all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from problems import METHODS, SHAPE, TABLES, fitted, gap
from test_device_pipelines import EXACTLY, ROUNDING, parallel, short
from tiny import CASES
from torch import Tensor

import paradiff
from paradiff import Evaluator, Keyed
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler, euler_ancestral, flow_euler, heun


@pytest.fixture
def default(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


def network(x: Tensor, t: Tensor) -> Tensor:
    """A network that relies on the default device."""
    return torch.sin(x) * torch.tensor([0.3]) + (t.to(x.dtype) / 1000)[:, None, None]


@pytest.mark.usefixtures("default")
@pytest.mark.parametrize("name", [*METHODS, "srds", "collocation"])
def test_methods_sample_as_without_it(name: str, device: str) -> None:
    table = TABLES["ddpm"]
    method: Any = {"srds": paradiff.srds(3), "collocation": paradiff.collocation()}.get(name)
    torch.set_default_device(None)
    method = method or fitted(METHODS[name](table), table, 5)
    noise = Keyed(SHAPE, 0, 2)
    wanted = paradiff.sample(Evaluator(network), table, noise, method, dtype=torch.float64)
    torch.set_default_device(device)
    found = paradiff.sample(Evaluator(network, device=device), table, noise, method, dtype=torch.float64)
    assert found.sample.device.type == device
    assert gap(found.sample.cpu(), wanted.sample) < 1e-6  # the network's own constant is of float32
    assert found.rounds == wanted.rounds


@pytest.mark.parametrize("make", [ddim, ddpm, dpmpp_2m, euler, euler_ancestral, heun, lambda _, steps: flow_euler(steps)])
def test_a_table_that_is_made_there_samples_as_one_made_without(make: Any, device: str) -> None:
    def run(device: str) -> paradiff.Solution:
        table = make(paradiff.Schedule.linear(), 8)
        return paradiff.sample(Evaluator(network, device=device), table, Keyed(SHAPE, 0), paradiff.parasolver(4))

    wanted = run("cpu")
    torch.set_default_device(device)
    try:
        found = run(device)
    finally:
        torch.set_default_device(None)
    assert gap(found.sample.cpu(), wanted.sample) < ROUNDING
    assert found.rounds == wanted.rounds


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("name", ["ddpm", "sd_euler_ancestral"])
def test_pipelines_are_parallel(name: str, executor: Any, device: str) -> None:
    pipe = CASES[name].make().to(device)

    def call(pipe: Any) -> Tensor:
        return short(name, generator=torch.Generator(device).manual_seed(1))(pipe)

    torch.set_default_device(device)
    try:
        wanted = call(pipe)
        found, _ = parallel(executor, pipe, call, EXACTLY)
    finally:
        torch.set_default_device(None)
    assert gap(found, wanted.cpu()) < ROUNDING

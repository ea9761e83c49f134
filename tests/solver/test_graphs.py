# SPDX-License-Identifier: Apache-2.0
"""The CUDA graphs of docs/devices.md, with a stand-in for CUDA's own: a graph is the operations that were recorded, with their
memory, and a replay makes them again in the same memory."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import SHAPE, TABLES, network
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from paradiff import Evaluator, Keyed, collocation, jacobi, quasi_newton, sample, srds
from paradiff.solver import Method

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"


class Recorded(TorchDispatchMode):
    """A graph: the operations made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...], dict[str, Any], Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.made.append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        for func, args, kwargs, output in self.made:
            found = func(*args, **kwargs)
            if found.data_ptr() != output.data_ptr():  # no view of an earlier output
                output.copy_(found)


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> type:
    """The page's class."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda one: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    found = re.search(r"^(class Graphed:\n(?:.*\n)*?)\n\n", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    namespace: dict[str, Any] = {"torch": torch}
    exec(found[1], namespace)
    return namespace["Graphed"]


def conditioned(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return network(x, t) + 0.1 * y.mean((1, 2))[:, None, None]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("method", [jacobi(), quasi_newton(window=8), srds(4), collocation()], ids=lambda method: method.name)
def test_a_graphed_network_has_at_most_four_graphs_and_the_same_sample(graphed: Any, method: Method, samples: int) -> None:
    rows = {"y": torch.randn(samples, 2, 2)}
    noise, one = Keyed(SHAPE, 0, samples), graphed(conditioned)
    wanted = sample(Evaluator(conditioned, conditioning=rows, pad=True), TABLES["ddpm"], noise, method)
    evaluator = Evaluator(one, conditioning=rows, pad=True)
    for _ in range(2):
        found = sample(evaluator, TABLES["ddpm"], noise, method)
        assert torch.equal(found.sample, wanted.sample)
        assert 1 <= len(one.graphs) <= 4
        assert {shapes[0][1][0] for shapes in one.graphs} <= set(evaluator.bound.widths(method.width(TABLES["ddpm"]) * samples))


def test_a_replay_overwrites_the_output_of_the_one_before(graphed: Any) -> None:
    one, t = graphed(network), torch.zeros(2)
    first = one(torch.ones(2, *SHAPE), t)
    kept = first.clone()
    second = one(torch.zeros(2, *SHAPE), t)
    assert second is first
    assert not torch.equal(first, kept)
    assert torch.equal(one(torch.ones(2, *SHAPE), t), kept)

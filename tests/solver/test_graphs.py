# SPDX-License-Identifier: Apache-2.0
"""The CUDA graphs of docs/devices.md, with a stand-in for CUDA's own (double/graphs.py)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from double import graphs
from problems import SHAPE, TABLES, gap, network
from tiny import CASES
from torch import Tensor
from torch.utils import _pytree

from paradiff import Evaluator, Keyed, collocation, jacobi, parallelize, parasolver, quasi_newton, sample, srds
from paradiff.pipelines.loop.audit import granted
from paradiff.solver import Method

ROUNDING = granted(torch.finfo(torch.float32).eps)
PAGE = Path(__file__).parents[2] / "docs" / "devices.md"


@pytest.fixture
def graphed(monkeypatch: pytest.MonkeyPatch) -> type:
    """The page's class."""
    monkeypatch.setattr(graphs, "STATE", graphs.State())
    for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(graphs, name))
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


# The stand-in.


def capture(call: Any, *, warm: bool = True) -> tuple[graphs.CUDAGraph, Any]:
    recorded = graphs.CUDAGraph()
    if warm:
        with graphs.stream(graphs.Stream()):
            call()
    with graphs.graph(recorded):
        output = call()
    return recorded, output


@pytest.mark.usefixtures("graphed")
def test_a_capture_computes_nothing_and_its_output_lies_in_one_place() -> None:
    x = torch.ones(3)
    recorded, output = capture(lambda: (x * 2).view(3, 1))
    assert output.isnan().all()
    assert x.tolist() == [1, 1, 1]
    recorded.replay()
    assert output.flatten().tolist() == [2, 2, 2]
    x.copy_(torch.tensor([1.0, 2, 3]))
    recorded.replay()
    assert output.flatten().tolist() == [2, 4, 6]


@pytest.mark.usefixtures("graphed")
@pytest.mark.parametrize(
    ("call", "warm", "said"),
    [
        (lambda x: x.sum().item(), True, "for which the host waits"),
        (lambda x: x[x > 0], True, "for which the host waits"),
        (lambda x: bool(torch.equal(x, x)), True, "for which the host waits"),
        (lambda x: capture(lambda: x + 1), True, "a capture within a capture"),
        (lambda x: x + 1, False, "never called"),
    ],
)
def test_what_cuda_refuses_to_capture_is_refused(call: Any, warm: bool, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        capture(lambda: call(torch.ones(3)), warm=warm)


# Pipelines.


class Replayed:
    """A network's `forward` as `mode="reduce-overhead"` makes it: a graph for each form of inputs, copied into memory of
    the graph's own, and outputs that lie in the same memory at every call."""

    def __init__(self, forward: Any) -> None:
        self._forward, self.graphs = forward, dict[Any, Any]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        form = (str(spec), *((one.shape, one.dtype) if isinstance(one, Tensor) else one for one in leaves))
        if form not in self.graphs:
            own = [one.clone() if isinstance(one, Tensor) else one for one in leaves]

            def call() -> Any:
                args, kwargs = _pytree.tree_unflatten(own, spec)
                return self._forward(*args, **kwargs)

            self.graphs[form] = own, *capture(call)
        own, recorded, output = self.graphs[form]
        for mine, one in zip(own, leaves, strict=True):
            if isinstance(one, Tensor):
                mine.copy_(one)
        recorded.replay()
        return output


@pytest.mark.usefixtures("graphed")
@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_a_pipelines_graphed_network_gives_the_plain_sample(executor: Any) -> None:
    case, method = CASES["sd"], quasi_newton(window=3, tolerance=0.0)
    pipe = case.make()
    wanted = case.run(pipe, num_inference_steps=5)
    pipe.unet.forward = graphs_of = Replayed(pipe.unet.forward)
    plain = case.run(pipe, num_inference_steps=5)
    assert gap(plain, wanted) < ROUNDING
    assert len(graphs_of.graphs) == 1
    with parallelize(pipe, method, executor=executor, pad=True, check="off") as run:
        for _ in range(2):
            assert gap(case.run(pipe, num_inference_steps=5), wanted) < ROUNDING
            assert run.report.executor == executor
            assert len(graphs_of.graphs) <= 4


@pytest.mark.usefixtures("graphed")
def test_graphs_of_ones_own_are_taken_for_memory_of_the_network_by_its_check() -> None:
    case = CASES["sd"]
    pipe = case.make()
    wanted = case.run(pipe, num_inference_steps=5)
    pipe.unet.forward = Replayed(pipe.unet.forward)
    said = "was called sequentially, .*: a call of UNet2DConditionModel changes .*; if it is harmless, leave the check out with"
    with parallelize(pipe, parasolver()), pytest.warns(RuntimeWarning, match=said):
        assert gap(case.run(pipe, num_inference_steps=5), wanted) < ROUNDING

# SPDX-License-Identifier: Apache-2.0
"""Networks that return the same memory at every call, write into their inputs, or share their conditioning among rows."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from tiny import CASES
from torch import Tensor, nn

from paradiff import parallelize, parasolver, quasi_newton
from paradiff.pipelines import Report
from paradiff.pipelines.network.batched_call import batched_call
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.tensor.windowed import Windowed

BOUND = 1e-4  # rounding, and what the tolerance leaves on this chain
METHOD = parasolver(tolerance=1e-4, window=7)
EXECUTORS = ["vector", "lanes"]


class Net(nn.Module):
    """Without memory; its text is one row for each of its states."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3
        self.strides: list[tuple[int, ...]] = []
        self.eval()

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x) + t.reshape(-1, 1) / 300 + text.mean(1)[:, :1]))


class Pipe(diffusers.DiffusionPipeline):
    """Three loops in one: without guidance, with two rows a state, and with two network calls a pass."""

    def __init__(self, net: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, guidance: str, generator: torch.Generator | None = None) -> Tensor:
        self.scheduler.set_timesteps(24)
        text, none = torch.linspace(-1, 1, 12).view(1, 3, 4), torch.zeros(1, 3, 4)
        x = torch.randn(1, 8, generator=generator)
        for t in self.scheduler.timesteps:
            if guidance == "rows":
                m, u = self.net(torch.cat([x, x]), t, torch.cat([text, none])).chunk(2)
                m = u + 2 * (m - u)
            elif guidance == "calls":
                m = self.net(x, t, text)
                u = self.net(x, t, none)
                m = u + 2 * (m - u)
            else:
                m = self.net(x, t, text)
            x = self.scheduler.step(m, t, x).prev_sample
        return x


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def pipe_of(net: nn.Module) -> Any:
    return Pipe(net, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


def parallel(net: nn.Module, guidance: str, **options: Any) -> tuple[Tensor, Report]:
    run = parallelize(pipe_of(net), METHOD, **options)
    return run(guidance, seeded()), run.report


def difference(found: Tensor, plain: Tensor) -> float:
    return float((found - plain).abs().max() / plain.abs().max())


class Static(Net):
    """Returns a buffer of its own, one for each number of rows, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, Tensor] = {}

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        held = self.held.setdefault(len(x), torch.zeros(len(x), 8))
        return held.copy_(super().forward(x, t, text))


@pytest.mark.parametrize("options", [{}, {"pad": True}, {"max_rows": 4}, {"pad": True, "max_rows": 6}], ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("guidance", ["none", "rows", "calls"])
def test_a_network_may_return_the_same_memory_at_every_call(guidance: str, executor: str, options: dict[str, Any]) -> None:
    plain = pipe_of(Net())(guidance, seeded())
    found, report = parallel(Static(), guidance, executor=executor, check="off", **options)
    assert report.executor == executor
    assert report.rounds < 24
    assert difference(found, plain) < BOUND


class Seen(Net):
    """Keeps the strides of its text, where its audit does not look."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        if len(x) > 2:
            STRIDES.append(text.stride())
        return super().forward(x, t, text)


STRIDES: list[tuple[int, ...]] = []


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("guidance", "strides"), [("none", (0, 4, 1)), ("calls", (0, 4, 1)), ("rows", (12, 4, 1))])
def test_a_text_of_one_row_is_one_row_in_memory(guidance: str, strides: tuple[int, ...], executor: str, pad: bool) -> None:
    STRIDES.clear()
    found, report = parallel(Seen(), guidance, executor=executor, pad=pad)
    assert report.executor == executor
    assert set(STRIDES) == {strides}
    assert difference(found, pipe_of(Net())(guidance, seeded())) < BOUND


class Viewing(Net):
    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, t, text.view(-1, 4).view(len(x), 3, 4))


class Demanding(Net):
    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        assert text.is_contiguous(), "the kernel takes contiguous memory"
        return super().forward(x, t, text)


class WritingText(Net):
    """Writes into its text what it may write again and again."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, t, text.clamp_(-0.5, 0.5))


class AddingToText(Net):
    """Changes its text at every call, so that its calls need their order."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, t, text.add_(1))


class WritingState(Net):
    """Writes into its state, as an activation in place does, which the loop sees where the state is the network's own input."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(x.mul_(0.9), t, text)


OPTIONS = [{}, {"pad": True, "check": "off"}, {"max_rows": 4, "check": "off"}]


def compared(net: nn.Module, plain: Tensor, guidance: str, executor: str, options: dict[str, Any]) -> None:
    found, report = parallel(net, guidance, executor=executor, **options)
    assert report.executor == executor
    assert difference(found, plain) < BOUND


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("guidance", ["none", "calls"])
@pytest.mark.parametrize("make", [Viewing, Demanding, WritingText])
def test_a_network_that_needs_copies_of_its_text_is_given_copies(
    make: Callable[[], nn.Module], guidance: str, executor: str, options: dict[str, Any]
) -> None:
    compared(make(), pipe_of(make())(guidance, seeded()), guidance, executor, options)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("guidance", ["none", "rows", "calls"])
def test_a_network_that_changes_its_text_at_every_call_is_called_in_order(guidance: str, executor: str) -> None:
    plain = pipe_of(AddingToText())(guidance, seeded())
    with pytest.warns(RuntimeWarning, match=r"gave one state two values|keeps something from one pass to the next"):
        found, report = parallel(AddingToText(), guidance, executor=executor)
    assert report.executor == "sequential"
    assert torch.equal(found, plain)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("guidance", "executor"), [("rows", "vector"), ("rows", "lanes"), ("none", "vector"), ("calls", "vector")]
)
def test_a_network_may_write_into_its_state(guidance: str, executor: str, options: dict[str, Any]) -> None:
    """With two rows a state the loop does not see it; with one the state that is stepped is the one written into."""
    compared(WritingState(), pipe_of(WritingState())(guidance, seeded()), guidance, executor, options)


@pytest.mark.parametrize("guidance", ["none", "calls"])
def test_lanes_refuse_a_network_that_writes_into_the_state_that_is_stepped(guidance: str) -> None:
    with pytest.warns(RuntimeWarning, match="the call comes to its loop with another state when it is made again"):
        found, report = parallel(WritingState(), guidance, executor="lanes")
    assert report.executor == "sequential"
    assert torch.equal(found, pipe_of(WritingState())(guidance, seeded()))


class WritingAndViewing(Net):
    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return super().forward(x.mul_(0.9), t, text.view(-1, 4).view(len(x), 3, 4))


def test_a_network_that_would_write_into_its_state_twice_is_called_sequentially() -> None:
    with pytest.warns(RuntimeWarning, match="WritingAndViewing writes into its state, and needs copies of its other inputs"):
        found, report = parallel(WritingAndViewing(), "none", check="off")
    assert report.executor == "sequential"
    assert torch.equal(found, pipe_of(WritingAndViewing())("none", seeded()))


def test_a_repeated_text_that_was_written_into_is_repeated_again() -> None:
    """With two rows a state the text is repeated once and kept, as long as no network writes into it."""
    text = torch.linspace(-1, 1, 12).view(1, 3, 4)
    net = AddingToText()
    batching = Batching(check="off")
    batching.widest = 3
    x, t = Windowed.wrap(torch.randn(3, 2, 8), SimpleNamespace(batching=batching)), torch.tensor(3.0)
    texts = torch.cat([text, text])
    with torch.no_grad():
        first, *others = [batched_call(batching, "Net", net.forward, (x, t, texts), {}).window for _ in range(4)]
    assert all(torch.equal(first, other) for other in others)


# -- compiled networks ---------------------------------------------------------------------------------------------------------


def counting(graphs: list[int]) -> Callable[..., object]:
    """A backend that notes each graph and runs it as it is."""

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(len(inputs))
        return module.forward

    return backend


@pytest.fixture
def graphs() -> Iterator[list[int]]:
    """The number of graphs that were made, as the length of a list."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def in_an_empty_context(executor: Any, compiled: bool) -> tuple[int, int]:
    """Network calls and graphs of a call where no compiler was at work before: in a context without variables."""
    pipe, graphs = pipe_of(Net()), list[int]()
    if compiled:
        pipe.net = torch.compile(pipe.net, backend=counting(graphs), dynamic=False)
    run = parallelize(pipe, quasi_newton(tolerance=1e-4, window=10), executor=executor, pad=True)
    contextvars.Context().run(run, "calls", seeded())
    assert run.report.executor == executor
    return run.report.network_calls, len(graphs)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_network_that_is_compiled_in_a_round_is_called_no_more_often(graphs: list[int], executor: Any) -> None:
    """The compiler leaves context variables where it ran."""
    (plain, _), (compiled, made) = (in_an_empty_context(executor, compiled) for compiled in (False, True))
    assert compiled == plain
    assert 2 <= made <= 4


@pytest.mark.parametrize("how", ["torch.compile", "compile"])
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("guidance", ["none", "rows", "calls"])
def test_a_compiled_network_has_at_most_four_graphs(graphs: list[int], guidance: str, executor: Any, how: str) -> None:
    pipe = pipe_of(Net())
    plain = pipe(guidance, seeded())
    if how == "compile":
        pipe.net.compile(backend=counting(graphs), dynamic=False)
    else:
        pipe.net = torch.compile(pipe.net, backend=counting(graphs), dynamic=False)
    run = parallelize(pipe, quasi_newton(tolerance=1e-4, window=10), executor=executor, pad=True)
    made = []
    for _ in range(2):
        assert difference(run(guidance, seeded()), plain) < BOUND
        assert run.report.executor == executor
        made.append(len(graphs))
    assert 2 <= made[0] == made[1] <= 4
    assert 0 < run.report.filled_rows < run.report.network_rows
    assert f"{run.report.filled_rows} of them padding" in str(run.report)


def test_repeated_blocks_are_compiled_for_at_most_four_shapes(graphs: list[int]) -> None:
    case = CASES["flux"]
    plain, pipe = case.run(case.make()), case.make()
    pipe.transformer.compile_repeated_blocks(backend=counting(graphs), dynamic=False)
    blocks = len(pipe.transformer._repeated_blocks)
    run = parallelize(pipe, quasi_newton(tolerance=1e-4), pad=True)
    made = []
    for _ in range(2):
        assert difference(case.run(run), plain) < BOUND
        made.append(len(graphs))
    assert blocks < made[0] == made[1] <= 4 * blocks

# SPDX-License-Identifier: Apache-2.0
"""Networks that keep something from one call to the next: refused in words; the plain call is as if nothing had been tried."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny.networks import HARMLESS, WITH_MEMORY, Net, Pipe, begin_anew
from torch import Tensor

from paradiff import parallelize, parasolver
from paradiff.pipelines import Report
from paradiff.pipelines.network.memory import Memory
from paradiff.pipelines.network.reads import is_read
from paradiff.pipelines.network.saved import equal

METHOD = parasolver(tolerance=1e-3)
BOUND = 1e-4  # rounding, and what the tolerance leaves on this chain


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def both(make: Any, **options: Any) -> tuple[Tensor, Tensor, Report]:
    """The plain call's result, the parallel one's, and its report."""
    begin_anew()
    plain = Pipe.of(make())(seeded())
    begin_anew()
    run = parallelize(Pipe.of(make()), METHOD, **options)
    return plain, run(seeded()), run.report


@pytest.mark.parametrize("executor", ["auto", "lanes"])
@pytest.mark.parametrize("name", WITH_MEMORY)
def test_a_network_with_memory_is_called_as_the_plain_call_does_bit_for_bit(name: str, executor: str) -> None:
    with pytest.warns(
        RuntimeWarning, match=r"called sequentially.*(order|random numbers|replaced|Python generator|keeps something)"
    ):
        plain, found, report = both(WITH_MEMORY[name], executor=executor)
    assert report.executor == "sequential"
    assert torch.equal(found, plain)
    assert len(report.warnings) == 1
    assert report.warnings[0].count("lanes:") + report.warnings[0].count("vector:") <= 1  # the next executor is not tried


@pytest.mark.parametrize("executor", ["auto", "lanes"])
@pytest.mark.parametrize("name", HARMLESS)
def test_a_record_that_nobody_reads_is_harmless(name: str, executor: str) -> None:
    plain, found, report = both(HARMLESS[name], executor=executor)
    assert report.executor == {"auto": "vector"}.get(executor, executor)
    assert float((found - plain).abs().max()) < BOUND
    assert report.warnings == []


class Recorder:
    """A hook that keeps what it is asked for, and reads nothing of it.

    Args:
        kind: What it keeps.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.told: list[Any] = []

    def __call__(self, module: Any, given: Any, output: Tensor) -> None:
        if self.kind == "outputs":
            self.told.append(output)
        elif self.kind == "outputs by name":
            self.told.append(("output", {"mean": output.mean()}))
        else:
            self.told.append(output.numpy().copy())


RECORDS = ("outputs", "outputs by name", "arrays")


@pytest.mark.parametrize("executor", ["auto", "lanes"])
@pytest.mark.parametrize("name", RECORDS)
def test_outputs_that_a_hook_collects_are_the_plain_calls(name: str, executor: str) -> None:
    held, pipes = [Recorder(name), Recorder(name)], [Pipe.of(HARMLESS["plain"]()) for _ in range(2)]
    for pipe, record in zip(pipes, held, strict=True):
        pipe.net.register_forward_hook(record)
    begin_anew()
    plain = pipes[0](seeded())
    begin_anew()
    with pytest.warns(RuntimeWarning, match="called sequentially"):
        found = parallelize(pipes[1], METHOD, executor=executor)(seeded())
    assert torch.equal(found, plain)
    assert equal(held[1].told, held[0].told)


def test_without_checks_the_faults_would_be_seen_in_the_result() -> None:
    """What the tests above guard against: the networks' memory is felt."""
    felt = []
    for name in ("Counter", "Momentum", "Late", "closure", "hook"):
        plain, found, report = both(WITH_MEMORY[name], check="off")
        assert report.executor != "sequential"
        felt.append(float((found - plain).abs().max()) > 10 * BOUND)
    assert all(felt)


def test_the_network_is_left_as_the_plain_call_leaves_it() -> None:
    begin_anew()
    nets = [WITH_MEMORY["Normalized"]() for _ in range(2)]
    Pipe.of(nets[0])(seeded())
    with pytest.warns(RuntimeWarning, match="norm.running_mean"):
        parallelize(Pipe.of(nets[1]), METHOD)(seeded())
    for (name, one), (_, two) in zip(nets[0].state_dict().items(), nets[1].state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert "forward" not in vars(nets[1])
    assert [module.training for module in nets[0].modules()] == [module.training for module in nets[1].modules()]


def test_the_users_arguments_are_put_back_before_the_next_try() -> None:
    class Editing(Pipe):
        def __call__(self, generator: Any = None, latents: Any = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            latents["x"].mul_(0.5)
            latents["notes"].append("seen")
            return super().__call__(latents=latents["x"].clone())

    begin_anew()
    given = [{"x": torch.ones(2, 8), "notes": ["first"]} for _ in range(2)]
    plain = Editing.of(WITH_MEMORY["Counter"]())(latents=given[0])
    with pytest.warns(RuntimeWarning, match="called sequentially"):
        found = parallelize(Editing.of(WITH_MEMORY["Counter"]()), METHOD)(latents=given[1])
    assert torch.equal(found, plain)
    assert torch.equal(given[1]["x"], given[0]["x"])
    assert given[1]["notes"] == given[0]["notes"] == ["first", "seen"]


def test_the_work_of_a_refused_try_is_counted() -> None:
    calls: list[int] = []

    class Counted(type(WITH_MEMORY["Counter"]())):
        def body(self, x: Tensor, t: Tensor) -> Tensor:
            calls.append(len(x))
            return super().body(x, t)

    run = parallelize(Pipe.of(Counted()), METHOD)
    with pytest.warns(RuntimeWarning, match="changes Counted"):
        run(seeded())
    # The list was put back as the network's other memory was: it has the plain call's entries.
    assert len(calls) == 24
    assert (run.report.refused_calls, run.report.refused_rows) == (3, 6)  # the first pass, and two states by themselves
    assert (run.report.rounds, run.report.network_calls) == (0, 0)


class App:
    """Something of the user's that does other work beside watching a network."""

    def __init__(self) -> None:
        self.served, self.depth = 0, 0

    def watch(self, module: Any, args: Any, output: Any) -> None:
        self.depth += 1

    def serve(self) -> None:
        self.served += 1


def test_what_no_function_of_the_network_names_is_left_alone() -> None:
    app, net = App(), Net()
    net.register_forward_hook(app.watch)
    memory = Memory([("net", net)])
    app.serve()
    net(torch.ones(2, 8), torch.tensor(3.0))
    assert (app.served, app.depth) == (1, 1)
    assert memory.influence() is None
    memory.restore()
    assert (app.served, app.depth) == (1, 0)


def test_everything_of_a_network_is_put_back() -> None:
    class Everything(Net):
        def __init__(self) -> None:
            super().__init__()
            self.numbers, self.nested, self.bag = [1, 2], {"a": {"b": [0]}}, {3}
            self.generator, self.twin = torch.Generator().manual_seed(0), torch.arange(3.0)
            self.cache: Any = None
            self.register_buffer("total", torch.zeros(2))
            self.register_buffer("late", None)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.numbers.append(3)
            self.nested["a"]["b"][0] += 1
            self.nested["c"] = {}
            self.bag.add(4)
            torch.rand(1, generator=self.generator)
            self.twin += 1
            self.total = self.total + 1
            self.late = x.clone()
            self.cache, self.new = x, 1
            self.train()
            return x

    net = Everything()
    before = copy.deepcopy({name: value for name, value in vars(net).items() if name not in ("generator", "_modules")})
    state = net.generator.get_state()
    memory = Memory([("net", net)])
    assert memory.influence() is None
    net(torch.ones(2), torch.ones(1))
    assert memory.influence() is not None
    memory.restore()
    assert memory.influence() is None
    assert torch.equal(net.generator.get_state(), state)
    assert not net.training
    assert not hasattr(net, "new")
    assert vars(net)["_buffers"]["total"].tolist() == [0, 0]
    assert net.late is None
    assert net.cache is None
    assert torch.equal(net.twin, before["twin"])
    assert (net.numbers, net.nested, net.bag) == (before["numbers"], before["nested"], before["bag"])


def test_a_name_is_read_unless_it_is_only_written() -> None:
    calls: list[int] = []
    table: dict[str, int] = {}

    def appends() -> None:
        calls.append(1)

    def measures() -> None:
        calls.append(len(calls))

    def assigns() -> None:
        table["n"] = 1
        table["n"] += 1

    def asks() -> int:
        return table["n"]

    assert not is_read("calls", appends)  # pyright: ignore[reportArgumentType]
    assert is_read("calls", measures)  # pyright: ignore[reportArgumentType]
    assert not is_read("table", assigns)  # pyright: ignore[reportArgumentType]
    assert is_read("table", asks)  # pyright: ignore[reportArgumentType]
    assert not is_read("other", asks)  # pyright: ignore[reportArgumentType]
    assert not is_read("calls", lambda: calls.append(2))  # pyright: ignore[reportArgumentType]
    hidden: dict[str, Any] = {"calls": calls}
    exec("def unknown():\n    calls.append(1)", hidden)  # without source: it may do anything
    assert is_read("calls", hidden["unknown"])


def test_hooks_that_a_first_call_installs_are_taken_away_with_the_sign_that_they_are_there() -> None:
    class Lazy(Net):
        """As text encoders of transformers: the first call installs hooks that gather its layers' outputs."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Identity()
            self.installed = False

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if not self.installed:
                self.layer.register_forward_hook(lambda module, args, output: output + 1)
                self.installed = True
            return self.layer(x)

    net = Lazy()
    memory = Memory([("net", net)])
    x, t = torch.zeros(2), torch.ones(1)
    assert net(x, t).tolist() == [1, 1]
    memory.restore()
    assert not net.installed
    assert net(x, t).tolist() == [1, 1]  # one hook, not two


@pytest.mark.parametrize("kind", [SimpleNamespace, lambda **more: [more], lambda **more: functools.partial(print, more)])
def test_objects_may_hold_each_other_in_a_chain_of_any_length(kind: Any) -> None:
    """As the groups of layers do that diffusers' group offloading loads one after the other."""
    last = torch.zeros(3)
    chain: Any = last
    for _ in range(5000):
        chain = kind(next=chain)
    net = torch.nn.Linear(1, 1)
    net.chain = chain
    memory = Memory([("net", net)])
    last += 1
    memory.restore()
    assert not last.any()


def test_a_tensor_whose_elements_share_memory_is_put_back() -> None:
    net = torch.nn.Linear(1, 1)
    net.ids = torch.arange(3.0)[:, None].expand(3, 4)
    memory = Memory([("net", net)])
    net.ids[:, :1] += 1
    memory.restore()
    assert net.ids.tolist() == [[0.0] * 4, [1.0] * 4, [2.0] * 4]

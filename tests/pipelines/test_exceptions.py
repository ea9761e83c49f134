# SPDX-License-Identifier: Apache-2.0
"""Errors within a call: one that only a try meets leads to the plain call, any other ends the call as it ends the plain one."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny.networks import Net, Pipe
from torch import Tensor, nn

from paradiff import parallelize, parasolver
from paradiff.pipelines import Report
from paradiff.pipelines.surroundings import SETTINGS, Surroundings
from paradiff.solver.protocol import Round

METHOD = parasolver(tolerance=1e-3)
BOUND = 1e-4
ROWS = 2


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def plain() -> Tensor:
    return Pipe.of(Net())(seeded())


class Fails(Net):
    """Raises an error in calls of more rows than one state has, the plain ones."""

    def __init__(self, error: BaseException, *, at: int = 1, outside: bool = False) -> None:
        super().__init__()
        self.error, self.left, self.outside = error, at, outside

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if len(x) > ROWS:
            self.left -= 1
            if self.left == 0:
                raise self.error
        return self.body(x, t)


class Hooked(Net):
    """Has a torch hook, which runs outside of the boundary, that an error escapes from."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.register_forward_hook(lambda module, args, output: self.look(output, error))

    def look(self, output: Any, error: BaseException) -> None:
        if type(output) is not Tensor:
            raise error


ERRORS = [
    RuntimeError("sizes differ"),
    TypeError("no such overload"),
    IndexError("out of range"),
    ValueError("a bad value"),
    AssertionError("rows"),
    KeyError("mask"),
    StopIteration("over"),
    NotImplementedError("no batch rule"),
    MemoryError("no room"),
    torch.OutOfMemoryError("no room on the device"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_that_only_a_try_meets_leads_to_the_plain_call_and_is_named(error: Exception) -> None:
    wanted = plain()
    out_of_memory = isinstance(error, torch.OutOfMemoryError)  # within a call, its rows are halved until they fit
    for net in (Hooked(error), *([] if out_of_memory else [Fails(error)])):
        word = type(error).__name__
        torch.manual_seed(5)
        before = torch.get_rng_state()
        generator = seeded()
        pipe = Pipe.of(net)
        scheduler = pipe.scheduler
        run = parallelize(pipe, METHOD, executor="vector")
        with pytest.warns(RuntimeWarning, match=f"called sequentially, vector: .*{word}") as caught:
            found = run(generator)
        assert len(caught) == 1
        assert torch.equal(found, wanted)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(generator.get_state(), after_the_plain_call())
        assert pipe.scheduler is scheduler
        assert "forward" not in vars(net)
        report: Report = run.report
        assert (report.executor, report.rounds) == ("sequential", 0)
        assert report.refused_calls >= 1
        assert report.warnings == [str(caught[0].message)]


def after_the_plain_call() -> Tensor:
    generator = seeded()
    Pipe.of(Net())(generator)
    return generator.get_state()


def test_out_of_memory_first_halves_the_rows() -> None:
    pipe = Pipe.of(Fails(torch.OutOfMemoryError("no room"), at=1))
    run = parallelize(pipe, METHOD)
    assert float((run(seeded()) - plain()).abs().max()) < BOUND
    assert run.report.executor == "vector"


@pytest.mark.parametrize("executor", ["auto", "vector", "lanes"])
@pytest.mark.parametrize("when", ["before the loop", "first pass", "in the loop", "after the loop"])
def test_an_error_that_the_plain_call_meets_too_is_raised_as_it_raises_it(executor: Any, when: str) -> None:
    class Broken(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if when == "first pass" or (when == "in the loop" and float(t.min()) < 900):
                raise LookupError(f"broken {when}")
            return self.body(x, t)

    class Bad(Pipe):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            if when == "before the loop":
                raise LookupError(f"broken {when}")
            found = super().__call__(*args, **kwargs)
            if when == "after the loop":
                raise LookupError(f"broken {when}")
            return found

    pipe: Any = Bad.of(Broken())
    kind = type(pipe)
    with pytest.raises(LookupError, match=f"broken {when}") as caught, parallelize(pipe, METHOD, executor=executor):
        pipe(seeded())  # with warnings as errors: none is given beside
    assert caught.value.__context__ is None
    assert type(pipe) is kind
    assert "forward" not in vars(pipe.net)


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_the_program_ends_the_call_at_once(executor: Any, error: type[BaseException]) -> None:
    net = Fails(error())
    with pytest.raises(error):
        parallelize(Pipe.of(net), METHOD, executor=executor)(seeded())
    assert net.left == 0
    assert "forward" not in vars(net)
    assert torch.equal(Pipe.of(net)(seeded()), plain())


class Own(Exception):
    pass


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("error", [Own("mine"), ValueError("mine"), StopIteration("mine"), RuntimeError("mine")])
def test_what_a_callback_raises_ends_the_call_and_is_its_own(executor: Any, error: Exception) -> None:
    steps: list[int] = []

    def callback(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        steps.append(step)
        if step == 3:
            raise error
        return tensors

    pipe = Pipe.of(Net())
    with pytest.raises(type(error), match="mine") as caught:
        parallelize(pipe, METHOD, executor=executor)(seeded(), callback_on_step_end=callback)
    assert caught.value is error
    assert steps == [0, 1, 2, 3]  # no second call follows


def test_what_an_observer_raises_ends_the_call() -> None:
    def observer(round: Round) -> None:
        raise Own("seen enough")

    with pytest.raises(Own, match="seen enough"):
        parallelize(Pipe.of(Net()), METHOD, observer=observer)(seeded())


def test_what_paradiff_refuses_stays_refused(tmp_path: Path) -> None:
    class Counted(Net):
        def forward(self, *args: Any) -> Any:
            with (tmp_path / "calls").open("a") as file:  # which a refusal does not put back
                file.write(".")
            return super().forward(*args)

    net = Counted()

    def steers(pipe: Any, step: int, time: Any, tensors: Any) -> Any:
        return {"latents": tensors["latents"] * 2}

    with pytest.raises(ValueError, match="callback_on_step_end changed the latents"):
        parallelize(Pipe.of(net), METHOD)(seeded(), callback_on_step_end=steers)
    assert 0 < len((tmp_path / "calls").read_text()) < 24  # no plain call of 24 steps follows


def test_calls_of_several_threads_wait_for_each_other() -> None:
    pipe, wanted = Pipe.of(Net()), {seed: Pipe.of(Net())(torch.Generator().manual_seed(seed)) for seed in range(6)}
    found: dict[int, Tensor] = {}
    with parallelize(pipe, METHOD) as run:

        def work(seed: int) -> None:
            found[seed] = pipe(torch.Generator().manual_seed(seed))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert {report.executor for report in run.reports} == {"vector"}
    assert len(run.reports) == 6
    for seed, latents in wanted.items():
        assert float((found[seed] - latents).abs().max()) < BOUND


def test_a_call_within_the_call_is_the_plain_one() -> None:
    class Nested(Pipe):
        def __call__(self, generator: Any = None, latents: Any = None, callback_on_step_end: Any = None, depth: int = 1) -> Any:
            first = Pipe.__call__(self, generator, latents)
            return self(latents=first, depth=depth - 1) if depth else first

    wanted = Nested.of(Net())(seeded())
    with parallelize(pipe := Nested.of(Net()), METHOD), pytest.warns(RuntimeWarning, match="called within its own call"):
        found = pipe(seeded())
    assert torch.equal(found, wanted)


def test_a_network_that_is_no_component_has_a_boundary_too() -> None:
    class Loose(Pipe):
        def __init__(self, net: nn.Module, scheduler: Any) -> None:
            super().__init__(nn.Identity(), scheduler)
            object.__setattr__(self, "other", net)

        def __call__(self, generator: Any = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            self.net = self.other
            return super().__call__(generator)

    with parallelize(pipe := Loose.of(Net()), METHOD, executor="lanes") as run:
        found = pipe(seeded())
    assert float((found - plain()).abs().max()) < BOUND
    assert run.report.network_calls == run.report.rounds


MOVES = {
    "default dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "default device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "gradients": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(False)),
    "detection of anomalies": (torch.is_anomaly_enabled, lambda: torch.set_anomaly_enabled(True)),
    "precision of products": (torch.get_float32_matmul_precision, lambda: torch.set_float32_matmul_precision("medium")),
    "deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    ),
    "benchmarks of cuDNN": (lambda: torch.backends.cudnn.benchmark, lambda: setattr(torch.backends.cudnn, "benchmark", True)),
    "TF32 of cuDNN": (lambda: torch.backends.cudnn.allow_tf32, lambda: setattr(torch.backends.cudnn, "allow_tf32", False)),
    "recursion limit": (sys.getrecursionlimit, lambda: sys.setrecursionlimit(sys.getrecursionlimit() + 10)),
    "working directory": (os.getcwd, lambda: os.chdir("/")),
    "umask": (lambda: Path("/proc/self/status").read_text().partition("Umask:")[2].split()[0], lambda: os.umask(0o077)),
}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the umask is read from there")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_a_try_changed_is_put_back(name: str) -> None:
    read, move = MOVES[name]
    surroundings = Surroundings()
    before = read()
    try:
        move()
        assert read() != before
    finally:
        surroundings.restore()
    assert read() == before

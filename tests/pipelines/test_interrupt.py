# SPDX-License-Identifier: Apache-2.0
"""`pipe._interrupt = True` ends a parallel call as it ends the plain one: with the state after the same number of steps."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny import CASES
from tiny.networks import STEPS, Net, Pipe
from torch import Tensor

from paradiff import collocation, parallelize, parasolver, quasi_newton
from paradiff.errors import Unsupported
from paradiff.pipelines.loop.interrupt import Interrupt
from paradiff.solver.protocol import Round
from paradiff.solver.solution import Status

METHOD = parasolver(tolerance=1e-3)
BOUND = 1e-4


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def stopping_at(stop: int, told: list[int]) -> Any:
    def callback(pipe: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        told.append(step)
        if step == stop:
            pipe._interrupt = True
        return tensors

    return callback


def states() -> list[Tensor]:
    """The plain call's state after each number of steps."""
    found: list[Tensor] = []

    def callback(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> None:
        found.append(tensors["latents"].clone())

    start = torch.randn(2, 8, generator=seeded())
    Pipe.of(Net())(latents=start, callback_on_step_end=callback)
    return [start, *found]


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("stop", [0, 1, 11, STEPS - 2, STEPS - 1])
@pytest.mark.parametrize("method", [METHOD, quasi_newton(tolerance=1e-3), parasolver(4, tolerance=1e-3)], ids=str)
def test_a_callback_that_interrupts_gets_the_plain_calls_state(executor: Any, stop: int, method: Any) -> None:
    told: list[int] = []
    wanted = Pipe.of(Net())(seeded(), callback_on_step_end=stopping_at(stop, []))
    pipe = Pipe.of(Net())
    run = parallelize(pipe, method, executor=executor)
    found = run(seeded(), callback_on_step_end=stopping_at(stop, told))
    assert float((found - wanted).abs().max()) < BOUND
    assert told == list(range(stop + 1))  # nor is the callback called again
    assert pipe._interrupt
    assert run.report.executor == executor
    if stop < STEPS - 1:
        assert run.report.status is Status.STOPPED
        assert f"interrupted after step {stop + 1}" in run.report.message
        assert float((found - states()[stop + 1]).abs().max()) < BOUND
        assert float((found - states()[stop + 2]).abs().max()) > 10 * BOUND
    assert float((run(seeded()) - Pipe.of(Net())(seeded())).abs().max()) < BOUND  # the next call is a whole one


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_an_interrupt_between_two_rounds_ends_with_the_newest_final_state(executor: Any) -> None:
    pipe = Pipe.of(Net())

    def observer(round: Round) -> None:
        if round.number == 2:
            pipe._interrupt = True

    run = parallelize(pipe, parasolver(6, tolerance=1e-5), executor=executor, observer=observer)
    found = run(seeded())
    assert run.report.status is Status.STOPPED
    assert nearest(found) < BOUND
    assert run.report.passes == 2
    assert pipe._interrupt


def nearest(found: Tensor) -> float:
    """The distance to the nearest of the plain call's states."""
    return min(float((found - state).abs().max()) for state in states())


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_an_interrupt_in_the_midst_of_a_round_is_heeded(executor: Any, call: int) -> None:
    """A network call is where another thread's flag is most likely set."""

    class Flagging(Net):
        calls = 0

        def body(self, x: Tensor, t: Tensor) -> Tensor:
            Flagging.calls += 1
            if Flagging.calls == call:
                pipe._interrupt = True
            return super().body(x, t)

    pipe = Pipe.of(Flagging())
    run = parallelize(pipe, parasolver(4, tolerance=1e-5), executor=executor, check="off")
    found = run(seeded())
    assert run.report.executor == executor
    assert run.report.status is Status.STOPPED
    assert nearest(found) < BOUND


def test_an_interrupt_between_the_step_and_the_next_pass_is_heeded() -> None:
    class Late(Pipe):
        """Its loop's flag is set where it is asked for, as by a thread that is just in time."""

        asked = 0

        @property
        def interrupt(self) -> bool:
            self.asked += 1
            if self.asked == 3:
                self._interrupt = True
            return self._interrupt

    pipe = Late.of(Net())
    run = parallelize(pipe, parasolver(4, tolerance=1e-5), executor="vector")
    found = run(seeded())
    assert run.report.executor == "vector"
    assert run.report.status is Status.STOPPED
    assert nearest(found) < BOUND
    assert pipe._interrupt


def test_an_interrupt_before_the_first_step_gives_the_start() -> None:
    class Early(Pipe):
        @property
        def interrupt(self) -> bool:
            return True

    wanted = Early.of(Net())(seeded())
    pipe = Early.of(Net())
    pipe._interrupt = True
    run = parallelize(pipe, METHOD, executor="vector")
    with pytest.warns(RuntimeWarning, match="took no step"):  # the flag itself is not set: the plain call decides
        found = run(seeded())
    assert torch.equal(found, wanted)


def test_another_thread_ends_a_call() -> None:
    started = threading.Event()

    class Slow(Net):
        def body(self, x: Tensor, t: Tensor) -> Tensor:
            started.set()
            stopped.wait(0.02)
            return super().body(x, t)

    stopped = threading.Event()
    pipe = Pipe.of(Slow())

    def stop() -> None:
        started.wait()
        pipe._interrupt = True
        stopped.set()

    for executor in ("vector", "lanes"):
        started.clear()
        stopped.clear()
        thread = threading.Thread(target=stop)
        thread.start()
        run = parallelize(pipe, parasolver(2, tolerance=1e-5), executor=executor, check="off")  # pyright: ignore
        found = run(seeded())
        thread.join()
        assert run.report.status is Status.STOPPED, executor
        assert nearest(found) < BOUND


@pytest.mark.parametrize("executor", ["auto", "vector", "lanes"])
def test_an_interrupt_from_outside_in_a_try_that_is_refused_ends_the_plain_call(executor: Any) -> None:
    told: list[int] = []
    pipe = Pipe.of(Net())

    def observer(round: Round) -> None:  # stands for another thread
        told.append(round.number)
        pipe._interrupt = len(told) == 2
        if len(told) == 2:
            raise Unsupported("it is refused")

    run = parallelize(pipe, METHOD, executor=executor, observer=observer)
    with pytest.warns(RuntimeWarning, match="it is refused"):
        found = run(seeded())
    assert torch.equal(found, states()[1])
    assert pipe._interrupt


def test_a_loop_that_does_not_ask_is_not_interrupted() -> None:
    class Deaf(Pipe):
        @torch.no_grad()
        def __call__(self, generator: Any = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            self.scheduler.set_timesteps(STEPS)
            x = torch.randn(2, 8, generator=generator)
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.net(x, t), t, x).prev_sample
            return x

        @property
        def interrupt(self) -> bool:
            return False

    pipe = Deaf.of(Net())

    def observer(round: Round) -> None:
        pipe._interrupt = True

    run = parallelize(pipe, METHOD, observer=observer)
    wanted = Deaf.of(Net())(seeded())
    assert float((run(seeded()) - wanted).abs().max()) < BOUND


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("name", ["sd", "flux", "wan", "sd3"])
def test_diffusers_pipelines_are_interrupted_by_callbacks(name: str) -> None:
    case, told = CASES[name], list[int]()
    wanted = case.run(case.make(), callback_on_step_end=stopping_at(5, []))
    pipe = case.make()
    run = parallelize(pipe, parasolver(4, tolerance=1e-5))
    found = case.run(run, callback_on_step_end=stopping_at(5, told))
    assert relative(found, wanted) < BOUND
    assert told == list(range(6))
    assert run.report.executor != "sequential"
    assert Interrupt(pipe, type(pipe))


@pytest.mark.parametrize("name", ["sd_inpaint4", "ltx_image_to_video"])
def test_a_loop_that_edits_its_state_ends_with_the_edited_one(name: str) -> None:
    """Such a loop has no final states for a callback; an observer stands for another thread."""
    case = CASES[name]
    pipe = case.make()

    def stop(round: Round) -> None:
        pipe._interrupt = round.number == 4

    run = parallelize(pipe, parasolver(2, tolerance=0.0), observer=stop)
    found = case.run(run)
    assert run.report.status is Status.STOPPED
    step = int(run.report.message.rsplit("step ", 1)[1])
    assert 2 <= step < 9
    plain = [case.run(case.make(), callback_on_step_end=stopping_at(step + k, [])) for k in (-1, 0)]
    assert relative(found, plain[0]) < BOUND
    assert relative(found, plain[1]) > 100 * BOUND


def test_methods_without_states_of_all_nodes_stop_with_their_best() -> None:
    pipe = Pipe.of(Net())

    def observer(round: Round) -> None:
        pipe._interrupt = round.number == 3

    run = parallelize(pipe, collocation(), observer=observer)
    found = run(seeded())
    assert run.report.status is Status.STOPPED
    assert float((found - states()[-1]).abs().max()) < 1.0

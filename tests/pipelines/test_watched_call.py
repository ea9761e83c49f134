# SPDX-License-Identifier: Apache-2.0
"""The plain call whose first passes are watched: it costs next to nothing where no window pays, and is given up where one does.

Seconds are those of a clock that the network alone moves, by a stated t(W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import CASES
from torch import Tensor

import paradiff
from paradiff.pipelines.known import CallKnown, forget_calls
from paradiff.planning import LatencyCurve
from paradiff.planning.store import FOLDER

STEPS = {"num_inference_steps": 50}


class Clocked:
    """A tiny pipeline whose network's calls take the seconds that a curve states.

    Args:
        monkeypatch: Replaces the clock.
        curve: Seconds by states.
        name: The tiny pipeline.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, curve: Callable[[float], float], name: str = "sd") -> None:
        self.case, self.seconds = CASES[name], 0.0
        self.pipe = self.case.make()
        self.network = getattr(self.pipe, "unet", None) or self.pipe.transformer
        real, own = self.network.forward, [0]
        monkeypatch.setattr("time.perf_counter", lambda: self.seconds)

        def forward(*args: Any, **kwargs: Any) -> Any:
            main = args[0] if args else kwargs["hidden_states"]
            own[0] = own[0] or len(main)
            self.seconds += curve(len(main) / own[0])
            return real(*args, **kwargs)

        self.network.forward = forward

    def call(self, **more: Any) -> tuple[Tensor, float]:
        """A call's picture and seconds."""
        begin = self.seconds
        found = self.case.run(self.pipe, **{**STEPS, **more})
        return found, self.seconds - begin


@pytest.fixture(params=["stored", "nowhere"])
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A cache folder, or none."""
    monkeypatch.setenv(FOLDER, str(tmp_path) if request.param == "stored" else "")


@pytest.mark.usefixtures("folder")
def test_no_call_takes_five_percent_longer_where_no_window_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch, lambda states: states, "dit")
    plain, seconds = clocked.call()
    with paradiff.parallelize(clocked.pipe) as run:
        for number in range(8):
            found, taken = clocked.call()
            assert torch.equal(found, plain)
            assert taken <= 1.05 * seconds
            assert run.report.executor == "sequential"
            assert "a pass of 2 states takes more than 1.35 times as long as one of 1" in run.report.message
            assert (taken > seconds) == (number in (0, 3))  # measured at first, and after two calls again
    assert not clocked.network._forward_hooks
    assert not clocked.network._forward_pre_hooks
    assert "step" not in vars(clocked.pipe.scheduler)


@pytest.mark.usefixtures("folder")
def test_the_first_call_and_later_ones_gain_where_a_window_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch, lambda states: 1 + 0.02 * (states - 1), "dit")
    plain, seconds = clocked.call()
    with paradiff.parallelize(clocked.pipe) as run:
        for number in range(3):
            found, taken = clocked.call()
            assert float((found.double() - plain.double()).square().mean().sqrt()) < 4e-3
            assert taken < (0.75 if number else 0.85) * seconds
            assert run.report.executor in ("vector", "lanes")
            assert run.report.refused_calls == (number == 0)  # the one on two states


def test_a_measured_curve_decides_at_the_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    clocked = Clocked(monkeypatch, lambda states: states)
    plain, seconds = clocked.call()
    given: dict[str, Any] = {}
    monkeypatch.setattr("paradiff.pipelines.call.CallKnown", lambda *of: given.setdefault("known", CallKnown(*of)))
    with paradiff.parallelize(clocked.pipe) as run:
        clocked.call()
    given["known"].keep_curve(LatencyCurve({1: 1.0, 2: 2.0, 8: 8.0}, {1: 0.0}))
    monkeypatch.undo()
    monkeypatch.setenv(FOLDER, str(tmp_path))
    forget_calls()
    with paradiff.parallelize(clocked.pipe) as run:
        found = clocked.case.run(clocked.pipe, **STEPS)
    assert torch.equal(found, plain)
    assert run.report.refused_calls == 0
    assert seconds > 0


def test_few_steps_are_measured_in_a_later_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch, lambda states: 1.0)
    steps = {"num_inference_steps": 30}
    _, seconds = clocked.call(**steps)
    with paradiff.parallelize(clocked.pipe) as run:
        taken = [clocked.call(**steps)[1] for _ in range(2)]
        assert taken[0] == seconds
        assert "few steps leave no room" in run.reports[0].message
        assert taken[1] < seconds
        assert run.reports[1].executor in ("vector", "lanes")


def test_a_short_loop_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch, lambda states: 5e-3)
    with paradiff.parallelize(clocked.pipe) as run:
        _, taken = clocked.call()
        assert taken == pytest.approx(0.25)
        assert "its loop takes about 0.25 s" in run.report.message
        clocked.call(num_inference_steps=10)
        assert "the chain is short" in run.report.message


def test_what_a_given_up_call_changed_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch, lambda states: 1.0)
    pipe = clocked.pipe
    kind = type(pipe)

    class Counting(kind):
        """Counts its prologues, and draws from torch's own generator in each."""

        count = 0

        def check_inputs(self, *args: Any, **kwargs: Any) -> None:
            self.count += 1
            self.drawn = float(torch.rand(()))
            return kind.check_inputs(self, *args, **kwargs)

    pipe.__class__ = Counting
    torch.manual_seed(3)
    clocked.call()
    wanted = pipe.drawn
    torch.manual_seed(3)
    with paradiff.parallelize(pipe, max_rows=64) as run:
        clocked.call()
    assert run.report.executor in ("vector", "lanes")
    assert run.report.refused_calls > 0
    assert pipe.count == 2
    assert pipe.drawn == wanted


def test_a_call_whose_networks_change_in_its_loop_is_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch, lambda states: 1.0)
    weight = clocked.network.conv_in.bias
    step = type(clocked.pipe.scheduler).step

    class Writing(type(clocked.pipe.scheduler)):
        """A scheduler whose steps write to the network."""

        def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                weight.mul_(1.001)
            return step(self, model_output, timestep, sample, **kwargs)

    clocked.pipe.scheduler.__class__ = Writing
    before = weight.detach().clone()
    plain, _ = clocked.call()
    with torch.no_grad():
        weight.copy_(before)
    with paradiff.parallelize(clocked.pipe) as run:
        found, _ = clocked.call()
    assert torch.equal(found, plain)
    assert run.report.executor == "sequential"
    assert "its networks change while its loop runs" in run.report.message


def test_a_users_network_keeps_nothing_of_the_calls_beside_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch, lambda states: states)
    network = clocked.network
    kind = type(network)

    class Counting(kind):
        """Counts its calls."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.count = vars(self).get("count", 0) + 1
            return kind.forward(self, *args, **kwargs)

    network.__class__ = Counting
    del network.forward
    real = network.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        clocked.seconds += len(args[0])
        return real(*args, **kwargs)

    network.forward = forward
    plain, _ = clocked.call()
    assert network.count == 50
    network.count = 0
    with paradiff.parallelize(clocked.pipe) as run:
        found, _ = clocked.call()
    assert torch.equal(found, plain)
    assert "more than 1.35 times" in run.report.message
    assert network.count == 50


def test_an_error_of_the_plain_call_is_passed_on_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch, lambda states: 1.0)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the network failed")

    clocked.network.forward = fail
    with paradiff.parallelize(clocked.pipe), pytest.raises(RuntimeError, match="the network failed"):
        clocked.call()
    assert not clocked.network._forward_hooks
    assert "step" not in vars(clocked.pipe.scheduler)

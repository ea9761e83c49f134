# SPDX-License-Identifier: Apache-2.0
"""`auto` in a pipeline's call: it follows edits and callbacks by a method that can, and knows what earlier calls took."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from adversary import Adversary, Net
from tiny import CASES
from torch import Tensor

import paradiff
from paradiff.pipelines.host.find import host_of
from paradiff.pipelines.known import CallKnown, call_key, curve_of_passes, forget_calls, pace_of
from paradiff.planning import LatencyCurve
from paradiff.planning.picking import Known, Picked
from paradiff.planning.store import FOLDER
from paradiff.planning.wish import Wish

FLAT = LatencyCurve({1: 1.0, 64: 1.2}, {1: 0.0})


def sparse_first(wish: Wish, known: Known | None, table: paradiff.Table, samples: int) -> Picked:
    """A choice of collocation wherever it can do what is asked."""
    found = paradiff.collocation(tolerance=1e-4)
    if wish.allows(found):
        return Picked(found, "collocation()", "first")
    return Picked(paradiff.quasi_newton(tolerance=1e-4), "quasi_newton()", "next")


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plain call is watched before a parallel one is begun."""
    monkeypatch.setattr("paradiff.pipelines.call.WatchedCall.fits", lambda host: False)


@pytest.mark.usefixtures("unwatched")
def test_a_loop_that_edits_its_states_gets_a_method_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiff.planning.auto.pick", sparse_first)
    case = CASES["sd_inpaint4"]
    pipe = case.make()
    plain = case.run(pipe)
    with paradiff.parallelize(pipe) as run:
        found = case.run(pipe)
    assert float((found.double() - plain.double()).square().mean().sqrt()) < 1e-3
    assert run.report.executor in ("vector", "lanes")
    assert "; chosen: quasi_newton(), next" in run.report.message
    assert run.report.refused_calls > 0


def test_a_pipeline_whose_networks_know_no_device_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers asks a pipeline's first module for its device, which a module of torch has not."""
    kind = Adversary.of(
        """
def loop(self, x, generator):
    for t in self.scheduler.timesteps:
        x = self.scheduler.step(self.net(x, t), t, x)[0]
    return x
"""
    )
    pipe = kind(Net(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    with pytest.raises(AttributeError):
        _ = pipe.device
    plain = pipe(generator=torch.Generator().manual_seed(0))
    assert host_of(pipe).device == torch.device("cpu")
    run = paradiff.parallelize(pipe)
    torch.testing.assert_close(run(generator=torch.Generator().manual_seed(0)), plain)
    monkeypatch.setattr("paradiff.planning.auto.pick", sparse_first)
    monkeypatch.setattr("paradiff.pipelines.call.WatchedCall.fits", lambda host: False)
    forget_calls()
    found = run(generator=torch.Generator().manual_seed(0))
    assert run.report.executor == "vector"
    assert float((found - plain).square().mean().sqrt()) < 1e-3


def test_a_callback_gets_the_states_of_all_steps_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiff.planning.auto.pick", sparse_first)
    case = CASES["sd"]
    pipe = case.make()
    told: list[tuple[int, Tensor]] = []
    plain: list[tuple[int, Tensor]] = []

    def into(kept: list[tuple[int, Tensor]]) -> Any:
        return lambda pipe, step, time, tensors: kept.append((step, tensors["latents"].clone())) or {}

    case.run(pipe, callback_on_step_end=into(plain))
    with paradiff.parallelize(pipe) as run:
        case.run(pipe, callback_on_step_end=into(told))
        assert "; chosen: quasi_newton(), next" in run.report.message
        case.run(pipe)
        assert "; chosen: collocation(), first" in run.report.message
    assert [step for step, _ in told] == [step for step, _ in plain] == [*range(case.steps)]
    for (_, one), (_, other) in zip(told, plain, strict=True):
        assert float((one - other).square().mean().sqrt()) < 1e-2


def test_a_curve_belongs_to_the_guidance_and_the_number_of_texts_and_not_to_what_they_say() -> None:
    pipe = CASES["sd"].make()
    host = host_of(pipe)

    def key(**call: Any) -> str:
        return call_key(host, host.bound((), call))

    one = key(prompt="a", guidance_scale=4.0)
    assert one == key(prompt="another", guidance_scale=4.0) == key(prompt="a", guidance_scale=4.0, num_inference_steps=7)
    others = [key(prompt="a", guidance_scale=5.0), key(prompt=["a", "b"], guidance_scale=4.0)]
    others += [key(prompt="a", guidance_scale=4.0, negative_prompt="b"), key(prompt_embeds=torch.zeros(1, 2, 3))]
    assert len({one, *others}) == 5


def test_a_curve_is_made_of_passes_of_several_widths() -> None:
    times = [(1, 9.0), (1, 1.0), (1, 1.2), (4, 1.5), (4, 1.6), (8, 3.0)]
    found = curve_of_passes(times)
    assert found is not None
    assert found.points == {1: 1.0, 4: 1.5}  # the first pass, and a single one, are no measure
    assert curve_of_passes(times[:3]) is None
    assert curve_of_passes([(2, 1.0), (4, 1.0), (4, 1.0), (2, 1.0), (2, 1.0)]) is None


def test_a_busy_machine_is_seen_by_passes_of_one_row() -> None:
    curve = LatencyCurve({1: 1.0, 8: 1.5})
    assert pace_of([(1, 90.0), (1, 9.0), (1, 3.0), (8, 4.5)], curve) == 3.0
    assert pace_of([(1, 90.0), (1, 0.5), (8, 12.0)], curve) == pace_of([(1, 90.0), (8, 12.0)], curve) == 1.0


@pytest.mark.usefixtures("unwatched")
def test_what_is_known_of_a_call_decides_and_its_runs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    case = CASES["sd"]
    pipe = case.make()
    steps = {"num_inference_steps": 25}
    with paradiff.parallelize(pipe) as run:
        case.run(pipe, **steps)
        widened, given_up = "a window that widens where its rounds show that it pays", "a window was tried within"
        assert widened in run.report.message or given_up in run.report.message
        for path in tmp_path.iterdir():
            path.unlink()
        given: dict[str, Any] = {}
        monkeypatch.setattr("paradiff.pipelines.call.CallKnown", lambda *of: given.setdefault("known", CallKnown(*of)))
        case.run(pipe, **steps)
        given["known"].keep_curve(FLAT)
        forget_calls()
        case.run(pipe, **steps)
    assert "times faster than the plain chain by the library's models" in run.report.message
    assert run.report.passes < 25


def plainly(wish: Wish, known: Known | None, table: paradiff.Table, samples: int) -> Picked:
    """A choice of the plain chain."""
    return Picked(paradiff.sequential(), "sequential()", "since nothing is faster")


@pytest.mark.usefixtures("unwatched")
def test_a_call_for_which_the_plain_one_is_chosen_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiff.planning.auto.pick", plainly)
    case = CASES["sd"]
    pipe = case.make()
    plain = case.run(pipe)
    rounds: list[Any] = []
    with paradiff.parallelize(pipe) as run, warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = case.run(pipe), case.run(pipe)
        told = run.reports
    with paradiff.parallelize(pipe, observer=lambda one: rounds.append(one)) as seen:
        third = case.run(pipe)
    for found in (first, second):
        assert torch.equal(found, plain)
    assert torch.allclose(third, plain, rtol=1e-3, atol=1e-3)
    for report in told:
        assert report.executor == "sequential"
        assert report.message == "sequential: the plain call; chosen: sequential(), since nothing is faster"
        assert not report.warnings
    assert told[0].refused_calls > 0  # those up to its first step
    assert told[1].refused_calls == 0
    assert seen.report.executor != "sequential"  # somebody looks at its rounds
    assert len(rounds) == case.steps


@pytest.mark.usefixtures("unwatched")
def test_a_window_that_does_not_pay_is_given_up_for_the_plain_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    case = CASES["sd"]
    pipe = case.make()
    steps = {"num_inference_steps": 40}
    plain = case.run(pipe, **steps)
    real, clock = pipe.unet.forward, [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def slow(*args: Any, **kwargs: Any) -> Any:
        clock[0] += len(args[0])  # in proportion to the rows
        return real(*args, **kwargs)

    pipe.unet.forward = slow
    with paradiff.parallelize(pipe) as run:
        found = [case.run(pipe, **steps) for _ in range(9)]
    for one in found:
        assert torch.equal(one, plain)
    assert [report.executor for report in run.reports] == ["sequential"] * 9
    tried = [report.refused_calls > 0 for report in run.reports]
    assert "a window was tried within" in run.reports[tried.index(True)].message
    assert tried == [True, False, False, True, *[False] * 4, True]  # it is tried anew after 2 calls, 4, ...

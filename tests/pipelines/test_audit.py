# SPDX-License-Identifier: Apache-2.0
"""The audit and the watches of a pass, one by one: each test fails without the part that it is named for."""

from __future__ import annotations

import itertools
import types
import warnings
from collections import deque
from typing import Any

import diffusers
import pytest
import torch
from adversary import Adversary, Loop, Net, judged
from torch import Tensor

from paradiff import parallelize, parasolver, sequential
from paradiff.pipelines import Report
from paradiff.pipelines.executors import lane, lanes, vector
from paradiff.pipelines.loop import audit
from paradiff.pipelines.loop.audit import granted, relative_difference
from paradiff.pipelines.loop.ledger import differing, grown, ledger

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy


def made(fault: str, *detail: str, **fields: Any) -> Loop:
    plain = {"begin": 0, "edit": "none", "indexed": False, "scheduler": "flow", "method": "parasolver", "executor": "auto"}
    return Loop(fault=fault, detail=detail, **(plain | fields))


def run_of(pipe: Any, **options: Any) -> tuple[Any, Report]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = parallelize(pipe, **({"method": parasolver()} | options))
        return run(generator=torch.Generator().manual_seed(3)), run.report


@pytest.fixture
def without_a_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves what a loop keeps to the audit of its passes."""
    for executor in (vector, lane):
        monkeypatch.setattr(executor, "refuse_memory", lambda *arguments: None)


@pytest.mark.parametrize("scheduler", ["flow", "dpm", "ancestral"])
@pytest.mark.parametrize("edit", ["before, in place", "before, behind the version", "after, in place", "after"])
def test_an_edit_is_followed_however_it_is_made(edit: str, scheduler: str) -> None:
    verdict = judged(made("plain", "none", edit=edit, scheduler=scheduler, method="quasi_newton"))
    assert verdict.kind == "parallel", verdict.text


@pytest.mark.parametrize("draw", ["dropout", "bernoulli", "numpy", "python", "argument", "seeded", "hook"])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_draw_of_any_kind_is_refused_by_name(draw: str, indexed: bool) -> None:
    verdict = judged(made("draw", draw, indexed=indexed))
    assert verdict.kind == "refused", verdict.text
    assert "draws random numbers" in verdict.text


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("time", ["earlier", "first"])
def test_the_time_of_a_step_is_that_of_its_pass(time: str, indexed: bool) -> None:
    verdict = judged(made("time", time, scheduler="ddim", indexed=indexed))
    assert "the loop gives its scheduler's step another time than that of its pass" in verdict.text


@pytest.mark.parametrize("indexed", [False, True])
def test_a_network_after_the_step_is_refused_by_name(indexed: bool) -> None:
    verdict = judged(made("edit", "network after the step", indexed=indexed))
    assert "the loop calls a network after its scheduler's step" in verdict.text


def test_a_network_after_the_step_of_a_window_is_refused_by_name() -> None:
    verdict = judged(made("edit", "network after the step", executor="vector"))
    assert "vector: the loop calls a network after its scheduler's step" in verdict.text


def test_what_a_loop_that_edits_its_states_keeps_is_found_by_the_repeated_row(without_a_walk: None) -> None:
    # What is kept grows by another amount in each pass, so no ledger shows it.
    text = made("keep", "count", "object", edit="after").source().replace("box.c + 1", "1.5 * box.c + 0.3")
    _, report = run_of(Adversary.of(text)(Net(), diffusers.FlowMatchEulerDiscreteScheduler()), executor="vector")
    assert report.executor == "sequential"
    assert "when the same state is evaluated again in the pass after" in report.warnings[0]


@pytest.mark.parametrize(("option", "value"), [("eta", "0.5 * (i > 12)"), ("use_clipped_model_output", "i > 12")])
def test_an_option_of_the_step_that_changes_in_the_loop_is_refused_by_name(option: str, value: str) -> None:
    loop = made("plain", "none", scheduler="ddim")
    text = loop.source().replace("step(v, t, x)", f"step(v, t, x, {option}={value})")
    _, report = run_of(Adversary.of(text)(Net(), diffusers.DDIMScheduler(clip_sample=False)))
    assert report.executor == "sequential"
    assert f"the loop changes the {option} of its scheduler's step" in report.warnings[0]


def test_calls_that_begin_their_loops_within_two_percent_begin_at_the_same_state() -> None:
    origin = torch.ones(2, 8)
    assert lane._near(origin * 1.019, origin)
    assert not lane._near(origin * 1.021, origin)
    assert not lane._near(torch.ones(2, 7), origin)


def test_a_row_is_evaluated_again_by_a_lane_that_made_none_of_the_passes_before() -> None:
    lockstep: Any = object.__new__(lanes.Lockstep)
    lockstep.lanes = [types.SimpleNamespace(seen=seen, turns=deque(), state=None) for seen in ({3}, {5}, {9}, {1})]
    busy = lockstep.lanes[3:]
    double = lockstep._double(5, range(2, 5), torch.zeros(1), busy)
    assert double is lockstep.lanes[2]
    assert list(double.turns) == [(4, True), (5, False)]


@pytest.mark.parametrize("indexed", [False, True])
def test_an_attribute_that_the_scheduler_changes_cannot_be_read(indexed: bool) -> None:
    loop = made("plain", "none", scheduler="dpm", indexed=indexed)
    reads = "v = v * (1 + 0.1 * self.scheduler.lower_order_nums)\n        x = self.scheduler.step"
    text = loop.source().replace("x = self.scheduler.step", reads)
    _, report = run_of(Adversary.of(text)(Net(), diffusers.DPMSolverMultistepScheduler()))
    assert report.executor == "sequential"
    assert "the loop reads the scheduler's lower_order_nums, which changes from step to step" in report.warnings[0]


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_the_sample_is_a_tensor_that_may_be_changed(executor: Any) -> None:
    found, report = run_of(made("plain", "none").make(), executor=executor)
    assert report.executor == executor
    assert not found.is_inference()
    found.mul_(2)


@pytest.mark.parametrize("kind", ["made at", "made of the state at", "switch"])
@pytest.mark.parametrize("begin", [0, 2, 10])
def test_what_an_earlier_pass_made_is_found_in_lanes(kind: str, begin: int) -> None:
    verdict = judged(made("keep", kind, "object", begin=begin, method="quasi_newton, loose"))
    assert verdict.kind == "refused", verdict.text
    assert "keeps something from one pass to the next" in verdict.text


@pytest.mark.parametrize("place", ["network", "processor", "module global"])
@pytest.mark.parametrize("begin", [0, 1, 5])
def test_what_lanes_share_is_found(place: str, begin: int) -> None:
    verdict = judged(made("keep", "made at", place, begin=begin, method="quasi_newton, loose", indexed=True))
    assert verdict.kind == "refused", verdict.text


@pytest.mark.parametrize("source", ["iterator", "generator", "popped list"])
def test_what_a_pass_uses_up_is_found_in_a_window(source: str) -> None:
    verdict = judged(made("use up", source, executor="vector"))
    assert verdict.kind == "refused", verdict.text


def test_a_factor_that_changes_with_every_pass_is_found_by_the_repeated_row(without_a_walk: None) -> None:
    text = made("keep", "count", "object").source().replace("box.c + 1", "box.c + 0.5")  # no whole number
    _, report = run_of(Adversary.of(text)(Net(), diffusers.FlowMatchEulerDiscreteScheduler()), executor="vector")
    assert report.executor == "sequential"
    assert "when the same state is evaluated again in the pass after" in report.warnings[0]


@pytest.mark.parametrize("place", ["object", "dict", "closure", "module global"])
@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_a_count_is_found_before_it_has_an_effect(place: str, executor: str) -> None:
    verdict = judged(made("keep", "count from", place, begin=25, executor=executor, method="quasi_newton, loose"))
    assert verdict.kind == "refused", verdict.text


def test_differences_are_relative_to_the_members_and_rounding_is_that_of_the_dtype() -> None:
    wanted = torch.ones(1, 2, 4)
    found = wanted.clone()
    found[0, 1] += 0.5
    assert relative_difference(found, wanted).tolist() == [0.5]
    nothing = wanted * torch.nan
    assert relative_difference(nothing, nothing).tolist() == [0.0]
    assert not relative_difference(nothing, wanted)[0] <= 1
    for dtype, expected in ((torch.float32, 9.7e-5), (torch.float16, 0.039), (torch.bfloat16, 0.157)):
        assert granted(torch.finfo(dtype).eps) == pytest.approx(expected, rel=0.02)


def test_a_difference_beyond_rounding_is_not_granted(without_a_walk: None) -> None:
    verdict = judged(made("keep", "previous output", "object", executor="lanes", method="parasolver, tight"))
    assert "where rounding explains 9.7e-05" in verdict.text


def test_a_ledger_holds_what_variables_lead_to() -> None:
    box: Any = types.SimpleNamespace(inner={"count": 3}, found=[torch.zeros(2)], name="a", weight=0.5)
    rest = iter([1, 2, 3])
    counter = itertools.count(4)
    next(rest)
    seen = ledger()
    assert (seen["box.inner['count']"], seen["len(box.found)"], seen["the rest of rest"]) == (3, 1, 2)
    assert seen["counter"] == "count(4)"
    assert differing(seen, {**seen, "len(box.found)": 2}) == "len(box.found)"
    assert differing(seen, dict(seen)) is None
    assert grown({"a": 1, "b": 1}, {"a": 2, "b": 2}, {"a": 2, "b": 3}) == "b"
    assert grown({"a": 1}, {"a": 1}, {"a": 1}) is None
    assert (box, counter) is not None


def test_as_many_rounds_as_steps_are_explained() -> None:
    pipe = made("plain", "none").make()
    with torch.no_grad():
        pipe.net.b.weight.mul_(60)  # an answer so strong that no sweep of two nodes finds it at once
    found, report = run_of(pipe, method=parasolver(window=2, tolerance=0.0), executor="lanes")
    assert isinstance(found, Tensor)
    assert report.rounds >= 30
    assert any("as many rounds as steps" in warning for warning in report.warnings)
    assert run_of(made("plain", "none").make(), method=sequential())[1].warnings == []


def test_the_whole_sample_is_compared_where_every_call_is_checked(
    monkeypatch: pytest.MonkeyPatch, without_a_walk: None
) -> None:
    loop = made("keep", "made at", "object", begin=5, executor="lanes")
    plain = loop.make()(generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(audit, "granted", lambda eps: float("inf"))
    found, report = run_of(loop.make(), method=parasolver(tolerance=0.05), executor="lanes", check="every")
    assert torch.equal(found, plain)
    assert any("its sample differs from the plain call's by" in warning for warning in report.warnings)

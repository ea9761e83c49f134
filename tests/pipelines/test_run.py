# SPDX-License-Identifier: Apache-2.0
"""A `Run`: entered, called or enabled, it makes calls parallel; afterwards the pipeline is what it was."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from tiny import CASES
from torch import Tensor

from paradiff import parallelize, parasolver, srds
from paradiff.chain.slope import freeze_epsilon
from paradiff.pipelines import Explanation, Report, Run, explain
from paradiff.solver.protocol import Round

METHOD = parasolver(tolerance=1e-4, slope=freeze_epsilon)  # latents of size 40
BOUND = 1e-5  # of the largest value: float32, whose rounding differs with the rows of a network call
CASE = CASES["sd"]
ARGUMENTS: dict[str, Any] = {"num_inference_steps": 10, "height": 8, "width": 8, "output_type": "latent"}
UNUSED = "StableDiffusionPipeline was made with parallelize and never used.*parallelize.pipe.: pipe.*call its enable"


def difference(found: Tensor, plain: Tensor) -> float:
    return float((found - plain).abs().max() / plain.abs().max())


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return CASE.run(CASE.make(), 3)


def test_a_run_is_called_like_the_pipeline_and_leaves_it_as_it_was(plain: Tensor) -> None:
    pipe = CASE.make()
    kind, scheduler = type(pipe), pipe.scheduler
    seen: list[type] = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(type(pipe)))
    run = parallelize(pipe, METHOD)
    assert difference(CASE.run(run, 3), plain) < BOUND
    assert (run.report.executor, run.report.passes < 10) == ("vector", True)
    assert set(seen) == {kind}
    hook.remove()
    assert (type(pipe), pipe.scheduler) == (kind, scheduler)
    assert torch.equal(CASE.run(pipe, 3), plain)  # the plain call
    assert difference(CASE.run(run, 3), plain) < BOUND
    assert len(run.reports) == 2


def test_a_run_returns_what_the_pipeline_returns() -> None:
    pipe = CASE.make()
    run = parallelize(pipe, METHOD)
    found, wanted = (
        one(["a"], generator=torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np") for one in (run, pipe)
    )
    assert type(found) is type(wanted)
    assert found.images.shape == wanted.images.shape


def test_enabling_switches_the_pipeline_object_itself(plain: Tensor) -> None:
    pipe = CASE.make()
    kind = type(pipe)
    run = parallelize(pipe, METHOD)
    assert run.enable() is run
    assert run.enabled
    assert type(pipe) is not kind
    assert isinstance(pipe, kind)
    assert difference(CASE.run(pipe, 3), plain) < BOUND
    assert run.report.passes < 10
    run.disable()
    assert not run.enabled
    assert type(pipe) is kind
    assert torch.equal(CASE.run(pipe, 3), plain)
    assert len(run.reports) == 1
    run.disable()  # harmless
    assert type(pipe) is kind
    with run:
        assert difference(CASE.run(pipe, 3), plain) < BOUND
    assert type(pipe) is kind
    assert len(run.reports) == 2


def test_the_target_of_the_block_may_be_called_in_place_of_the_pipeline(plain: Tensor) -> None:
    pipe: Any = CASE.make()
    kind, original = type(pipe), pipe
    with parallelize(pipe, METHOD) as pipe:  # by mistake
        assert difference(CASE.run(pipe, 3), plain) < BOUND
    assert type(original) is kind
    assert [report.executor for report in pipe.reports] == ["vector"]


@pytest.mark.parametrize("first", ["with", "enable"])
@pytest.mark.parametrize("again", ["with", "enable", "call", "new"])
def test_a_second_run_of_an_enabled_pipeline_is_refused_in_one_sentence(first: str, again: str, plain: Tensor) -> None:
    pipe = CASE.make()
    kind = type(pipe)
    one, two = parallelize(pipe, METHOD), parallelize(pipe, METHOD)
    one.__enter__() if first == "with" else one.enable()
    enabled = type(pipe)
    second = {"with": two.__enter__, "enable": two.enable, "call": lambda: two("a"), "new": lambda: parallelize(pipe)}[again]
    two.disable()  # of a run that is not enabled: without effect
    with pytest.raises(ValueError, match=r"^this StableDiffusionPipeline is already run in parallel; leave .*[^.]$") as caught:
        second()
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="already run in parallel"):
        one.enable()
    assert type(pipe) is enabled
    assert difference(CASE.run(pipe, 3), plain) < BOUND
    one.__exit__(None, None, None)
    assert type(pipe) is kind
    two.enable().disable()  # the pipeline is free now
    assert type(pipe) is kind


@pytest.mark.parametrize("how", ["with", "call", "enable"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_exception_leaves_the_pipeline_as_it_was(how: str, error: type[BaseException], plain: Tensor) -> None:
    pipe = CASE.make()
    kind, scheduler = type(pipe), pipe.scheduler
    calls: list[int] = []

    def fail(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error

    hook = pipe.unet.register_forward_pre_hook(fail)
    run = parallelize(pipe, METHOD, check="off")  # the hook reads its list, which the check would refuse

    def within() -> None:
        with run:
            CASE.run(pipe, 3)

    uses = {"with": within, "call": lambda: CASE.run(run, 3), "enable": lambda: CASE.run(run.enable().pipeline, 3)}
    with pytest.raises(error):
        uses[how]()
    hook.remove()
    assert pipe.scheduler is scheduler
    assert run.enabled == (how == "enable")  # an error in a call does not switch the pipeline
    run.disable()
    assert type(pipe) is kind
    assert "forward" not in vars(pipe.unet)
    assert torch.equal(CASE.run(pipe, 3), plain)


def test_a_run_that_is_dropped_unused_warns_once() -> None:
    run = parallelize(CASE.make(), METHOD)
    with pytest.warns(UserWarning, match=UNUSED) as caught:
        del run
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("how", ["with", "call", "enable", "refused"])
def test_a_run_that_was_used_is_dropped_silently(how: str) -> None:
    pipe = CASE.make()
    run = parallelize(pipe, METHOD)
    if how == "with":
        with run:
            pass
    elif how == "call":
        run("a", **ARGUMENTS)
    elif how == "enable":
        run.enable().disable()
    else:
        with parallelize(pipe, METHOD), pytest.raises(ValueError, match="already"):
            run.enable()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del run
    assert not [warning for warning in caught if "parallelize" in str(warning.message)]


def test_explain_and_the_end_of_the_interpreter_warn_of_no_unused_run() -> None:
    explain(CASE.make(), num_inference_steps=4)  # with warnings as errors
    program = """
import diffusers, paradiff
class Pipe(diffusers.DiffusionPipeline):
    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)
run = paradiff.parallelize(Pipe(diffusers.DDIMScheduler()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "parallelize" not in done.stderr


def test_texts_of_a_run_and_a_report_are_short() -> None:
    pipe = CASE.make()
    run = parallelize(pipe, METHOD)
    assert repr(run) == "Run(StableDiffusionPipeline, parasolver, executor='auto', not enabled, 0 calls)"
    with run:
        run("a", **ARGUMENTS)
        assert repr(run) == "Run(StableDiffusionPipeline, parasolver, executor='auto', enabled, 1 call)"
    text = repr(run.report)
    assert text.startswith("Report(StableDiffusionPipeline, DDIMScheduler, parasolver, vector,\n")
    assert f"{run.report.rounds} rounds and {run.report.rows} rows for 10 steps" in text
    plain = parallelize(pipe, METHOD, executor="sequential")
    plain("a", **ARGUMENTS)
    assert len(text.splitlines()) == 3
    assert repr(plain.report).startswith("Report(StableDiffusionPipeline, DDIMScheduler, parasolver, sequential,\n")
    assert len(repr(plain.report).splitlines()) == 2


@pytest.mark.parametrize("method", [METHOD, srds(tolerance=1e-5)], ids=["window", "srds"])
def test_a_report_pickles(method: Any) -> None:
    run = parallelize(CASE.make(), method)
    run("a", **ARGUMENTS)
    again = pickle.loads(pickle.dumps(run.report))
    assert isinstance(again, Report)
    assert again == run.report
    assert len(again.history) > 0


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("method", [METHOD, srds(tolerance=1e-5)], ids=["window", "srds"])
def test_the_observer_gets_the_records_of_each_round(executor: Any, method: Any, plain: Tensor) -> None:
    seen: list[Round] = []
    run = parallelize(CASE.make(), method, executor=executor, observer=seen.append)
    assert difference(CASE.run(run, 3), plain) < BOUND
    report = run.report
    assert report.executor == executor
    records = [record for round in seen for record in round.records]
    assert records == report.history
    assert len({record.round for record in records}) == len([round for round in seen if round.records])
    assert sum(record.passed for record in records) > 0


@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_an_observers_error_ends_the_call_and_is_its_own(executor: Any) -> None:
    def stop(round: Round) -> None:
        raise InterruptedError("seen enough")

    pipe = CASE.make()
    kind, scheduler = type(pipe), pipe.scheduler
    with pytest.raises(InterruptedError, match="seen enough"), parallelize(pipe, METHOD, executor=executor, observer=stop):
        CASE.run(pipe)
    assert (type(pipe), pipe.scheduler) == (kind, scheduler)
    with pytest.raises(ValueError, match="observer is a int; give a function of a round"):
        parallelize(pipe, METHOD, observer=3)  # pyright: ignore[reportArgumentType]


def test_run_report_and_explanation_are_public() -> None:
    run = parallelize(CASE.make(), METHOD)
    assert isinstance(run, Run)
    run("a", **ARGUMENTS)
    assert isinstance(run.report, Report)
    assert isinstance(explain(run.pipeline, num_inference_steps=4), Explanation)

# SPDX-License-Identifier: Apache-2.0
"""Calls while a parallel call runs: of the same pipeline in another thread, of one with the same scheduler in a callback."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import diffusers
import pytest
import torch
from adversary import Adversary, Net
from test_further_loops import written

from paradiff import parallelize, parasolver
from paradiff.pipelines.turn import GATES

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy


class Gated(Net):
    """A network that lets another thread go on at its first call, and waits until that has called the pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["gates"] = None

    def forward(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        gates, self.__dict__["gates"] = self.__dict__["gates"], None
        if gates is not None:
            gates[0].set()
            gates[1].wait(0.2)
        return super().forward(x, t)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_a_call_from_another_thread_waits_and_is_right(executor: Any, enabled: bool) -> None:
    pipe = Adversary.of(written())(Gated(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    wanted = [pipe(generator=seeded(seed)) for seed in (1, 2)]
    pipe.net.__dict__["gates"] = gates = threading.Event(), threading.Event()
    found: dict[int, Any] = {}

    def other() -> None:
        gates[0].wait()
        try:
            found[1] = pipe(generator=seeded(2))
        except Exception as error:
            found[1] = error

    thread = threading.Thread(target=other)
    thread.start()
    run = parallelize(pipe, parasolver(tolerance=1e-5), executor=executor)
    if enabled:
        run.enable()
    found[0] = run(generator=seeded(1))
    thread.join()
    assert all(report.executor == executor for report in run.reports)
    assert len(run.reports) == 1 + enabled
    for place in (0, 1):
        assert isinstance(found[place], torch.Tensor), found[place]
        assert float((found[place] - wanted[place]).abs().max()) < 1e-4
    if enabled:
        run.disable()
    assert type(pipe).__mro__[1] is diffusers.DiffusionPipeline


@pytest.mark.parametrize("within", ["plain", "parallel"])
@pytest.mark.parametrize("executor", ["vector", "lanes"])
def test_a_callback_may_call_another_pipeline_of_the_same_scheduler(executor: Any, within: str) -> None:
    kind = Adversary.of(written())

    class Called(kind):
        def __call__(self, generator: Any = None, callback_on_step_end: Any = None) -> Any:
            return kind.__call__(self, generator)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe, other = Called(Net(), scheduler), kind(Net(), scheduler)
    wanted = [call(generator=seeded(seed)) for seed, call in ((1, pipe), (2, other))]
    inner = other if within == "plain" else parallelize(other, parasolver(tolerance=1e-5))
    found: list[Any] = []

    def callback(_: Any, step: int, time: Any, tensors: Any) -> Any:
        if step in (3, 17):
            found.append(inner(generator=seeded(2)))
        return tensors

    run = parallelize(pipe, parasolver(tolerance=1e-5), executor=executor)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sample = run(generator=seeded(1), callback_on_step_end=callback)
    assert run.report.executor == executor
    assert float((sample - wanted[0]).abs().max()) < 1e-4
    assert [float((state - wanted[1]).abs().max()) for state in found] == [0, 0]
    said = [warning for warning in told if "another parallel call walks over the same" in str(warning.message)]
    assert bool(said) == (within == "parallel")


def test_a_class_has_its_own_method_again_after_the_last_call_of_it() -> None:
    class Host:
        def walk(self) -> int:
            return 1

    class Heir(Host):
        pass

    for kind in (Host, Heir):
        before = dict(vars(kind))
        with GATES.at(kind, "walk"):
            with GATES.at(kind, "walk"):
                assert kind().walk() == 1
            assert vars(kind)["walk"] is not before.get("walk")
        assert vars(kind).get("walk") is before.get("walk")
        assert vars(kind).keys() == before.keys()

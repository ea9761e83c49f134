# SPDX-License-Identifier: Apache-2.0
"""A loop that keeps something out of every variable's reach is found by walking it without its networks."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from adversary import ELSEWHERE, FILE, Loop, Net, judged
from torch import Tensor

from paradiff import parallelize, parasolver
from paradiff.pipelines.executors.dry_walk import PERIODS, second_visits
from paradiff.pipelines.report import Report

STEPS = 30


@pytest.fixture(autouse=True)
def cleaned() -> Iterator[None]:
    """Takes away what loops leave outside."""
    yield
    FILE.unlink(missing_ok=True)
    os.environ.pop("ADVERSARY", None)


class Pipe(diffusers.DiffusionPipeline):
    """A loop with a function of its passes' outputs."""

    def __init__(self, net: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, generator: Any = None, edit: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        self.scheduler.set_timesteps(STEPS)
        x = torch.randn(2, 8, generator=generator)
        for t in self.scheduler.timesteps:
            v = self.net(x, t)
            x = self.scheduler.step(v if edit is None else edit(v), t, x).prev_sample
        return x


FACTORS: list[float] = []


class Spending(Pipe):
    """A loop that uses up its factors."""

    @torch.no_grad()
    def __call__(self, generator: Any = None, edit: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        FACTORS[:] = [1.0] * 20 + [0.8] * 10
        return super().__call__(generator, edit)


def called(
    edit: Callable[[Tensor], Tensor] | None = None, net: Net | None = None, kind: type[Pipe] = Pipe, **options: Any
) -> tuple[Tensor, Report]:
    pipe = kind(net or Net(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with parallelize(pipe, parasolver(), **options) as run:
            found: Any = pipe(generator=torch.Generator().manual_seed(3), edit=edit)  # pyright: ignore[reportCallIssue]
    return found, run.report


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("place", ELSEWHERE)
def test_a_count_is_found_wherever_it_is_kept_before_it_has_an_effect(place: str, executor: str) -> None:
    loop = Loop(
        "elsewhere", (place,), begin=25, edit="none", indexed=False, scheduler="flow", method="parasolver", executor=executor
    )
    verdict = judged(loop)
    assert verdict.kind == "refused", verdict.text
    assert "with its networks' outputs held fixed" in verdict.text


@pytest.mark.parametrize("period", PERIODS)
def test_what_comes_again_after_some_passes_is_found(period: int) -> None:
    os.environ["ADVERSARY"] = ""

    def edit(v: Tensor) -> Tensor:
        os.environ["ADVERSARY"] += "x"
        return v if len(os.environ["ADVERSARY"]) % period else 0.8 * v

    assert called(edit)[1].executor == "sequential"
    assert os.environ["ADVERSARY"] == "x" * STEPS  # what the walk left there was put back before the plain call


def test_a_setting_that_the_walk_changed_is_put_back() -> None:
    """A loop that lowers the recursion limit in each of its passes, which only the plain call may be seen to do."""

    def edit(v: Tensor) -> Tensor:
        sys.setrecursionlimit(sys.getrecursionlimit() - 1)
        return v if sys.getrecursionlimit() > 2975 else 0.8 * v

    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(3000)
        found, report = called(edit)
        assert sys.getrecursionlimit() == 3000 - STEPS
        assert "depends on the passes before" in report.warnings[0]
        sys.setrecursionlimit(3000)
        assert torch.equal(found, called(edit, executor="sequential")[0])
    finally:
        sys.setrecursionlimit(limit)


def test_values_that_are_used_up_with_the_loop_are_found() -> None:
    _, report = called(lambda v: v * FACTORS.pop(0), kind=Spending)
    assert "is passed again" in report.warnings[0]
    assert "IndexError" in report.warnings[0]
    assert FACTORS == []  # those that the walk took were put back before the plain call


def test_the_walk_calls_no_network_and_leaves_a_loop_without_memory_alone() -> None:
    counts = []

    class Counted(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            counts.append(len(x))
            return super().forward(x, t)

    for executor in ("vector", "lanes"):
        counts.clear()
        _, report = called(net=Counted(), executor=executor)
        assert report.executor == executor
        assert len(counts) == report.network_calls
    _, audited = called(executor="vector")
    _, alone = called(executor="vector", check="off")
    assert audited.passes == alone.passes


def test_a_walk_that_a_loop_ends_shows_nothing() -> None:
    def edit(v: Tensor) -> Tensor:
        if type(v) is Tensor and len(v.unique()) == 1:
            raise ValueError("never")
        return v

    assert called(edit)[1].executor == "vector"


@pytest.mark.parametrize("steps", [3, 4, 7, 10, 30, 50, 999])
def test_nodes_are_passed_again_at_other_counts(steps: int) -> None:
    nodes = second_visits(steps)
    assert nodes[-1] == 1
    assert sorted(set(nodes), reverse=True) == nodes
    assert all(1 <= node < steps for node in nodes)
    if steps >= 30:
        late = [steps + 2 * k - node - 1 for k, node in enumerate(nodes, 1)]
        assert all(any(count % period for count in late) for period in PERIODS)
        assert math.gcd(*late) == 1

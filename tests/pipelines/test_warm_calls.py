# SPDX-License-Identifier: Apache-2.0
"""Pipelines' calls that begin from the trajectory of an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CASES
from torch import Tensor

import paradiff
from paradiff import Method, collocation, parallelize, parasolver, quasi_newton, sequential, srds
from paradiff.pipelines import Report

CASE = CASES["sd"]


def call(pipe: Any, prompt: str, **more: Any) -> Tensor:
    given: dict[str, Any] = {"num_inference_steps": 20, "height": 8, "width": 8, "output_type": "latent"} | more
    return pipe([prompt], generator=torch.Generator().manual_seed(3), **given).images


def ran(method: Method, prompt: str, **more: Any) -> tuple[Tensor, Report]:
    pipe = CASE.make()
    run = parallelize(pipe, method, **more)
    return call(run, prompt), run.report


@pytest.fixture(scope="module")
def before() -> Report:
    return ran(quasi_newton(), "a", keep_trajectory=True)[1]


@pytest.mark.parametrize("executor", ["vector", "lanes"])
@pytest.mark.parametrize("method", [quasi_newton(), parasolver(8), collocation()], ids=lambda m: m.name)
def test_a_warm_call_is_the_plain_call(method: Method, executor: str, before: Report, tmp_path: Path) -> None:
    assert before.trajectory is not None
    before.trajectory.save(tmp_path / "a.safetensors")
    plain = call(CASE.make(), "b")
    cold = ran(method, "b", executor=executor)[1]
    for start in (before, before.trajectory, tmp_path / "a.safetensors"):
        found, report = ran(method, "b", executor=executor, start=start)
        assert (report.executor, report.warnings) == (executor, [])
        assert (found - plain).square().mean().sqrt() < 4e-3 * plain.std()
        assert report.rounds <= cold.rounds


def test_a_call_that_cannot_begin_from_it_is_refused(before: Report) -> None:
    pipe = CASE.make()
    run = parallelize(pipe, quasi_newton(), start=before)
    with pytest.raises(
        ValueError, match=r"and the chain is another one, .* with 10 steps; begin from a trajectory of the same"
    ):
        call(run, "b", num_inference_steps=10)
    with pytest.raises(ValueError, match=r"start is a trajectory of 1 samples of shape \(1, 4, 4, 4\), and 1 of shape \(2,"):
        call(run, "b", num_images_per_prompt=2)
    for method in (sequential(), srds()):
        with pytest.raises(ValueError, match=rf"{method.name} cannot begin from a trajectory"):
            parallelize(pipe, method, start=before)
    with pytest.raises(ValueError, match=r"srds keeps no trajectory"):
        parallelize(pipe, srds(), keep_trajectory=True)
    with pytest.raises(ValueError, match=r"start was given with executor='sequential'"):
        parallelize(pipe, quasi_newton(), start=before, executor="sequential")
    with pytest.raises(ValueError, match=r"start is 3; give a call's report, a Trajectory or the path of its file, or None"):
        parallelize(pipe, quasi_newton(), start=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"start is a Report whose trajectory was not kept; give keep_trajectory=True"):
        parallelize(pipe, quasi_newton(), start=ran(quasi_newton(), "a")[1])
    other = CASES["ddpm"].make() if "ddpm" in CASES else CASES[next(name for name in CASES if name != "sd")].make()
    with pytest.raises(ValueError, match=r"of the model 'StableDiffusionPipeline, .* weights', and this one is "):
        parallelize(other, quasi_newton(), start=before)


@pytest.mark.parametrize("steps", [8, 40])
def test_auto_keeps_a_trajectory_and_begins_from_it(steps: int) -> None:
    pipe = CASE.make()
    plain = call(pipe, "b", num_inference_steps=steps)
    kept = parallelize(pipe, paradiff.auto(), keep_trajectory=True)
    call(kept, "a", num_inference_steps=steps)
    assert kept.report.trajectory is not None
    assert kept.report.executor in ("vector", "lanes")
    warm = parallelize(pipe, paradiff.auto(), start=kept.report)
    found = call(warm, "b", num_inference_steps=steps)
    assert float((found - plain).square().mean().sqrt()) < 4e-3 * float(plain.std())
    assert "the chain is short" in warm.report.message or "since a trajectory begins it" in warm.report.message

# SPDX-License-Identifier: Apache-2.0
"""The bundled trained pipelines: the plain call's sample in a fraction of its rounds."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny.case import quiet, tensor
from torch import Tensor

import paradiff
from paradiff import collocation, parallelize, parasolver, quasi_newton
from paradiff.methods import CollocationMethod, WindowMethod
from paradiff.pipelines import Report

MODELS = Path(paradiff.__file__).parent / "models/bundled"
PROMPT = "a red circle left of a blue square"
NO_T5: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None}


def loaded(kind: Any, name: str, **options: Any) -> Any:
    with quiet():
        pipe = kind.from_pretrained(MODELS / name, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def shapes() -> Any:
    return loaded(diffusers.StableDiffusionPipeline, "shapes")


@pytest.fixture(scope="module")
def shapes_flow() -> Any:
    return loaded(diffusers.StableDiffusion3Pipeline, "shapes-flow", **NO_T5)


@functools.cache
def trained_digits() -> Any:
    return loaded(diffusers.DDPMPipeline, "digits")


def digits(kind: Any, scheduler: Any, **options: Any) -> Any:
    """The bundled digits with a pipeline and scheduler of this kind, of one network."""
    trained = trained_digits()
    with quiet():
        pipe = kind(unet=trained.unet, scheduler=scheduler.from_config(trained.scheduler.config, **options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(pipe: Any, method: WindowMethod | CollocationMethod, seed: int, **call: Any) -> tuple[Tensor, Tensor, Report]:
    """The samples of the plain and of the parallel call, and the latter's report."""

    def sampled() -> Tensor:
        return tensor(pipe(**call, generator=torch.Generator().manual_seed(seed))[0])

    plain = sampled()
    with parallelize(pipe, method) as run:
        return plain, sampled(), run.report


def error(found: Tensor, plain: Tensor) -> float:
    """Root mean square difference."""
    return float((found - plain).square().mean().sqrt())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_text_pipeline_with_guidance_needs_a_third_of_its_rounds(shapes: Any, seed: int) -> None:
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 50, "guidance_scale": 4.0, "output_type": "latent"}
    plain, found, report = both(shapes, quasi_newton(), seed, **call)
    assert report.executor == "vector"
    assert report.steps == 50
    assert report.rounds <= 15
    assert report.error_estimate is not None
    assert report.error_estimate.estimated_error <= 4e-3  # the tolerance
    assert error(found, plain) < 1e-2 * float(plain.std())
    assert report.warnings == []


@pytest.mark.parametrize("seed", [0, 1])
def test_a_flow_transformer_needs_fewer_rounds_than_steps(shapes_flow: Any, seed: int) -> None:
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 28, "guidance_scale": 4.0, "output_type": "latent"}
    plain, found, report = both(shapes_flow, quasi_newton(), seed, **call)
    assert report.executor == "lanes"  # its loop reads the step number
    assert report.steps == 28
    assert report.rounds < 20
    assert error(found, plain) < 1e-2 * float(plain.std())  # as above
    assert report.warnings == []


LIMITED: dict[str, Any] = {"num_inference_steps": 50, "output_type": "np"}


@functools.cache
def unlimited(kind: Any, scheduler: Any, seed: int) -> Tensor:
    """The plain call's digit without a limit."""
    free = digits(kind, scheduler, clip_sample=False)
    return tensor(free(**LIMITED, generator=torch.Generator().manual_seed(seed))[0])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [(diffusers.DDIMPipeline, diffusers.DDIMScheduler), (diffusers.DDPMPipeline, diffusers.DDPMScheduler)],
    ids=["ddim", "ddpm"],
)
@pytest.mark.parametrize("method", [quasi_newton(), parasolver()], ids=["quasi_newton", "parasolver"])
def test_a_limit_on_the_clean_data_is_followed(kind: Any, scheduler: Any, method: WindowMethod, seed: int) -> None:
    plain, found, report = both(digits(kind, scheduler, clip_sample=True, clip_sample_range=0.8), method, seed, **LIMITED)
    assert report.executor == "vector"
    assert report.rounds <= 25
    assert error(found, plain) < 4e-3  # of pixels in 0 ... 1: a grey level; half the tolerance is 1.2e-2 of these
    assert error(unlimited(kind, scheduler, seed), plain) > 4e-3  # the limit is met, so that it would be missed


@pytest.mark.parametrize("seed", [0, 1])
def test_sparse_nodes_follow_a_long_guided_chain(shapes: Any, seed: int) -> None:
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 200, "guidance_scale": 4.0, "output_type": "latent"}
    plain, found, report = both(shapes, collocation(window=16), seed, **call)
    assert report.executor == "vector"
    assert report.rounds <= 60
    assert report.error_estimate is not None
    assert 0 < report.error_estimate.interpolation_error <= report.error_estimate.estimated_error <= 4e-3
    assert error(found, plain) < 1e-2 * float(plain.std())
    assert report.warnings == []


@pytest.mark.parametrize("seed", [0, 2])  # others run along a decision, and take many times as many
def test_sparse_nodes_take_fewer_rows_than_a_long_stochastic_chain_has_steps(seed: int) -> None:
    pipe = digits(diffusers.DDPMPipeline, diffusers.DDPMScheduler)
    plain, found, report = both(pipe, collocation(window=16), seed, num_inference_steps=500, output_type="np")
    assert report.executor == "vector"
    assert report.rounds <= 40
    assert report.rows < 500
    assert error(found, plain) < 4e-3  # of pixels in 0 ... 1


def test_sparse_nodes_between_a_loops_times_are_refused(shapes: Any) -> None:
    with pytest.raises(ValueError, match="whose times lie between those of the pipeline's loop"):
        parallelize(shapes, collocation(target="ode"))

# SPDX-License-Identifier: Apache-2.0
"""Pipelines that follow a text, served: requests of many texts share network calls, and each has the sample of its own call."""

from __future__ import annotations

import dataclasses
import functools
import random
import re
import threading
import warnings
from typing import Any

import diffusers
import pytest
import torch
from served import FLAT, STEEP, rms
from tiny import CASES
from tiny.case import deprecations
from torch import Tensor

from paradiff.models import load_pipeline
from paradiff.serving import Engine, SampleRequest, ServedModel, Stepwise, served_pipeline
from paradiff.serving.text_pipeline import CLASSES, TextPipeline

# Of the scheduler of PixArt and Sana, in diffusers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

ROUNDING = 2e-5  # of float32 states, relative to their size, which a chain of 50 steps amplifies
PROMPTS = ["a red circle", "blue square", "a dog", ""]


def kind_of(pipeline: Any) -> TextPipeline:
    return CLASSES[type(pipeline).__name__]


def plain(pipeline: Any, request: SampleRequest, output: str = "latent") -> Tensor:
    """What the pipeline's own call gives for a request."""
    given: dict[str, Any] = {"prompt": request.prompt, **kind_of(pipeline).given(pipeline)}
    given |= {} if request.negative_prompt is None else {"negative_prompt": request.negative_prompt}
    given |= {} if request.guidance is None else {"guidance_scale": request.guidance}
    given |= {} if request.eta is None else {"eta": request.eta}
    given |= {} if request.steps is None else {"num_inference_steps": request.steps}
    generator = torch.Generator().manual_seed(request.seed)
    with deprecations():
        return torch.as_tensor(pipeline(**given, generator=generator, output_type=output).images[0])


def apart(one: Tensor, other: Tensor) -> float:
    """Root mean square difference, relative where states are large."""
    return rms(one, other) / max(1.0, float(other.square().mean().sqrt()))


def latents(pipeline: Any) -> ServedModel:
    """A pipeline as it is served, without its decoder."""
    return dataclasses.replace(served_pipeline(pipeline), decode=lambda x: kind_of(pipeline).latents(x[None])[0])


def mixed(pipeline: Any, count: int, methods: list[str]) -> list[SampleRequest]:
    """Requests of mixed texts, guidances, steps, seeds and methods."""
    choice, negative = random.Random(7), [None] if kind_of(pipeline).embeds else [None, "a red circle", "a cat"]
    return [
        SampleRequest(
            seed=100 + k,
            prompt=choice.choice(PROMPTS),
            negative_prompt=choice.choice(negative),
            guidance=choice.choice([None, 0.5, 1.0, 1.5, 4.0]),
            steps=50 if k % 20 == 9 else choice.choice([10, 10, 11, 13]),
            method=choice.choice(methods),
        )
        for k in range(count)
    ]


KINDS = ["sd", "sd3", "sdxl", "lcm", "flux", "pixart", "sana"]


def made(case: str) -> Any:
    """A tiny pipeline; of Flux one for small pictures."""
    found = CASES[case].make()
    if case == "flux":
        found.default_sample_size = 8
    return found


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


def test_mixed_requests_share_calls_and_each_has_the_sample_of_its_own_call(pipeline: Any) -> None:
    calls: list[tuple[int, int]] = []
    model, submitted = latents(pipeline), threading.Event()

    def counted(x: Tensor, t: Tensor, **rows: Tensor) -> Tensor:
        assert submitted.wait(60)
        calls.append((len(x), len(rows["guidance"].unique())))
        return model.denoiser(x, t, **rows)

    engine = Engine(dataclasses.replace(model, denoiser=counted), active=16, curve=STEEP, check=False)
    # How rows are mixed is one code for all kinds: more than the engine's places do for the others' conditions and schedulers.
    count = 40 if isinstance(pipeline, diffusers.StableDiffusionPipeline) else 20
    jobs = [engine.submit(request) for request in mixed(pipeline, count, ["auto", "sequential"])]
    submitted.set()
    assert engine.close(drain=120) == []
    assert max(guidances for _, guidances in calls) >= 4
    assert max(rows for rows, _ in calls) == 16
    for job in jobs:
        assert (job.state, job.finished is not None and job.finished.status.code) == ("done", "exact")
        assert job.finished is not None
        assert apart(job.finished.sample, plain(pipeline, job.request)) < ROUNDING


def test_windows_keep_to_their_tolerance_of_the_pipelines_own_call(pipeline: Any) -> None:
    engine = Engine(latents(pipeline), active=4, curve=FLAT)
    jobs = [engine.submit(request) for request in mixed(pipeline, 12, ["parasolver", "quasi_newton", "collocation"])]
    assert engine.close(drain=120) == []
    assert max(job.finished.widest for job in jobs if job.finished is not None) > 2
    for job in jobs:
        assert job.finished is not None, job.message
        found, own, estimate = job.finished.sample, plain(pipeline, job.request), job.finished.estimate.estimated_error
        assert estimate <= job.request.allowed or job.finished.status.code == "stopped"
        assert rms(found, own) < 2 * estimate or apart(found, own) < ROUNDING


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", None), ("ddim", 0.7), ("euler_ancestral", None), ("dpmpp_2m", None)])
def test_other_samplers_draw_as_the_pipeline_does_with_them(sampler: str, eta: float | None) -> None:
    pipeline = CASES["sd"].make()
    stepwise = Stepwise(latents(pipeline), 1)
    request = SampleRequest(seed=3, prompt="a dog", guidance=3.0, steps=20, sampler=sampler, eta=eta)
    with deprecations():
        state = stepwise.prepare(request)
    while not state.done:
        rows = stepwise.gather([state])
        stepwise.scheduler_step(rows, stepwise.denoise_step(rows))
    own = CASES["sd"].make()
    names = {"ddpm": "DDPM", "ddim": "DDIM", "euler_ancestral": "EulerAncestralDiscrete", "dpmpp_2m": "DPMSolverMultistep"}
    kind = getattr(diffusers, f"{names[sampler]}Scheduler")
    with deprecations():
        own.scheduler = kind.from_config(own.scheduler.config)
    expected = plain(own, request)
    assert apart(stepwise.decode(state).sample, expected) < ROUNDING


def test_a_request_is_the_picture_of_a_call_by_the_encoders_as_they_are_when_it_begins() -> None:
    pipeline = load_pipeline("shapes-flow")
    pipeline.set_progress_bar_config(disable=True)
    served = served_pipeline(pipeline)
    request = SampleRequest(seed=1, prompt="a red circle left of a blue square", guidance=4.0, steps=12)
    pictures = []
    for _ in range(2):
        engine = Engine(served, curve=STEEP)
        jobs = [engine.submit(dataclasses.replace(request, seed=seed)) for seed in (1, 2)]
        assert engine.close(drain=60) == []
        for job in jobs:
            assert job.finished is not None
            expected = 2 * plain(pipeline, job.request, "pt") - 1
            assert job.finished.sample.shape == expected.shape == (3, 32, 32)
            assert rms(job.finished.sample, expected) < 2e-4  # the decoder amplifies rounding
            pictures.append(expected)
        with torch.no_grad():
            for weight in pipeline.text_encoder.parameters():
                weight.mul_(1.5)
    assert rms(pictures[0], pictures[2]) > 1e-2


def test_a_pipeline_is_as_it_was_after_it_is_served() -> None:
    pipeline = CASES["sd"].make()
    pipeline.scheduler.set_timesteps(7)
    before = plain(pipeline, SampleRequest(prompt="a dog", steps=5))
    times, bars = pipeline.scheduler.timesteps.clone(), dict(pipeline._progress_bar_config)
    scheduler = pipeline.scheduler
    engine = Engine(served_pipeline(pipeline, sampler="ddpm", steps=3), curve=STEEP)
    engine.submit(SampleRequest(prompt="a cat"))
    engine.close(drain=60)
    assert pipeline.scheduler is scheduler
    assert torch.equal(pipeline.scheduler.timesteps, times)
    assert pipeline._progress_bar_config == bars
    assert torch.equal(plain(pipeline, SampleRequest(prompt="a dog", steps=5)), before)


@pytest.mark.parametrize("pipeline", ["sd", "sd3"], indirect=True)
def test_a_cancelled_and_a_late_request_leave_the_others_their_samples(pipeline: Any) -> None:
    engine = Engine(latents(pipeline), active=4, curve=STEEP, check=False)
    long = SampleRequest(prompt="a dog", steps=900, method="sequential")
    late = engine.submit(dataclasses.replace(long, deadline=1e-3))
    cancelled = engine.submit(long)
    jobs = [engine.submit(SampleRequest(prompt=text, steps=10, seed=4)) for text in PROMPTS]
    assert engine.cancel(cancelled.id)
    assert engine.close(drain=120) == []
    assert (late.state, cancelled.state) == ("late", "cancelled")
    for job in jobs:
        assert job.finished is not None
        assert apart(job.finished.sample, plain(pipeline, job.request)) < ROUNDING


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "the request has no prompt; give one"),
        ({"prompt": ["a", "b"]}, "the prompt is ['a', 'b']; give one text"),
        ({"prompt": "a", "negative_prompt": 3}, "the negative_prompt is 3; give one text"),
        ({"prompt": "a", "guidance": -1}, "the guidance is -1; it must be a number, 0 or more"),
        ({"prompt": "a", "conditioning": {"text": 0}}, "conditioning was given, but the model takes a prompt"),
        ({"prompt": "a", "steps": 1001}, "1001 steps were asked for, but the DDIMScheduler has 1000 times"),
        ({"prompt": "a", "sampler": "eular"}, "did you mean 'euler'"),
        ({"prompt": "a", "sampler": "euler", "eta": 0.5}, "eta is 0.5, but the EulerDiscreteScheduler has no eta"),
    ],
)
def test_a_request_that_does_not_fit_the_pipeline_is_refused_by_a_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Stepwise(SERVED, 1).method(SampleRequest.of_json(given))


SERVED = served_pipeline(CASES["sd"].make())


def test_a_text_for_a_model_without_one_is_refused() -> None:
    with pytest.raises(ValueError, match="the guidance was given, but the model follows no text; leave it out"):
        dataclasses.replace(SERVED, encode=None).given_rows(SampleRequest(guidance=2.0))


def test_a_class_whose_call_does_more_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a QwenImagePipeline is not served.*StableDiffusionPipeline, .*SanaPipeline"):
        served_pipeline(CASES["qwen"].make())


@pytest.mark.parametrize("case", KINDS)
def test_a_pipeline_whose_call_does_something_else_is_refused(case: str) -> None:
    own = made(case)

    kind = type(own)

    @functools.wraps(kind.__call__)
    def call(self: Any, **given: Any) -> Any:
        return kind.__call__(self, **{**given, "guidance_scale": 1.1 * given["guidance_scale"]})

    name = kind.__name__
    own.__class__ = type(name, (kind,), {"__call__": call})
    with pytest.raises(ValueError, match=f"the {name} is not served: its own call makes another sample than its rows do"):
        served_pipeline(own)


@pytest.mark.parametrize(
    ("case", "given", "sentence"),
    [
        ("lcm", {"negative_prompt": "b"}, "the negative_prompt was given, but the model has no use for it; leave it out"),
        ("flux", {"negative_prompt": "b"}, "the negative_prompt was given, but the model has no use for it; leave it out"),
        ("lcm", {"sampler": "ddim"}, "sampler 'ddim' does not fit the LCMScheduler of the LatentConsistencyModelPipeline"),
    ],
)
def test_what_a_class_has_no_use_for_is_refused(case: str, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Stepwise(served_pipeline(made(case)), 1).method(SampleRequest(prompt="a", **given))


@pytest.mark.parametrize("kind", ["upcast", "mean"])
def test_pictures_of_sdxl_are_decoded_as_its_call_decodes_them(kind: str) -> None:
    """At the start they are compared with a picture of its own call."""
    own = made("sdxl")
    count = own.vae.config.latent_channels
    if kind == "upcast":
        own.to(dtype=torch.float16)
        own.vae.register_to_config(force_upcast=True)
    else:
        own.vae.register_to_config(latents_mean=[0.5] * count, latents_std=[0.7] * count)
    with deprecations(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`upcast_vae` is deprecated", FutureWarning)  # which its own call calls
        assert isinstance(served_pipeline(own), ServedModel)
    assert own.vae.dtype == (torch.float16 if kind == "upcast" else torch.float32)


def test_the_classes_that_are_served_are_those_of_diffusers() -> None:
    assert all(isinstance(getattr(diffusers, name), type) for name in CLASSES)

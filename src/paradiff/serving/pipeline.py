# SPDX-License-Identifier: Apache-2.0
"""Pipelines that follow a text, as an engine serves them: steps of one request take their place beside those of others.

A pipeline's own call does for one request

    e, e' = encode(prompt, negative prompt)                                      once
    m = n(x, t, e') + g (n(x, t, e) - n(x, t, e')),  g > 1;  n(x, t, e) else     each step
    picture = decode(x)                                                          once

with the guidance g. `served_pipeline` gives every request rows of e, e' and g (`ServedModel.encode`), so that one call of n
takes the rows of requests with other texts, guidances, seeds and steps: 2 for a state with g > 1, and 1 otherwise. Networks
that are given g itself, m = n(x, t, e, g), have one row. What encodes, what n is given, and what decodes are the
pipeline's own functions; the chain is read off its scheduler.

Classes whose calls do more than that are not served. Of those that are, a short call of the pipeline itself is compared at the
start with the same request by rows.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.table import Table
from paradiff.methods.presets import sequential
from paradiff.models.pipeline import scheduler_named
from paradiff.samplers.scheduler.probe import from_scheduler
from paradiff.serving.model import TEXTS, ServedModel
from paradiff.serving.request import SampleRequest
from paradiff.serving.text_pipeline import CLASSES, TextPipeline, default_of
from paradiff.solver.arguments import require_rows
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.loop import sample
from paradiff.solver.rounding import difference, limit_of

CHECKED = SampleRequest(prompt="a", negative_prompt="b", steps=2)
"""The request whose sample is compared at the start, with the pipeline's own guidance and with none."""

ROUNDINGS = 4.0
"""Most that the two may differ by, beside what rounding explains of one network call (solver/rounding.py)."""


def refuse_class(name: str) -> None:
    """Refuses a class of pipelines that is not served.

    Raises:
        ValueError: With those that are.
    """
    if name not in CLASSES:
        raise ValueError(
            f"a {name} is not served, whose call may do more than encode a text, walk and decode; served are unconditional "
            f"pixel models, {', '.join(CLASSES)}: call this one by paradiff sample, or from Python"
        )


def served_pipeline(
    pipeline: Any,
    *,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    max_rows: int | None = None,
) -> ServedModel:
    """A pipeline as an engine serves it.

    The sample of a request is the picture `[C, H, W]`, -1 to 1, of the pipeline's own call with its prompt, negative prompt,
    guidance, steps and `torch.Generator().manual_seed(seed)`; tolerances and estimated errors are of the states before they are
    decoded.

    Args:
        pipeline: The pipeline, of one of `CLASSES`. It is not changed.
        sampler: The sampler of requests that name none, `ddim` say, or a scheduler class of diffusers; None for the pipeline's
            own.
        steps: Steps of requests that name none; None for the pipeline's own number.
        eta: Share of the DDPM noise that `ddim` adds, of requests that name none; None for 0.
        max_rows: Most rows of one network call, of which a state with guidance has two; None for no bound.

    Raises:
        ValueError: If the class is not served, the pipeline's call does more than its class's does, or an option does not fit.

    Example:
        >>> engine = Engine(served_pipeline(load_pipeline("shapes")))  # doctest: +SKIP
        >>> job = engine.submit(SampleRequest(prompt="a red circle", guidance=4.0, steps=50, seed=3))  # doctest: +SKIP
    """
    require_rows(max_rows)
    refuse_class(type(pipeline).__name__)
    kind = CLASSES[type(pipeline).__name__]
    network = getattr(pipeline, kind.network)
    if not kind.embeds and getattr(network.config, "time_cond_proj_dim", None) is not None:
        raise ValueError(
            f"the network of this {type(pipeline).__name__} is given the guidance itself, which is not served; call it by "
            "paradiff sample"
        )
    own = SampleRequest(
        sampler=sampler,
        steps=default_of(pipeline, "num_inference_steps") if steps is None else steps,
        eta=eta,
        guidance=default_of(pipeline, "guidance_scale"),
    )
    chains = _Chains(pipeline, kind, own)

    def encode(request: SampleRequest) -> dict[str, Tensor]:
        assert request.prompt is not None
        guidance = own.guidance if request.guidance is None else request.guidance
        assert guidance is not None
        guided = guidance > 1
        with torch.no_grad():
            text, other = kind.encode(pipeline, request.prompt, request.negative_prompt if guided else None, guidance)
        found = {name: row[0] for name, row in text.items()}
        if not kind.embeds:
            found |= {f"negative_{name}": other[name][0] if guided else torch.zeros_like(row) for name, row in found.items()}
            found["guidance"] = torch.tensor(float(guidance) if guided else 1.0, device=pipeline.device)
        return found

    def evaluate(x: Tensor, t: Tensor, **given: Tensor) -> Tensor:
        """m of states `[R, C, h, w]`, of a network that is given the guidance."""
        return kind.call(network, x, t, given)

    def evaluate_guided(x: Tensor, t: Tensor, guidance: Tensor, **given: Tensor) -> Tensor:
        """m of states `[R, C, h, w]`. It waits for the device once, for which rows have a guidance."""
        rows = {name: row for name, row in given.items() if not name.startswith("negative_")}
        at = (guidance > 1).nonzero()[:, 0]
        if not len(at):
            return kind.call(network, x, t, rows)
        both = {name: torch.cat([row, given[f"negative_{name}"][at]]) for name, row in rows.items()}
        m = kind.call(network, torch.cat([x, x[at]]), torch.cat([t, t[at]]), both)
        m, other = m[: len(x)], m[len(x) :]
        scale = guidance[at].view(-1, *[1] * (x.ndim - 1)).to(m.dtype)
        return m.index_copy(0, at, other + scale * (m[at] - other))

    model = ServedModel(
        denoiser=evaluate if kind.embeds else evaluate_guided,
        shape=kind.size(pipeline, network),
        chain=chains.of,
        decode=lambda x: _decoded(pipeline, x),
        conditioning=encode(SampleRequest(prompt="")),
        encode=encode,
        texts=TEXTS if not kind.embeds else _heeded(network),
        drawn_on="cpu",
        max_rows=max_rows if max_rows is None or kind.embeds else max(1, max_rows // 2),
        device=pipeline.device,
        dtype=network.dtype,
    )
    for decoded in (False, True):
        _check(pipeline, chains, model, decoded=decoded)
    return model


def _heeded(network: Any) -> Sequence[str]:
    """Fields of a request's text that a network heeds which is given the guidance, if it is."""
    return ("prompt", "guidance") if getattr(network.config, "guidance_embeds", True) else ("prompt",)


@dataclass(frozen=True)
class _Chains:
    """The chains of a pipeline's requests.

    Attributes:
        pipeline: The pipeline.
        kind: What its class does.
        own: What requests have that name nothing else.
    """

    pipeline: Any
    kind: TextPipeline
    own: SampleRequest

    def scheduler(self, request: SampleRequest) -> Any:
        """The scheduler of a request, which is nobody else's.

        Raises:
            ValueError: If there is none of its name, or it does not fit the pipeline.
        """
        name = self.own.sampler if request.sampler is None else request.sampler
        return copy.deepcopy(self.pipeline.scheduler) if name is None else scheduler_named(self.pipeline, name)

    def of(self, request: SampleRequest) -> Table:
        """The chain of a request.

        Raises:
            ValueError: If the scheduler has none.
        """
        steps = self.own.steps if request.steps is None else request.steps
        eta = self.own.eta if request.eta is None else request.eta
        assert steps is not None
        scheduler = self.scheduler(request)
        kind = type(scheduler).__name__
        takes_eta = "eta" in inspect.signature(scheduler.step).parameters
        if eta and not takes_eta:
            raise ValueError(f"eta is {eta:g}, but the {kind} has no eta; give it with sampler 'ddim'")
        most = getattr(scheduler.config, "num_train_timesteps", None)
        if most is not None and steps > most:
            raise ValueError(f"{steps} steps were asked for, but the {kind} has {most} times; give at most so many")
        try:
            scheduler.set_timesteps(**self.kind.times(self.pipeline, steps))
        except (ValueError, TypeError) as error:
            raise ValueError(f"the {kind} has no chain of {steps} steps: {' '.join(str(error).split())}") from error
        options: dict[str, Any] = {"eta": eta or 0.0} if takes_eta else {}
        return from_scheduler(scheduler, **options)


@torch.no_grad()
def _decoded(pipeline: Any, x: Tensor) -> Tensor:
    """The picture of a state `[C, h, w]`, as the pipeline's own decoder and checker give it, `[C, H, W]` from -1 to 1."""
    vae, config = pipeline.vae, pipeline.vae.config
    raised = hasattr(pipeline, "upcast_vae") and vae.dtype == torch.float16 and config.force_upcast
    if raised:
        vae.to(torch.float32)
    latents = x[None].to(vae.device, vae.dtype) / config.scaling_factor
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if hasattr(pipeline, "upcast_vae") and mean is not None and std is not None:
        latents = latents * latents.new_tensor(std).view(1, -1, 1, 1) + latents.new_tensor(mean).view(1, -1, 1, 1)
    else:
        latents = latents + (getattr(config, "shift_factor", None) or 0.0)
    try:
        picture, plain = vae.decode(latents, return_dict=False)[0], [True]
    finally:
        if raised:
            vae.to(torch.float16)
    if getattr(pipeline, "watermark", None) is not None:
        picture = pipeline.watermark.apply_watermark(picture)
    if getattr(pipeline, "safety_checker", None) is not None:
        picture, flagged = pipeline.run_safety_checker(picture, pipeline.device, picture.dtype)
        plain = [not one for one in flagged]
    return 2 * pipeline.image_processor.postprocess(picture, output_type="pt", do_denormalize=plain)[0].float() - 1


@torch.no_grad()
def _check(pipeline: Any, chains: _Chains, model: ServedModel, *, decoded: bool) -> None:
    """Compares a short call of the pipeline with the same request by rows: its state with guidance, its picture without.

    Raises:
        ValueError: If they differ by more than rounding, or the call fails.
    """
    given = {**CHECKED.to_json(), "guidance": 1.0 if decoded else max(2.0, chains.own.guidance or 0.0)}
    asked = SampleRequest(**{name: value for name, value in given.items() if name not in {*TEXTS} - {*model.texts}})
    rows = {name: row[None] for name, row in model.rows_of(asked).items()}
    evaluator, table = Evaluator(model.denoiser, conditioning=rows, device=model.device, dtype=model.dtype), model.chain(asked)
    noise = model.noise(asked, evaluator.device, table)
    own = sample(evaluator, table, noise, sequential(), check="off").sample[0]
    plain = copy.copy(pipeline)
    plain.scheduler = chains.scheduler(asked)
    plain.set_progress_bar_config(disable=True)
    texts = {"prompt": asked.prompt, "negative_prompt": asked.negative_prompt, "guidance_scale": asked.guidance}
    found = plain(
        **{name: value for name, value in texts.items() if value is not None},
        num_inference_steps=asked.steps,
        generator=torch.Generator().manual_seed(asked.seed),
        output_type="pt" if decoded else "latent",
        **chains.kind.given(plain),
        **{"eta": chains.own.eta} if chains.own.eta else {},
    ).images[0]
    apart = difference((model.decode(own) + 1) / 2 if decoded else chains.kind.latents(own[None])[0], found)
    if not apart <= ROUNDINGS * limit_of(model.dtype or torch.float32, evaluator.device):
        raise ValueError(
            f"the {type(pipeline).__name__} is not served: its own call makes another sample than its rows do (relative "
            f"difference {apart:.2g}), so that it does more than encode, walk and decode; call it by paradiff sample"
        )

# SPDX-License-Identifier: Apache-2.0
"""The classes of pipelines that are served (pipeline.py): how each encodes a text, and what its network is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

Rows = Mapping[str, Tensor]


def _no_options(pipeline: Any, steps: int) -> dict[str, Any]:
    return {"num_inference_steps": steps}


def _size(pipeline: Any, network: Any) -> tuple[int, int, int]:
    """`[C, h, w]` of the states, of the network's own size."""
    size = getattr(pipeline, "default_sample_size", None) or network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return network.config.in_channels, height, width


def _as_it_is(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class TextPipeline:
    """What one class of pipelines does.

    Attributes:
        network: The name of its network n.
        encode: e and e' of a prompt, a negative prompt and a guidance, `[1, ...]` by name; e' is empty where the guidance is 1
            or less, or part of e.
        call: n of states and times `[R, ...]` and rows of e.
        embeds: Whether n is given the guidance, and has one row for a state.
        size: `[C, h, w]` of the states.
        times: Arguments of the scheduler's `set_timesteps` for a number of steps.
        latents: What the call returns of states `[1, C, h, w]` that are not decoded.
        given: Names of arguments of the call, and their values, with which it makes pictures of the network's own size.
    """

    network: str
    encode: Callable[[Any, str, str | None, float], tuple[Rows, Rows]]
    call: Callable[[Any, Tensor, Tensor, Rows], Tensor]
    embeds: bool = False
    size: Callable[[Any, Any], tuple[int, int, int]] = _size
    times: Callable[[Any, int], dict[str, Any]] = _no_options
    latents: Callable[[Tensor], Tensor] = _as_it_is
    given: Callable[[Any], dict[str, Any]] = lambda pipeline: {}


def default_of(pipeline: Any, name: str) -> Any:
    """The value that an argument of the pipeline's call has by default."""
    return inspect.signature(pipeline.__call__).parameters[name].default


def _encode_one(pipeline: Any, prompt: str, negative: str | None, guidance: float) -> tuple[Rows, Rows]:
    text, other = pipeline.encode_prompt(prompt, pipeline.device, 1, guidance > 1, negative)
    return {"text": text}, {"text": other} if guidance > 1 else {}


def _encode_pooled(pipeline: Any, prompt: str, negative: str | None, guidance: float, **further: Any) -> tuple[Rows, Rows]:
    text, other, pooled, other_pooled = pipeline.encode_prompt(
        prompt=prompt,
        prompt_2=None,
        negative_prompt=negative,
        do_classifier_free_guidance=guidance > 1,
        device=pipeline.device,
        **further,
    )
    return {"text": text, "pooled": pooled}, {"text": other, "pooled": other_pooled} if guidance > 1 else {}


def _encode_with_sizes(pipeline: Any, prompt: str, negative: str | None, guidance: float) -> tuple[Rows, Rows]:
    """Of SDXL, whose network is given the picture's size, too."""
    text, other = _encode_pooled(pipeline, prompt, negative, guidance)
    _, height, width = _size(pipeline, pipeline.unet)
    picture = (height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor)
    encoder = pipeline.text_encoder_2
    width_of_text = int(text["pooled"].shape[-1]) if encoder is None else encoder.config.projection_dim
    sizes = pipeline._get_add_time_ids(
        picture, (0, 0), picture, dtype=text["text"].dtype, text_encoder_projection_dim=width_of_text
    ).to(pipeline.device)
    return {**text, "sizes": sizes}, {**other, "sizes": sizes} if guidance > 1 else {}


def _encode_masked(pipeline: Any, prompt: str, negative: str | None, guidance: float) -> tuple[Rows, Rows]:
    """Of PixArt and Sana, whose networks are given which tokens there are."""
    instruction = {
        name: default_of(pipeline, name)
        for name in ("clean_caption", "complex_human_instruction")
        if name in inspect.signature(pipeline.encode_prompt).parameters
    }
    text, mask, other, other_mask = pipeline.encode_prompt(
        prompt, guidance > 1, negative_prompt=negative or "", device=pipeline.device, **instruction
    )
    return {"text": text, "mask": mask}, {"text": other, "mask": other_mask} if guidance > 1 else {}


def _encode_flux(pipeline: Any, prompt: str, negative: str | None, guidance: float) -> tuple[Rows, Rows]:
    text, pooled, _ = pipeline.encode_prompt(prompt=prompt, prompt_2=None, device=pipeline.device)
    rows = {"text": text, "pooled": pooled}
    if pipeline.transformer.config.guidance_embeds:
        rows["guidance"] = torch.full([1], guidance, device=pipeline.device, dtype=torch.float32)
    return rows, {}


def _encode_embedded(pipeline: Any, prompt: str, negative: str | None, guidance: float) -> tuple[Rows, Rows]:
    """Of latent consistency models."""
    text, _ = pipeline.encode_prompt(prompt, pipeline.device, 1, False)
    size = pipeline.unet.config.time_cond_proj_dim
    embedded = pipeline.get_guidance_scale_embedding(torch.tensor([guidance - 1.0]), embedding_dim=size)
    return {"text": text, "guidance": embedded.to(text)}, {}


def _unet(network: Any, x: Tensor, t: Tensor, rows: Rows) -> Tensor:
    return network(x, t, encoder_hidden_states=rows["text"], return_dict=False)[0]


def _unet_with_sizes(network: Any, x: Tensor, t: Tensor, rows: Rows) -> Tensor:
    added = {"text_embeds": rows["pooled"], "time_ids": rows["sizes"]}
    return network(x, t, encoder_hidden_states=rows["text"], added_cond_kwargs=added, return_dict=False)[0]


def _unet_with_guidance(network: Any, x: Tensor, t: Tensor, rows: Rows) -> Tensor:
    return network(x, t, timestep_cond=rows["guidance"], encoder_hidden_states=rows["text"], return_dict=False)[0]


def _transformer(network: Any, x: Tensor, t: Tensor, rows: Rows) -> Tensor:
    return network(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=rows["text"],
        pooled_projections=rows["pooled"],
        return_dict=False,
    )[0]


def _masked_transformer(network: Any, x: Tensor, t: Tensor, rows: Rows, **further: Any) -> Tensor:
    """Of PixArt and Sana; where the network tells a variance, too, that is left out."""
    m = network(
        x,
        encoder_hidden_states=rows["text"],
        encoder_attention_mask=rows["mask"],
        timestep=t,
        return_dict=False,
        **further,
    )[0]
    return m.chunk(2, dim=1)[0] if network.config.out_channels // 2 == x.shape[1] else m


def _pixart(network: Any, x: Tensor, t: Tensor, rows: Rows) -> Tensor:
    return _masked_transformer(network, x, t, rows, added_cond_kwargs={"resolution": None, "aspect_ratio": None})


def _sana(network: Any, x: Tensor, t: Tensor, rows: Rows) -> Tensor:
    return _masked_transformer(network, x, t * network.config.timestep_scale, rows)


def _packed(x: Tensor) -> Tensor:
    """States `[R, C, h, w]` as Flux has them, patches of two by two `[R, h w / 4, 4 C]`."""
    return pixel_unshuffle(x, 2).flatten(2).mT


def _flux(network: Any, x: Tensor, t: Tensor, rows: Rows) -> Tensor:
    places = [torch.arange(size // 2, device=x.device, dtype=x.dtype) for size in x.shape[2:]]
    m = network(
        hidden_states=_packed(x),
        timestep=t.to(x.dtype) / 1000,  # rounded as the call rounds it
        guidance=rows.get("guidance"),
        pooled_projections=rows["pooled"],
        encoder_hidden_states=rows["text"],
        txt_ids=torch.zeros(rows["text"].shape[1], 3, device=x.device, dtype=x.dtype),
        img_ids=torch.cartesian_prod(x.new_zeros(1), *places),
        return_dict=False,
    )[0]
    return pixel_shuffle(m.mT.unflatten(2, [len(place) for place in places]), 2)


def _flux_size(pipeline: Any, network: Any) -> tuple[int, int, int]:
    side = 2 * (pipeline.default_sample_size // 2)
    return network.config.in_channels // 4, side, side


def _flux_times(pipeline: Any, steps: int) -> dict[str, Any]:
    """The noise levels of Flux, moved by the number of its patches."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config, (_, height, width) = pipeline.scheduler.config, _flux_size(pipeline, pipeline.transformer)
    shift = calculate_shift(
        height * width // 4,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": shift}


def _without_bins(pipeline: Any) -> dict[str, Any]:
    """Pictures of the network's own size, which is in the bins of published networks."""
    _, height, width = _size(pipeline, pipeline.transformer)
    factor = pipeline.vae_scale_factor
    return {"use_resolution_binning": False, "height": height * factor, "width": width * factor}


CLASSES = {
    "StableDiffusionPipeline": TextPipeline(network="unet", encode=_encode_one, call=_unet),
    "StableDiffusionXLPipeline": TextPipeline(network="unet", encode=_encode_with_sizes, call=_unet_with_sizes),
    "StableDiffusion3Pipeline": TextPipeline(
        network="transformer", encode=partial(_encode_pooled, prompt_3=None), call=_transformer
    ),
    "LatentConsistencyModelPipeline": TextPipeline(
        network="unet", encode=_encode_embedded, call=_unet_with_guidance, embeds=True
    ),
    "FluxPipeline": TextPipeline(
        network="transformer",
        encode=_encode_flux,
        call=_flux,
        embeds=True,
        size=_flux_size,
        times=_flux_times,
        latents=_packed,
    ),
    "PixArtSigmaPipeline": TextPipeline(network="transformer", encode=_encode_masked, call=_pixart, given=_without_bins),
    "SanaPipeline": TextPipeline(network="transformer", encode=_encode_masked, call=_sana, given=_without_bins),
}
"""The classes that are served, by name; classes derived from them have calls of their own, and are not."""

# SPDX-License-Identifier: Apache-2.0
"""Pipelines without text: DDPM, DDIM and DiT."""

from __future__ import annotations

from typing import Any

import diffusers

from tiny.case import Case, assemble, calling
from tiny.encoders import autoencoder

# An image is clamped to [0, 1]. With a schedule that ends at this noise, a random network's images are still inside.
SHORT: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 2e-3}


def unet() -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def ddpm(**options: Any) -> Any:
    return assemble(
        diffusers.DDPMPipeline, gains={"unet": 0.6}, unet=unet(), scheduler=diffusers.DDPMScheduler(**SHORT, **options)
    )


def ddim(**options: Any) -> Any:
    return assemble(
        diffusers.DDIMPipeline, gains={"unet": 0.6}, unet=unet(), scheduler=diffusers.DDIMScheduler(**SHORT, **options)
    )


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    scheduler = diffusers.DDIMScheduler(**SHORT, clip_sample=False)
    return assemble(
        diffusers.DiTPipeline, gains={"transformer": 0.5}, transformer=transformer, vae=autoencoder(), scheduler=scheduler
    )


pixels = calling(batch_size=2, num_inference_steps=10, output_type="np")

CASES = [
    Case("ddpm", lambda: ddpm(clip_sample=False), pixels),
    Case("ddpm_clip", lambda: ddpm(clip_sample=True), pixels),
    Case("ddpm_threshold", lambda: ddpm(clip_sample=False, thresholding=True), pixels),
    Case("ddim", lambda: ddim(clip_sample=False), pixels),
    Case("ddim_clip", lambda: ddim(clip_sample=True), pixels),
    Case(
        "ddim_eta1", lambda: ddim(clip_sample=False), calling(batch_size=2, num_inference_steps=10, eta=1.0, output_type="np")
    ),
    Case(
        "dit",
        dit,
        calling(class_labels=[1, 7], guidance_scale=2.0, num_inference_steps=10, output_type="np"),
        other={"class_labels": [3, 4]},
    ),
]

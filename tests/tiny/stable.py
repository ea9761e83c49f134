# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion, its schedulers, and what is built upon its network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers

from tiny.case import Case, assemble, calling, noise, quiet
from tiny.encoders import autoencoder, clip, tokenizer

PROMPT = ["a cat", "a red dog"]
OTHER: dict[str, Any] = {"prompt": ["a tree", "two houses"]}
TEXT: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "latent"}
IMAGE = noise(2, 3, 16, 16, seed=1).sigmoid()
MASK = (noise(2, 1, 16, 16, seed=2) > 0).float()
TRAINING: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim_scheduler() -> Any:
    """As Stable Diffusion is published."""
    return diffusers.DDIMScheduler(**TRAINING, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


# The published scheduler's successors, each with the number of steps it makes of ten.
SCHEDULERS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "euler": (diffusers.EulerDiscreteScheduler.from_config, 10),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler.from_config, 10),
    "ddpm": (lambda config: diffusers.DDPMScheduler.from_config(config, clip_sample=False), 10),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler.from_config, 10),
    "dpmpp_2m_karras": (lambda config: diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=True), 10),
    "sde_dpmpp_2m": (
        lambda config: diffusers.DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++"),
        10,
    ),
    "unipc": (diffusers.UniPCMultistepScheduler.from_config, 10),
    "deis": (diffusers.DEISMultistepScheduler.from_config, 10),
    "pndm": (lambda config: diffusers.PNDMScheduler.from_config(config, skip_prk_steps=True), 11),
    "heun": (diffusers.HeunDiscreteScheduler.from_config, 19),
    "lms": (diffusers.LMSDiscreteScheduler.from_config, 10),
}


def with_scheduler(pipe: Any, name: str) -> Any:
    """The same pipeline with one of `SCHEDULERS`, made of its scheduler's configuration."""
    with quiet():
        pipe.scheduler = SCHEDULERS[name][0](pipe.scheduler.config)
    return pipe


def unet(**options: Any) -> diffusers.UNet2DConditionModel:
    """Two resolutions, attention to text at the lower one and in the middle."""
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (4, 8),
            "norm_num_groups": 2,
            "attention_head_dim": 2,
            "cross_attention_dim": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        | options
    )


def stable(kind: Any = diffusers.StableDiffusionPipeline, scheduler: Any = None, **components: Any) -> Any:
    """A pipeline that has Stable Diffusion's components."""
    return assemble(
        kind,
        **{
            "unet": unet(),
            "vae": autoencoder(),
            "text_encoder": clip(),
            "tokenizer": tokenizer(),
            "scheduler": scheduler or ddim_scheduler(),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        | components,
    )


def controlnet() -> Any:
    network = diffusers.ControlNetModel(
        in_channels=4,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(2, 4),
    )
    return stable(diffusers.StableDiffusionControlNetPipeline, controlnet=network)


def latent_consistency() -> Any:
    scheduler = diffusers.LCMScheduler(**TRAINING, clip_sample=False, set_alpha_to_one=False)
    return stable(diffusers.LatentConsistencyModelPipeline, scheduler, unet=unet(time_cond_proj_dim=8))


def text_case(name: str, make: Callable[[], Any], steps: int = 10, **arguments: Any) -> Case:
    return Case(name, make, calling(**(TEXT | arguments)), steps, OTHER)


INPAINT: dict[str, Any] = {"image": IMAGE, "mask_image": MASK, "height": 16, "width": 16}

CASES = [
    text_case("sd", stable),
    *(
        text_case(f"sd_{name}", lambda name=name: with_scheduler(stable(), name), steps)
        for name, (_, steps) in SCHEDULERS.items()
    ),
    text_case("sd_ddim_eta1", stable, eta=1.0),
    text_case("sd_unguided", stable, guidance_scale=1.0),
    text_case("sd_rescale", stable, guidance_rescale=0.7),
    text_case("sd_img2img", lambda: stable(diffusers.StableDiffusionImg2ImgPipeline), 9, image=IMAGE, strength=0.9),
    text_case("sd_inpaint4", lambda: stable(diffusers.StableDiffusionInpaintPipeline), **INPAINT),
    text_case("sd_inpaint9", lambda: stable(diffusers.StableDiffusionInpaintPipeline, unet=unet(in_channels=9)), **INPAINT),
    text_case("sd_controlnet", controlnet, image=IMAGE),
    text_case("sd_controlnet_half", controlnet, image=IMAGE, control_guidance_end=0.5),
    text_case("sd_pag", lambda: stable(diffusers.StableDiffusionPAGPipeline), pag_scale=2.0),
    text_case("lcm", latent_consistency),
]

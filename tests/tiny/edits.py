# SPDX-License-Identifier: Apache-2.0
"""What is built upon Stable Diffusion's and SDXL's networks: editing, inpainting, control, upscaling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers

from tiny.case import Case, assemble, calling, noise
from tiny.encoders import autoencoder
from tiny.stable import IMAGE, MASK, TRAINING, ddim_scheduler, stable, unet

EMBEDDED: dict[str, Any] = {
    "prompt_embeds": noise(2, 6, 8, seed=3),
    "negative_prompt_embeds": noise(2, 6, 8, seed=4),
    "num_inference_steps": 8,
    "guidance_scale": 3.0,
    "output_type": "latent",
}
XL_EMBEDDED: dict[str, Any] = EMBEDDED | {
    "prompt_embeds": noise(2, 6, 16, seed=3),
    "negative_prompt_embeds": noise(2, 6, 16, seed=4),
    "pooled_prompt_embeds": noise(2, 8, seed=5),
    "negative_pooled_prompt_embeds": noise(2, 8, seed=6),
}
CONTROL = noise(2, 3, 16, 16, seed=7).sigmoid()
NO_TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}


def xl_unet(**options: Any) -> diffusers.UNet2DConditionModel:
    return unet(
        **{
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "transformer_layers_per_block": (1, 1),
            "projection_class_embeddings_input_dim": 8 + 6 * 4,
            "cross_attention_dim": 16,
            "use_linear_projection": True,
        }
        | options
    )


def xl(kind: Any, **components: Any) -> Any:
    return assemble(
        kind,
        **{
            "unet": xl_unet(),
            "vae": autoencoder(),
            "text_encoder": None,
            "text_encoder_2": None,
            "tokenizer": None,
            "tokenizer_2": None,
            "scheduler": ddim_scheduler(),
        }
        | components,
    )


def edit(kind: Any, **components: Any) -> Any:
    return stable(kind, **NO_TEXT, **components)


def control(**options: Any) -> Any:
    return diffusers.ControlNetModel(
        **{
            "in_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (4, 8),
            "norm_num_groups": 2,
            "attention_head_dim": 2,
            "cross_attention_dim": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "conditioning_embedding_out_channels": (2, 4),
        }
        | options
    )


def xl_control() -> Any:
    return control(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=8 + 6 * 4,
        cross_attention_dim=16,
        use_linear_projection=True,
    )


def upscale() -> Any:
    return assemble(
        diffusers.StableDiffusionUpscalePipeline,
        unet=unet(in_channels=7, num_class_embeds=100),
        vae=autoencoder(scaling_factor=0.08333),
        **NO_TEXT,
        low_res_scheduler=diffusers.DDPMScheduler(),
        scheduler=ddim_scheduler(),
        max_noise_level=50,
    )


def depth() -> Any:
    return assemble(
        diffusers.StableDiffusionDepth2ImgPipeline,
        unet=unet(in_channels=5),
        vae=autoencoder(),
        **NO_TEXT,
        depth_estimator=None,
        feature_extractor=None,
        scheduler=ddim_scheduler(),
    )


def adapter() -> Any:
    return diffusers.T2IAdapter(
        in_channels=3, channels=[4, 8], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    )


ADAPTED = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}


def case(name: str, make: Callable[[], Any], steps: int = 8, **arguments: Any) -> Case:
    return Case(name, make, calling(**(EMBEDDED | arguments)), steps)


def xl_case(name: str, make: Callable[[], Any], steps: int = 8, **arguments: Any) -> Case:
    return Case(name, make, calling(**(XL_EMBEDDED | arguments)), steps)


D = diffusers
CASES = [
    case("sd_sag", lambda: edit(D.StableDiffusionSAGPipeline)),
    case("sd_pix2pix", lambda: edit(D.StableDiffusionInstructPix2PixPipeline, unet=unet(in_channels=8)), image=IMAGE),
    case("sd_upscale", upscale, image=noise(2, 3, 8, 8, seed=1).sigmoid()),
    case("sd_depth", depth, 7, image=IMAGE, strength=0.9, depth_map=noise(2, 16, 16, seed=8)),
    case("sd_ldm3d", lambda: edit(D.StableDiffusionLDM3DPipeline, image_encoder=None), output_type="np"),
    case("sd_adapter", lambda: edit(D.StableDiffusionAdapterPipeline, adapter=adapter(), unet=unet(**ADAPTED)), image=CONTROL),
    case("sd_pag_img2img", lambda: edit(D.StableDiffusionPAGImg2ImgPipeline), 7, image=IMAGE, strength=0.9),
    case(
        "sd_pag_inpaint",
        lambda: edit(D.StableDiffusionPAGInpaintPipeline),
        7,
        image=IMAGE,
        mask_image=MASK,
        height=16,
        width=16,
    ),
    case(
        "sd_controlnet_img2img",
        lambda: edit(D.StableDiffusionControlNetImg2ImgPipeline, controlnet=control()),
        7,
        image=IMAGE,
        control_image=CONTROL,
        strength=0.9,
    ),
    case("sd_controlnet_pag", lambda: edit(D.StableDiffusionControlNetPAGPipeline, controlnet=control()), image=CONTROL),
    case(
        "lcm_img2img",
        lambda: edit(
            D.LatentConsistencyModelImg2ImgPipeline,
            scheduler=D.LCMScheduler(**TRAINING, clip_sample=False, set_alpha_to_one=False),
            unet=unet(time_cond_proj_dim=8),
        ),
        image=IMAGE,
    ),
    case("sd_panorama", lambda: edit(D.StableDiffusionPanoramaPipeline), height=16, width=32),
    xl_case("sdxl_img2img", lambda: xl(D.StableDiffusionXLImg2ImgPipeline), 7, image=IMAGE, strength=0.9),
    xl_case(
        "sdxl_inpaint", lambda: xl(D.StableDiffusionXLInpaintPipeline), 7, image=IMAGE, mask_image=MASK, height=16, width=16
    ),
    xl_case("sdxl_pix2pix", lambda: xl(D.StableDiffusionXLInstructPix2PixPipeline, unet=xl_unet(in_channels=8)), image=IMAGE),
    xl_case("sdxl_pag", lambda: xl(D.StableDiffusionXLPAGPipeline)),
    xl_case("sdxl_controlnet", lambda: xl(D.StableDiffusionXLControlNetPipeline, controlnet=xl_control()), image=CONTROL),
    xl_case(
        "sdxl_adapter",
        lambda: xl(D.StableDiffusionXLAdapterPipeline, adapter=adapter(), unet=xl_unet(**ADAPTED)),
        image=CONTROL,
    ),
]

# SPDX-License-Identifier: Apache-2.0
"""Text to image, and image to image, by transformers; most of them solve a flow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor

from tiny.case import Case, assemble, calling, noise
from tiny.encoders import autoencoder, qwen_autoencoder
from tiny.images import deep_autoencoder
from tiny.stable import IMAGE, MASK, TRAINING

D = diffusers
SIZE = {"height": 16, "width": 16}
CALL: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "latent", **SIZE}
POSITIVE, NEGATIVE = noise(2, 6, 16, seed=3), noise(2, 6, 16, seed=4)
POOLED, NEGATIVE_POOLED = noise(2, 8, seed=5), noise(2, 8, seed=6)
FULL = torch.ones(2, 6, dtype=torch.long)
EMBEDS: dict[str, Any] = {"prompt_embeds": POSITIVE, "negative_prompt_embeds": NEGATIVE}
MASKS: dict[str, Any] = {"prompt_attention_mask": FULL, "negative_prompt_attention_mask": FULL}
BOOLEANS = {name: mask.bool() for name, mask in MASKS.items()}
POOLS: dict[str, Any] = {"pooled_prompt_embeds": POOLED, "negative_pooled_prompt_embeds": NEGATIVE_POOLED}
FLUX: dict[str, Any] = {"prompt_embeds": POSITIVE, "pooled_prompt_embeds": POOLED}


def euler(**options: Any) -> Any:
    return D.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | options)


def dynamic() -> Any:
    return euler(use_dynamic_shifting=True)


def image_vae(**options: Any) -> Any:
    return autoencoder(**{"shift_factor": 0.1} | options)


def flux(kind: Any, channels: int = 16, **components: Any) -> Any:
    network = D.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return assemble(
        kind,
        transformer=network,
        vae=image_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        scheduler=dynamic(),
        **components,
    )


def sd3(kind: Any, channels: int = 4, **components: Any) -> Any:
    network = D.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    absent = dict.fromkeys(["text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"])
    return assemble(kind, transformer=network, vae=image_vae(channels=channels), **absent, scheduler=euler(), **components)


def simple(kind: Any, network: Any, scheduler: Any = None, **components: Any) -> Any:
    """A pipeline of a transformer, an autoencoder and one text encoder, which is left out."""
    return assemble(
        kind,
        **{
            "transformer": network,
            "vae": image_vae(),
            "text_encoder": None,
            "tokenizer": None,
            "scheduler": scheduler or euler(),
        }
        | components,
    )


def bria() -> Any:
    network = D.BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    )
    return simple(D.BriaPipeline, network)


def chroma(kind: Any) -> Any:
    network = D.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
        approximator_hidden_dim=16,
        approximator_layers=1,
        approximator_num_channels=8,
    )
    return simple(kind, network)


def flux2(kind: Any, guided: bool = True, **components: Any) -> Any:
    network = D.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guided,
    )
    vae = D.AutoencoderKLFlux2(
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    return simple(kind, network, dynamic(), vae=vae, **components)


def hidream() -> Any:
    network = D.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 8],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=(0, 1),
    )
    absent = {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("_2", "_3", "_4")}
    pipe = simple(D.HiDreamImagePipeline, network, **absent)
    pipe.default_sample_size = 8  # it scales every picture to as many pixels as this size has
    return pipe


HIDREAM: dict[str, Any] = {
    "prompt_embeds_t5": POSITIVE,
    "negative_prompt_embeds_t5": NEGATIVE,
    "prompt_embeds_llama3": noise(2, 2, 6, 8, seed=7),
    "negative_prompt_embeds_llama3": noise(2, 2, 6, 8, seed=8),
    **POOLS,
}


def guider(**options: Any) -> Any:
    return D.guiders.AdaptiveProjectedMixGuidance(**options)


def hunyuan_image(**options: Any) -> Any:
    network = D.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=16,
        text_embed_2_dim=8,
        rope_axes_dim=(4, 4),
    )
    vae = D.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.5,
    )
    return simple(
        D.HunyuanImagePipeline,
        network,
        vae=vae,
        text_encoder_2=None,
        tokenizer_2=None,
        guider=guider(adaptive_projected_guidance_start_step=2, **options),
        ocr_guider=guider(adaptive_projected_guidance_start_step=3, **options),
    )


HUNYUAN_IMAGE: dict[str, Any] = {
    **EMBEDS,
    "guidance_scale": ...,
    "prompt_embeds_mask": FULL,
    "negative_prompt_embeds_mask": FULL,
    "prompt_embeds_2": noise(2, 3, 8, seed=7),
    "negative_prompt_embeds_2": noise(2, 3, 8, seed=8),
    "prompt_embeds_mask_2": FULL[:, :3],
    "negative_prompt_embeds_mask_2": FULL[:, :3],
}


def pixart(kind: Any, **components: Any) -> Any:
    network = D.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=16,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        use_additional_conditions=False,
    )
    return simple(kind, network, D.DPMSolverMultistepScheduler(**TRAINING), gains={"transformer": 0.5}, **components)


def lumina() -> Any:
    network = D.LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        norm_eps=1e-5,
        learn_sigma=True,
        qk_norm=True,
        cross_attention_dim=16,
        scaling_factor=1.0,
    )
    return simple(D.LuminaPipeline, network)


def lumina2() -> Any:
    network = D.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=8,
        num_layers=2,
        num_attention_heads=1,
        num_kv_heads=1,
        multiple_of=16,
        norm_eps=1e-5,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=16,
    )
    return simple(D.Lumina2Pipeline, network)


def aura_flow() -> Any:
    network = D.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return simple(D.AuraFlowPipeline, network)


def cogview3() -> Any:
    network = D.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = D.CogVideoXDDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    return simple(D.CogView3PlusPipeline, network, scheduler)


def cogview4() -> Any:
    network = D.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        condition_dim=4,
    )
    scheduler = euler(use_dynamic_shifting=True, base_image_seq_len=256, base_shift=0.25, time_shift_type="linear")
    return simple(D.CogView4Pipeline, network, scheduler)


def hunyuan_dit() -> Any:
    network = D.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        hidden_size=16,
        text_len=6,
        text_len_t5=6,
        activation_fn="gelu-approximate",
    )
    return simple(
        D.HunyuanDiTPipeline,
        network,
        D.DDPMScheduler(**TRAINING, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=None,
        tokenizer_2=None,
    )


HUNYUAN_DIT: dict[str, Any] = {
    **EMBEDS,
    **MASKS,
    "prompt_embeds_2": noise(2, 6, 16, seed=7),
    "negative_prompt_embeds_2": noise(2, 6, 16, seed=8),
    "prompt_attention_mask_2": FULL,
    "negative_prompt_attention_mask_2": FULL,
    "use_resolution_binning": False,
}


def sana(kind: Any, scheduler: Any, **options: Any) -> Any:
    network = D.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=16,
        sample_size=32,
        **options,
    )
    return simple(kind, network, scheduler, vae=deep_autoencoder(), gains={"transformer": 0.5})


def qwen(kind: Any) -> Any:
    network = D.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    vae = qwen_autoencoder()
    return simple(kind, network, dynamic(), vae=vae)


QWEN: dict[str, Any] = {
    **EMBEDS,
    "prompt_embeds_mask": FULL,
    "negative_prompt_embeds_mask": FULL,
    "guidance_scale": None,
    "true_cfg_scale": 2.0,
}


def ovis() -> Any:
    network = D.OvisImageTransformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    return simple(D.OvisImagePipeline, network)


def z_image(kind: Any) -> Any:
    network = D.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[2, 2, 4],
        axes_lens=[64, 32, 32],
    )
    return simple(kind, network)


def case(name: str, make: Callable[[], Any], steps: int = 10, **arguments: Any) -> Case:
    """A call with `CALL`; arguments that are given as `...` are left out."""
    given = {name: value for name, value in (CALL | arguments).items() if value is not ...}
    return Case(name, make, calling(**given), steps)


BOOLEANS = {name: mask.bool() for name, mask in MASKS.items()}
PICTURE = VaeImageProcessor.numpy_to_pil(noise(1, 64, 64, 3, seed=1).sigmoid().numpy())[0]
EDIT: dict[str, Any] = {"image": IMAGE, "strength": 0.9}
PLAIN: dict[str, Any] = {"use_resolution_binning": False, "negative_prompt": None}

CASES = [
    case("bria", bria, **EMBEDS),
    case("chroma", lambda: chroma(D.ChromaPipeline), **EMBEDS, **BOOLEANS),
    case("chroma_img2img", lambda: chroma(D.ChromaImg2ImgPipeline), 9, **EMBEDS, **BOOLEANS, **EDIT),
    case("flux_img2img", lambda: flux(D.FluxImg2ImgPipeline), 9, **FLUX, **EDIT),
    case("flux_inpaint", lambda: flux(D.FluxInpaintPipeline), 9, **FLUX, **EDIT, mask_image=MASK),
    case("flux_fill", lambda: flux(D.FluxFillPipeline, 48), **FLUX, image=IMAGE, mask_image=MASK),
    case("flux_kontext", lambda: flux(D.FluxKontextPipeline), **FLUX, image=IMAGE, max_area=256, _auto_resize=False),
    case("flux_control", lambda: flux(D.FluxControlPipeline, 32), **FLUX, control_image=IMAGE),
    case("flux2", lambda: flux2(D.Flux2Pipeline), prompt_embeds=POSITIVE),
    case("flux2_klein", lambda: flux2(D.Flux2KleinPipeline, False), **EMBEDS),
    case("flux2_klein_kv", lambda: flux2(D.Flux2KleinKVPipeline, False), prompt_embeds=POSITIVE, guidance_scale=...),
    case(
        "flux2_klein_kv_reference",
        lambda: flux2(D.Flux2KleinKVPipeline, False),
        prompt_embeds=POSITIVE[:1],
        image=PICTURE,
        guidance_scale=...,
    ),
    case("hidream", hidream, **HIDREAM),
    case("hunyuan_image", hunyuan_image, **HUNYUAN_IMAGE),
    case("sd3_img2img", lambda: sd3(D.StableDiffusion3Img2ImgPipeline), 9, **EMBEDS, **POOLS, **EDIT),
    case("sd3_inpaint", lambda: sd3(D.StableDiffusion3InpaintPipeline, 16), 9, **EMBEDS, **POOLS, **EDIT, mask_image=MASK),
    case("sd3_pag", lambda: sd3(D.StableDiffusion3PAGPipeline, pag_applied_layers="blocks.1"), **EMBEDS, **POOLS),
    case("sana_pag", lambda: sana(D.SanaPAGPipeline, euler()), **EMBEDS, **MASKS, **PLAIN, height=32, width=32),
    case(
        "sana_sprint",
        lambda: sana(D.SanaSprintPipeline, D.SCMScheduler(), qk_norm="rms_norm_across_heads", guidance_embeds=True),
        prompt_embeds=POSITIVE,
        prompt_attention_mask=FULL,
        intermediate_timesteps=None,
        height=32,
        width=32,
        use_resolution_binning=False,
    ),
    case("pixart_alpha", lambda: pixart(D.PixArtAlphaPipeline), **EMBEDS, **MASKS, **PLAIN),
    case("pixart_pag", lambda: pixart(D.PixArtSigmaPAGPipeline, pag_applied_layers="blocks.1"), **EMBEDS, **MASKS, **PLAIN),
    case("lumina", lumina, **EMBEDS, **MASKS),
    case("lumina2", lumina2, **EMBEDS, **MASKS),
    case("aura_flow", aura_flow, **EMBEDS, **MASKS),
    case("cogview3", cogview3, **EMBEDS),
    case("cogview4", cogview4, **EMBEDS),
    case("hunyuan_dit", hunyuan_dit, **HUNYUAN_DIT),
    case("qwen_img2img", lambda: qwen(D.QwenImageImg2ImgPipeline), 9, **QWEN, **EDIT),
    case("qwen_inpaint", lambda: qwen(D.QwenImageInpaintPipeline), 9, **QWEN, **EDIT, mask_image=MASK),
    case("ovis", ovis, **EMBEDS, negative_prompt=None),
    case(
        "z_image_img2img",
        lambda: z_image(D.ZImageImg2ImgPipeline),
        9,
        prompt_embeds=list(POSITIVE),
        negative_prompt_embeds=list(NEGATIVE),
        **EDIT,
    ),
]

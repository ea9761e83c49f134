# SPDX-License-Identifier: Apache-2.0
"""Further pipelines of videos, and of music."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers

from tiny.case import Case, assemble, calling, noise
from tiny.edits import XL_EMBEDDED, xl_unet
from tiny.encoders import autoencoder, ltx_autoencoder
from tiny.flows import FULL, MASKS, PICTURE, euler
from tiny.stable import ddim_scheduler, unet
from tiny.video import flow_unipc

D = diffusers
SIZE = {"height": 32, "width": 32}
CALL: dict[str, Any] = {
    "num_inference_steps": 8,
    "guidance_scale": 3.0,
    "output_type": "latent",
    "prompt_embeds": noise(2, 6, 8, seed=3),
    "negative_prompt_embeds": noise(2, 6, 8, seed=4),
    **SIZE,
}
ONE: dict[str, Any] = {"prompt_embeds": CALL["prompt_embeds"][:1], "negative_prompt_embeds": CALL["negative_prompt_embeds"][:1]}
VIDEO = noise(1, 5, 3, 32, 32, seed=1).sigmoid()
CLIP = noise(1, 2, 3, 16, 16, seed=1).sigmoid()
IMAGE = noise(1, 3, 32, 32, seed=1).sigmoid()


def film(kind: Any, network: Any, vae: Any, scheduler: Any, **components: Any) -> Any:
    return assemble(kind, transformer=network, vae=vae, text_encoder=None, tokenizer=None, scheduler=scheduler, **components)


def wan_vae() -> Any:
    return D.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def wan_vace() -> Any:
    network = D.WanVACETransformer3DModel(**WAN, vace_layers=[0, 1], vace_in_channels=8 + 64)
    return film(D.WanVACEPipeline, network, wan_vae(), euler())


def wan_image() -> Any:
    network = D.WanTransformer3DModel(**WAN | {"in_channels": 12})
    return film(D.WanImageToVideoPipeline, network, wan_vae(), flow_unipc(), image_encoder=None, image_processor=None)


def wan_video() -> Any:
    return film(D.WanVideoToVideoPipeline, D.WanTransformer3DModel(**WAN), wan_vae(), flow_unipc())


def sky_reels() -> Any:
    network = D.SkyReelsV2Transformer3DModel(**WAN)
    scheduler = D.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return film(D.SkyReelsV2Pipeline, network, wan_vae(), scheduler)


def cogvideox_vae() -> Any:
    blocks: dict[str, Any] = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (4, 4, 4, 4),
    }
    return D.AutoencoderKLCogVideoX(
        **blocks, latent_channels=4, layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4
    )


def cogvideox(kind: Any, channels: int = 4) -> Any:
    network = D.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=8,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    )
    scheduler = D.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    return film(kind, network, cogvideox_vae(), scheduler)


def allegro() -> Any:
    network = D.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=8,
        caption_channels=8,
    )
    vae = D.AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return film(D.AllegroPipeline, network, vae, ddim_scheduler())


def latte() -> Any:
    network = D.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=2,
    )
    return film(D.LattePipeline, network, autoencoder(), ddim_scheduler())


def mochi() -> Any:
    network = D.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=8,
        time_embed_dim=4,
        max_sequence_length=6,
    )
    blocks: dict[str, Any] = {
        f"{part}_block_out_channels": (32, 32, 32, 32) for part in ("encoder", "decoder")
    }  # its norms have 32 groups
    vae = D.AutoencoderKLMochi(**blocks, latent_channels=4, layers_per_block=(1, 1, 1, 1, 1))
    return film(D.MochiPipeline, network, vae, euler())


def hunyuan15(**options: Any) -> Any:
    network = D.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
        task_type="t2v",
    )
    vae = D.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    guider = D.guiders.ClassifierFreeGuidance(guidance_scale=3.0)
    if options:
        guider = D.guiders.AdaptiveProjectedGuidance(guidance_scale=3.0, **options)
    pipe = film(D.HunyuanVideo15Pipeline, network, vae, euler(), text_encoder_2=None, tokenizer_2=None, guider=guider)
    pipe.vision_num_semantic_tokens = 2  # 729 in the published one
    return pipe


HUNYUAN15: dict[str, Any] = {
    "prompt_embeds_mask": FULL,
    "negative_prompt_embeds_mask": FULL,
    "prompt_embeds_2": noise(2, 3, 8, seed=7),
    "negative_prompt_embeds_2": noise(2, 3, 8, seed=8),
    "prompt_embeds_mask_2": FULL[:, :3],
    "negative_prompt_embeds_mask_2": FULL[:, :3],
    "guidance_scale": ...,
    "height": 16,
    "width": 16,
    "num_frames": 5,
}


def ltx_condition() -> Any:
    network = D.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
    )
    vae = ltx_autoencoder()
    return film(D.LTXConditionPipeline, network, vae, euler())


def unet3d() -> Any:
    return D.UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
    )


def text_to_video(kind: Any) -> Any:
    return assemble(kind, unet=unet3d(), vae=autoencoder(), text_encoder=None, tokenizer=None, scheduler=ddim_scheduler())


def motion() -> Any:
    return D.MotionAdapter(
        block_out_channels=(4, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )


def animate(kind: Any, **components: Any) -> Any:
    return assemble(
        kind,
        **{
            "unet": unet(),
            "motion_adapter": motion(),
            "vae": autoencoder(),
            "text_encoder": None,
            "tokenizer": None,
            "scheduler": ddim_scheduler(),
        }
        | components,
    )


def stable_video() -> Any:
    network = D.UNetSpatioTemporalConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=8,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    return network


def case(name: str, make: Callable[[], Any], steps: int = 8, **arguments: Any) -> Case:
    """A call with `CALL`; arguments that are given as `...` are left out."""
    given = {name: value for name, value in (CALL | arguments).items() if value is not ...}
    return Case(name, make, calling(**given), steps)


SMALL = {"height": 16, "width": 16}
XL = dict(XL_EMBEDDED, num_frames=2, **SMALL)

CASES = [
    case("wan_vace", wan_vace, **ONE, num_frames=5),
    case("wan_image", wan_image, **ONE, num_frames=5, image=PICTURE),
    case("wan_video", wan_video, 7, **ONE, video=VIDEO, strength=0.9),
    case("sky_reels", sky_reels, num_frames=5),
    case("cogvideox_image", lambda: cogvideox(D.CogVideoXImageToVideoPipeline, 8), **ONE, num_frames=9, image=IMAGE),
    case("cogvideox_video", lambda: cogvideox(D.CogVideoXVideoToVideoPipeline), 7, **ONE, video=VIDEO, strength=0.9),
    case("cogvideox_control", lambda: cogvideox(D.CogVideoXFunControlPipeline, 8), **ONE, control_video=VIDEO),
    case("allegro", allegro, **MASKS, negative_prompt=None, num_frames=8),
    case("latte", latte, negative_prompt=None, video_length=2, clean_caption=False, **SMALL),
    case("mochi", mochi, **MASKS, num_frames=7),
    case("hunyuan15", hunyuan15, **HUNYUAN15),
    case("hunyuan15_momentum", lambda: hunyuan15(adaptive_projected_guidance_momentum=-0.5), **HUNYUAN15),
    case("ltx_condition", ltx_condition, **MASKS, num_frames=9),
    case("text_to_video", lambda: text_to_video(D.TextToVideoSDPipeline), num_frames=2, **SMALL),
    case(
        "video_to_video",
        lambda: text_to_video(D.VideoToVideoSDPipeline),
        7,
        **ONE,
        video=CLIP,
        strength=0.9,
        height=...,
        width=...,
    ),
    case("animatediff_video", lambda: animate(D.AnimateDiffVideoToVideoPipeline), 7, **ONE, video=CLIP, **SMALL, strength=0.9),
    case(
        "animatediff_xl",
        lambda: animate(D.AnimateDiffSDXLPipeline, unet=xl_unet(), text_encoder_2=None, tokenizer_2=None),
        **XL,
    ),
]

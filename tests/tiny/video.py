# SPDX-License-Identifier: Apache-2.0
"""Text to video, and image to video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import transformers

from tiny.case import Case, assemble, calling, noise
from tiny.encoders import SPECIAL, VOCABULARY, autoencoder, clip, ltx_autoencoder, t5, tokenizer
from tiny.stable import OTHER, TEXT, ddim_scheduler, unet

SIZE = {"height": 32, "width": 32}
SHORT_TEXT = {"max_sequence_length": 16}
IMAGE = noise(2, 3, 32, 32, seed=1).sigmoid()


def flow_unipc() -> Any:
    """As Wan is published."""
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan_transformer() -> Any:
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan(scheduler: Any = None, **components: Any) -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    encoder = transformers.UMT5Config(
        vocab_size=VOCABULARY,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        pad_token_id=SPECIAL["pad"],
        eos_token_id=SPECIAL["eos"],
    )
    return assemble(
        diffusers.WanPipeline,
        **{
            "transformer": wan_transformer(),
            "vae": vae,
            "text_encoder": transformers.UMT5EncoderModel(encoder),
            "tokenizer": tokenizer(bos=False),
            "scheduler": scheduler or flow_unipc(),
        }
        | components,
    )


def wan_two() -> Any:
    return wan(transformer_2=wan_transformer(), boundary_ratio=0.8)


def cogvideox() -> Any:
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=8,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    blocks: dict[str, Any] = {
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (4, 4, 4, 4),
    }
    vae = diffusers.AutoencoderKLCogVideoX(
        **blocks,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return assemble(
        diffusers.CogVideoXPipeline,
        transformer=network,
        vae=vae,
        text_encoder=t5(),
        tokenizer=tokenizer(bos=False),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    )


def ltx(kind: Any = diffusers.LTXPipeline) -> Any:
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=8,
    )
    vae = ltx_autoencoder()
    return assemble(
        kind,
        transformer=network,
        vae=vae,
        text_encoder=t5(),
        tokenizer=tokenizer(bos=False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def animatediff() -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(4, 8),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )
    return assemble(
        diffusers.AnimateDiffPipeline,
        unet=unet(),
        motion_adapter=adapter,
        vae=autoencoder(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        scheduler=ddim_scheduler(),
    )


def hunyuan() -> Any:
    network = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 2, 4),
    )
    blocks: dict[str, Any] = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1}
    vae = diffusers.AutoencoderKLHunyuanVideo(**blocks, latent_channels=4, norm_num_groups=2)
    # The pipeline reads the third hidden state from the end.
    encoder = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=SPECIAL["pad"],
        bos_token_id=SPECIAL["bos"],
        eos_token_id=SPECIAL["eos"],
    )
    return assemble(
        diffusers.HunyuanVideoPipeline,
        transformer=network,
        vae=vae,
        text_encoder=transformers.LlamaModel(encoder),
        tokenizer=tokenizer(eos=False),
        text_encoder_2=clip(max_length=77),
        tokenizer_2=tokenizer(77),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def text_case(name: str, make: Callable[[], Any], steps: int = 10, **arguments: Any) -> Case:
    return Case(name, make, calling(**(TEXT | SIZE | SHORT_TEXT | arguments)), steps, OTHER)


HUNYUAN = {"num_frames": 9, "prompt_template": {"template": "{}", "crop_start": 0}}

CASES = [
    text_case("wan", wan, num_frames=5),
    text_case("wan_euler", lambda: wan(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)), num_frames=5),
    text_case("wan22", wan_two, num_frames=5, guidance_scale_2=2.0),
    text_case("wan22_expand_timesteps", lambda: wan(expand_timesteps=True), num_frames=5),
    text_case("cogvideox", cogvideox, num_frames=9),
    text_case("cogvideox_dynamic_cfg", cogvideox, num_frames=9, use_dynamic_cfg=True),
    text_case("ltx", ltx, num_frames=9),
    text_case("ltx_image_to_video", lambda: ltx(diffusers.LTXImageToVideoPipeline), num_frames=9, image=IMAGE),
    Case("animatediff", animatediff, calling(**TEXT, num_frames=4, height=16, width=16), 10, OTHER),
    text_case("hunyuan", hunyuan, **HUNYUAN),
    text_case("hunyuan_true_cfg", hunyuan, **HUNYUAN, true_cfg_scale=2.0, negative_prompt=["blurred", "dark"]),
]

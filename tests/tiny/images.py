# SPDX-License-Identifier: Apache-2.0
"""Text to image beyond Stable Diffusion's first network: SDXL and the transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import transformers

from tiny.case import Case, assemble, calling
from tiny.encoders import SPECIAL, VOCABULARY, autoencoder, clip, clip_projected, qwen_autoencoder, t5, tokenizer
from tiny.stable import OTHER, TEXT, TRAINING, ddim_scheduler, unet

SIZE = {"height": 16, "width": 16}
SHORT_TEXT = {"max_sequence_length": 16}


def sdxl() -> Any:
    network = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=8 + 6 * 4,
        cross_attention_dim=16,
        use_linear_projection=True,
    )
    return assemble(
        diffusers.StableDiffusionXLPipeline,
        unet=network,
        vae=autoencoder(),
        text_encoder=clip(),
        text_encoder_2=clip_projected(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=ddim_scheduler(),
        add_watermarker=False,
    )


def sd3(encoder: bool = True) -> Any:
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    return assemble(
        diffusers.StableDiffusion3Pipeline,
        transformer=network,
        vae=autoencoder(shift_factor=0.1),
        text_encoder=clip_projected(),
        text_encoder_2=clip_projected(),
        text_encoder_3=t5(16) if encoder else None,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer(bos=False) if encoder else None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux() -> Any:
    network = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
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
        diffusers.FluxPipeline,
        transformer=network,
        vae=autoencoder(shift_factor=0.1),
        text_encoder=clip(),
        text_encoder_2=t5(16),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(bos=False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def pixart() -> Any:
    network = diffusers.PixArtTransformer2DModel(
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
    return assemble(
        diffusers.PixArtSigmaPipeline,
        transformer=network,
        vae=autoencoder(),
        text_encoder=t5(16),
        tokenizer=tokenizer(bos=False),
        scheduler=diffusers.DPMSolverMultistepScheduler(**TRAINING),
    )


def deep_autoencoder() -> Any:
    blocks: dict[str, Any] = {
        f"{part}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock") for part in ("encoder", "decoder")
    }
    return diffusers.AutoencoderDC(
        **blocks,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )


def sana() -> Any:
    network = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    gemma = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        head_dim=4,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=1,
        pad_token_id=SPECIAL["pad"],
        eos_token_id=SPECIAL["eos"],
        bos_token_id=SPECIAL["bos"],
    )
    return assemble(
        diffusers.SanaPipeline,
        transformer=network,
        vae=deep_autoencoder(),
        text_encoder=transformers.Gemma2Model(gemma),
        tokenizer=tokenizer(eos=False),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def qwen() -> Any:
    network = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    vae = qwen_autoencoder()
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1], "rope_theta": 1e6},
            "pad_token_id": SPECIAL["pad"],
            "bos_token_id": SPECIAL["bos"],
            "eos_token_id": SPECIAL["eos"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "out_hidden_size": 8,
        },
        image_token_id=SPECIAL["unk"],
        video_token_id=SPECIAL["unk"],
        vision_start_token_id=SPECIAL["unk"],
        vision_end_token_id=SPECIAL["unk"],
    )
    pipe = assemble(
        diffusers.QwenImagePipeline,
        transformer=network,
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer(max_length=64, bos=False, eos=False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    # The published instruction around a prompt is 200 bytes long.
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "> {}", 2
    return pipe


def z_image() -> Any:
    network = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[2, 2, 4],
        axes_lens=[64, 32, 32],
    )
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        pad_token_id=SPECIAL["pad"],
        bos_token_id=SPECIAL["bos"],
        eos_token_id=SPECIAL["eos"],
    )
    return assemble(
        diffusers.ZImagePipeline,
        transformer=network,
        vae=autoencoder(shift_factor=0.1),
        text_encoder=transformers.Qwen3Model(config),
        tokenizer=tokenizer(bos=False, eos=False, chat_template="{{ messages[0]['content'] }}"),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def text_case(name: str, make: Callable[[], Any], steps: int = 10, **arguments: Any) -> Case:
    return Case(name, make, calling(**(TEXT | SIZE | arguments)), steps, OTHER)


CASES = [
    text_case("sdxl", sdxl),
    text_case("sd3", sd3, **SHORT_TEXT),
    text_case("sd3_without_t5", lambda: sd3(encoder=False), **SHORT_TEXT),
    text_case(
        "sd3_skip_layers",
        sd3,
        **SHORT_TEXT,
        skip_guidance_layers=[1],
        skip_layer_guidance_start=0.15,
        skip_layer_guidance_stop=0.6,
    ),
    text_case("flux", flux, **SHORT_TEXT),
    text_case("flux_true_cfg", flux, **SHORT_TEXT, true_cfg_scale=2.0, negative_prompt=["blurred", "dark"]),
    # As many text tokens as images: nothing may take the one for the other.
    text_case("flux_short_text", flux, max_sequence_length=2),
    text_case("pixart", pixart, **SHORT_TEXT, clean_caption=False, use_resolution_binning=False),
    text_case("sana", sana, **SHORT_TEXT, height=32, width=32, use_resolution_binning=False, complex_human_instruction=None),
    text_case("qwen", qwen, guidance_scale=None, true_cfg_scale=2.0, negative_prompt=["blurred", "dark"]),
    text_case("z_image", z_image, **SHORT_TEXT),
    text_case("z_image_truncated", z_image, **SHORT_TEXT, cfg_truncation=0.5),
]

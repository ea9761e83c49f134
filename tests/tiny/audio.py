# SPDX-License-Identifier: Apache-2.0
"""Text to audio."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

from tiny.case import Case, assemble, calling, noise, quiet
from tiny.encoders import VOCABULARY, autoencoder, t5, tokenizer
from tiny.stable import OTHER, TEXT, ddim_scheduler


def stable_audio() -> Any:
    network = diffusers.StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    with quiet():
        vae = diffusers.AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        )
    projection = diffusers.pipelines.stable_audio.StableAudioProjectionModel(
        text_encoder_dim=8, conditioning_dim=8, min_value=0, max_value=32
    )
    return assemble(
        diffusers.StableAudioPipeline,
        gains={"transformer": 0.7},  # at 1 this chain turns rounding of 1e-7 into differences of 1e-5
        transformer=network,
        vae=vae,
        projection_model=projection,
        text_encoder=t5(),
        tokenizer=tokenizer(bos=False),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential", sigma_min=0.3, sigma_max=500.0
        ),
    )


def audioldm2() -> Any:
    blocks: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "cross_attention_dim": (None, 8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    network = diffusers.AudioLDM2UNet2DConditionModel(
        **blocks,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
    )
    language = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    with quiet():
        return assemble(
            diffusers.AudioLDM2Pipeline,
            unet=network,
            vae=autoencoder(in_channels=1, out_channels=1),
            text_encoder=None,
            text_encoder_2=t5(),
            projection_model=diffusers.pipelines.audioldm2.AudioLDM2ProjectionModel(
                text_encoder_dim=8, text_encoder_1_dim=8, langauge_model_dim=8
            ),
            language_model=transformers.GPT2LMHeadModel(language),
            tokenizer=None,
            tokenizer_2=None,
            feature_extractor=None,
            scheduler=ddim_scheduler(),
            vocoder=transformers.SpeechT5HifiGan(vocoder),
        )


def embedded(seed: int) -> dict[str, Any]:
    """What AudioLDM2's text encoders would give; the pipeline asks for their own tokenizer classes."""
    return {"prompt_embeds": noise(2, 6, 8, seed=seed), "generated_prompt_embeds": noise(2, 4, 8, seed=seed + 1)}


AUDIOLDM2 = {
    **embedded(0),
    "negative_prompt_embeds": noise(2, 6, 8, seed=4),
    "negative_generated_prompt_embeds": noise(2, 4, 8, seed=5),
    "attention_mask": torch.ones(2, 6, dtype=torch.long),
    "negative_attention_mask": torch.ones(2, 6, dtype=torch.long),
    "num_inference_steps": 10,
    "guidance_scale": 3.0,
    "audio_length_in_s": 0.004,
    "output_type": "latent",
}

CASES = [
    Case("stable_audio", stable_audio, calling(**TEXT, audio_end_in_s=4.0), 10, OTHER),
    Case("audioldm2", audioldm2, calling(**AUDIOLDM2), other=embedded(2)),
]

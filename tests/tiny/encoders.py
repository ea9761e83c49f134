# SPDX-License-Identifier: Apache-2.0
"""Tiny tokenizers, text encoders and autoencoders."""

from __future__ import annotations

from typing import Any

import diffusers
import tokenizers
import transformers

BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
SPECIAL = {"pad": 256, "eos": 257, "bos": 258, "unk": 259}
VOCABULARY = len(BYTES) + len(SPECIAL)


def tokenizer(max_length: int = 16, bos: bool = True, eos: bool = True, **options: Any) -> Any:
    """Byte by byte: every other prompt has other tokens."""
    vocabulary = {byte: i for i, byte in enumerate(BYTES)} | {f"<{name}>": i for name, i in SPECIAL.items()}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    ends = [(f"<{name}>", SPECIAL[name]) for name, wanted in (("bos", bos), ("eos", eos)) if wanted]
    if ends:
        template = ["<bos>"] * bos + ["$A"] + ["<eos>"] * eos
        backend.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        **{f"{name}_token": f"<{name}>" for name in SPECIAL},
        **options,
    )


def clip_config(width: int = 8, max_length: int = 16, **options: Any) -> transformers.CLIPTextConfig:
    """Two layers."""
    return transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=max_length,
        bos_token_id=SPECIAL["bos"],
        eos_token_id=SPECIAL["eos"],
        pad_token_id=SPECIAL["pad"],
        **options,
    )


def clip(width: int = 8, max_length: int = 16, **options: Any) -> transformers.CLIPTextModel:
    """The text encoder of SD and of AnimateDiff; the first of SDXL and Flux."""
    return transformers.CLIPTextModel(clip_config(width, max_length, **options))


def clip_projected(width: int = 8, max_length: int = 16, **options: Any) -> transformers.CLIPTextModelWithProjection:
    """The second text encoder of SDXL, the first two of SD3."""
    return transformers.CLIPTextModelWithProjection(clip_config(width, max_length, **options))


def t5(width: int = 8) -> transformers.T5EncoderModel:
    """The text encoder of most transformers."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        pad_token_id=SPECIAL["pad"],
        eos_token_id=SPECIAL["eos"],
    )
    return transformers.T5EncoderModel(config)


def autoencoder(channels: int = 4, **options: Any) -> diffusers.AutoencoderKL:
    """Images twice as wide as their latents."""
    return diffusers.AutoencoderKL(
        **{
            "block_out_channels": (4, 4),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": channels,
            "norm_num_groups": 2,
            "sample_size": 16,
        }
        | options
    )


def qwen_autoencoder() -> diffusers.AutoencoderKLQwenImage:
    """That of Qwen-Image, without a change of size in time."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def ltx_autoencoder() -> diffusers.AutoencoderKLLTXVideo:
    """That of LTX-Video."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=2,
        patch_size_t=1,
    )

# SPDX-License-Identifier: Apache-2.0
"""Cascades and their parts, and other pipelines with networks of their own kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import transformers

from tiny import pixels
from tiny.case import Case, assemble, calling, noise
from tiny.encoders import SPECIAL, VOCABULARY, clip_projected, tokenizer
from tiny.stable import IMAGE, MASK, ddim_scheduler

D = diffusers
SIZE = {"height": 16, "width": 16}
CALL: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "latent"}


def kandinsky_unet(**options: Any) -> Any:
    return D.UNet2DConditionModel(
        **{
            "in_channels": 4,
            "out_channels": 8,
            "addition_embed_type": "image",
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "block_out_channels": (32, 32),
            "norm_num_groups": 2,
            "layers_per_block": 1,
            "encoder_hid_dim": 8,
            "encoder_hid_dim_type": "image_proj",
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "resnet_time_scale_shift": "scale_shift",
        }
        | options
    )


def movq() -> Any:
    return D.VQModel(
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def kandinsky(kind: Any, scheduler: Any = None, **options: Any) -> Any:
    return assemble(kind, unet=kandinsky_unet(**options), movq=movq(), scheduler=scheduler or ddim_scheduler())


IMAGE_EMBEDS = {"image_embeds": noise(2, 8, seed=3), "negative_image_embeds": noise(2, 8, seed=4)}


def kandinsky_prior() -> Any:
    prior = D.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=8, num_layers=1, num_embeddings=16, additional_embeddings=4
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        image_size=16,
        projection_dim=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        patch_size=8,
    )
    pipe = assemble(
        D.KandinskyV22PriorPipeline,
        prior=prior,
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        text_encoder=clip_projected(),
        tokenizer=tokenizer(),
        image_processor=None,
        scheduler=D.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=10.0
        ),
    )
    return pipe


def cascade_prior() -> Any:
    prior = D.models.StableCascadeUNet(
        conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        switch_level=(False,),
        clip_image_in_channels=8,
        clip_text_in_channels=8,
        clip_text_pooled_in_channels=8,
        dropout=(0.0, 0.0),
    )
    return assemble(
        D.StableCascadePriorPipeline,
        prior=prior,
        tokenizer=None,
        text_encoder=clip_projected(),  # the pipeline asks for its dtype
        scheduler=D.DDPMWuerstchenScheduler(),
    )


CASCADE: dict[str, Any] = {
    "prompt_embeds": noise(2, 6, 8, seed=3),
    "negative_prompt_embeds": noise(2, 6, 8, seed=4),
    "prompt_embeds_pooled": noise(2, 1, 8, seed=5),
    "negative_prompt_embeds_pooled": noise(2, 1, 8, seed=6),
    "output_type": "pt",
}


def cascade_decoder() -> Any:
    decoder = D.models.StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        clip_text_pooled_in_channels=8,
        dropout=(0.0, 0.0),
        effnet_in_channels=4,
    )
    vqgan = D.pipelines.stable_cascade.pipeline_stable_cascade.PaellaVQModel(
        bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=8
    )
    return assemble(
        D.StableCascadeDecoderPipeline,
        decoder=decoder,
        vqgan=vqgan,
        tokenizer=None,
        text_encoder=clip_projected(),
        scheduler=D.DDPMWuerstchenScheduler(),
        latent_dim_scale=4.0,
    )


def deep_floyd() -> Any:
    network = D.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=3,
        out_channels=6,
        cross_attention_dim=32,
        encoder_hid_dim=8,
        norm_num_groups=2,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    scheduler = D.DDPMScheduler(
        thresholding=True, sample_max_value=1.5, variance_type="learned_range", prediction_type="epsilon"
    )
    return assemble(
        D.IFPipeline,
        gains={"unet": 0.6},
        unet=network,
        tokenizer=None,
        text_encoder=None,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def consistency() -> Any:
    return assemble(
        D.ConsistencyModelPipeline,
        gains={"unet": 0.6},
        unet=pixels.unet(),
        scheduler=D.CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_min=0.002, sigma_max=80.0),
    )


def super_resolution() -> Any:
    network = D.UNet2DModel(
        sample_size=8,
        in_channels=6,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    vqvae = D.VQModel(
        block_out_channels=[4, 4],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=3,
        norm_num_groups=2,
    )
    return assemble(D.LDMSuperResolutionPipeline, unet=network, vqvae=vqvae, scheduler=ddim_scheduler())


def ace_step(**options: Any) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 16,
    }
    network = D.AceStepTransformer1DModel(
        **sizes, num_hidden_layers=1, in_channels=12, audio_acoustic_hidden_dim=4, patch_size=2, **options
    )
    conditions = D.pipelines.ace_step.AceStepConditionEncoder(
        **sizes,
        text_hidden_dim=16,
        timbre_hidden_dim=4,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    )
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        pad_token_id=SPECIAL["pad"],
        bos_token_id=SPECIAL["bos"],
        eos_token_id=SPECIAL["eos"],
    )
    vae = D.AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    return assemble(
        D.AceStepPipeline,
        gains={"transformer": 0.7},
        transformer=network,
        condition_encoder=conditions,
        vae=vae,
        text_encoder=transformers.Qwen3Model(config),
        tokenizer=tokenizer(max_length=256, bos=False, eos=False),
        scheduler=D.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    )


def case(name: str, make: Callable[[], Any], steps: int = 10, **arguments: Any) -> Case:
    """A call with `CALL`; arguments that are given as `...` are left out."""
    given = {name: value for name, value in (CALL | arguments).items() if value is not ...}
    return Case(name, make, calling(**given), steps)


CASES = [
    case("kandinsky", lambda: kandinsky(D.KandinskyV22Pipeline), **IMAGE_EMBEDS, **SIZE),
    case(
        "kandinsky_img2img",
        lambda: kandinsky(D.KandinskyV22Img2ImgPipeline),
        9,
        **IMAGE_EMBEDS,
        image=IMAGE,
        strength=0.9,
        **SIZE,
    ),
    case(
        "kandinsky_inpaint",
        lambda: kandinsky(D.KandinskyV22InpaintPipeline, in_channels=9),
        **IMAGE_EMBEDS,
        image=IMAGE,
        mask_image=MASK,
        **SIZE,
    ),
    case("kandinsky_prior", kandinsky_prior, prompt=["a cat", "a red dog"], output_type="pt"),
    case("cascade_prior", cascade_prior, **CASCADE, height=128, width=128),
    case("cascade_decoder", cascade_decoder, **CASCADE, image_embeddings=noise(2, 4, 4, 4, seed=7)),
    case(
        "deep_floyd",
        deep_floyd,
        prompt_embeds=noise(2, 6, 8, seed=3),
        negative_prompt_embeds=noise(2, 6, 8, seed=4),
        output_type="pt",
        height=8,
        width=8,
    ),
    case("consistency", consistency, batch_size=2, guidance_scale=..., output_type="np"),
    case(
        "consistency_times",
        consistency,
        batch_size=2,
        guidance_scale=...,
        output_type="np",
        num_inference_steps=None,
        timesteps=[39, 35, 30, 26, 22, 18, 14, 10, 5, 0],
    ),
    case(
        "super_resolution",
        super_resolution,
        image=noise(2, 3, 8, 8, seed=1).sigmoid(),
        batch_size=2,
        guidance_scale=...,
        output_type="np",
    ),
    case("ace_step", ace_step, prompt="a cat", lyrics="la", audio_duration=4.0, max_text_length=32, guidance_scale=1.0),
    case(
        "ace_step_guided",
        lambda: ace_step(is_turbo=False, model_version="base"),
        prompt="a cat",
        lyrics="la",
        audio_duration=4.0,
        max_text_length=32,
        guidance_scale=3.0,
    ),
]

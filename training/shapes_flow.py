# SPDX-License-Identifier: Apache-2.0
"""Train the bundled `shapes-flow` pipeline: a text-conditioned rectified flow in the format of Stable Diffusion 3.

Loss (Liu, Gong and Liu, 2023, "Flow Straight and Fast", eq. 1; Esser et al., 2024, sections 2 and 3.1), with z0 drawn from the
autoencoder's posterior and z_s = (1 - s) z0 + s eps:

    L = E || transformer(z_s, 1000 s, text(c)) - (eps - z0) ||^2,      logit of s standard normal

A tenth of the captions are empty, and the exponential moving average of the weights is the result. Both text encoders
start from the same weights. Run training/latents.py and training/captions.py first.

Stable Diffusion 3 without its third text encoder gives the transformer `max_sequence_length` (256) tokens that are zero. They
stay equal to one another in every layer, hence n of them act in attention as one whose logit is raised by log n. So one is used
here (`RepeatedToken`), with n = 256 for half the batch, and for the rest n between 1 and 256 (log n uniform), so that a caller
who asks for a shorter `max_sequence_length`, and a faster network, gets the same quality.

The embedding of the time has channels that turn once in six of its thousand units. Minutes of training do not find out that
they say nothing, and what is left of their first weights is noise from one time step to the next, a few per cent of the
clean-data estimate. So the channel of frequency f counts as a smooth window of width `BLUR` leaves it: exp(-(f BLUR)^2/2).

    python training/shapes_flow.py                   # resumes from training/checkpoints/shapes-flow.pt if it is there
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from captions import load_text_model
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from fit import fit, options, replace_folder, write_record
from latents import encode, held_out_pictures, load_autoencoder, training_latents
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import CLIPTextModelWithProjection
from words import build_tokenizer, drop, encoder_config, make_portable, token_ids

ZERO_TOKENS = 256
BLUR = 10.0  # units of time, of 1000


class Blur(nn.Module):
    """Makes the weights of an embedding's quick channels smaller."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        frequency = torch.exp(-math.log(10_000) * torch.arange(channels // 2) / (channels // 2))  # as diffusers' Timesteps
        self.register_buffer("share", torch.exp(-((frequency * BLUR) ** 2) / 2).repeat(2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.share


class RepeatedToken:
    """Joint attention in which the last token of the context counts `counts` times, one number per sample."""

    def __init__(self) -> None:
        self.counts = torch.ones(1)

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        image, context = hidden_states.shape[1], encoder_hidden_states.shape[1]

        def heads(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a, b], 1).unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states), attn.add_q_proj(encoder_hidden_states))
        key = heads(attn.to_k(hidden_states), attn.add_k_proj(encoder_hidden_states))
        value = heads(attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states))
        raised = torch.zeros(len(query), 1, 1, image + context)
        raised[..., -1] = self.counts.log()[:, None, None]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=raised)
        seen, said = mixed.transpose(1, 2).flatten(2).split([image, context], 1)
        return attn.to_out[0](seen), said if attn.context_pre_only else attn.to_add_out(said)


def build_transformer() -> SD3Transformer2DModel:
    """A multimodal transformer of 1.31 M parameters: four layers of width 96, one token per latent pixel."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        joint_attention_dim=128,
        caption_projection_dim=96,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
    )


def blurred(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """A transformer whose time embedding has `Blur`."""
    first = transformer.time_text_embed.timestep_embedder.linear_1
    parametrize.register_parametrization(first, "weight", Blur(first.in_features))
    return transformer


def plain(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """The same network in the layers that diffusers knows."""
    first, found = "time_text_embed.timestep_embedder.linear_1", build_transformer()
    weights = {k: v for k, v in transformer.state_dict().items() if not k.startswith(f"{first}.parametrizations")}
    found.load_state_dict(weights | {f"{first}.weight": transformer.get_submodule(first).weight})
    return found


def velocity(
    parts: dict[str, nn.Module], attention: RepeatedToken, z: Tensor, s: Tensor, ids: Tensor, counts: Tensor
) -> Tensor:
    """The network's answer at level `s` `[n]`, computed as the pipeline does but for the repeated token."""
    outputs = [parts[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    words = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    context = torch.cat([words, torch.zeros_like(words[:, :1])], 1)
    pooled = torch.cat([output[0] for output in outputs], -1)
    attention.counts = counts
    transformer = cast(SD3Transformer2DModel, parts["transformer"])
    return cast(Any, transformer(z, context, pooled, cast(Any, 1000 * s))).sample


def main() -> None:
    arguments = options(__doc__, "shapes-flow", steps=20_000, minutes=30, batch=32, rate=1.5e-3)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    autoencoder = load_autoencoder()
    tokenizer = build_tokenizer()
    means, deviations, captions = training_latents(autoencoder)
    # The pipeline subtracts nothing on its way into the latents, but its decoding reads a shift.
    autoencoder.register_to_config(shift_factor=0.0)
    ids, empty = token_ids(tokenizer, captions), token_ids(tokenizer, [""])
    pictures, held_captions = held_out_pictures()
    held = autoencoder.config["scaling_factor"] * encode(autoencoder, pictures)[0]
    held_ids = token_ids(tokenizer, held_captions)

    config = encoder_config(tokenizer)
    parts: dict[str, nn.Module] = {
        "transformer": blurred(build_transformer()),
        "text_encoder": CLIPTextModelWithProjection(config),
        "text_encoder_2": CLIPTextModelWithProjection(config),
    }
    for name in ("text_encoder", "text_encoder_2"):
        cast(Any, parts[name]).text_model.load_state_dict(load_text_model())
    attention = RepeatedToken()
    cast(SD3Transformer2DModel, parts["transformer"]).set_attn_processor(cast(Any, attention))

    def matching(parts: dict[str, nn.Module], z0: Tensor, tokens: Tensor) -> Tensor:
        n = len(z0)
        s = torch.special.ndtri(((torch.randperm(n) + torch.rand(n)) / n).clamp(1e-4, 1 - 1e-4)).sigmoid()
        eps = torch.randn_like(z0)
        z = torch.lerp(z0, eps, s[:, None, None, None])
        shorter = (torch.rand(n) * math.log(ZERO_TOKENS)).exp().round()
        counts = torch.where(torch.rand(n) < 0.5, torch.full((n,), float(ZERO_TOKENS)), shorter)
        return (velocity(parts, attention, z, s, tokens, counts) - (eps - z0)).square().mean()

    def loss(parts: dict[str, nn.Module], batch: int, _: int) -> Tensor:
        chosen = torch.randint(len(means), (batch,))
        z0 = means[chosen] + deviations[chosen] * torch.randn(batch, *means.shape[1:])
        return matching(parts, z0, drop(ids[chosen], empty))

    @torch.no_grad()
    def held_out_loss(parts: dict[str, nn.Module], half: slice) -> float:
        torch.manual_seed(0)
        cast(SD3Transformer2DModel, parts["transformer"]).set_attn_processor(cast(Any, attention))
        return sum(matching(parts, held[half], held_ids[half]).item() for _ in range(4)) / 4

    def export(parts: dict[str, nn.Module], record: dict[str, Any]) -> None:
        losses = {
            "held_out_loss": held_out_loss(parts, slice(0, 512)),
            "held_out_loss_new_captions": held_out_loss(parts, slice(512, None)),
        }
        print(losses, flush=True)
        pipe = StableDiffusion3Pipeline(
            transformer=plain(cast(SD3Transformer2DModel, parts["transformer"])),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
            vae=autoencoder,
            text_encoder=cast(CLIPTextModelWithProjection, parts["text_encoder"]),
            tokenizer=tokenizer,
            text_encoder_2=cast(CLIPTextModelWithProjection, parts["text_encoder_2"]),
            tokenizer_2=tokenizer,
            text_encoder_3=cast(Any, None),
            tokenizer_3=cast(Any, None),
        )

        def write(folder: Path) -> None:
            pipe.save_pretrained(folder, safe_serialization=True)
            make_portable(folder)
            write_record(folder, "training/shapes_flow.py", record, **losses)

        replace_folder(arguments.out, write)

    fit(parts, loss, arguments, export)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Train the bundled `shapes` pipeline: text-conditioned latent diffusion in the format of Stable Diffusion.

Loss (Ho, Jain and Abbeel, 2020, eq. 14, on latents and with a caption c; Rombach et al., 2022, eq. 3):

    L = E || eps - unet(alpha[t] z0 + sigma[t] eps, t, text(c)) ||^2,      t uniform on 0 ... 999

where z0 is drawn from the autoencoder's posterior, text is trained with the UNet, a tenth of the captions are empty, and the
exponential moving average of the weights is the result. Times are stratified over the batch. Run training/latents.py and
training/captions.py first; text starts from the latter.

So it learns what things look like, but not which of two is on the left: that is settled at the noisiest times, where a wrong
guess of z0 hardly shows in eps. The order of two things in its pictures is therefore up to the seed; `shapes-flow` has learnt
it.

    python training/shapes.py                        # resumes from training/checkpoints/shapes.pt if it is there
    python training/shapes.py --steps 20 --out /tmp/shapes   # a short trial
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from captions import load_text_model
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from fit import fit, options, replace_folder, write_record
from latents import encode, held_out_pictures, load_autoencoder, training_latents
from torch import Tensor, nn
from transformers import CLIPTextModel
from words import build_tokenizer, drop, encoder_config, make_portable, token_ids


def build_unet() -> UNet2DConditionModel:
    """A UNet of 1.08 M parameters on latents `[4, 8, 8]`, with attention to the caption at both resolutions."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's: square roots of the betas linear from 0.00085 to 0.012, nothing clipped."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def main() -> None:
    arguments = options(__doc__, "shapes", steps=20_000, minutes=19, batch=32, rate=1.5e-3)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    autoencoder = load_autoencoder()
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    means, deviations, captions = training_latents(autoencoder)
    ids, empty = token_ids(tokenizer, captions), token_ids(tokenizer, [""])
    pictures, held_captions = held_out_pictures()
    held = autoencoder.config["scaling_factor"] * encode(autoencoder, pictures)[0]
    held_ids = token_ids(tokenizer, held_captions)

    def errors(parts: dict[str, nn.Module], z0: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        eps = torch.randn_like(z0)
        context = parts["text_encoder"](tokens).last_hidden_state
        output = parts["unet"](scheduler.add_noise(z0, eps, cast(Any, t)), t, context).sample
        return (output - eps).square().mean((1, 2, 3))

    def times(n: int) -> Tensor:
        return ((torch.randperm(n) + torch.rand(n)) / n * 1000).long().clamp(max=999)

    def batch_of(batch: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(means), (batch,))
        return means[chosen] + deviations[chosen] * torch.randn(batch, *means.shape[1:]), drop(ids[chosen], empty)

    def loss(parts: dict[str, nn.Module], batch: int, _: int) -> Tensor:
        z0, tokens = batch_of(batch)
        return errors(parts, z0, times(batch), tokens).mean()

    @torch.no_grad()
    def held_out_loss(parts: dict[str, nn.Module], half: slice) -> float:
        torch.manual_seed(0)
        return sum(errors(parts, held[half], times(512), held_ids[half]).mean().item() for _ in range(4)) / 4

    def export(parts: dict[str, nn.Module], record: dict[str, Any]) -> None:
        losses = {
            "held_out_loss": held_out_loss(parts, slice(0, 512)),
            "held_out_loss_new_captions": held_out_loss(parts, slice(512, None)),
        }
        print(losses, flush=True)
        pipe = StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=cast(CLIPTextModel, parts["text_encoder"]),
            tokenizer=tokenizer,
            unet=cast(UNet2DConditionModel, parts["unet"]),
            scheduler=cast(Any, scheduler),
            safety_checker=cast(Any, None),
            feature_extractor=cast(Any, None),
            requires_safety_checker=False,
        )

        def write(folder: Path) -> None:
            pipe.save_pretrained(folder, safe_serialization=True)
            make_portable(folder)
            write_record(folder, "training/shapes.py", record, **losses)

        replace_folder(arguments.out, write)

    text_encoder = CLIPTextModel(encoder_config(tokenizer))
    text_encoder.load_state_dict(load_text_model())
    parts: dict[str, nn.Module] = {"unet": build_unet(), "text_encoder": text_encoder}
    fit(parts, loss, arguments, export)


if __name__ == "__main__":
    main()

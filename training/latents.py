# SPDX-License-Identifier: Apache-2.0
"""Train the autoencoder that the `shapes` and `shapes-flow` pipelines share, and encode the training pictures with it.

Loss, with the picture x in -1 ... 1, the posterior N(m, s^2) of its latents `[4, 8, 8]`, z drawn from it, and the decoder D:

    L = mean |x - D(z)| + mean (x - D(z))^2 + 1e-3 mean (m^2 + s^2 - 1 - log s^2) / 2 .

Afterwards the 1x1 convolutions on either side of the latents are changed so that each channel has mean zero and all have the
same standard deviation; this leaves D(z) as it is. `scaling_factor` then gives the latents unit standard deviation.

    python training/latents.py                 # resumes from training/checkpoints/autoencoder.pt if it is there
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL
from fit import CHECKPOINTS, fit, options, replace_folder, write_record
from scenes import held_out, pictures, shown
from torch import Tensor, nn

COUNT = 40_000
FOLDER = CHECKPOINTS / "autoencoder"


def build_autoencoder() -> AutoencoderKL:
    """A KL autoencoder of 0.68 M parameters, from `[3, 32, 32]` to `[4, 8, 8]`."""
    return AutoencoderKL(
        block_out_channels=cast(Any, (16, 32, 64)),
        down_block_types=cast(Any, ("DownEncoderBlock2D",) * 3),
        up_block_types=cast(Any, ("UpDecoderBlock2D",) * 3),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        force_upcast=False,
    )


def training_pictures() -> tuple[np.ndarray, list[str]]:
    """The training pictures `[40000, 32, 32, 3]` and their captions, drawn once and kept among the checkpoints."""
    images, captions = CHECKPOINTS / "pictures.npy", CHECKPOINTS / "captions.txt"
    if not captions.exists():
        drawn, lines = pictures(COUNT, seed=1)
        CHECKPOINTS.mkdir(parents=True, exist_ok=True)
        np.save(images, drawn)
        captions.write_text("\n".join(lines) + "\n")
    return np.load(images, mmap_mode="r"), captions.read_text().splitlines()


def held_out_pictures(count: int = 1024) -> tuple[np.ndarray, list[str]]:
    """Pictures that are not among the training pictures: of scenes shown there in the first half, of scenes held out then."""
    known, known_captions = pictures(count // 2, seed=2, pairs=shown())
    new, new_captions = pictures(count - count // 2, seed=3, pairs=held_out())
    return np.concatenate([known, new]), known_captions + new_captions


def to_tensor(images: np.ndarray) -> Tensor:
    """`[n, 32, 32, 3]` in 0 ... 255 to `[n, 3, 32, 32]` in -1 ... 1."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: np.ndarray, batch: int = 250) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of each picture, `[n, 4, 8, 8]`, before the scaling factor."""
    means, deviations = [], []
    for begin in range(0, len(images), batch):
        posterior = cast(Any, autoencoder.encode(to_tensor(images[begin : begin + batch]))).latent_dist
        means.append(posterior.mean)
        deviations.append(posterior.std)
    return torch.cat(means), torch.cat(deviations)


@torch.no_grad()
def equalize(autoencoder: AutoencoderKL, images: np.ndarray) -> None:
    """Give the latents of `images` mean zero in each channel and equal deviations, and set the scaling factor."""
    means, deviations = encode(autoencoder, images)
    shift = means.mean((0, 2, 3))
    deviation = (means.var((0, 2, 3)) + deviations.square().mean((0, 2, 3))).sqrt()
    common = deviation.square().mean().sqrt()
    gain = common / deviation
    before, after = cast(nn.Conv2d, autoencoder.quant_conv), cast(nn.Conv2d, autoencoder.post_quant_conv)
    assert before.bias is not None
    assert after.bias is not None
    after.bias += after.weight[..., 0, 0] @ shift
    after.weight /= gain[:, None, None]
    before.weight[:4] *= gain[:, None, None, None]
    before.bias[:4] = (before.bias[:4] - shift) * gain
    before.bias[4:] += 2 * gain.log()
    autoencoder.register_to_config(scaling_factor=round(1 / common.item(), 5))


def load_autoencoder() -> AutoencoderKL:
    """The trained autoencoder."""
    if not FOLDER.exists():
        raise FileNotFoundError(f"There is no autoencoder in {FOLDER}; run `python training/latents.py` first.")
    return AutoencoderKL.from_pretrained(FOLDER).eval().requires_grad_(False)


def training_latents(autoencoder: AutoencoderKL) -> tuple[Tensor, Tensor, list[str]]:
    """Mean and deviation of the scaled latents of the training pictures, `[40000, 4, 8, 8]`, and the captions."""
    images, captions = training_pictures()
    path = CHECKPOINTS / "latents.pt"
    if not path.exists():
        torch.save(encode(autoencoder, images), path)
    means, deviations = torch.load(path, weights_only=True)
    scale = autoencoder.config["scaling_factor"]
    return scale * means, scale * deviations, captions


def main() -> None:
    arguments: argparse.Namespace = options(__doc__, "autoencoder", steps=4000, minutes=8, batch=32, rate=2e-3)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    images, _ = training_pictures()

    def loss(parts: dict[str, nn.Module], batch: int, _: int) -> Tensor:
        x = to_tensor(images[torch.randint(len(images), (batch,)).numpy()])
        autoencoder = cast(AutoencoderKL, parts["autoencoder"])
        posterior = cast(Any, autoencoder.encode(x)).latent_dist
        error = cast(Any, autoencoder.decode(posterior.sample())).sample - x
        m, log_var = posterior.mean, posterior.logvar
        return error.abs().mean() + error.square().mean() + 5e-4 * (m.square() + log_var.exp() - 1 - log_var).mean()

    def export(parts: dict[str, nn.Module], record: dict[str, Any]) -> None:
        autoencoder = cast(AutoencoderKL, parts["autoencoder"])
        with torch.no_grad():
            x = to_tensor(held_out_pictures(256)[0])
            error = (cast(Any, autoencoder(x)).sample - x).square().mean().item()

        def write(folder: Path) -> None:
            autoencoder.save_pretrained(folder)
            write_record(folder, "training/latents.py", record, held_out_squared_error=error)

        print(f"held-out squared error {error:.5f} (of a range of 2)", flush=True)
        replace_folder(FOLDER, write)

    fit({"autoencoder": build_autoencoder()}, loss, arguments, export)
    autoencoder = AutoencoderKL.from_pretrained(FOLDER).eval()
    equalize(autoencoder, images[:4000])
    autoencoder.save_pretrained(FOLDER)
    (CHECKPOINTS / "latents.pt").unlink(missing_ok=True)
    training_latents(autoencoder)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Train the bundled `digits` pipeline: an epsilon-prediction DDPM UNet on scikit-learn's 8x8 digits.

Loss (Ho, Jain and Abbeel, 2020, "Denoising Diffusion Probabilistic Models", eq. 14):

    L = E || eps - unet(alpha[t] x0 + sigma[t] eps, t) ||^2,      t uniform on 0 ... 999

with the exponential moving average of the weights as the result. Times are stratified over the batch, which lowers the
variance of the gradient without changing its mean. The loop is that of training/fit.py; its docstring says how the loop that
made the bundled weights differed. That script also drew the weights of a second network first, so its batches were others.

A fifth of the digits (`HELD_OUT`, fixed by `SPLIT_SEED`) is never shown to the network, so that training/digits_quality.py
can compare its samples with digits it has not seen.

    python training/digits.py                  # resumes from training/checkpoints/digits.pt if it is there
    python training/digits.py --steps 200 --out /tmp/digits --checkpoint /tmp/digits.pt   # a short trial
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from fit import fit, options, replace_folder, write_record
from sklearn.datasets import load_digits
from torch import Tensor, nn

SPLIT_SEED = 0
HELD_OUT = 360


def load_split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The digits in -1 ... 1, `[n, 1, 8, 8]`, and their labels: training images, training labels, held-out images, labels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    labels = torch.tensor(data.target)
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(images)))
    held, train = order[:HELD_OUT], order[HELD_OUT:]
    return images[train], labels[train], images[held], labels[held]


def build_unet() -> UNet2DModel:
    """A UNet of 0.70 M parameters: 2.8 MB in float32."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
        dropout=0.1,
    )


def build_scheduler() -> DDPMScheduler:
    """Linear betas 1e-4 ... 0.02 over 1000 steps; no clipping, so that the step is linear in the network's output."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)


def main() -> None:
    arguments = options(__doc__, "digits", steps=4000, minutes=math.inf, batch=128, rate=1.5e-3)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    images, scheduler = load_split()[0], build_scheduler()

    def loss(parts: dict[str, nn.Module], batch: int, _: int) -> Tensor:
        x0 = images[torch.randint(len(images), (batch,))]
        times = ((torch.arange(batch) + torch.rand(batch)) / batch * 1000).long().clamp(max=999)
        eps = torch.randn_like(x0)
        noisy = scheduler.add_noise(x0, eps, cast(Any, times))
        return (parts["unet"](noisy, times).sample - eps).square().mean()

    def export(parts: dict[str, nn.Module], record: dict[str, Any]) -> None:
        def write(folder: Path) -> None:
            unet = cast(UNet2DModel, parts["unet"])
            DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder, safe_serialization=True)
            write_record(folder, "training/digits.py", record)

        replace_folder(arguments.out, write)

    fit({"unet": build_unet()}, loss, arguments, export, decay=0.999)


if __name__ == "__main__":
    main()

"""Train the bundled `digits` pipeline: an epsilon-prediction DDPM UNet on scikit-learn's 8x8 digits.

Loss (Ho, Jain and Abbeel, 2020, "Denoising Diffusion Probabilistic Models", eq. 14):

    L = E || eps - unet(alpha[t] x0 + sigma[t] eps, t) ||^2,      t uniform on 0 ... 999

with the exponential moving average of the weights as the result. Times are stratified over the batch, which lowers the
variance of the gradient without changing its mean.

A fifth of the digits (`HELD_OUT`, fixed by `SPLIT_SEED`) is never shown to the network, so that training/digits_quality.py
can compare its samples with digits it has not seen.

    python training/digits.py                  # resumes from training/checkpoints/digits.pt if it is there
    python training/digits.py --steps 200      # a short trial
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parent.parent
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


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` beside `path` and move it into place, so that an interruption leaves the old checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    torch.save(state, scratch)
    os.replace(scratch, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "training/checkpoints/digits.pt")
    parser.add_argument("--out", type=Path, default=ROOT / "src/paradiff/models/bundled/digits")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    images = load_split()[0]
    scheduler = build_scheduler()
    unet = build_unet()
    average = build_unet()
    average.load_state_dict(unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=arguments.rate, weight_decay=1e-2)
    done, seconds = 0, 0.0
    if arguments.checkpoint.exists():
        state = torch.load(arguments.checkpoint, weights_only=True)
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        done, seconds = state["done"], state["seconds"]
        print(f"resuming after {done} steps")

    def checkpoint() -> None:
        save_checkpoint(
            arguments.checkpoint,
            {
                "unet": unet.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
                "done": done,
                "seconds": seconds + time.perf_counter() - start,
            },
        )

    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    start = time.perf_counter()
    smoothed = float("nan")
    strata = torch.arange(arguments.batch)
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("training", total=arguments.steps, completed=done, loss=smoothed)
        for step in range(done, arguments.steps):
            fraction = step / arguments.steps
            rate = arguments.rate * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * fraction))
            for group in optimizer.param_groups:
                group["lr"] = rate
            x0 = images[torch.randint(len(images), (arguments.batch,))]
            times = ((strata + torch.rand(arguments.batch)) / arguments.batch * 1000).long().clamp(max=999)
            eps = torch.randn_like(x0)
            noisy = scheduler.add_noise(x0, eps, times)
            loss = (unet(noisy, times).sample - eps).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            decay = min(0.999, (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)
            done = step + 1
            smoothed = loss.item() if math.isnan(smoothed) else 0.98 * smoothed + 0.02 * loss.item()
            progress.update(bar, completed=done, loss=smoothed)
            if done % 500 == 0 or done == arguments.steps:
                checkpoint()
                progress.console.print(f"step {done}  loss {smoothed:.4f}  {time.perf_counter() - start:.0f} s")
    DDPMPipeline(unet=average.eval(), scheduler=scheduler).save_pretrained(arguments.out, safe_serialization=True)
    record = {
        "script": "training/digits.py",
        "seed": arguments.seed,
        "steps": arguments.steps,
        "batch": arguments.batch,
        "rate": arguments.rate,
        "loss": smoothed,
        "seconds": seconds + time.perf_counter() - start,
        "parameters": sum(p.numel() for p in average.parameters()),
        "torch": torch.__version__,
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The training loop of the bundled pipelines: AdamW, cosine rate, moving average of the weights, resumable.

With the share p of the run that is over (of the steps or of the minutes, whichever is further), step n = 0, 1, ... has the rate

    rate min(1, (n + 1) / 200) (1 + cos(pi p)) / 2

by torch's `LambdaLR`; the schedules of `diffusers.optimization` count steps only. The average is diffusers' `EMAModel`, of
decay min(`decay`, n / (n + 9)) after n steps. The bundled weights were made by a loop of the same arithmetic, but for rounding
and for the average after the first step: it kept a tenth of the initial weights, where `EMAModel` keeps none.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "training/checkpoints"


def options(description: str | None, name: str, steps: int, minutes: float, batch: int, rate: float) -> argparse.Namespace:
    """The command line of a training script whose model is called `name`, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps at most")
    parser.add_argument("--minutes", type=float, default=minutes, help="minutes of training at most, earlier runs counted")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINTS / f"{name}.pt")
    parser.add_argument("--save-minutes", type=float, default=3.0, help="minutes between two checkpoints")
    parser.add_argument("--out", type=Path, default=ROOT / "src/paradiff/models/bundled" / name)
    return parser.parse_args()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` beside `path` and move it into place, so that an interruption leaves the old checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    torch.save(state, scratch)
    os.replace(scratch, path)


def replace_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `out`, then put it in place of `out`; configurations lose the path they came from."""
    scratch, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    for folder in (scratch, old):
        shutil.rmtree(folder, ignore_errors=True)
    scratch.mkdir(parents=True)
    write(scratch)
    for file in scratch.rglob("config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
    for file in filter(Path.is_file, scratch.rglob("*")):
        file.chmod(0o644)
    if out.exists():
        out.rename(old)
    scratch.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def fit(
    parts: dict[str, nn.Module],
    loss: Callable[[dict[str, nn.Module], int, int], Tensor],
    arguments: argparse.Namespace,
    export: Callable[[dict[str, nn.Module], dict[str, Any]], None],
    decay: float = 0.998,
) -> dict[str, Any]:
    """Train the parts together and export their moving average at every checkpoint.

    Args:
        parts: the modules whose weights are trained.
        loss: the loss of a fresh batch, given the parts, the batch size and the number of steps done.
        arguments: from `options`.
        export: writes the averaged parts, given also the record of the run so far.
        decay: the largest decay of the average.

    Returns:
        The record of the run, for training.json.
    """
    model = nn.ModuleDict(parts)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    average = EMAModel(model.parameters(), decay=decay, foreach=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, weight_decay=1e-2)
    done, before, smoothed = 0, 0.0, float("nan")
    start = saved = time.perf_counter()

    def over(step: int) -> float:
        minutes = (before + time.perf_counter() - start) / 60
        return min(1.0, max(step / arguments.steps, minutes / arguments.minutes))

    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * over(step))))
    if arguments.checkpoint.exists():
        state = torch.load(arguments.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        done, before, smoothed = state["done"], state["seconds"], state["loss"]
        print(f"resuming after {done} steps", flush=True)

    def record() -> dict[str, Any]:
        return {
            "seed": arguments.seed,
            "steps": done,
            "batch": arguments.batch,
            "rate": arguments.rate,
            "loss": smoothed,
            "minutes": round((before + time.perf_counter() - start) / 60, 2),
            "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
            "hardware": f"{arguments.threads} thread(s), {platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        }

    def save() -> None:
        seconds = before + time.perf_counter() - start
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {
            "schedule": schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "done": done,
            "seconds": seconds,
            "loss": smoothed,
        }
        save_checkpoint(arguments.checkpoint, state)
        rng = torch.get_rng_state()
        average.copy_to(averaged.parameters())
        export(dict(averaged.items()), record())
        torch.set_rng_state(rng)
        print(f"step {done}  loss {smoothed:.4f}  {seconds:.0f} s", flush=True)

    model.train()
    while over(done) < 1:
        value = loss(parts, arguments.batch, done)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.step(model.parameters())
        done += 1
        smoothed = value.item() if math.isnan(smoothed) else 0.99 * smoothed + 0.01 * value.item()
        if time.perf_counter() - saved > 60 * arguments.save_minutes:
            save()
            saved = time.perf_counter()
    save()
    return record()


def write_record(folder: Path, script: str, record: dict[str, Any], **more: Any) -> None:
    """Write training.json."""
    (folder / "training.json").write_text(json.dumps({"script": script} | record | more, indent=2) + "\n")

# SPDX-License-Identifier: Apache-2.0
"""Train the bundled `points-policy`: a diffusion policy that leads a point mass past two discs to a goal (models/plane.py).

Loss (Ho, Jain and Abbeel, 2020, eq. 14, with an observation o; Chi et al., 2023, "Diffusion Policy", eq. 5):

    L = E || eps - unet(alpha[t] a + sigma[t] eps, t, o) ||^2 / alpha[t]^2,      t uniform on 0 ... 99,

where a are the next 16 actions of a demonstration. Its weights are those of v-prediction (Salimans and Ho, 2022): without them
a wrong plan of a very noisy state would hardly count. Levels are the squared-cosine ones. The exponential moving average of the
weights is the result. Times are stratified over the batch.

Demonstrations are paths p[0] ... p[T] that start anywhere with some velocity and end at rest at the goal. A side of each disc
ahead is drawn, both equally likely where the disc is in the middle of the way; from the broken line by these sides a path is
found that makes least

    J = 400 sum |p[k+1] - 2 p[k] + p[k-1]|^2 + 5 sum |p[k+1] - p[k]|^2 + 100 sum relu(MARGIN - clearance(p[k]))^2

by Adam, thousands of them at once. Its actions are those that lead the mass along it: equation (1) of models/plane.py, solved
for a.

    python training/points_policy.py           # resumes from training/checkpoints/points-policy.pt if it is there
    python training/points_policy.py --minutes 1 --out /tmp/points --checkpoint /tmp/points.pt   # a short trial
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDPMScheduler
from fit import fit, options, replace_folder, write_record
from torch import Tensor, nn

from paradiff.models.plane import DISCS, FAST, PULL, RADIUS, clearance, ends_of
from paradiff.models.policy_unet import PolicyUNet

HORIZON = 16
MARGIN = 0.1
"""What demonstrations keep from a disc."""

LENGTHS = (44, 38, 32, 26, 20, 14, 8)
"""Steps of the demonstrations' paths; the longest lead across the whole plane."""

PATHS = 2000
"""Demonstrations of each length."""

HELD_OUT = 0.05


def paths_of(steps: int, count: int) -> tuple[Tensor, Tensor]:
    """Demonstrations: the place before the start, the start and the places after `[n, steps + 2, 2]`, and goals `[n, 2]`."""
    draw = torch.rand(count, 8)
    far, goal = ends_of(draw[:, :4])
    share = steps / LENGTHS[0]
    height = 0.9 - 1.8 * share + 0.12 * (draw[:, 4] - 0.5)
    aside = (0.1 + 0.4 * share) * (2 * draw[:, 5] - 1)
    start = torch.stack([goal[:, 0] + share * (far[:, 0] - goal[:, 0]) + aside, height], 1)
    velocity = torch.randn(count, 2) * 0.015 + torch.tensor([0.0, 0.03])
    velocity = velocity * (draw[:, 6:7] > (0.5 if share == 1 else 0.1))
    free = clearance(start) > 0
    start, goal, velocity = start[free], goal[free], velocity[free]
    return smoothed(broken(start, goal, steps), start, velocity, goal), goal


def broken(start: Tensor, goal: Tensor, steps: int) -> Tensor:
    """`[n, steps - 1, 2]` the places between start and goal on a broken line by sides that are drawn."""
    discs = torch.tensor(DISCS)
    ahead = discs[:, 1] - start[:, 1:]  # [n, 2]
    share = (ahead / (goal[:, 1:] - start[:, 1:])).clamp(min=0)
    across = start[:, :1] + share * (goal[:, :1] - start[:, :1])
    off = across - discs[:, 0]
    side = torch.where(torch.rand_like(off) < torch.sigmoid(off / (0.2 * ahead).clamp(0.01, 0.08)), 1.0, -1.0)
    aside = discs[:, 0] + side * (off * side).clamp(min=RADIUS + MARGIN)
    corners = torch.stack([aside, discs[:, 1].expand_as(aside)], 2)
    corners = torch.where((ahead < -RADIUS)[..., None], start[:, None], corners)
    knots = torch.cat([start[:, None], corners, goal[:, None]], 1)  # [n, 4, 2], their heights increase
    heights = torch.cat([knots[:, :1, 1], knots[:, 1:, 1].cummax(1).values], 1)
    t = torch.arange(1, steps) / steps
    y = start[:, 1:] + t * (goal[:, 1:] - start[:, 1:])  # [n, steps - 1]
    right = torch.searchsorted(heights.contiguous(), y.contiguous()).clamp(1, 3)
    low, high = (heights.gather(1, k) for k in (right - 1, right))
    part = ((y - low) / (high - low).clamp(min=1e-4)).clamp(0, 1)
    x = knots[..., 0].gather(1, right - 1) * (1 - part) + knots[..., 0].gather(1, right) * part
    return torch.stack([x, y], 2)


def smoothed(first: Tensor, start: Tensor, velocity: Tensor, goal: Tensor, rounds: int = 400) -> Tensor:
    """`[n, steps + 2, 2]` the paths that make J least, from the place before the start to the goal."""
    inner = first.clone().requires_grad_()
    optimizer = torch.optim.Adam([inner], lr=0.01)
    head, tail = torch.stack([start - velocity, start], 1), goal[:, None].expand(-1, 2, -1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds)
    for _ in range(rounds):
        path = torch.cat([head, inner, tail], 1)
        near = (MARGIN - clearance(path)).relu()
        cost = 400 * path.diff(n=2, dim=1).square().sum() + 5 * path.diff(dim=1).square().sum() + 100 * near.square().sum()
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
        schedule.step()
    return torch.cat([head, inner.detach(), goal[:, None]], 1)


def windows_of(path: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Observations `[m, 6]` and the actions that follow them `[m, HORIZON, 2]`, at every step of paths that hit nothing."""
    clear = clearance(path[:, 8:]).amin(1) > 0.6 * MARGIN  # the first steps depend on where it began
    clear &= clearance(path).amin(1) > 0
    path, goal = path[clear], goal[clear]
    path = torch.cat([path, goal[:, None].expand(-1, HORIZON + 4, -1)], 1)
    place, velocity = path[:, 1:-1], path.diff(dim=1)
    action = place + velocity[:, :-1] + velocity.diff(dim=1) / PULL
    count = path.shape[1] - 1 - HORIZON
    told = [place[:, :count], FAST * velocity[:, :count], goal[:, None].expand(-1, count, -1)]
    following = action.unfold(1, HORIZON, 1)[:, :count].transpose(2, 3)
    return torch.cat(told, 2).flatten(0, 1), following.flatten(0, 1).clamp(-1, 1)


def demonstrations() -> tuple[Tensor, Tensor]:
    """Observations and actions of all demonstrations."""
    found = [windows_of(*paths_of(steps, PATHS)) for steps in LENGTHS]
    seen, actions = (torch.cat(parts) for parts in zip(*found, strict=True))
    return seen, actions


def build_scheduler() -> DDPMScheduler:
    """Squared-cosine betas over 100 steps, the clean plan within the plane's coordinates, as Diffusion Policy has it."""
    return DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True)


def main() -> None:
    arguments = options(__doc__, "points-policy", steps=16_000, minutes=28, batch=96, rate=2e-3)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    seen, actions = demonstrations()
    order = torch.randperm(len(seen))
    held = order[: int(HELD_OUT * len(seen))][:4096]
    train = order[int(HELD_OUT * len(seen)) :]
    print(f"{len(train)} windows", flush=True)
    scheduler = build_scheduler()

    def error(unet: nn.Module, chosen: Tensor) -> Tensor:
        n = len(chosen)
        t = ((torch.randperm(n) + torch.rand(n)) / n * 100).long().clamp(max=99)
        eps = torch.randn(n, HORIZON, 2)
        noisy = scheduler.add_noise(actions[chosen], eps, cast(Any, t))
        return ((unet(noisy, t, seen[chosen]) - eps).square().mean((1, 2)) / scheduler.alphas_cumprod[t]).mean()

    def loss(parts: dict[str, nn.Module], batch: int, _: int) -> Tensor:
        return error(parts["unet"], train[torch.randint(len(train), (batch,))])

    @torch.no_grad()
    def held_out_loss(unet: nn.Module) -> float:
        torch.manual_seed(0)
        return sum(error(unet, held).item() for _ in range(2)) / 2

    def export(parts: dict[str, nn.Module], record: dict[str, Any]) -> None:
        unet = cast(PolicyUNet, parts["unet"])
        losses = {"windows": len(train), "held_out_loss": held_out_loss(unet)}
        print(losses, flush=True)

        def write(folder: Path) -> None:
            unet.save_pretrained(folder / "unet", safe_serialization=True)
            scheduler.save_pretrained(folder / "scheduler")
            index = {
                "_class_name": "DiffusionPolicy",
                "_diffusers_version": record["diffusers"],
                "scheduler": ["diffusers", "DDPMScheduler"],
                "unet": ["paradiff", "PolicyUNet"],
            }
            (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
            write_record(folder, "training/points_policy.py", record, **losses)

        replace_folder(arguments.out, write)

    fit({"unet": PolicyUNet(horizon=HORIZON)}, loss, arguments, export, decay=0.999)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Robot policies with the structure of LeRobot's and of real-stanford/diffusion_policy's: modules whose method walks.

The first has its loop in a part, takes a time for each row by `torch.full`, and keeps a queue of actions. The second writes
what is known of a trajectory into its state before each network call, and has its scheduler under another name in its loop.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

HORIZON, ACTION, OBSERVED = 16, 2, 3
"""Actions of a trajectory, numbers of an action, numbers of an observation."""
STEPS = 40


class Denoiser(nn.Module):
    """A 1-D convolution over a trajectory `[B, HORIZON, ACTION]`, with its time and an observation as further channels."""

    def __init__(self, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.inward = nn.Conv1d(ACTION + OBSERVED + 1, width, 3, padding=1)
        self.outward = nn.Conv1d(width, ACTION, 3, padding=1)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))

    def forward(self, sample: Tensor, timestep: Any, global_cond: Tensor | None = None, **_: Any) -> Tensor:
        rows = sample.movedim(-1, 1)
        time = torch.as_tensor(timestep, device=sample.device).expand(len(sample)).to(sample.dtype) / 100
        seen = sample.new_zeros(len(sample), OBSERVED) if global_cond is None else global_cond
        beside = torch.cat([seen, time[:, None]], 1)[:, :, None].expand(-1, -1, rows.shape[-1])
        return self.outward(torch.tanh(self.inward(torch.cat([rows, beside], 1)))).movedim(1, -1)


def noise_scheduler() -> Any:
    """The scheduler of both: DDPM with a squared cosine, clipped."""
    return diffusers.DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", clip_sample=True)


class Diffusion(nn.Module):
    """The part of a policy that has its loop."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.noise_scheduler = Denoiser(), noise_scheduler()

    def conditional_sample(
        self, batch_size: int, global_cond: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        rows = (batch_size, HORIZON, ACTION)
        sample = torch.randn(rows, generator=generator).to(self.unet.inward.weight.device)
        self.noise_scheduler.set_timesteps(STEPS)
        for t in self.noise_scheduler.timesteps:
            times = torch.full(sample.shape[:1], t, dtype=torch.long, device=sample.device)
            output = self.unet(sample, times, global_cond=global_cond)
            sample = self.noise_scheduler.step(output, t, sample, generator=generator).prev_sample
        return sample


class QueuedPolicy(nn.Module):
    """A policy that hands out the actions of a trajectory one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion = Diffusion()
        self.queue: list[Tensor] = []

    @torch.no_grad()
    def select_action(self, observation: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The next action `[B, ACTION]`."""
        if not self.queue:
            actions = self.diffusion.conditional_sample(len(observation), observation, generator)
            self.queue = list(actions[:, :8].unbind(1))
        return self.queue.pop(0)


class MaskedPolicy(nn.Module):
    """A policy whose trajectory begins at what is observed."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.noise_scheduler = Denoiser(), noise_scheduler()
        self.step_options: dict[str, Any] = {}

    def conditional_sample(
        self,
        known: Tensor,
        mask: Tensor,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        model, scheduler = self.model, self.noise_scheduler
        trajectory = torch.randn(known.shape, generator=generator).to(known.device)
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            trajectory[mask] = known[mask]
            output = model(trajectory, t, global_cond=global_cond)
            trajectory = scheduler.step(output, t, trajectory, generator=generator, **options).prev_sample
        trajectory[mask] = known[mask]
        return trajectory

    @torch.no_grad()
    def predict_action(self, observation: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The trajectory from the observed place on."""
        known = observation.new_zeros(len(observation), HORIZON, ACTION)
        known[:, 0] = observation[:, :ACTION]
        mask = torch.zeros_like(known, dtype=torch.bool)
        mask[:, 0] = True
        return {"action": self.conditional_sample(known, mask, observation, generator, **self.step_options)}

# SPDX-License-Identifier: Apache-2.0
"""The network of a diffusion policy: a U-Net over the steps of a plan, told its time and an observation by FiLM.

Its structure is that of the 1-D U-Net of Chi et al., 2023, "Diffusion Policy" (appendix A.2): blocks of two convolutions with
group norms, each scaled and shifted by a linear function of time and observation (FiLM; Perez et al., 2018), residual, with
skips between the two halves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class PolicyUNet(ModelMixin, ConfigMixin):
    """The noise of a plan, predicted from the noisy plan, its time, and what is observed.

    Args:
        horizon: Steps of a plan H, a multiple of 2 for each resolution but the last.
        action_size: Numbers of an action A.
        observation_size: Numbers of an observation O.
        block_out_channels: Channels at each resolution.
        kernel_size: Of the convolutions along the plan.
        norm_num_groups: Of the group norms.
        time_channels: Numbers of the embedding of a time.
        observation_channels: Numbers of the embedding of an observation.
        skip: Times of a squared-cosine schedule, of which the output is sigma x + alpha f with the U-Net f, as v-prediction
            has it: so the clean plan of a very noisy one does not magnify f's errors. None for f alone.
    """

    @register_to_config
    def __init__(
        self,
        horizon: int = 16,
        action_size: int = 2,
        observation_size: int = 6,
        block_out_channels: Sequence[int] = (32, 64, 80),
        kernel_size: int = 3,
        norm_num_groups: int = 8,
        time_channels: int = 32,
        observation_channels: int = 40,
        skip: int | None = 100,
    ) -> None:
        super().__init__()
        widths, told = list(block_out_channels), time_channels + observation_channels
        self.times = Timesteps(time_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_channels, 4 * time_channels, act_fn="mish", out_dim=time_channels)
        wide = 2 * observation_channels
        layers = (
            nn.Linear(observation_size, wide),
            nn.Mish(),
            nn.Linear(wide, wide),
            nn.Mish(),
            nn.Linear(wide, observation_channels),
        )
        self.observation_embedding = nn.Sequential(*layers)

        def pair(before: int, after: int) -> nn.ModuleList:
            one, other = (FilmBlock(b, after, told, kernel_size, norm_num_groups) for b in (before, after))
            return nn.ModuleList([one, other])

        self.down = nn.ModuleList([pair(b, a) for b, a in zip([action_size, *widths[:-1]], widths, strict=True)])
        self.shrink = nn.ModuleList([nn.Conv1d(w, w, 3, stride=2, padding=1) for w in widths[:-1]])
        self.middle = pair(widths[-1], widths[-1])
        self.up = nn.ModuleList([pair(2 * b, a) for b, a in zip(widths[:0:-1], widths[-2::-1], strict=True)])
        self.grow = nn.ModuleList([nn.ConvTranspose1d(w, w, 4, stride=2, padding=1) for w in widths[-2::-1]])
        last = _convolved(2 * widths[0], widths[0], kernel_size, norm_num_groups)
        self.last = nn.Sequential(*last, nn.Conv1d(widths[0], action_size, 1))

    def forward(self, sample: Tensor, timestep: Tensor, observation: Tensor) -> Tensor:
        """The noise.

        Args:
            sample: Noisy plans `[R, H, A]`.
            timestep: Times `[R]`.
            observation: What is observed `[R, O]`.

        Returns:
            Noises `[R, H, A]`.
        """
        embedded = self.time_embedding(self.times(timestep).to(sample.dtype))
        told = torch.cat([embedded, self.observation_embedding(observation.to(sample.dtype))], 1)
        x, kept = sample.transpose(1, 2), []
        for i, blocks in enumerate(self.down):
            x = _through(blocks, x, told)
            kept.append(x)
            x = self.shrink[i](x) if i < len(self.shrink) else x
        x = _through(self.middle, x, told)
        for blocks, grow in zip(self.up, self.grow, strict=True):
            x = grow(_through(blocks, torch.cat([x, kept.pop()], 1), told))
        output = self.last(torch.cat([x, kept.pop()], 1)).transpose(1, 2)
        times = self.config["skip"]
        if times is None:
            return output
        angle = (((timestep.to(sample.dtype) + 1) / times + 0.008) / 1.008 * (math.pi / 2))[:, None, None]
        return angle.sin() * sample + angle.cos() * output


class FilmBlock(nn.Module):
    """Two convolutions, scaled and shifted between them, beside a residual.

    Args:
        before: Channels of its input.
        after: Channels of its output.
        told: Numbers that scale and shift.
        kernel_size: Of the convolutions.
        groups: Of the norms.
    """

    def __init__(self, before: int, after: int, told: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_convolved(before, after, kernel_size, groups))
        self.film = nn.Sequential(nn.Mish(), nn.Linear(told, 2 * after))
        self.second = nn.Sequential(*_convolved(after, after, kernel_size, groups))
        self.beside = nn.Conv1d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """The block's output `[R, after, H]` for x `[R, before, H]` and told `[R, told]`."""
        scale, shift = self.film(told)[..., None].chunk(2, 1)
        return self.second(self.first(x) * (1 + scale) + shift) + self.beside(x)


def _through(blocks: nn.Module, x: Tensor, told: Tensor) -> Tensor:
    """The output of blocks, one after the other."""
    for block in blocks.children():
        x = block(x, told)
    return x


def _convolved(before: int, after: int, kernel_size: int, groups: int) -> list[nn.Module]:
    return [nn.Conv1d(before, after, kernel_size, padding=kernel_size // 2), nn.GroupNorm(groups, after), nn.Mish()]

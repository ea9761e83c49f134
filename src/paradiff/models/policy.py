# SPDX-License-Identifier: Apache-2.0
"""Diffusion policies as folders: a `PolicyUNet` and a scheduler config, as `points-policy` is bundled.

What diffusers has no pipeline for is laid out as its pipelines are: `model_index.json` names a `DiffusionPolicy`, `unet/` and
`scheduler/` hold its parts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from paradiff.chain.table import Table
from paradiff.models.files import POLICY, components, folder_of, is_policy, read_index
from paradiff.models.network import load_network
from paradiff.models.pixel import scheduler_config, table_of
from paradiff.models.policy_unet import PolicyUNet


@dataclass(frozen=True, eq=False)
class PolicyModel:
    """A policy's network, its scheduler's config, and the shape of one plan. Models are compared by identity.

    Attributes:
        name: As the user gave it.
        unet: The network, in evaluation mode.
        config: The config of the scheduler that came with it.
    """

    name: str
    unet: PolicyUNet
    config: Mapping[str, Any]

    def __repr__(self) -> str:
        count = sum(weight.numel() for weight in self.unet.parameters())
        return (
            f"PolicyModel {self.name!r}: plans of shape {self.shape}, observations of {self.observed} numbers, "
            f"{count / 1e6:.3g} million weights, {self.unet.dtype} on {self.unet.device}"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of one plan: steps H, numbers of an action A."""
        return self.unet.config["horizon"], self.unet.config["action_size"]

    @property
    def observed(self) -> int:
        """Numbers of an observation, O."""
        return self.unet.config["observation_size"]

    def __call__(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        """The denoiser: the network's output for noisy plans `[R, H, A]` at times `[R]`, given observations `[R, O]`."""
        return self.unet(x, t, observation)

    def table(self, sampler: str, steps: int, *, eta: float = 0.0) -> Table:
        """The table of a sampler on this model's schedule: see `Model.table`."""
        return table_of(self.config, sampler, steps, eta=eta)


def load_policy(
    model: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PolicyModel:
    """Loads a diffusion policy.

    Args:
        model: `points-policy`, a folder of its layout, or a hub id.
        device: Where the network goes.
        dtype: The network's dtype.

    Raises:
        ValueError: If the folder holds no policy, its weights are not safetensors, or do not fit its config.
    """
    index = read_index(model)
    if not is_policy(index):
        raise ValueError(
            f"{os.fspath(model)!r} holds a {index['_class_name']}, and no {POLICY} of a PolicyUNet and a scheduler; load a "
            "pipeline by paradiff.models.load_pipeline, and give a policy of another library to paradiff.parallelize"
        )
    folder, name = folder_of(model), os.fspath(model)
    config = scheduler_config(name, folder, components(index))
    unet = cast(PolicyUNet, load_network(name, PolicyUNet, folder, "unet", dtype))
    torch.nn.Module.to(unet, torch.device(device))
    return PolicyModel(name, unet.eval().requires_grad_(False), config)

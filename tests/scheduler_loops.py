# SPDX-License-Identifier: Apache-2.0
"""What the tests of probing share: diffusers' own loop and the recurrence of a table, on a small nonlinear network."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from paradiff import Table
from paradiff.samplers.scheduler.probe import Increments

SHAPE = (2, 3, 4, 4)


def network(x: Tensor, t: Tensor) -> Tensor:
    """A nonlinear network for states `[R, ...]` at times `[R]` or one time, entry by entry."""
    t = t.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t.to(x.dtype)
    return torch.tanh(0.3 * x) * torch.cos(t / 300) + 0.1 * x


def start_of(scheduler: Any, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (x * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)


def walk_scheduler(
    scheduler: Any, x: Tensor, generator: Any = None, timesteps: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """All states of diffusers' own loop, on a copy."""
    own = copy.deepcopy(scheduler)
    if "generator" in inspect.signature(own.step).parameters:
        options["generator"] = generator
    states = [x]
    for t in own.timesteps if timesteps is None else timesteps:
        seen = own.scale_model_input(states[-1], t) if hasattr(own, "scale_model_input") else states[-1]
        states.append(own.step(network(seen, t), t, states[-1], return_dict=False, **options)[0])
    return states


def walk_table(table: Table, x: Tensor, noise: Increments) -> list[Tensor]:
    """All states of equation (1) of chain/table.py, in float64."""
    states, outputs = [x.double()], []
    for i in range(table.steps):
        m = network(states[i] * table.scale[i], table.t[i])
        outputs.append(table.convert(slice(i, i + 1), states[i][None], m[None])[0])
        new = table.c[i] * noise.draw(0, range(i, i + 1))[0].double()
        for j in range(min(table.band, i + 1)):
            new = new + table.a[i, j] * states[i - j] + table.b[i, j] * outputs[i - j]
        states.append(new)
    return states


def gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference at a node beside the largest entry there."""
    return max(float((o.double() - t.double()).abs().max() / t.double().abs().max()) for o, t in zip(ours, theirs, strict=True))

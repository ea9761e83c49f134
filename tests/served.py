# SPDX-License-Identifier: Apache-2.0
"""A small model for servers: the exact network of a mixture, whose means a label moves, on a schedule of 1000 times."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from paradiff import samplers
from paradiff.chain.table import Table
from paradiff.errors import refuse_unknown
from paradiff.methods.presets import sequential
from paradiff.planning.latency import LatencyCurve
from paradiff.samplers.schedule import Schedule
from paradiff.serving import Engine, SampleRequest, ServedModel
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.loop import sample

SHAPE = (1, 4, 4)
SCHEDULE = Schedule.linear()
LEVELS = (1 - SCHEDULE.betas).cumprod(0)
MEANS = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
WIDTH = 0.3  # standard deviation of each of the mixture's parts

FLAT = LatencyCurve({1: 1.0, 2: 1.0, 4096: 1.0})
"""A device to which rows cost nothing."""

STEEP = LatencyCurve({1: 1.0, 2: 2.0})
"""One that is full with a single row."""


def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The noise in states x `[R, 1, 4, 4]` at times t, of data whose means are moved by a tenth of y."""
    level = LEVELS[t.round().long()].to(x.dtype)[:, None]
    flat = x.flatten(1)
    means = MEANS + 0.1 * y[:, None, None]
    variance = level * WIDTH**2 + 1 - level
    logits = -(flat[:, None] - level.sqrt()[..., None] * means).square().sum(2) / (2 * variance)
    mean = (logits.softmax(1)[..., None] * means).sum(1)
    clean = mean + level.sqrt() * WIDTH**2 / variance * (flat - level.sqrt() * mean)
    return ((flat - level.sqrt() * clean) / (1 - level).sqrt()).view_as(x)


def chain(request: SampleRequest) -> Table:
    """Chains of both kinds, of one step and of two; `halves` has no whole times."""
    name = request.sampler or "ddim"
    refuse_unknown("sampler", name, ["ddim", "ddpm", "dpmpp_2m", "halves"])
    steps = request.steps or 20
    if name == "halves":
        table = samplers.ddim(SCHEDULE, steps)
        return dataclasses.replace(table, t=table.t + 0.25)
    make: Any = getattr(samplers, name)
    return make(SCHEDULE, steps)


def model(**options: Any) -> ServedModel:
    """The model as it is served."""
    given = {"denoiser": network, "shape": SHAPE, "chain": chain, "conditioning": {"y": torch.tensor(0.0)}}
    return ServedModel(**given | options)


def engine(curve: LatencyCurve = FLAT, served: ServedModel | None = None, **options: Any) -> Engine:
    """An engine of it, on a made-up device."""
    return Engine(model() if served is None else served, curve=curve, check=False, **options)


def alone(request: SampleRequest) -> Tensor:
    """The sequential sample of a request by itself."""
    y = torch.tensor([float(request.conditioning.get("y", 0.0))])
    noise = model().noise(request, torch.device("cpu"))
    return sample(Evaluator(network, conditioning={"y": y}), chain(request), noise, sequential(), check="off").sample[0]


def rms(one: Tensor, other: Tensor) -> float:
    """Root mean square difference."""
    return float((one - other).square().mean().sqrt())

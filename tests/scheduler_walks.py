# SPDX-License-Identifier: Apache-2.0
"""The samplers' own tables walked beside diffusers' schedulers of the same names, in float64."""

from __future__ import annotations

import diffusers
import torch
from textbook import SHAPE, largest_gap, network, start_and_noise, walk
from torch import Tensor

from paradiff.chain.table import Table


class Wide(Tensor):
    """A float64 tensor that stays so: some schedulers cast states to float32 in each step, which costs 1e-6 in 100."""

    def to(self, *_: object, **__: object) -> Tensor:
        return self


def walk_scheduler(scheduler: diffusers.SchedulerMixin, x: Tensor, **options: object) -> list[Tensor]:
    """The states of diffusers' own loop."""
    states = [x]
    for t in scheduler.timesteps:
        sample = states[-1][None].as_subclass(Wide)
        m = network(scheduler.scale_model_input(sample, t), float(t))
        states.append(scheduler.step(m, t, sample, **options).prev_sample[0].as_subclass(Tensor))
    return states


def draws_of(table: Table, every: bool) -> list[Tensor]:
    """A generator's draws in the order of a sequential run: one a step, where the scheduler draws."""
    generator, zero = torch.Generator().manual_seed(7), torch.zeros(SHAPE, dtype=torch.float64)
    return [
        torch.randn((1, *SHAPE), generator=generator, dtype=torch.float64)[0] if every or table.t[i] > 0 else zero
        for i in range(table.steps)
    ]


def gap_to_scheduler(
    table: Table, scheduler: diffusers.SchedulerMixin, every: bool = True, scale: float = 1.0, **options: object
) -> float:
    x = start_and_noise(0)[0] * scale * table.start_scale
    if hasattr(scheduler, "sigmas"):
        # Theirs are float32, interpolated at float32 times, which round by 3e-5 near 999: where a cosine schedule's ratio grows
        # by a tenth a unit of time, that is 3e-6 of it. Once seen to agree both are made float64.
        ratio = table.sigma if table.prediction == "flow" else table.sigma / table.alpha
        torch.testing.assert_close(scheduler.sigmas.double(), ratio, rtol=3e-6, atol=1e-7)
        torch.testing.assert_close(scheduler.timesteps.double(), table.t[:-1], rtol=0, atol=1e-4)
        scheduler.sigmas, scheduler.timesteps = ratio, table.t[:-1]
        scheduler.set_begin_index(0)
    if table.stochastic:
        options["generator"] = torch.Generator().manual_seed(7)
    ours = walk(table, x, draws_of(table, every))
    return largest_gap(ours, walk_scheduler(scheduler, x, **options))

# SPDX-License-Identifier: Apache-2.0
"""The sampler of rectified flows, on the line alpha + sigma = 1: `flow_euler`, a `Table` for any number of steps."""

from __future__ import annotations

import torch

from paradiff.chain.home import made_at_home
from paradiff.chain.table import Table
from paradiff.samplers.forms import with_end
from paradiff.samplers.schedule import flow_sigmas


@made_at_home
def flow_euler(steps: int, *, shift: float = 1.0, train_steps: int = 1000) -> Table:
    """Euler's method on a rectified flow (Liu, Gong and Liu, arXiv 2209.03003, section 2.1; diffusers'
    FlowMatchEulerDiscreteScheduler), for a network that predicts m = eps - x0 at time T s:

        x' = x + (s' - s) m

    Args:
        steps: N, at least 1.
        shift: See `flow_sigmas`.
        train_steps: T, the scale of the times.

    Raises:
        ValueError: If an argument is out of range.
    """
    level = flow_sigmas(steps, shift, train_steps)
    b = level.diff()[:, None]
    times = with_end(level[:-1] * train_steps)
    return Table(
        name="flow_euler",
        prediction="flow",
        t=times,
        alpha=1 - level,
        sigma=level,
        a=torch.ones_like(b),
        b=b,
        c=torch.zeros_like(level[1:]),
    )

# SPDX-License-Identifier: Apache-2.0
"""Samplers of variance-exploding states, alpha = 1 with the noise ratio as sigma: `euler`, `euler_ancestral`, `heun`.

Each function returns the `Table` of one published sampler at one number of steps, written as equation (1) of forms.py, which
explains the arguments that several share and the errors that all raise. The network sees x/sqrt(sigma^2 + 1).
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.chain.prediction import Prediction
from paradiff.chain.table import Table
from paradiff.errors import refuse_unknown, require_truth
from paradiff.samplers.forms import Clipping, Final, descending, in_outputs, last_ratio, refuse_other_kinds, with_end
from paradiff.samplers.schedule import Schedule, Spacing, fractional_times, karras_ratios


@made_at_home
def euler(
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = "linspace",
    offset: int = 0,
    prediction: Prediction = "epsilon",
    karras: bool = False,
    final: Final = "zero",
) -> Table:
    """Euler's method on the probability-flow ODE in the noise ratio (Karras et al., arXiv 2206.00364, eq. 1 and
    algorithm 1 without its second stage; diffusers' EulerDiscreteScheduler without churn):

        x' = x + (sigma' - sigma) (x - D)/sigma

    Args:
        spacing: Which times are visited; those of linspace are not rounded, and the ratio is interpolated.
        karras: Whether to space the ratios between the first and the last one by eq. 5 of the paper (rho = 7) instead.
        final: Whether the last step lands on 0 or on the smallest ratio of the schedule.

    Raises:
        ValueError: See forms.py; also if the ratios rise.
    """
    times, sigma = _ratios(schedule, steps, spacing, offset, karras, final)
    shrink = sigma[1:] / sigma[:-1]
    return _exploding(
        name="euler",
        spacing=spacing,
        prediction=prediction,
        times=times,
        sigma=sigma,
        state=shrink[:, None],
        clean=1 - shrink[:, None],
    )


@made_at_home
def euler_ancestral(
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = "linspace",
    offset: int = 0,
    prediction: Prediction = "epsilon",
) -> Table:
    """Euler's method down to less noise than the next node has, then fresh noise up to it (k-diffusion's
    `sample_euler_ancestral` with eta = 1; diffusers' EulerAncestralDiscreteScheduler):

        x' = x + (down - sigma) (x - D)/sigma + up z,    down = sigma'^2/sigma,    up = sqrt(sigma'^2 - down^2)

    In these coordinates it is `ddpm` at fractional times. Arguments as for `euler`.

    Raises:
        ValueError: See forms.py; also if the ratios rise.
    """
    times, sigma = _ratios(schedule, steps, spacing, offset)
    before, after = sigma[:-1], sigma[1:]
    shrink = (after / before) ** 2
    up = after * ((before - after) * (before + after)).sqrt() / before
    return _exploding(
        name="euler_ancestral",
        spacing=spacing,
        prediction=prediction,
        times=times,
        sigma=sigma,
        state=shrink[:, None],
        clean=1 - shrink[:, None],
        c=up,
    )


@made_at_home
def heun(
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = "linspace",
    offset: int = 0,
    prediction: Prediction = "epsilon",
    karras: bool = False,
    clip: Clipping | None = None,
) -> Table:
    """Heun's method on the probability-flow ODE in the noise ratio (Karras et al., arXiv 2206.00364, algorithm 1;
    diffusers' HeunDiscreteScheduler). Both network calls of a step are nodes, the second at the predicted state y:

        y  = x + (sigma' - sigma) (x - D(x))/sigma                                   node 2k to node 2k+1
        x' = x + (sigma' - sigma)/2 [ (x - D(x))/sigma + (y - D(y))/sigma' ]         node 2k+1 (and 2k) to node 2k+2

    The last step, to sigma' = 0, has no second call: N steps are a table of 2N - 1, of band 2, where nodes 2k-1 and 2k
    share a level and a time.

    Args:
        steps: N, from 1 to T; the network is called 2N - 1 times.
        spacing: Which times are visited; those of linspace are not rounded, and the ratio is interpolated.
        karras: As for `euler`.
        clip: Limit on the clean-data estimate (chain/clipping.py), in both stages.

    Raises:
        ValueError: See forms.py; also if the ratios rise.
    """
    times, levels = _ratios(schedule, steps, spacing, offset, karras)
    node = (torch.arange(2 * steps) + 1) // 2
    state, clean = torch.zeros(2, 2 * steps - 1, 2, dtype=torch.float64)
    shrink = levels[1:] / levels[:-1]
    state[0::2, 0], clean[0::2, 0] = shrink, 1 - shrink
    before, after = levels[:-2], levels[1:-1]
    half_first, half_second = (after - before) / (2 * before), (after - before) / (2 * after)
    state[1::2] = torch.stack([half_second, 1 + half_first], dim=1)
    clean[1::2] = torch.stack([-half_second, -half_first], dim=1)
    return _exploding(
        name="heun",
        spacing=spacing,
        prediction=prediction,
        times=times[node[:-1]],
        sigma=levels[node],
        state=state,
        clean=clean,
        clip=clip,
    )


def _ratios(
    schedule: Schedule, steps: int, spacing: Spacing, offset: int, karras: bool = False, final: Final = "zero"
) -> tuple[Tensor, Tensor]:
    """`[N]` times and `[N+1]` noise ratios of a variance-exploding sampler."""
    refuse_other_kinds(schedule, steps)
    refuse_unknown("final", final, get_args(Final))
    require_truth("karras", karras)
    times = fractional_times(schedule.train_steps, steps, spacing, offset)
    ratio = schedule.ratio_at(times)
    if karras:
        ratio = karras_ratios(float(ratio[-1]), float(ratio[0]), steps)
        times = schedule.time_of(ratio)
    return times, descending(torch.cat([ratio, last_ratio(schedule, final)]))


def _exploding(
    *,
    name: str,
    spacing: Spacing,
    prediction: Prediction,
    times: Tensor,
    sigma: Tensor,
    state: Tensor,
    clean: Tensor,
    c: Tensor | None = None,
    clip: Clipping | None = None,
) -> Table:
    """A table in variance-exploding coordinates. Its start has the deviation of pure noise at the first level, or with
    leading spacing that of noised data of variance one, as in diffusers."""
    alpha, root = torch.ones_like(sigma), (sigma**2 + 1).sqrt()
    a, b = in_outputs(prediction, alpha, sigma, state, clean)
    c = torch.zeros_like(sigma[1:]) if c is None else c
    start = float(root[0] if spacing == "leading" else sigma[0])
    return Table(
        name=name,
        prediction=prediction,
        t=with_end(times),
        alpha=alpha,
        sigma=sigma,
        a=a,
        b=b,
        c=c,
        scale=1 / root,
        start_scale=start,
        clip=clip,
    )

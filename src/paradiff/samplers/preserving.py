# SPDX-License-Identifier: Apache-2.0
"""Samplers of variance-preserving states, alpha^2 + sigma^2 = 1: `ddim`, `ddpm`, `dpmpp_2m`.

Each function returns the `Table` of one published sampler at one number of steps, written as equation (1) of forms.py, which
explains the arguments that several share and the errors that all raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from paradiff.chain.home import made_at_home
from paradiff.chain.prediction import Prediction, clean_coefficients
from paradiff.chain.table import Table
from paradiff.errors import are_whole, is_real, refuse_unknown, require_truth, shown
from paradiff.samplers.forms import Clipping, Final, descending, in_outputs, last_ratio, refuse_other_kinds, with_end
from paradiff.samplers.schedule import Schedule, Spacing, karras_ratios, spaced_times

Landing = Literal["next", "stride"]
Variance = Literal["fixed_small", "fixed_large"]


@made_at_home
def ddim(
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    spacing: Spacing = "leading",
    offset: int = 0,
    prediction: Prediction = "epsilon",
    set_alpha_to_one: bool = True,
    clip: Clipping | None = None,
    clipped_epsilon: bool = False,
    landing: Landing = "next",
) -> Table:
    """DDIM (Song, Meng and Ermon, arXiv 2010.02502, eq. 12 and 16; diffusers' DDIMScheduler):

        x' = alpha' D + sqrt(sigma'^2 - c^2) (x - alpha D)/sigma + c z,
        c = eta (sigma'/sigma) sqrt(1 - alpha^2/alpha'^2)

    Args:
        eta: 0 is deterministic, 1 has the noise of DDPM; in [0, 1].
        set_alpha_to_one: Whether the last step lands on clean data, or on the first level of the schedule.
        clipped_epsilon: Whether the second term, too, sees the limited D. If not, as in diffusers' pipelines, it keeps
            the network's own epsilon, and the weight of the limit is alpha'/b instead of 1/q.
        landing: `next` lands on the level of the next node, as in the paper; `stride` on that of time t - T // N, as
            diffusers does: the same for leading spacing, slightly off for the others.

    Raises:
        ValueError: See forms.py; also if `eta` is outside [0, 1], or a limited step has no room for its limit.
    """
    refuse_other_kinds(schedule, steps)
    refuse_unknown("landing", landing, get_args(Landing))
    require_truth("set_alpha_to_one", set_alpha_to_one)
    require_truth("clipped_epsilon", clipped_epsilon)
    if not is_real(eta) or not 0 <= eta <= 1:
        raise ValueError(f"eta is {shown(eta)}; it must lie in [0, 1], from deterministic (0) to the noise of DDPM (1)")
    times = spaced_times(schedule.train_steps, steps, spacing, offset)
    final = torch.ones(1, dtype=torch.float64) if set_alpha_to_one else schedule.alpha_bar[:1]
    if landing == "next":
        landed = torch.cat([schedule.alpha_bar[times[1:]], final])
    else:
        target = times - schedule.train_steps // steps
        landed = torch.where(target >= 0, schedule.alpha_bar[target.clamp(min=0)], final)
    alpha_bar = schedule.alpha_bar[times]
    alpha, sigma, alpha_to, sigma_to = (v.sqrt() for v in (alpha_bar, 1 - alpha_bar, landed, 1 - landed))
    c = float(eta) * sigma_to / sigma * (1 - alpha_bar / landed).sqrt()
    direction = (sigma_to**2 - c**2).clamp(min=0).sqrt()
    state, clean = direction / sigma, alpha_to - alpha * direction / sigma
    weight = None
    if clip is not None and not clipped_epsilon:
        if (clean < 1e-9 * alpha_to).any():
            raise ValueError(
                "clip was given for a last step that begins and ends at training time 0 (set_alpha_to_one=False), "
                "where a raw epsilon leaves no room for a limit; set an offset of 1, set_alpha_to_one=True or "
                "clipped_epsilon=True"
            )
        weight = alpha_to / (clean * clean_coefficients(prediction, alpha, sigma)[1])
    alpha, sigma = torch.cat([alpha, alpha_to[-1:]]), torch.cat([sigma, sigma_to[-1:]])
    a, b = in_outputs(prediction, alpha, sigma, state[:, None], clean[:, None])
    reached = torch.stack([alpha_to, sigma_to], dim=1)
    return Table(
        name="ddim",
        prediction=prediction,
        t=with_end(times),
        alpha=alpha,
        sigma=sigma,
        a=a,
        b=b,
        c=c,
        reached=reached,
        clip=clip,
        clip_weight=weight,
    )


@made_at_home
def ddpm(
    schedule: Schedule,
    steps: int,
    *,
    variance: Variance = "fixed_small",
    spacing: Spacing = "leading",
    offset: int = 0,
    prediction: Prediction = "epsilon",
    clip: Clipping | None = None,
) -> Table:
    """Ancestral sampling (Ho, Jain and Abbeel, arXiv 2006.11239, eq. 6, 7 and algorithm 2; diffusers' DDPMScheduler).
    With beta = 1 - alpha^2/alpha'^2, the variance of the forward step that is undone:

        x' = (alpha' beta/sigma^2) D + (alpha sigma'^2/(alpha' sigma^2)) x + c z

    `fixed_small` has c^2 = beta sigma'^2/sigma^2, the posterior's; `fixed_large` has c^2 = beta, which adds more noise
    than the process has and is excused from the table's variance check. A step that begins at time 0 adds none. As in
    diffusers any other last step does: `fixed_small` c = 1e-10 (its floor on the variance), `fixed_large` sqrt(beta).

    Args:
        variance: Which noise.

    Raises:
        ValueError: See forms.py.
    """
    refuse_other_kinds(schedule, steps)
    refuse_unknown("variance", variance, get_args(Variance))
    times = spaced_times(schedule.train_steps, steps, spacing, offset)
    alpha_bar = torch.cat([schedule.alpha_bar[times], torch.ones(1, dtype=torch.float64)])
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    beta = 1 - alpha_bar[:-1] / alpha_bar[1:]
    state = alpha[:-1] / alpha[1:] * (sigma[1:] / sigma[:-1]) ** 2
    clean = alpha[1:] * beta / sigma[:-1] ** 2
    small = (beta * (sigma[1:] / sigma[:-1]) ** 2).clamp(min=1e-20)
    c = torch.where(times > 0, small if variance == "fixed_small" else beta, 0.0).sqrt()
    a, b = in_outputs(prediction, alpha, sigma, state[:, None], clean[:, None])
    exact = variance == "fixed_small"
    return Table(
        name="ddpm",
        prediction=prediction,
        t=with_end(times),
        alpha=alpha,
        sigma=sigma,
        a=a,
        b=b,
        c=c,
        clip=clip,
        exact_variance=exact,
    )


@made_at_home
def dpmpp_2m(
    schedule: Schedule,
    steps: int,
    *,
    spacing: Spacing = "linspace",
    offset: int = 0,
    prediction: Prediction = "epsilon",
    karras: bool = False,
    lower_order_final: bool = True,
    final: Final = "zero",
    clip: Clipping | None = None,
    restarts: Sequence[int] = (),
) -> Table:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2; diffusers' DPMSolverMultistepScheduler with its
    default order 2 and midpoint rule). With h = log(ratio/ratio') and h0 the h of the step before:

        x' = (sigma'/sigma) x + alpha' (1 - exp(-h)) [ D + (h/(2 h0)) (D - D before) ]

    The first step, those in `restarts` and the last one of a table with `final="zero"`, or with `lower_order_final` and
    fewer than 15 steps, are of order one: the bracket is D alone.

    Args:
        steps: N, from 1 to T - 1 (T for trailing spacing).
        spacing: Which times are visited. Leading and linspace list N + 1 times and drop the lowest.
        karras: Whether to space the ratios between the schedule's largest and smallest by eq. 5 of arXiv 2206.00364;
            times are then rounded.
        lower_order_final: See above.
        final: Whether the last step lands on clean data or on the schedule's first level.
        restarts: Steps, 0 ... N-1, that do not use the step before, as after a change of the condition.

    Differs from diffusers in: on a cosine schedule with Karras ratios diffusers cuts times to integers instead of
    rounding.

    Raises:
        ValueError: See forms.py; also if the ratios rise, or a restart is not a step of the table.
    """
    refuse_other_kinds(schedule, steps)
    refuse_unknown("spacing", spacing, get_args(Spacing))
    refuse_unknown("final", final, get_args(Final))
    require_truth("karras", karras)
    require_truth("lower_order_final", lower_order_final)
    extra = 0 if spacing == "trailing" else 1
    most = schedule.train_steps - extra
    if not 1 <= steps <= most:
        raise ValueError(
            f"{steps} steps were asked of dpmpp_2m with {spacing} spacing, which can take 1 to {most} on a schedule of "
            f"{schedule.train_steps} training times; change the number of steps"
        )
    if not are_whole(restarts):
        raise ValueError(f"restarts is {shown(restarts)}; it must be a sequence of steps, from 0 to {steps - 1}")
    if not all(0 <= step < steps for step in restarts):
        raise ValueError(
            f"restarts are {list(restarts)}; each must be the index of one of the {steps} steps, from 0 to {steps - 1}"
        )
    times = spaced_times(schedule.train_steps, steps + extra, spacing, offset)[:steps]
    ratio = schedule.ratio[times]
    if karras:
        ratio = karras_ratios(float(schedule.ratio[0]), float(schedule.ratio[-1]), steps)
        times = schedule.time_of(ratio).round()
    ratio = descending(torch.cat([ratio, last_ratio(schedule, final)]))
    alpha = 1 / (ratio**2 + 1).sqrt()
    sigma = ratio * alpha
    state, clean = torch.zeros(2, steps, 2, dtype=torch.float64)
    state[:, 0] = sigma[1:] / sigma[:-1]
    gain = alpha[1:] * (1 - ratio[1:] / ratio[:-1])
    second = torch.ones(steps, dtype=torch.bool)
    second[[0, *restarts]] = False
    if final == "zero" or (lower_order_final and steps < 15):
        second[-1] = False
    h = (ratio[:-1] / ratio[1:]).log()
    slope = torch.zeros(steps, dtype=torch.float64)
    slope[second] = h[second] / (2 * h.roll(1)[second])
    clean[:, 0], clean[:, 1] = gain * (1 + slope), -gain * slope
    a, b = in_outputs(prediction, alpha, sigma, state, clean)
    return Table(
        name="dpmpp_2m",
        prediction=prediction,
        t=with_end(times),
        alpha=alpha,
        sigma=sigma,
        a=a,
        b=b,
        c=torch.zeros_like(h),
        clip=clip,
    )

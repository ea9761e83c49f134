"""The samplers: each function returns the `Table` of one published sampler at one number of steps.

Every one is linear in the states and in the network's clean-data estimates D = p x + q m (chain/prediction.py), so each is
written in the form in which it was published, as

    x[i+1] = sum_j ( A[i,j] x[i-j] + B[i,j] D[i-j] ) + c[i] z[i]                                              (1)

and turned into the table's a = A + B p and b = B q, whatever the network predicts. Primes mark the level that the step
lands on: alpha', sigma'. Two kinds of coordinates occur. Variance-preserving states have alpha^2 + sigma^2 = 1 (`ddim`,
`ddpm`, `dpmpp_2m`); variance-exploding ones have alpha = 1 and the noise ratio as sigma, and the network sees
x/sqrt(sigma^2 + 1) (`euler`, `euler_ancestral`, `heun`). `flow_euler` lives on the line alpha + sigma = 1.

The last node is the sample: its time is listed as 0 and no chain hands it to the network. Times, levels and options are
those of the diffusers scheduler that a docstring names; where they differ it says so.

Arguments that several share and that are not explained again: `schedule`, of T training times; `steps`, N; `spacing`,
which times are visited, and `offset`, added to those of leading spacing; `prediction`, what the network predicts;
`clip`, a limit on the clean-data estimate (chain/clipping.py). Every function raises ValueError for an unknown option, for
more steps than the schedule can give, for an offset that leaves the training times (schedule.py), and for a network
that predicts epsilon at a node of pure noise (chain/table.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from paradiff.chain.prediction import Prediction, clean_coefficients
from paradiff.chain.table import Table
from paradiff.errors import refuse_unknown
from paradiff.samplers.schedule import Schedule, Spacing, flow_sigmas, fractional_times, karras_ratios, spaced_times

Clipping = Callable[[Tensor], Tensor]
Final = Literal["zero", "sigma_min"]
Landing = Literal["next", "stride"]
Variance = Literal["fixed_small", "fixed_large"]


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
        ValueError: See the module; also if `eta` is outside [0, 1], or a limited step has no room for its limit.
    """
    refuse_unknown("landing", landing, get_args(Landing))
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must lie in [0, 1], from deterministic (0) to the noise of DDPM (1)")
    times = spaced_times(schedule.train_steps, steps, spacing, offset)
    final = torch.ones(1, dtype=torch.float64) if set_alpha_to_one else schedule.alpha_bar[:1]
    if landing == "next":
        landed = torch.cat([schedule.alpha_bar[times[1:]], final])
    else:
        target = times - schedule.train_steps // steps
        landed = torch.where(target >= 0, schedule.alpha_bar[target.clamp(min=0)], final)
    alpha_bar = schedule.alpha_bar[times]
    alpha, sigma, alpha_to, sigma_to = (v.sqrt() for v in (alpha_bar, 1 - alpha_bar, landed, 1 - landed))
    c = eta * sigma_to / sigma * (1 - alpha_bar / landed).sqrt()
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
    return Table("ddim", prediction, _with_end(times), alpha, sigma, a, b, c, reached=reached, clip=clip, clip_weight=weight)


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
        ValueError: See the module.
    """
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
    return Table("ddpm", prediction, _with_end(times), alpha, sigma, a, b, c, clip=clip, exact_variance=exact)


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
        ValueError: See the module; also if the ratios rise.
    """
    times, sigma = _ratios(schedule, steps, spacing, offset, karras, final)
    shrink = sigma[1:] / sigma[:-1]
    return _exploding("euler", spacing, prediction, times, sigma, shrink[:, None], 1 - shrink[:, None])


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
        ValueError: See the module; also if the ratios rise.
    """
    times, sigma = _ratios(schedule, steps, spacing, offset)
    before, after = sigma[:-1], sigma[1:]
    shrink = (after / before) ** 2
    up = after * ((before - after) * (before + after)).sqrt() / before
    return _exploding("euler_ancestral", spacing, prediction, times, sigma, shrink[:, None], 1 - shrink[:, None], up)


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
        ValueError: See the module; also if the ratios rise.
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
    return _exploding("heun", spacing, prediction, times[node[:-1]], levels[node], state, clean, clip=clip)


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
        ValueError: See the module; also if the ratios rise, or a restart is not a step of the table.
    """
    refuse_unknown("spacing", spacing, get_args(Spacing))
    refuse_unknown("final", final, get_args(Final))
    extra = 0 if spacing == "trailing" else 1
    most = schedule.train_steps - extra
    if not 1 <= steps <= most:
        raise ValueError(
            f"{steps} steps were asked of dpmpp_2m with {spacing} spacing, which can take 1 to {most} on a schedule of "
            f"{schedule.train_steps} training times; change the number of steps"
        )
    if not all(0 <= step < steps for step in restarts):
        raise ValueError(
            f"restarts are {list(restarts)}; each must be the index of one of the {steps} steps, from 0 to {steps - 1}"
        )
    times = spaced_times(schedule.train_steps, steps + extra, spacing, offset)[:steps]
    ratio = schedule.ratio[times]
    if karras:
        ratio = karras_ratios(float(schedule.ratio[0]), float(schedule.ratio[-1]), steps)
        times = schedule.time_of(ratio).round()
    ratio = _descending(torch.cat([ratio, _last_ratio(schedule, final)]))
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
    return Table("dpmpp_2m", prediction, _with_end(times), alpha, sigma, a, b, torch.zeros_like(h), clip=clip)


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
    times = _with_end(level[:-1] * train_steps)
    return Table("flow_euler", "flow", times, 1 - level, level, torch.ones_like(b), b, torch.zeros_like(level[1:]))


def _ratios(
    schedule: Schedule, steps: int, spacing: Spacing, offset: int, karras: bool = False, final: Final = "zero"
) -> tuple[Tensor, Tensor]:
    """`[N]` times and `[N+1]` noise ratios of a variance-exploding sampler."""
    refuse_unknown("final", final, get_args(Final))
    times = fractional_times(schedule.train_steps, steps, spacing, offset)
    ratio = schedule.ratio_at(times)
    if karras:
        ratio = karras_ratios(float(ratio[-1]), float(ratio[0]), steps)
        times = schedule.time_of(ratio)
    return times, _descending(torch.cat([ratio, _last_ratio(schedule, final)]))


def _last_ratio(schedule: Schedule, final: Final) -> Tensor:
    return torch.zeros(1, dtype=torch.float64) if final == "zero" else schedule.ratio[:1]


def _descending(ratio: Tensor) -> Tensor:
    """`ratio` itself, refused if it rises anywhere."""
    rises = (ratio[1:] > ratio[:-1]).nonzero()
    if len(rises):
        step = int(rises[0])
        raise ValueError(
            f"the noise ratio rises from {ratio[step]:.6g} to {ratio[step + 1]:.6g} at step {step}; it must fall. A "
            "zero-SNR schedule's last ratio is held at 4096, below its neighbours at some schedules: use fewer steps, "
            "ddim or ddpm"
        )
    return ratio


def _exploding(
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
    return Table(name, prediction, _with_end(times), alpha, sigma, a, b, c, scale=1 / root, start_scale=start, clip=clip)


def _with_end(times: Tensor) -> Tensor:
    """`[N+1]` float64 times: those of the N steps and the sample's."""
    return torch.cat([times.to(torch.float64), torch.zeros(1, dtype=torch.float64)])


def in_outputs(prediction: Prediction, alpha: Tensor, sigma: Tensor, state: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """The table's a and b, `[N, P]`, from A = `state` and B = `clean` of equation (1)."""
    p, q = clean_coefficients(prediction, alpha[:-1], sigma[:-1])
    source = (torch.arange(len(p))[:, None] - torch.arange(state.shape[1])).clamp(min=0)
    return state + clean * p[source], clean * q[source]

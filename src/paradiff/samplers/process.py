# SPDX-License-Identifier: Apache-2.0
"""The noising process that a network was trained on: its times and its coordinates.

A state x = alpha x0 + sigma eps of any process, divided by sqrt(alpha^2 + sigma^2), is a state z of the Ornstein-Uhlenbeck
process dz = -z/2 du + dB at the noise level

    u = log(1 + sigma^2/alpha^2),     z = e^(-u/2) x0 + sqrt(1 - e^(-u)) eps,                                   (1)

so one chain in z and u (exponential.py) runs on every trained network, if it is told two things of each level: the time that
the network calls it by, and the factor on z that gives the state which the network expects.

| process | state | factor on z | time |
|---|---|---|---|
| `variance_preserving` | alpha^2 + sigma^2 = 1 | 1 | training time, fractional between two |
| `variance_exploding` | alpha = 1 | 1/alpha | sigma, or a function of it |
| `rectified_flow` | alpha + sigma = 1 | 1/(alpha + sigma) | T sigma/(alpha + sigma) |
| `ornstein_uhlenbeck` | z itself | 1 | u |

In the table alpha and sigma are those of z.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.errors import is_whole, number_of, require_kind, shown
from paradiff.samplers.schedule import MOST_TIMES, Schedule

Levels = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Process:
    """A noising process. Processes are compared by identity.

    Attributes:
        name: Its name.
        time: Function of (alpha, sigma) of z, any shape, that returns the times for the network.
        scale: Likewise the factor on z that gives the network's state.
        lowest: Smallest level u that the network was trained on.
        highest: Largest level, infinite if it was trained on pure noise.
        train_times: Whether the network was trained at whole times only.
    """

    name: str
    time: Levels
    scale: Levels
    lowest: float = 0.0
    highest: float = math.inf
    train_times: bool = False


def level_of(ratio: Tensor) -> Tensor:
    """The level u of noise ratios sigma/alpha, any shape: equation (1)."""
    return torch.log1p(ratio**2)


def signal_and_noise(u: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma of z at levels u, any shape: equation (1). Exact at 0 and at infinity."""
    return (-u / 2).exp(), (-torch.expm1(-u)).sqrt()


# Functions of (alpha, sigma), none of them a local one, so that a process pickles.


def _ones(alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.ones_like(alpha + sigma)


def _own_level(alpha: Tensor, sigma: Tensor) -> Tensor:
    return -2 * alpha.log()


def _training_time(schedule: Schedule, last: float, alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.where(alpha > 0, schedule.time_of(sigma / alpha.clamp(min=1e-12)), last)


def _itself(sigma: Tensor) -> Tensor:
    return sigma


def _time_of_ratio(time: Callable[[Tensor], Tensor], alpha: Tensor, sigma: Tensor) -> Tensor:
    return time(sigma / alpha)


def _over_signal(alpha: Tensor, sigma: Tensor) -> Tensor:
    return 1 / alpha


def _flow_time(train_steps: int, alpha: Tensor, sigma: Tensor) -> Tensor:
    return train_steps * sigma / (alpha + sigma)


def _over_sum(alpha: Tensor, sigma: Tensor) -> Tensor:
    return 1 / (alpha + sigma)


def ornstein_uhlenbeck() -> Process:
    """The process (1) itself, for scores that are functions of z and u."""
    return Process("ornstein_uhlenbeck", _own_level, _ones)


@made_at_home
def variance_preserving(schedule: Schedule) -> Process:
    """A network trained at the times 0 ... T-1 of a schedule. Times between them are linear in log(sigma/alpha).

    A level is u = -log alpha_bar: for the linear betas 1e-4 ... 0.02 from 1.0e-4 to 10.1.
    """
    require_kind("the schedule", schedule, Schedule)
    ratio = schedule.ratio
    pure = bool(schedule.alpha_bar[-1] == 0)
    # The capped last ratio of such a schedule may lie below its neighbours: finite levels then belong to the times before it.
    finite = Schedule(schedule.betas[:-1]) if ratio[-1] <= ratio[-2] else schedule
    time = partial(_training_time, finite, float(schedule.train_steps - 1))
    lowest, highest = level_of(ratio[[0, -1]]).tolist()
    return Process("variance_preserving", time, _ones, lowest, math.inf if pure else highest, train_times=True)


@made_at_home
def variance_exploding(lowest: float, highest: float, time: Callable[[Tensor], Tensor] = _itself) -> Process:
    """A network that sees x0 + sigma eps itself (Song et al., arXiv 2011.13456; Karras et al., arXiv 2206.00364).

    Args:
        lowest: Smallest sigma that it was trained on, above 0.
        highest: Largest.
        time: The time that it calls a sigma by; log(sigma)/4 for networks in the manner of Karras et al.

    Raises:
        ValueError: If the levels are not 0 < lowest < highest, finite.
    """
    if not 0 < number_of(lowest) < number_of(highest) < math.inf:
        raise ValueError(f"the noise levels are {shown(lowest)} to {shown(highest)}; they must be above 0, rising and finite")
    ends = level_of(torch.tensor([lowest, highest], dtype=torch.float64)).tolist()
    return Process("variance_exploding", partial(_time_of_ratio, time), _over_signal, *ends)


def rectified_flow(train_steps: int = 1000) -> Process:
    """A network on the line x = (1 - s) x0 + s eps, at the time T s (Liu, Gong and Liu, arXiv 2209.03003).

    Args:
        train_steps: T, the scale of the times, at least 1.

    Raises:
        ValueError: If T is below 1.
    """
    if not is_whole(train_steps) or not 1 <= train_steps <= MOST_TIMES:
        raise ValueError(
            f"the flow has {shown(train_steps)} training steps; the scale of its times must be at least 1, "
            f"and at most {MOST_TIMES}"
        )
    return Process(
        "rectified_flow",
        partial(_flow_time, train_steps),
        _over_sum,
        train_times=True,
    )

# SPDX-License-Identifier: Apache-2.0
"""The noise schedule: how much signal and how much noise a state holds at each training time.

A network is trained at the integer times t = 0 ... T-1 on states x = alpha[t] x0 + sigma[t] eps with

    alpha_bar[t] = prod_{s<=t} (1 - beta[s]),    alpha = sqrt(alpha_bar),    sigma = sqrt(1 - alpha_bar)        (1)
    ratio[t] = sigma[t]/alpha[t]                                                                              (2)

(Ho et al., arXiv 2006.11239, eq. 4). `ratio` is the noise level of the same state in variance-exploding coordinates
x/alpha, the sigma of Karras et al. (arXiv 2206.00364). Samplers visit few of the T times: `spaced_times` says which.
Rectified flows have no betas: their state is x = (1 - s) x0 + s eps, and `flow_sigmas` lists the levels s.

Rounding follows diffusers to the last bit, so that a table's times are those of the scheduler of the same name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.errors import is_real, is_whole, number_of, refuse_unknown, require_real, require_truth, require_whole, shown

Spacing = Literal["leading", "trailing", "linspace"]

SMALLEST_ALPHA_BAR = 2.0**-24
"""Stands for alpha_bar = 0 in `Schedule.ratio`, so that a schedule that ends in pure noise has a finite last ratio,
4096 (the smallest float16; diffusers does the same)."""


LARGEST_LOG = 700.0
"""Of a number that float64 holds, nearly."""

MOST_TIMES = 10**6
"""Training times that a named schedule may have."""


def _check_betas(train_steps: object, **betas: object) -> None:
    """Refuses what is no number of training times, or no number."""
    require_whole("train_steps", train_steps, 1, most=MOST_TIMES)
    for name, beta in betas.items():
        require_real(name, beta)


@made_at_home
def linear_betas(train_steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """`[T]` betas that grow linearly from `start` to `end` (Ho et al., arXiv 2006.11239, section 4)."""
    _check_betas(train_steps, start=start, end=end)
    return torch.linspace(float(start), float(end), train_steps, dtype=torch.float64)


@made_at_home
def scaled_linear_betas(train_steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """`[T]` betas whose square roots grow linearly (Rombach et al., arXiv 2112.10752; Stable Diffusion)."""
    _check_betas(train_steps, start=start, end=end)
    return torch.linspace(start**0.5, end**0.5, train_steps, dtype=torch.float64) ** 2


@made_at_home
def cosine_betas(train_steps: int = 1000, max_beta: float = 0.999) -> Tensor:
    """`[T]` betas of the cosine schedule, beta[t] = min(1 - f((t+1)/T)/f(t/T), max_beta) with
    f(u) = cos^2(pi/2 (u + 0.008)/1.008) (Nichol and Dhariwal, arXiv 2102.09672, eq. 17; diffusers'
    `squaredcos_cap_v2`)."""

    _check_betas(train_steps, max_beta=max_beta)

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f((t + 1) / train_steps) / f(t / train_steps), max_beta) for t in range(train_steps)]
    return torch.tensor(betas, dtype=torch.float64)


@made_at_home
def zero_snr_betas(betas: Tensor) -> Tensor:
    """`[T]` betas rescaled to end in pure noise: alpha is shifted to 0 at the last time and stretched back to its old
    value at the first (Lin et al., arXiv 2305.08891, algorithm 1)."""
    betas = Schedule(betas).betas
    alpha = torch.cumprod(1 - betas, dim=0).sqrt()
    alpha_bar = ((alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


@dataclass(frozen=True)
class Schedule:
    """A variance-preserving schedule: equations (1) and (2).

    Attributes:
        betas: `[T]` variances of the forward process's steps, in (0, 1); the last may be 1. Kept in float64 on the CPU.

    Raises:
        ValueError: If `betas` is not such a list of at least two numbers.
    """

    betas: Tensor

    def __post_init__(self) -> None:
        try:
            betas = torch.as_tensor(self.betas, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"betas is {shown(self.betas)}; it must be a row of at least two numbers, one for each training time"
            ) from error
        object.__setattr__(self, "betas", betas)
        if betas.ndim != 1 or len(betas) < 2:
            raise ValueError(
                f"betas have shape {tuple(betas.shape)}; a schedule needs one row of at least two, one for each training time"
            )
        allowed = (betas > 0) & (betas < 1)
        allowed[-1] |= betas[-1] == 1
        if not allowed.all():
            worst = int((~allowed).nonzero()[0])
            raise ValueError(
                f"beta is {float(betas[worst]):.6g} at training time {worst}; every beta must be above 0 and below 1, "
                "only the last may be 1 (zero terminal SNR)"
            )

    def __repr__(self) -> str:
        return (
            f"Schedule of {self.train_steps} training times: betas {self.betas[0]:.3g} to {self.betas[-1]:.3g}, "
            f"noise over signal {self.ratio[0]:.3g} to {self.ratio[-1]:.4g}"
        )

    def __eq__(self, other: object) -> bool:
        """Whether all betas are equal."""
        return torch.equal(self.betas, other.betas) if isinstance(other, Schedule) else NotImplemented

    def __hash__(self) -> int:
        return hash((self.train_steps, float(self.betas[0]), float(self.betas[-1])))

    @classmethod
    def linear(
        cls, train_steps: int = 1000, start: float = 1e-4, end: float = 0.02, *, rescale_zero_snr: bool = False
    ) -> Schedule:
        """The schedule of `linear_betas`, through `zero_snr_betas` if asked."""
        require_truth("rescale_zero_snr", rescale_zero_snr)
        betas = linear_betas(train_steps, start, end)
        return cls(zero_snr_betas(betas) if rescale_zero_snr else betas)

    @classmethod
    def scaled_linear(
        cls, train_steps: int = 1000, start: float = 0.00085, end: float = 0.012, *, rescale_zero_snr: bool = False
    ) -> Schedule:
        """The schedule of `scaled_linear_betas`, through `zero_snr_betas` if asked."""
        require_truth("rescale_zero_snr", rescale_zero_snr)
        betas = scaled_linear_betas(train_steps, start, end)
        return cls(zero_snr_betas(betas) if rescale_zero_snr else betas)

    @classmethod
    def cosine(cls, train_steps: int = 1000, max_beta: float = 0.999, *, rescale_zero_snr: bool = False) -> Schedule:
        """The schedule of `cosine_betas`, through `zero_snr_betas` if asked."""
        require_truth("rescale_zero_snr", rescale_zero_snr)
        betas = cosine_betas(train_steps, max_beta)
        return cls(zero_snr_betas(betas) if rescale_zero_snr else betas)

    @property
    def train_steps(self) -> int:
        """T, the number of training times."""
        return len(self.betas)

    @cached_property
    def alpha_bar(self) -> Tensor:
        """`[T]` squared signal level, equation (1)."""
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def alpha(self) -> Tensor:
        """`[T]` signal level, equation (1)."""
        return self.alpha_bar.sqrt()

    @cached_property
    def sigma(self) -> Tensor:
        """`[T]` noise level, equation (1)."""
        return (1 - self.alpha_bar).sqrt()

    @cached_property
    def ratio(self) -> Tensor:
        """`[T]` noise level over signal level, equation (2); 4096 where alpha is 0 (`SMALLEST_ALPHA_BAR`)."""
        alpha_bar = torch.where(self.alpha_bar == 0, SMALLEST_ALPHA_BAR, self.alpha_bar)
        return ((1 - alpha_bar) / alpha_bar).sqrt()

    def ratio_at(self, time: Tensor) -> Tensor:
        """The noise ratio at fractional training times, linear in `ratio` between integer times.

        Args:
            time: Times, any shape; those outside [0, T-1] are moved to its ends.
        """
        time = time.to(torch.float64).clamp(0, self.train_steps - 1)
        low = time.floor().long().clamp(max=self.train_steps - 2)
        weight = time - low
        return torch.lerp(self.ratio[low], self.ratio[low + 1], weight)

    def time_of(self, ratio: Tensor) -> Tensor:
        """The fractional training time of noise ratios, linear in log(ratio) between integer times.

        This is not the exact inverse of `ratio_at`, which is linear in the ratio itself; diffusers uses the same pair.

        Args:
            ratio: Positive noise ratios, any shape; those outside the schedule get its first or last time.
        """
        levels, level = self.ratio.log(), ratio.to(torch.float64).clamp(min=1e-10).log()
        low = (torch.searchsorted(levels, level.contiguous(), right=True) - 1).clamp(0, self.train_steps - 2)
        weight = ((level - levels[low]) / (levels[low + 1] - levels[low])).clamp(0, 1)
        return low + weight


@made_at_home
def spaced_times(train_steps: int, steps: int, spacing: Spacing, offset: int = 0) -> Tensor:
    """The training times that a sampler visits (Lin et al., arXiv 2305.08891, table 2).

    With T training steps and N steps: `leading` takes i (T // N) + offset, `trailing` round(T - i T/N) - 1, which
    begins at the last time, and `linspace` N evenly spaced times from 0 to T-1, rounded. Halves round to even. One step
    of `linspace` visits time 0 only. For some N (61, say, at T = 1000) rounding errors give the trailing times of
    diffusers 0.42 an N+1st entry of -1; here there are always N.

    Args:
        train_steps: T.
        steps: N, from 1 to T.
        spacing: Which rule.
        offset: Added to every time; `leading` only. Stable Diffusion uses 1.

    Returns:
        `[N]` descending times, int64.

    Raises:
        ValueError: If the spacing is unknown, the schedule cannot give that many steps, or the offset does not fit.
    """
    return _spaced(train_steps, steps, spacing, offset).round().long()


@made_at_home
def fractional_times(train_steps: int, steps: int, spacing: Spacing, offset: int = 0) -> Tensor:
    """`[N]` float64 times of `spaced_times`, those of `linspace` not rounded: the times of samplers that work on the
    noise ratio and interpolate it (Euler, Heun). Arguments and errors as there."""
    times = _spaced(train_steps, steps, spacing, offset)
    return times if spacing == "linspace" else times.round()


def _spaced(train_steps: int, steps: int, spacing: Spacing, offset: int) -> Tensor:
    refuse_unknown("spacing", spacing, get_args(Spacing))
    require_whole("the number of training times", train_steps, 1, most=MOST_TIMES)
    for name, value in (("the number of steps", steps), ("the offset", offset)):
        if not is_whole(value):
            raise ValueError(f"{name} is {shown(value)}; it must be a whole number")
    if not 1 <= steps <= train_steps:
        raise ValueError(
            f"{steps} steps were asked of a schedule that can give 1 to {train_steps}, one for each training time; "
            "change the number of steps"
        )
    if offset and spacing != "leading":
        raise ValueError(
            f"the offset is {offset} with {spacing} spacing; only leading spacing has one, so leave it at 0 or use leading"
        )
    index = torch.arange(steps, dtype=torch.float64)
    if spacing == "trailing":
        # The increment is first + step - first, as in numpy's arange: it decides which way halves fall.
        first = float(train_steps)
        return (((first - train_steps / steps) - first) * index + first).round() - 1
    if spacing == "linspace":
        times = index * ((train_steps - 1) / max(steps - 1, 1))
        times[1:][-1:] = train_steps - 1
        return times.flip(0)
    times = index.flip(0) * (train_steps // steps) + offset
    if offset < 0 or times[0] > train_steps - 1:
        raise ValueError(
            f"an offset of {offset} moves the times of {steps} steps to {int(times[-1])} ... {int(times[0])}, outside "
            f"the training times 0 ... {train_steps - 1}; use a smaller offset or fewer steps"
        )
    return times


@made_at_home
def karras_ratios(low: float, high: float, steps: int, rho: float = 7.0) -> Tensor:
    """Noise ratios whose rho-th roots are evenly spaced (Karras et al., arXiv 2206.00364, eq. 5, without its last 0).

    Args:
        low: Last ratio, above 0.
        high: First ratio, at least `low`.
        steps: N, at least 1; one step gives `high`.
        rho: How much the ratios crowd towards `low`.

    Returns:
        `[N]` descending ratios, float64.

    Raises:
        ValueError: If an argument is out of range.
    """
    first, last, power = map(number_of, (high, low, rho))
    fits = 0 < last <= first < math.inf and 0 < power < math.inf and is_whole(steps) and 1 <= steps <= MOST_TIMES
    if not fits or max(abs(math.log(first)), abs(math.log(last))) / power > LARGEST_LOG:
        raise ValueError(
            f"Karras ratios were asked from {shown(high)} down to {shown(low)} in {shown(steps)} steps with rho "
            f"{shown(rho)}; they need 0 < low <= high, at least one step and at most {MOST_TIMES}, and rho above 0, all "
            "finite, and so are their rho-th roots"
        )
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    ratios = (first ** (1 / power) + ramp * (last ** (1 / power) - first ** (1 / power))) ** power
    ratios[-1], ratios[0] = last, first
    return ratios


@made_at_home
def flow_sigmas(steps: int, shift: float = 1.0, train_steps: int = 1000) -> Tensor:
    """Levels s of a rectified flow, from 1 (noise) to 0 (data), as diffusers' FlowMatchEulerDiscreteScheduler lists
    them.

    N evenly spaced levels from 1 to S(1/T) go through the shift S(s) = shift s/(1 + (shift - 1) s) (Esser et al., arXiv
    2403.03206, eq. 23), and a 0 is appended. The lowest level is thus shifted twice; so it is in diffusers.

    Args:
        steps: N, at least 1.
        shift: Above 0; larger spends more steps at high noise. Stable Diffusion 3 uses 3.
        train_steps: T, at least 2.

    Returns:
        `[N+1]` descending levels, float64.

    Raises:
        ValueError: If an argument is out of range.
    """
    for name, value in (("the number of steps", steps), ("train_steps", train_steps)):
        if not is_whole(value):
            raise ValueError(f"{name} is {shown(value)}; it must be a whole number")
    if not is_real(shift):
        raise ValueError(f"the shift is {shown(shift)}; it must be a number, positive, and finite")
    if steps > MOST_TIMES:
        raise ValueError(f"flow levels were asked for {shown(steps)} steps; give at most {MOST_TIMES}")
    if not (steps >= 1 and 0 < shift < math.inf and train_steps >= 2):
        raise ValueError(
            f"flow levels were asked for {steps} steps with shift {shift} and {train_steps} training steps; they need "
            "at least one step, a positive shift and at least two training steps"
        )

    factor = float(shift)

    def shifted(s: Tensor) -> Tensor:
        return factor * s / (1 + (factor - 1) * s)

    lowest = shifted(torch.tensor(1 / train_steps, dtype=torch.float64))
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return torch.cat([shifted(1 + ramp * (lowest - 1)), torch.zeros(1, dtype=torch.float64)])

# SPDX-License-Identifier: Apache-2.0
"""The published samplers as textbook loops: schedules by numpy, one step after another, nothing shared with the package.

A helper for the tests. Every loop walks a whole trajectory with a nonlinear toy network that depends on the time and returns
all states. Comparisons are made node by node: the largest difference at a node beside the largest entry there, so that a large
start cannot hide an error at a small end.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from paradiff.chain.table import Table
from paradiff.samplers.schedule import Schedule

SHAPE = (3, 4, 4)
BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
PREDICTIONS = ["epsilon", "sample", "v"]
SPACINGS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
THEIRS = {"epsilon": "epsilon", "sample": "sample", "v": "v_prediction"}


def betas_of(name: str, zero_snr: bool = False) -> np.ndarray:
    """Betas from the formulas, in float64, by numpy."""
    if name == "linear":
        betas = np.linspace(1e-4, 0.02, 1000)
    elif name == "scaled_linear":
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    else:
        f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    if zero_snr:
        alpha = np.sqrt(np.cumprod(1 - betas))
        bar = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
        betas = 1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])
    return betas


def schedule_of(name: str, zero_snr: bool = False) -> Schedule:
    make = {"linear": Schedule.linear, "scaled_linear": Schedule.scaled_linear, "squaredcos_cap_v2": Schedule.cosine}
    return make[name](rescale_zero_snr=zero_snr)


def times_of(steps: int, spacing: str, offset: int, rounded: bool = True) -> np.ndarray:
    if spacing == "leading":
        return (np.arange(steps) * (1000 // steps))[::-1] + float(offset)
    if spacing == "trailing":
        return np.round(np.arange(1000, 0, -1000 / steps))[:steps] - 1
    times = np.linspace(0, 999, steps)[::-1]
    return times.round() if rounded else times


def network(x: Tensor, t: float) -> Tensor:
    return torch.tanh(0.7 * x + 0.1 * t / 1000) + 0.3 * math.cos(t / 150) * torch.sin(x)


def clean_of(prediction: str, x: Tensor, m: Tensor, alpha: float, sigma: float) -> Tensor:
    """The clean-data estimate of a variance-preserving state."""
    return {"epsilon": lambda: (x - sigma * m) / alpha, "sample": lambda: m, "v": lambda: alpha * x - sigma * m}[prediction]()


def start_and_noise(steps: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(steps + 1)]
    return draws[0], draws[1:]


def walk(table: Table, x: Tensor, noise: list[Tensor], net: Callable[[Tensor, float], Tensor] = network) -> list[Tensor]:
    """The states of chain/table.py's equation (1), one after another."""
    states, outputs = [x], []
    for i in range(table.steps):
        raw = net(states[i] * table.scale[i], float(table.t[i]))
        outputs.append(table.convert(slice(i, i + 1), states[i][None], raw[None])[0])
        new = table.c[i] * noise[i]
        for j in range(min(table.band, i + 1)):
            new = new + table.a[i, j] * states[i - j] + table.b[i, j] * outputs[i - j]
        states.append(new)
    return states


def largest_gap(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs)
    gaps = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]
    return max(gaps) if all(math.isfinite(gap) for gap in gaps) else math.inf


# -- textbook loops ----------------------------------------------------------------------------------------------------


def textbook_ddim(
    bar: np.ndarray,
    times: np.ndarray,
    landed: np.ndarray,
    x: Tensor,
    noise: list[Tensor],
    prediction: str,
    eta: float,
    limit: Callable[[Tensor], Tensor] | None,
    clipped_epsilon: bool,
) -> list[Tensor]:
    """Song, Meng and Ermon, eq. 12, with sigma_t of eq. 16."""
    states = [x]
    for i, t in enumerate(times):
        now, then = bar[int(t)], landed[i]
        clean = clean_of(prediction, x, network(x, t), math.sqrt(now), math.sqrt(1 - now))
        epsilon = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
        if limit is not None:
            clean = limit(clean[None])[0]
        if clipped_epsilon:
            epsilon = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
        deviation = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
        x = math.sqrt(then) * clean + math.sqrt(max(1 - then - deviation**2, 0)) * epsilon + deviation * noise[i]
        states.append(x)
    return states


def landings(bar: np.ndarray, times: np.ndarray, landing: str, to_one: bool) -> np.ndarray:
    final = 1.0 if to_one else bar[0]
    if landing == "next":
        return np.append(bar[times[1:].astype(int)], final)
    back = times.astype(int) - 1000 // len(times)
    return np.where(back >= 0, bar[np.maximum(back, 0)], final)


def textbook_ddpm(
    bar: np.ndarray,
    times: np.ndarray,
    x: Tensor,
    noise: list[Tensor],
    prediction: str,
    variance: str,
    limit: Callable[[Tensor], Tensor] | None,
) -> list[Tensor]:
    """Ho, Jain and Abbeel, algorithm 2: eq. 11 on the network's noise, with the betas of the shortened chain."""
    states = [x]
    for i, t in enumerate(times):
        now, then = bar[int(t)], bar[int(times[i + 1])] if i + 1 < len(times) else 1.0
        alpha = now / then
        clean = clean_of(prediction, x, network(x, t), math.sqrt(now), math.sqrt(1 - now))
        if limit is not None:
            clean = limit(clean[None])[0]
        if prediction == "epsilon":
            epsilon = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
            x = (x - (1 - alpha) / math.sqrt(1 - now) * epsilon) / math.sqrt(alpha)
        else:  # eq. 7, for eq. 11 cancels at high noise unless it holds the network's own epsilon
            x = (math.sqrt(then) * (1 - alpha) * clean + math.sqrt(alpha) * (1 - then) * x) / (1 - now)
        posterior = max((1 - then) / (1 - now) * (1 - alpha), 1e-20)
        if t > 0:
            x = x + math.sqrt(posterior if variance == "fixed_small" else 1 - alpha) * noise[i]
        states.append(x)
    return states


def ratios_of(bar: np.ndarray) -> np.ndarray:
    return np.sqrt((1 - bar) / bar)


def karras_of(high: float, low: float, steps: int) -> np.ndarray:
    return (high ** (1 / 7) + np.linspace(0, 1, steps) * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def exploding_nodes(
    bar: np.ndarray, steps: int, spacing: str, offset: int, karras: bool = False, final: str = "zero"
) -> tuple[np.ndarray, np.ndarray]:
    levels = ratios_of(bar)
    times = times_of(steps, spacing, offset, rounded=False)
    ratio = np.interp(times, np.arange(1000), levels)
    if karras:
        ratio = karras_of(ratio[0], ratio[-1], steps)
        times = np.interp(np.log(ratio), np.log(levels), np.arange(1000))
    return times, np.append(ratio, 0.0 if final == "zero" else levels[0])


def denoised(prediction: str, x: Tensor, t: float, s: float) -> Tensor:
    """The clean-data estimate of a variance-exploding state, as in k-diffusion's external.py."""
    m = network(x / math.sqrt(s**2 + 1), t)
    if prediction == "epsilon":
        return x - s * m
    return m if prediction == "sample" else x / (s**2 + 1) - m * s / math.sqrt(s**2 + 1)


def textbook_euler(times: np.ndarray, ratio: np.ndarray, x: Tensor, prediction: str) -> list[Tensor]:
    states = [x]
    for i, t in enumerate(times):
        slope = (x - denoised(prediction, x, t, ratio[i])) / ratio[i]
        x = x + slope * (ratio[i + 1] - ratio[i])
        states.append(x)
    return states


def textbook_ancestral(times: np.ndarray, ratio: np.ndarray, x: Tensor, noise: list[Tensor], prediction: str) -> list[Tensor]:
    states = [x]
    for i, t in enumerate(times):
        up = min(ratio[i + 1], (ratio[i + 1] ** 2 * (ratio[i] ** 2 - ratio[i + 1] ** 2) / ratio[i] ** 2) ** 0.5)
        down = (ratio[i + 1] ** 2 - up**2) ** 0.5
        slope = (x - denoised(prediction, x, t, ratio[i])) / ratio[i]
        x = x + slope * (down - ratio[i]) + up * noise[i]
        states.append(x)
    return states


def textbook_heun(
    times: np.ndarray, ratio: np.ndarray, x: Tensor, prediction: str, limit: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Karras et al., algorithm 1; both the Euler guess and the corrected state are listed."""
    states = [x]
    for i, t in enumerate(times):
        slope = (x - limit(denoised(prediction, x, t, ratio[i]))) / ratio[i]
        guess = x + slope * (ratio[i + 1] - ratio[i])
        states.append(guess)
        if ratio[i + 1] > 0:
            second = (guess - limit(denoised(prediction, guess, times[i + 1], ratio[i + 1]))) / ratio[i + 1]
            x = x + (ratio[i + 1] - ratio[i]) * (slope + second) / 2
            states.append(x)
    return states


def dpm_nodes(
    bar: np.ndarray, steps: int, spacing: str, offset: int, karras: bool, final: str
) -> tuple[np.ndarray, np.ndarray]:
    levels = ratios_of(bar)
    times = times_of(steps, spacing, 0) if spacing == "trailing" else times_of(steps + 1, spacing, offset)[:-1]
    ratio = levels[times.astype(int)]
    if karras:
        ratio = karras_of(levels[-1], levels[0], steps)
        times = np.interp(np.log(ratio), np.log(levels), np.arange(1000)).round()
    return times, np.append(ratio, 0.0 if final == "zero" else levels[0])


def textbook_dpmpp_2m(
    times: np.ndarray,
    ratio: np.ndarray,
    x: Tensor,
    prediction: str,
    first_order: set[int],
    limit: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """k-diffusion's sample_dpmpp_2m, in variance-exploding coordinates y = x/alpha, mapped back at each node."""

    def size(s: float) -> float:
        return 1 / math.sqrt(s**2 + 1)

    states, y, old = [x], x / size(ratio[0]), None
    for i, t in enumerate(times):
        clean = limit(denoised(prediction, y, t, ratio[i]))
        step = math.log(ratio[i] / ratio[i + 1]) if ratio[i + 1] > 0 else math.inf
        guess = clean
        if i not in first_order:
            r = math.log(ratio[i - 1] / ratio[i]) / step
            guess = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * old
        y = (ratio[i + 1] / ratio[i]) * y - math.expm1(-step) * guess
        old = clean
        states.append(y * size(ratio[i + 1]))
    return states


def textbook_flow(steps: int, shift: float, x: Tensor) -> list[Tensor]:
    def shifted(s: float) -> float:
        return shift * s / (1 + (shift - 1) * s)

    level = [shifted(s) for s in np.linspace(1, shifted(1 / 1000), steps)] + [0.0]
    states = [x]
    for i in range(steps):
        x = x + (level[i + 1] - level[i]) * network(x, 1000 * level[i])
        states.append(x)
    return states


def same(x: Tensor) -> Tensor:
    return x

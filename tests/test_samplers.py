"""samplers.py and table.py against textbook loops written out here, and against diffusers' schedulers of those names.

Every comparison walks a whole trajectory with a nonlinear toy network that depends on the time, and is made node by
node: the largest difference at a node beside the largest entry there, so that a large start cannot hide an error at a
small end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from paradiff.clipping import Clip, DynamicThreshold
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler, euler_ancestral, flow_euler, heun
from paradiff.schedule import Schedule
from paradiff.table import Table, column

torch.set_num_threads(1)

# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

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
    """The states of table.py's equation (1), one after another."""
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


# Both sides are float64; coefficients up to 1e4 (epsilon at the cosine schedule's first levels) cost some digits.
TEXTBOOK = 1e-12


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("steps", [5, 20, 37, 100])
def test_every_sampler_is_its_textbook_loop(betas: str, prediction: str, spacing: str, offset: int, steps: int) -> None:
    bar, schedule = np.cumprod(1 - betas_of(betas)), schedule_of(betas)
    x, noise = start_and_noise(2 * steps)
    options = {"spacing": spacing, "offset": offset, "prediction": prediction}
    times = times_of(steps, spacing, offset)
    for eta, landing, to_one in [(0.0, "next", True), (0.5, "stride", True), (1.0, "next", False)]:
        table = ddim(schedule, steps, eta=eta, landing=landing, set_alpha_to_one=to_one, **options)
        landed = landings(bar, times, landing, to_one)
        wanted = textbook_ddim(bar, times, landed, x, noise, prediction, eta, None, False)
        assert largest_gap(walk(table, x, noise), wanted) < TEXTBOOK
    for variance in ("fixed_small", "fixed_large"):
        table = ddpm(schedule, steps, variance=variance, **options)
        wanted = textbook_ddpm(bar, times, x, noise, prediction, variance, None)
        assert largest_gap(walk(table, x, noise), wanted) < TEXTBOOK

    for karras in (False, True):
        times, ratio = exploding_nodes(bar, steps, spacing, offset, karras)
        y = x * ratio[0]
        # The loops subtract numbers of the size of one state to make the next: digits go where the ratio falls steeply
        # (the cosine schedule's 20000 to 3).
        tolerance = max(TEXTBOOK, 1e-13 * (ratio[:-2] / ratio[1:-1]).max())
        table = euler(schedule, steps, karras=karras, **options)
        assert largest_gap(walk(table, y, noise), textbook_euler(times, ratio, y, prediction)) < tolerance
        table = heun(schedule, steps, karras=karras, **options)
        assert table.steps == 2 * steps - 1
        wanted = textbook_heun(times, ratio, y, prediction, same)
        assert largest_gap(walk(table, y, noise), wanted) < tolerance
        start = ratio[0] if spacing != "leading" else math.hypot(ratio[0], 1)
        assert table.start_scale == pytest.approx(start, rel=1e-12)
    times, ratio = exploding_nodes(bar, steps, spacing, offset)
    tolerance = max(TEXTBOOK, 1e-13 * (ratio[:-2] / ratio[1:-1]).max())
    wanted = textbook_ancestral(times, ratio, y := x * ratio[0], noise, prediction)
    assert largest_gap(walk(euler_ancestral(schedule, steps, **options), y, noise), wanted) < tolerance
    times, ratio = exploding_nodes(bar, steps, spacing, offset, False, "sigma_min")
    table = euler(schedule, steps, final="sigma_min", **options)
    assert largest_gap(walk(table, y, noise), textbook_euler(times, ratio, y, prediction)) < tolerance

    for karras, final, lower in [(False, "zero", True), (True, "zero", True), (False, "sigma_min", False)]:
        times, ratio = dpm_nodes(bar, steps, spacing, offset, karras, final)
        table = dpmpp_2m(schedule, steps, karras=karras, final=final, lower_order_final=lower, **options)
        first_order = {0, steps - 1} if final == "zero" else {0}
        wanted = textbook_dpmpp_2m(times, ratio, x, prediction, first_order, same)
        assert largest_gap(walk(table, x, noise), wanted) < TEXTBOOK


@pytest.mark.parametrize("steps", [1, 5, 20, 37, 100])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_its_textbook_loop(steps: int, shift: float) -> None:
    x, noise = start_and_noise(steps)
    assert largest_gap(walk(flow_euler(steps, shift=shift), x, noise), textbook_flow(steps, shift, x)) < TEXTBOOK


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("limit", [Clip(), Clip(0.3), DynamicThreshold(0.8, 1.5)], ids=["clip", "clip-0.3", "threshold"])
@pytest.mark.parametrize("steps", [5, 37])
def test_limits_are_those_of_the_textbook_loop(prediction: str, limit: Callable, steps: int) -> None:
    bar, schedule = np.cumprod(1 - betas_of("linear")), Schedule.linear()
    x, noise = start_and_noise(2 * steps)
    x = 2 * x
    free = walk(ddpm(schedule, steps, prediction=prediction), x, noise)

    def once(clean: Tensor) -> Tensor:
        return limit(clean[None])[0]

    times = times_of(steps, "leading", 0)
    for eta in (0.0, 0.5):
        for clipped in (False, True):
            table = ddim(schedule, steps, prediction=prediction, eta=eta, clip=limit, clipped_epsilon=clipped)
            landed = landings(bar, times, "next", True)
            wanted = textbook_ddim(bar, times, landed, x, noise, prediction, eta, limit, clipped)
            assert largest_gap(walk(table, x, noise), wanted) < TEXTBOOK
    wanted = textbook_ddpm(bar, times, x, noise, prediction, "fixed_small", limit)
    assert largest_gap(walk(ddpm(schedule, steps, prediction=prediction, clip=limit), x, noise), wanted) < TEXTBOOK
    assert largest_gap(wanted, free) > 1e-3  # The limit was at work.
    times, ratio = dpm_nodes(bar, steps, "linspace", 0, False, "zero")
    wanted = textbook_dpmpp_2m(times, ratio, x, prediction, {0, steps - 1}, once)
    assert largest_gap(walk(dpmpp_2m(schedule, steps, prediction=prediction, clip=limit), x, noise), wanted) < TEXTBOOK
    times, ratio = exploding_nodes(bar, steps, "linspace", 0)
    wanted = textbook_heun(times, ratio, x * ratio[0], prediction, once)
    table = heun(schedule, steps, prediction=prediction, clip=limit)
    assert largest_gap(walk(table, x * ratio[0], noise), wanted) < TEXTBOOK


def test_restarts_and_low_final_order_are_of_order_one() -> None:
    bar, schedule = np.cumprod(1 - betas_of("linear")), Schedule.linear()
    x, noise = start_and_noise(20)
    times, ratio = dpm_nodes(bar, 20, "linspace", 0, False, "zero")
    table = dpmpp_2m(schedule, 20, restarts=[7, 12])
    wanted = textbook_dpmpp_2m(times, ratio, x, "epsilon", {0, 7, 12, 19}, same)
    assert largest_gap(walk(table, x, noise), wanted) < TEXTBOOK
    for steps, lower, order_one in [(14, True, True), (14, False, False), (15, True, False)]:
        table = dpmpp_2m(schedule, steps, lower_order_final=lower, final="sigma_min")
        assert bool(table.b[-1, 1] == 0) is order_one


# -- diffusers ---------------------------------------------------------------------------------------------------------


def scheduler_of(kind: str, betas: str, steps: int, *, zero_snr: bool = False, **options: object) -> diffusers.SchedulerMixin:
    """A diffusers scheduler whose tables are float64: its own are products of 1000 float32 factors, off by about 1e-5
    at the noisy end, which would hide errors of that size."""
    name = {"ddim": "DDIM", "ddpm": "DDPM", "euler": "EulerDiscrete", "euler_ancestral": "EulerAncestralDiscrete"}
    name |= {"heun": "HeunDiscrete", "dpmpp_2m": "DPMSolverMultistep"}
    scheduler = getattr(diffusers, name[kind] + "Scheduler")(beta_schedule=betas, **options)
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.from_numpy(betas_of(betas, zero_snr)), dim=0)
    if zero_snr and kind not in ("ddim", "ddpm"):
        scheduler.alphas_cumprod[-1] = 2**-24
    if options.get("set_alpha_to_one") is False:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    return scheduler


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
        # Theirs are float32, interpolated at float32 times: once seen to agree both are made float64.
        ratio = table.sigma if table.prediction == "flow" else table.sigma / table.alpha
        torch.testing.assert_close(scheduler.sigmas.double(), ratio, rtol=3e-6, atol=1e-7)
        torch.testing.assert_close(scheduler.timesteps.double(), table.t[:-1], rtol=0, atol=1e-4)
        scheduler.sigmas, scheduler.timesteps = ratio, table.t[:-1]
        scheduler.set_begin_index(0)
    if table.stochastic:
        options["generator"] = torch.Generator().manual_seed(7)
    ours = walk(table, x, draws_of(table, every))
    return largest_gap(ours, walk_scheduler(scheduler, x, **options))


# Float64 on both sides. The Heun step from the cosine schedule's ratio of 20000 to one of 10 costs three digits.
SCHEDULER = 1e-9


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("steps", [5, 37, 100])
def test_ddim_and_ddpm_are_those_of_diffusers(betas: str, prediction: str, spacing: str, offset: int, steps: int) -> None:
    schedule = schedule_of(betas)
    options = {"spacing": spacing, "offset": offset, "prediction": prediction}
    theirs = {"timestep_spacing": spacing, "steps_offset": offset, "prediction_type": THEIRS[prediction]}
    for eta, to_one in [(0.0, True), (0.5, True), (1.0, False)]:
        table = ddim(schedule, steps, eta=eta, landing="stride", set_alpha_to_one=to_one, **options)
        scheduler = scheduler_of("ddim", betas, steps, clip_sample=False, set_alpha_to_one=to_one, **theirs)
        # All in float64.
        assert gap_to_scheduler(table, scheduler, eta=eta) < 1e-11
    for variance in ("fixed_small", "fixed_large"):
        table = ddpm(schedule, steps, variance=variance, **options)
        scheduler = scheduler_of("ddpm", betas, steps, clip_sample=False, variance_type=variance, **theirs)
        assert gap_to_scheduler(table, scheduler, every=False) < 1e-11


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [5, 50])
def test_limits_are_those_of_diffusers(prediction: str, spacing: str, steps: int) -> None:
    schedule, options = Schedule.linear(), {"spacing": spacing, "prediction": prediction}
    theirs = {"timestep_spacing": spacing, "prediction_type": THEIRS[prediction]}
    threshold = {"dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5, "thresholding": True}
    for clip, limit in [(Clip(0.7), {"clip_sample_range": 0.7}), (DynamicThreshold(0.8, 1.5), threshold)]:
        for eta, clipped in [(0.0, False), (0.0, True), (0.5, False)]:
            table = ddim(schedule, steps, eta=eta, clip=clip, clipped_epsilon=clipped, landing="stride", **options)
            scheduler = scheduler_of("ddim", "linear", steps, **theirs, **limit)
            assert gap_to_scheduler(table, scheduler, scale=2, eta=eta, use_clipped_model_output=clipped) < 1e-11
        table = ddpm(schedule, steps, clip=clip, **options)
        assert gap_to_scheduler(table, scheduler_of("ddpm", "linear", steps, **theirs, **limit), False, 2) < 1e-11
    table = dpmpp_2m(schedule, steps, clip=DynamicThreshold(0.8, 1.5), **options)
    assert gap_to_scheduler(table, scheduler_of("dpmpp_2m", "linear", steps, **theirs, **threshold)) < SCHEDULER
    table = heun(schedule, steps, clip=Clip(0.7), **options)
    scheduler = scheduler_of("heun", "linear", steps, clip_sample=True, clip_sample_range=0.7, **theirs)
    assert gap_to_scheduler(table, scheduler) < SCHEDULER


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
@pytest.mark.parametrize("steps", [5, 37, 100])
def test_samplers_in_the_noise_ratio_are_those_of_diffusers(
    betas: str, prediction: str, spacing: str, offset: int, steps: int
) -> None:
    schedule = schedule_of(betas)
    options = {"spacing": spacing, "offset": offset, "prediction": prediction}
    theirs = {"timestep_spacing": spacing, "steps_offset": offset, "prediction_type": THEIRS[prediction]}
    gaps = {}
    for karras in (False, True):
        more = {**theirs, "use_karras_sigmas": karras}
        for final in ("zero",) if karras else ("zero", "sigma_min"):
            table = euler(schedule, steps, karras=karras, final=final, **options)
            scheduler = scheduler_of("euler", betas, steps, final_sigmas_type=final, **more)
            assert table.start_scale == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
            gaps["euler", karras, final] = gap_to_scheduler(table, scheduler)
            table = dpmpp_2m(schedule, steps, karras=karras, final=final, **options)
            scheduler = scheduler_of("dpmpp_2m", betas, steps, final_sigmas_type=final, **more)
            if karras and betas == "squaredcos_cap_v2":
                # diffusers cuts these times to integers; ours are rounded, which samplers.py states.
                assert (scheduler.timesteps - table.t[:-1]).abs().max() <= 1
                scheduler.timesteps = table.t[:-1]
            gaps["dpmpp_2m", karras, final] = gap_to_scheduler(table, scheduler)
        gaps["heun", karras] = gap_to_scheduler(
            heun(schedule, steps, karras=karras, **options), scheduler_of("heun", betas, steps, **more)
        )
    table = euler_ancestral(schedule, steps, **options)
    gaps["euler_ancestral"] = gap_to_scheduler(table, scheduler_of("euler_ancestral", betas, steps, **theirs))
    assert {case: gap for case, gap in gaps.items() if not gap < SCHEDULER} == {}


@pytest.mark.parametrize("steps", [5, 37, 100])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_is_that_of_diffusers(steps: int, shift: float) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.scale_model_input = lambda x, t: x
    scheduler.set_timesteps(steps)
    table = flow_euler(steps, shift=shift)
    assert gap_to_scheduler(table, scheduler) < SCHEDULER


@pytest.mark.parametrize("steps", [5, 37])
def test_zero_terminal_snr_is_that_of_diffusers(steps: int) -> None:
    schedule = Schedule.scaled_linear(rescale_zero_snr=True)
    ours = {"spacing": "trailing", "prediction": "v"}
    theirs = {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    # At eta 1 diffusers takes the root of a rounding error from pure noise, of either sign.
    for eta in (0.0, 0.9):
        table = ddim(schedule, steps, eta=eta, landing="stride", **ours)
        assert table.alpha[0] == 0
        scheduler = scheduler_of("ddim", "scaled_linear", steps, zero_snr=True, clip_sample=False, **theirs)
        assert gap_to_scheduler(table, scheduler, eta=eta) < 1e-11
    scheduler = scheduler_of("ddpm", "scaled_linear", steps, zero_snr=True, clip_sample=False, **theirs)
    assert gap_to_scheduler(ddpm(schedule, steps, **ours), scheduler, every=False) < 1e-11
    for sampler in (euler, euler_ancestral, dpmpp_2m):
        scheduler = scheduler_of(sampler.__name__, "scaled_linear", steps, zero_snr=True, **theirs)
        assert gap_to_scheduler(sampler(schedule, steps, **ours), scheduler) < SCHEDULER


# -- the table's own guards --------------------------------------------------------------------------------------------

TABLES = {
    "ddim": ddim(Schedule.linear(), 20),
    "ddim eta": ddim(Schedule.cosine(), 20, eta=1.0, prediction="v"),
    "ddpm": ddpm(Schedule.linear(), 20, prediction="sample"),
    "euler": euler(Schedule.scaled_linear(), 20),
    "euler_ancestral": euler_ancestral(Schedule.scaled_linear(), 20, prediction="v"),
    "heun": heun(Schedule.scaled_linear(), 20),
    "dpmpp_2m": dpmpp_2m(Schedule.linear(), 20, karras=True),
    "flow_euler": flow_euler(20, shift=3.0),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("field", ["a", "b"])
@pytest.mark.parametrize("factor", [1.001, 0.999])
def test_a_wrong_coefficient_is_caught_wherever_it_stands(name: str, field: str, factor: float) -> None:
    table = TABLES[name]
    for i in range(table.steps):
        for j in range(table.band):
            wrong = getattr(table, field).clone()
            wrong[i, j] *= factor
            if abs(wrong[i, j] - getattr(table, field)[i, j]) < 1e-4:
                wrong[i, j] += 1e-3 if i >= j else 0
            if torch.equal(wrong, getattr(table, field)):
                continue
            with pytest.raises(ValueError, match=rf"table '{table.name}': .* at step {i}: level .* check the coeff"):
                dataclasses.replace(table, **{field: wrong})


@pytest.mark.parametrize("name", [name for name in TABLES if TABLES[name].stochastic])
def test_variances_that_do_not_add_up_are_caught(name: str) -> None:
    table = TABLES[name]
    wrong = table.c.clone()
    wrong[10] *= 1.01
    with pytest.raises(ValueError, match=r"variances do not add up at step 10: level .* where the schedule has"):
        dataclasses.replace(table, c=wrong)
    assert dataclasses.replace(table, c=wrong, exact_variance=False).c[10] == wrong[10]


def test_a_wrong_coefficient_of_a_clean_datum_is_named() -> None:
    table = TABLES["euler"]
    wrong = table.a.clone()
    wrong[3] *= 1.001
    with pytest.raises(ValueError, match=r"table 'euler': a known clean datum leaves its ray at step 3: level 1.001 where"):
        dataclasses.replace(table, a=wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"a": torch.ones(20, dtype=torch.float64)},
            r"a has shape \(20,\) and dtype torch.float64; with 20 steps it must be",
        ),
        ({"b": torch.ones(20, 3, dtype=torch.float64)}, r"b has shape \(20, 3\) .* it must be \(20, 2\), float64"),
        ({"c": torch.zeros(20)}, r"c has shape \(20,\) and dtype torch.float32; .* it must be \(20,\), float64"),
        ({"alpha": torch.ones(20, dtype=torch.float64)}, r"alpha has shape \(20,\) .* it must be \(21,\), float64"),
        ({"sigma": torch.ones(22, dtype=torch.float64)}, r"sigma has shape \(22,\)"),
        ({"scale": torch.ones(21, dtype=torch.float64)}, r"scale has shape \(21,\) .* it must be \(20,\), float64"),
        (
            {"reached": torch.ones(20, dtype=torch.float64)},
            r"reached has shape \(20,\) .* it must be \(20, 2\), float64",
        ),
        ({"clip_weight": torch.ones(3, dtype=torch.float64)}, r"clip_weight has shape \(3,\) .* it must be \(20,\)"),
        ({"t": torch.ones(1, dtype=torch.float64)}, "has 1 times; it needs at least two, for one step"),
        ({"c": torch.full((20,), math.nan, dtype=torch.float64)}, "c is not finite at node 0"),
    ],
)
def test_wrong_shapes_and_values_are_refused(change: dict, message: str) -> None:
    table = TABLES["dpmpp_2m"]
    if "sigma" in change or "alpha" in change:
        change = {**change, "reached": None}
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(table, **change)


def test_a_step_that_reads_states_before_the_first_is_refused() -> None:
    table = TABLES["dpmpp_2m"]
    wrong = table.b.clone()
    wrong[0, 1] = 0.1
    with pytest.raises(ValueError, match="step 0 refers to states before the first one"):
        dataclasses.replace(table, b=wrong)


def test_a_level_at_which_no_clean_estimate_exists_is_refused_though_coefficients_are_finite() -> None:
    table = TABLES["euler"]
    alpha = table.alpha.clone()
    alpha[0] = 0
    with pytest.raises(ValueError, match="a known clean datum leaves its ray at step 0: level nan"):
        dataclasses.replace(table, alpha=alpha)


@pytest.mark.parametrize("sampler", [ddim, ddpm])
def test_epsilon_at_pure_noise_is_refused(sampler: Callable[..., Table]) -> None:
    schedule = Schedule.linear(rescale_zero_snr=True)
    message = r"a is not finite at node 0 \(alpha = 0, sigma = 1, epsilon prediction\); a schedule that starts from"
    with pytest.raises(ValueError, match=message):
        sampler(schedule, 10, spacing="trailing")
    assert sampler(schedule, 10, spacing="leading").alpha[0] > 0


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "steps", "options", "message"),
    [
        (ddim, 10, {"eta": 1.5}, r"eta is 1.5; it must lie in \[0, 1\]"),
        (ddim, 10, {"eta": -0.1}, r"eta is -0.1; it must lie in \[0, 1\]"),
        (ddim, 10, {"landing": "strde"}, "landing is 'strde'; it must be one of next, stride; did you mean 'stride'"),
        (
            ddim,
            10,
            {"set_alpha_to_one": False, "clip": Clip()},
            "clip was given for a last step that begins and ends at",
        ),
        (ddim, 10, {"prediction": "eps"}, "prediction is 'eps'; it must be one of epsilon, sample, v, flow"),
        (ddim, 0, {}, "0 steps were asked of a schedule that can give 1 to 1000"),
        (ddim, 1001, {}, "1001 steps were asked of a schedule that can give 1 to 1000"),
        (
            ddim,
            10,
            {"spacing": "linear"},
            "spacing is 'linear'; it must be one of leading, trailing, linspace; did you",
        ),
        (ddim, 1000, {"offset": 1}, "an offset of 1 moves the times of 1000 steps to 1 ... 1000"),
        (ddpm, 10, {"variance": "learned"}, "variance is 'learned'; it must be one of fixed_small, fixed_large"),
        (euler, 10, {"final": "sigma_max"}, "final is 'sigma_max'; it must be one of zero, sigma_min; did you mean"),
        (euler, 10, {"offset": 1}, "the offset is 1 with linspace spacing; only leading spacing has one"),
        (euler_ancestral, 1001, {}, "1001 steps were asked of a schedule that can give 1 to 1000"),
        (heun, 10, {"spacing": "trail"}, "spacing is 'trail'; .* did you mean 'trailing'"),
        (dpmpp_2m, 1000, {}, "1000 steps were asked of dpmpp_2m with linspace spacing, which can take 1 to 999"),
        (dpmpp_2m, 0, {"spacing": "trailing"}, "0 steps were asked of dpmpp_2m with trailing .* can take 1 to 1000"),
        (dpmpp_2m, 10, {"spacing": "trail"}, "spacing is 'trail'; .* did you mean 'trailing'"),
        (dpmpp_2m, 10, {"final": "one"}, "final is 'one'; it must be one of zero, sigma_min"),
        (dpmpp_2m, 10, {"restarts": [3, 10]}, r"restarts are \[3, 10\]; each must be the index of one of the 10 steps"),
        (dpmpp_2m, 10, {"restarts": [-1]}, r"restarts are \[-1\]; each must be .* from 0 to 9"),
    ],
)
def test_every_error_says_what_was_given_and_what_was_expected(
    sampler: Callable[..., Table], steps: int, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(Schedule.linear(), steps, **options)


@pytest.mark.parametrize("sampler", [euler, euler_ancestral, heun, dpmpp_2m])
def test_ratios_that_rise_are_refused(sampler: Callable[..., Table]) -> None:
    # The capped last ratio, 4096, is below its neighbour's 15406.
    schedule = Schedule.linear(rescale_zero_snr=True)
    with pytest.raises(ValueError, match=r"the noise ratio rises from 4096 to 15406 at step 0; it must fall"):
        sampler(schedule, 1000, spacing="trailing", prediction="v")


def test_flow_euler_refuses_a_shift_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"flow levels were asked for 10 steps with shift -1.0"):
        flow_euler(10, shift=-1.0)


# -- what a table tells ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_posterior_variance_is_the_noise_of_ddpm(spacing: str) -> None:
    table = ddpm(Schedule.linear(), 50, spacing=spacing)
    # The floor of 1e-20 on the last step aside.
    torch.testing.assert_close(table.posterior_variance, table.c**2, rtol=1e-9, atol=1e-19)
    # DDIM at eta 0 adds none but has the same unit; at eta 1 it is this noise.
    still = ddim(Schedule.linear(), 50, spacing=spacing)
    assert not still.stochastic
    torch.testing.assert_close(still.posterior_variance, table.posterior_variance)
    full = ddim(Schedule.linear(), 50, spacing=spacing, eta=1.0)
    torch.testing.assert_close(full.c**2, table.posterior_variance, rtol=1e-9, atol=1e-19)


def test_posterior_variance_of_euler_ancestral_is_its_noise() -> None:
    table = euler_ancestral(Schedule.linear(), 30)
    torch.testing.assert_close(table.posterior_variance, table.c**2)
    assert table.posterior_variance[-1] == 0


def test_posterior_variance_exists_from_pure_noise_to_data() -> None:
    table = ddim(Schedule.linear(rescale_zero_snr=True), 10, spacing="trailing", prediction="v")
    assert table.alpha[0] == 0
    assert table.posterior_variance.isfinite().all()
    torch.testing.assert_close(table.posterior_variance[0], table.sigma[1] ** 2)


def test_a_level_that_two_nodes_share_has_no_posterior_variance() -> None:
    table = heun(Schedule.linear(), 10)
    assert (table.posterior_variance[1::2] == 0).all()
    assert (table.posterior_variance[0:-1:2] > 0).all()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v", "flow"])
def test_convert_replaces_the_clean_estimate_by_its_limit(prediction: str) -> None:
    table = ddpm(Schedule.linear(), 10, prediction=prediction, clip=Clip(0.5))
    x, m = torch.randn(2, 4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for nodes in (slice(2, 6), torch.tensor([9, 0, 3, 3])):
        new = table.convert(nodes, x, m)
        p, q = column(table.p[nodes], x), column(table.q[nodes], x)
        torch.testing.assert_close(p * x + q * new, (p * x + q * m).clamp(-0.5, 0.5), rtol=0, atol=1e-12)
        assert table.convert(nodes, x.float(), m.float()).dtype == torch.float32


def test_convert_is_the_identity_without_a_limit_and_inside_it() -> None:
    x, m = torch.randn(2, 4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert ddim(Schedule.linear(), 10).convert(slice(0, 4), x, m) is m
    wide = ddim(Schedule.linear(), 10, clip=Clip(1e6))
    assert torch.equal(wide.convert(slice(0, 4), x, m), m)

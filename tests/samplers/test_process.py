# SPDX-License-Identifier: Apache-2.0
"""samplers/process.py: networks of four processes, each written in its own coordinates, give one sample.

The networks here know nothing of the package: each is handed a state and a time as its own process has them, finds signal and
noise level from the time alone, and returns the optimal prediction, so that a wrong time or factor is seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import SHAPE, chain, gap
from textbook import BETAS, betas_of, ratios_of, schedule_of
from torch import Tensor

from paradiff import Keyed, Schedule, Table
from paradiff.chain.prediction import Prediction
from paradiff.models.exact import Mixture
from paradiff.samplers import (
    Grid,
    Process,
    exponential_integrator,
    log_snr_grid,
    ornstein_uhlenbeck,
    paper_grid,
    rectified_flow,
    uniform_grid,
    variance_exploding,
    variance_preserving,
)
from paradiff.samplers.exponential import Form
from paradiff.samplers.process import level_of, signal_and_noise

PREDICTIONS: list[Prediction] = ["epsilon", "sample", "v", "flow"]
ADDED: dict[Form, float] = {"score": 1.0, "epsilon": 0.5, "clean": 1.0}  # a volatility for each form

DATA = Mixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
    torch.tensor([0.05, 0.2, 0.6]),
)

Levels = tuple[Tensor, Tensor]


def preserving(t: Tensor, levels: np.ndarray) -> Levels:
    """Levels of a variance-preserving state at a fractional time: log(sigma/alpha) is linear between whole times."""
    ratio = torch.from_numpy(np.exp(np.interp(t.numpy(), np.arange(len(levels)), np.log(levels))))
    return 1 / torch.sqrt(1 + ratio**2), ratio / torch.sqrt(1 + ratio**2)


LINEAR = ratios_of(np.cumprod(1 - betas_of("linear")))

# A process, and signal and noise level of its own state as a function of its own time.
PROCESSES: dict[str, tuple[Process, Callable[[Tensor], Levels]]] = {
    "variance preserving": (variance_preserving(Schedule.linear()), lambda t: preserving(t, LINEAR)),
    "variance exploding": (variance_exploding(1e-3, 500), lambda t: (torch.ones_like(t), t)),
    "variance exploding, time log(sigma)/4": (
        variance_exploding(1e-3, 500, lambda sigma: sigma.log() / 4),
        lambda t: (torch.ones_like(t), torch.exp(4 * t)),
    ),
    "rectified flow": (rectified_flow(), lambda t: (1 - t / 1000, t / 1000)),
    "rectified flow, times 0 to 1": (rectified_flow(1), lambda t: (1 - t, t)),
    "ornstein-uhlenbeck": (ornstein_uhlenbeck(), lambda t: (torch.exp(-t / 2), torch.sqrt(1 - torch.exp(-t)))),
}
each_process = pytest.mark.parametrize("name", PROCESSES)

GRIDS = {
    "uniform": uniform_grid(8.0, 2e-3, 2, 12),
    "log_snr": log_snr_grid(10.0, 2e-4, 2, 12, clean=True),
    "paper": paper_grid(3, 0.25, 5e-3, clean=True),
}


def network(levels: Callable[[Tensor], Levels], prediction: Prediction) -> Callable[[Tensor, Tensor], Tensor]:
    """The optimal prediction from x = alpha x0 + sigma eps, levels found from the time."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = levels(t)
        clean = DATA.clean(x, alpha, sigma)
        alpha, sigma = (level.view(-1, *[1] * (x.ndim - 1)) for level in (alpha, sigma))
        eps = (x - alpha * clean) / sigma
        if prediction == "v":
            return (alpha * eps - sigma * clean) / torch.sqrt(alpha**2 + sigma**2)
        return {"epsilon": eps, "sample": clean, "flow": eps - clean}[prediction]

    return denoise


def sample_of(name: str, table: Table, prediction: Prediction) -> Tensor:
    return chain(network(PROCESSES[name][1], prediction), table, Keyed(SHAPE, 7))[-1]


# -- levels, times and factors -----------------------------------------------------------------------------------------


@each_process
def test_a_level_has_the_time_and_the_factor_of_its_process(name: str) -> None:
    process, levels = PROCESSES[name]
    u = torch.linspace(1e-3, 10, 200, dtype=torch.float64)
    alpha, sigma = signal_and_noise(u)
    theirs = levels(process.time(alpha, sigma))
    # Times up to 1000 in float64; alpha = 1 - 999.9/1000 loses four digits.
    torch.testing.assert_close(theirs[1] / theirs[0], sigma / alpha, rtol=1e-11, atol=0)
    torch.testing.assert_close(level_of(theirs[1] / theirs[0]), u, rtol=1e-11, atol=0)
    # On a ray: the network's state of x0 and eps is the factor times z of the same x0 and eps.
    x0, eps = 1.3, -0.4
    mine = process.scale(alpha, sigma) * (alpha * x0 + sigma * eps)
    torch.testing.assert_close(mine, theirs[0] * x0 + theirs[1] * eps, rtol=1e-11, atol=1e-11)


def test_signal_and_noise_of_a_level() -> None:
    u = torch.tensor([0.0, 1e-8, 0.5, 7.0, math.inf], dtype=torch.float64)
    alpha, sigma = signal_and_noise(u)
    assert (float(alpha[0]), float(sigma[0])) == (1, 0)
    assert (float(alpha[-1]), float(sigma[-1])) == (0, 1)
    assert float(sigma[1]) == pytest.approx(1e-4, rel=1e-8)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(u), rtol=0, atol=1e-15)
    torch.testing.assert_close(level_of(sigma / alpha), u, rtol=1e-14, atol=0)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("pure", [False, True])
def test_training_levels_have_their_training_times(betas: str, pure: bool) -> None:
    """Also where the capped last ratio of a schedule that ends in pure noise lies below the two before it (linear betas)."""
    schedule = schedule_of(betas, pure)
    process = variance_preserving(schedule)
    bar = np.cumprod(1 - betas_of(betas, pure))
    levels = torch.from_numpy(np.where(bar > 1e-30, -np.log(np.maximum(bar, 1e-300)), np.inf))
    found = process.time(*signal_and_noise(levels))
    # Levels of alpha_bar near 1 keep 12 digits.
    torch.testing.assert_close(found, torch.arange(1000, dtype=torch.float64), rtol=0, atol=1e-7)
    assert process.lowest == pytest.approx(float(levels[0]), rel=1e-9)
    assert process.highest == (math.inf if pure else pytest.approx(float(levels[-1]), rel=1e-12))
    between = process.time(*signal_and_noise(levels[:999].unfold(0, 2, 1).mean(1)))
    assert (between > torch.arange(998)).all()
    assert (between < torch.arange(1, 999)).all()


def test_ranges_of_the_other_processes() -> None:
    assert variance_exploding(0.1, 20).lowest == pytest.approx(math.log(1.01), rel=1e-12)
    assert variance_exploding(0.1, 20).highest == pytest.approx(math.log(401), rel=1e-12)
    for process in (rectified_flow(), ornstein_uhlenbeck()):
        assert (process.lowest, process.highest) == (0, math.inf)
    trained = {name: process.train_times for name, (process, _) in PROCESSES.items()}
    assert [name for name in trained if trained[name]] == [
        "variance preserving",
        "rectified flow",
        "rectified flow, times 0 to 1",
    ]


# -- change of variables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("form", ["score", "epsilon", "clean"])
@pytest.mark.parametrize("stochastic", [False, True], ids=["ode", "sde"])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_process_gives_the_same_sample(prediction: Prediction, form: Form, stochastic: bool, grid: str) -> None:
    options = {"form": form, "volatility": ADDED[form] * stochastic, "prediction": prediction}
    tables = {name: exponential_integrator(process, GRIDS[grid], **options) for name, (process, _) in PROCESSES.items()}
    found = {name: sample_of(name, table, prediction) for name, table in tables.items()}
    wanted = found.pop("ornstein-uhlenbeck")
    assert wanted.abs().max() > 0.1
    for name, sample in found.items():
        # A flow time near 1000 leaves alpha 13 digits, a level of alpha_bar near 1 as many.
        assert gap(sample, wanted) < 1e-11, name


@pytest.mark.parametrize("volatility", [0.0, 1.0])
@pytest.mark.parametrize("prediction", ["sample", "v", "flow"])
def test_the_same_from_pure_noise(volatility: float, prediction: Prediction) -> None:
    """Processes that reach it: a flow, and a schedule rescaled to it, whose levels at the grid's nodes are training levels."""
    schedule = Schedule.linear(rescale_zero_snr=True)
    times = torch.tensor([999, 900, 750, 500, 250, 100, 0])
    u = torch.cat([-schedule.alpha_bar[times].log(), torch.zeros(1, dtype=torch.float64)])
    assert u[0] == math.inf
    bar = np.cumprod(1 - betas_of("linear", zero_snr=True))

    def levels(t: Tensor) -> Levels:
        found = torch.from_numpy(bar[t.round().long().numpy()]).clamp(min=0)
        return found.sqrt(), (1 - found).sqrt()

    found = []
    for process, own in [(variance_preserving(schedule), levels), (rectified_flow(), PROCESSES["rectified flow"][1])]:
        options = {"form": "clean", "volatility": volatility, "prediction": prediction}
        table = exponential_integrator(process, Grid(u, [0, 3, 7]), **options)
        assert table.alpha[0] == 0
        found.append(chain(network(own, prediction), table, Keyed(SHAPE, 7))[-1])
    assert gap(found[0], found[1]) < 1e-11


@each_process
def test_a_wrong_time_or_factor_is_seen(name: str) -> None:
    """The sample answers to a change of a thousandth in what the network is told, far beyond the tolerance above."""
    process, _ = PROCESSES[name]
    right = sample_of(name, exponential_integrator(process, GRIDS["log_snr"]), "epsilon")
    times = dataclasses.replace(process, time=lambda alpha, sigma: process.time(alpha, sigma) * 0.999)
    factors = dataclasses.replace(process, scale=lambda alpha, sigma: process.scale(alpha, sigma) * 1.001)
    for wrong in (times, factors):
        assert gap(sample_of(name, exponential_integrator(wrong, GRIDS["log_snr"]), "epsilon"), right) > 1e-4


# -- nearest times -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["variance preserving", "rectified flow"])
def test_nearest_times_are_whole_and_nothing_else_changes(name: str) -> None:
    process, _ = PROCESSES[name]
    real = exponential_integrator(process, GRIDS["log_snr"])
    whole = exponential_integrator(process, GRIDS["log_snr"], times="nearest")
    assert torch.equal(whole.t, whole.t.round())
    assert (real.t != real.t.round()).sum() > 20
    assert (whole.t - real.t).abs().max() <= 0.5
    for field in ("alpha", "sigma", "a", "b", "c", "scale"):
        assert torch.equal(getattr(whole, field), getattr(real, field)), field
    apart = gap(sample_of(name, whole, "epsilon"), sample_of(name, real, "epsilon"))
    assert 1e-5 < apart < 0.3  # the network believes in another level, which is near


@pytest.mark.parametrize("betas", BETAS)
def test_real_and_nearest_are_the_same_at_training_levels(betas: str) -> None:
    schedule = schedule_of(betas)
    times = torch.arange(950, 0, -50)
    grid = Grid(-schedule.alpha_bar[times].log(), [0, len(times) - 1])
    real, whole = (exponential_integrator(variance_preserving(schedule), grid, times=kind) for kind in ("real", "nearest"))
    assert torch.equal(whole.t, times.double())
    torch.testing.assert_close(real.t, whole.t, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["variance exploding", "ornstein-uhlenbeck"])
def test_nearest_times_are_refused_where_there_are_none(name: str) -> None:
    process, _ = PROCESSES[name]
    with pytest.raises(ValueError, match=rf"the process {process.name} has no whole training times"):
        exponential_integrator(process, GRIDS["log_snr"], times="nearest")


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: variance_exploding(0, 1), "the noise levels are 0 to 1; they must be above 0, rising and finite"),
        (lambda: variance_exploding(2, 1), "the noise levels are 2 to 1; they must be above 0, rising"),
        (lambda: variance_exploding(1, 1), "the noise levels are 1 to 1; they must be above 0, rising"),
        (lambda: variance_exploding(1, math.inf), "the noise levels are 1 to inf; they must be .* finite"),
        (lambda: rectified_flow(0), "the flow has 0 training steps; the scale of its times must be at least 1"),
    ],
)
def test_every_error_says_what_was_given_and_what_was_expected(make: Callable[[], Process], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("process", "grid", "message"),
    [
        (
            variance_preserving(Schedule.linear()),
            uniform_grid(10.2, 0.1, 1, 4),
            "begins at u = 10.2, noisier than variance_preserving ever is, u = 10.1177; begin there or below",
        ),
        (
            variance_exploding(0.1, 20),
            uniform_grid(6.0, 0.1, 1, 4),
            "begins at u = 6, noisier than variance_exploding ever is, u = 5.99396; begin there or below",
        ),
        (
            variance_preserving(Schedule.linear()),
            uniform_grid(8.0, 0.9e-4, 1, 4),
            "stops at u = 9e-05, cleaner than variance_preserving ever is, u = 0.000100005; stop there or above",
        ),
        (
            variance_exploding(0.1, 20),
            uniform_grid(5.0, 0.009, 1, 4, clean=True),
            "stops at u = 0.009, cleaner than variance_exploding ever is, u = 0.00995033; stop there or above",
        ),
    ],
)
@pytest.mark.parametrize("form", ["score", "clean"])
def test_levels_outside_those_of_the_process_are_refused(process: Process, grid: Grid, message: str, form: Form) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        exponential_integrator(process, grid, form=form)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["variance preserving", "variance exploding"])
@pytest.mark.parametrize("clean", [False, True])
def test_the_whole_range_of_a_process_is_allowed(name: str, clean: bool) -> None:
    process, _ = PROCESSES[name]
    table = exponential_integrator(process, uniform_grid(process.highest, process.lowest, 1, 5, clean=clean))
    assert table.steps == 5 + clean

# SPDX-License-Identifier: Apache-2.0
"""samplers/exponential.py against quadrature of the frozen equation, a textbook loop in the language of scores, and ddpm and
ddim.

The equation is written out here once more: down from the level u, with sigma^2 = 1 - e^(-u) and alpha^2 = e^(-u),

    dz = (z/2 + (1 + v^2)/2 s) dtau + v dB,    u = u_0 - tau,    s = -eps/sigma = (alpha D - z)/sigma^2.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import SHAPE, chain, gap
from scipy.integrate import quad
from textbook import BETAS, schedule_of
from torch import Tensor

import paradiff.samplers.exponential
from paradiff import Keyed, Schedule, Table
from paradiff.chain.prediction import Prediction
from paradiff.models.exact import Gaussian, Mixture
from paradiff.planning.gaussian_law import linear_chain, sample_variance, sequential_weights
from paradiff.samplers import (
    Grid,
    Process,
    ddim,
    ddpm,
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

FORMS: list[Form] = ["score", "epsilon", "clean"]
VOLATILITIES = [0.0, 0.5, 1.0]
PREDICTIONS: list[Prediction] = ["epsilon", "sample", "v", "flow"]

# Steps long and short, at high and low noise.
LEVELS = [8.0, 6.5, 6.4, 2.0, 1.0, 0.9, 0.3, 0.02, 0.015, 1e-3, 9.9e-4, 9.8e-4]
GRID = Grid(torch.tensor(LEVELS, dtype=torch.float64), [0, 5, len(LEVELS) - 1])

# Quadrature to 1e-14, and coefficients that are differences of numbers up to a hundred times their size.
QUADRATURE = 1e-12

Coefficients = tuple[Tensor, Tensor, Tensor]


# -- coefficients ------------------------------------------------------------------------------------------------------


def frozen_step(form: Form, v: float, start: float, stop: float) -> tuple[float, float, float]:
    """Factors of the state and of the frozen quantity, and the deviation of the noise, of a step from level to level."""

    def rates(u: float) -> tuple[float, float]:
        """Drift per unit of state and per unit of the frozen quantity."""
        weight, variance = (1 + v * v) / 2, -math.expm1(-u)
        if form == "score":
            return 0.5, weight
        if form == "epsilon":
            return 0.5, -weight / math.sqrt(variance)
        return 0.5 - weight / variance, weight * math.exp(-u / 2) / variance

    def integral(f: Callable[[float], float], upper: float) -> float:
        return quad(f, stop, upper, epsabs=1e-14, epsrel=1e-13, limit=200)[0]

    def passed(u: float) -> float:
        """What is left at the end of a change of the state at level u."""
        return math.exp(integral(lambda w: rates(w)[0], u))

    output = integral(lambda u: passed(u) * rates(u)[1], start)
    return passed(start), output, v * math.sqrt(integral(lambda u: passed(u) ** 2, start))


def quadrature(form: Form, v: float) -> np.ndarray:
    """`[N, 3]`: the above for the steps of the grid."""
    return np.array([frozen_step(form, v, *pair) for pair in itertools.pairwise(LEVELS)])


def in_frozen_quantity(table: Table, form: Form) -> np.ndarray:
    """`[N, 3]` factors of state, frozen quantity and noise, from those of the state and the network's output."""
    u = np.array(LEVELS[:-1])
    alpha, sigma = np.exp(-u / 2), np.sqrt(-np.expm1(-u))
    zero, one = np.zeros_like(u), np.ones_like(u)
    # The output as a combination of the state and the frozen quantity, from s = -eps/sigma and z = alpha D + sigma eps.
    output = {
        ("epsilon", "score"): (zero, -sigma),
        ("epsilon", "epsilon"): (zero, one),
        ("epsilon", "clean"): (1 / sigma, -alpha / sigma),
        ("sample", "score"): (1 / alpha, sigma**2 / alpha),
        ("sample", "epsilon"): (1 / alpha, -sigma / alpha),
        ("sample", "clean"): (zero, one),
        ("v", "score"): (-sigma / alpha, -sigma / alpha),
        ("v", "epsilon"): (-sigma / alpha, 1 / alpha),
        ("v", "clean"): (alpha / sigma, -1 / sigma),
        ("flow", "score"): (-1 / alpha, -sigma - sigma**2 / alpha),
        ("flow", "epsilon"): (-1 / alpha, 1 + sigma / alpha),
        ("flow", "clean"): (1 / sigma, -alpha / sigma - 1),
    }
    state, frozen = output[table.prediction, form]
    a, b, c = table.a[:, 0].numpy(), table.b[:, 0].numpy(), table.c.numpy()
    return np.stack([a + b * state, b * frozen, c], axis=1)


def off(table: Table, form: Form, wanted: np.ndarray) -> float:
    """Largest error of a coefficient, beside its size or 1 where that is smaller."""
    return float((np.abs(in_frozen_quantity(table, form) - wanted) / np.maximum(np.abs(wanted), 1)).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("volatility", VOLATILITIES)
def test_coefficients_are_those_of_quadrature(form: Form, volatility: float) -> None:
    wanted = quadrature(form, volatility)
    assert (wanted[:, 2] > 0).all() == (volatility > 0)
    for prediction in PREDICTIONS:
        options = {"form": form, "volatility": volatility, "prediction": prediction}
        table = exponential_integrator(ornstein_uhlenbeck(), GRID, **options)
        assert off(table, form, wanted) < QUADRATURE, prediction
        assert table.name == ("exponential_sde" if volatility else "exponential_ode")
        assert table.stochastic == (volatility > 0)
        # Small coefficients too, to their own size: deviations of the last, short steps.
        np.testing.assert_allclose(table.c.numpy(), wanted[:, 2], rtol=1e-10, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("volatility", [0.5, 1.0])
def test_the_quadrature_sees_a_wrong_coefficient(form: Form, volatility: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults that keep a clean datum on its ray, so that the table itself does not refuse them."""
    wanted = quadrature(form, volatility)
    right = paradiff.samplers.exponential._step
    other = 0.7 if volatility == 1 else 1.0

    def table() -> Table:
        return exponential_integrator(ornstein_uhlenbeck(), GRID, form=form, volatility=volatility, prediction="sample")

    assert off(table(), form, wanted) < QUADRATURE

    def gain(form: Form, v: float, u: Tensor, alpha: Tensor, sigma: Tensor) -> Coefficients:
        state, clean, c = right(form, v, u, alpha, sigma)
        return state - 1e-10, clean + 1e-10 * alpha[:-1], c

    def noise(form: Form, v: float, u: Tensor, alpha: Tensor, sigma: Tensor) -> Coefficients:
        state, clean, c = right(form, v, u, alpha, sigma)
        return state, clean, c * (1 + 1e-10)

    def last_step(form: Form, v: float, u: Tensor, alpha: Tensor, sigma: Tensor) -> Coefficients:
        state, clean, c = right(form, v, u, alpha, sigma)
        clean[-1] += 1e-10
        return state, clean, c

    def volatility_of_another(form: Form, v: float, u: Tensor, alpha: Tensor, sigma: Tensor) -> Coefficients:
        return right(form, other, u, alpha, sigma)

    def form_of_another(form: Form, v: float, u: Tensor, alpha: Tensor, sigma: Tensor) -> Coefficients:
        return right("score" if form == "epsilon" else "epsilon", v, u, alpha, sigma)

    faults = [gain, noise, last_step, volatility_of_another]
    for fault in faults if form == "clean" else [*faults, form_of_another]:
        monkeypatch.setattr(paradiff.samplers.exponential, "_step", fault)
        assert off(table(), form, wanted) > 20 * QUADRATURE, fault.__name__


@pytest.mark.parametrize("volatility", VOLATILITIES)
def test_the_papers_coefficients(volatility: float) -> None:
    """a, b and c of PIADM in the score language, and the same for the ODE."""
    table = exponential_integrator(ornstein_uhlenbeck(), uniform_grid(4.0, 0.5, 1, 7), volatility=volatility)
    sigma = table.sigma[:-1].numpy()
    state, score, noise = table.a[:, 0].numpy(), -table.b[:, 0].numpy() * sigma, table.c.numpy()
    np.testing.assert_allclose(state, math.exp(0.25), rtol=1e-14)
    np.testing.assert_allclose(score, (1 + volatility**2) * (math.exp(0.25) - 1), rtol=1e-13)
    np.testing.assert_allclose(noise, volatility * math.sqrt(math.exp(0.5) - 1), rtol=1e-14)


def test_forms_agree_where_they_should_and_differ_elsewhere() -> None:
    def coefficients(form: Form, volatility: float) -> Tensor:
        table = exponential_integrator(ornstein_uhlenbeck(), GRID, form=form, volatility=volatility, prediction="sample")
        return torch.cat([table.a[:, 0], table.b[:, 0], table.c])

    torch.testing.assert_close(coefficients("epsilon", 0.0), coefficients("clean", 0.0), rtol=1e-12, atol=1e-12)
    assert (coefficients("score", 0.0) - coefficients("clean", 0.0)).abs().max() > 0.1
    assert (coefficients("score", 1.0) - coefficients("clean", 1.0)).abs().max() > 0.1
    assert (coefficients("score", 1.0) - coefficients("epsilon", 1.0)).abs().max() > 0.1
    assert (coefficients("epsilon", 1.0) - coefficients("clean", 1.0)).abs().max() > 0.1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("volatility", VOLATILITIES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_to_level_0_lands_on_the_clean_datum(form: Form, volatility: float, prediction: Prediction) -> None:
    grid = uniform_grid(4.0, 0.1, 1, 5, clean=True)
    options = {"form": form, "volatility": volatility, "prediction": prediction}
    table = exponential_integrator(ornstein_uhlenbeck(), grid, **options)
    x, m = torch.tensor([0.3, -1.2]), torch.tensor([0.8, 0.1])
    torch.testing.assert_close(
        table.a[-1, 0] * x + table.b[-1, 0] * m, table.p[-1] * x + table.q[-1] * m, check_dtype=False, rtol=1e-14, atol=1e-14
    )
    assert (float(table.c[-1]), float(table.sigma[-1]), float(table.t[-1]), float(table.scale[-1])) == (0, 0, 0, 1)
    bare = exponential_integrator(ornstein_uhlenbeck(), uniform_grid(4.0, 0.1, 1, 5), **options)
    for field in ("a", "b", "c"):
        assert torch.equal(getattr(table, field)[:-1], getattr(bare, field))


@pytest.mark.parametrize(
    "process",
    [variance_preserving(Schedule.linear()), variance_exploding(0.01, 100), rectified_flow(), ornstein_uhlenbeck()],
    ids=lambda process: process.name,
)
def test_states_have_variance_one_whatever_the_process(process: Process) -> None:
    table = exponential_integrator(process, log_snr_grid(8.0, 0.01, 2, 6, clean=True))
    assert table.start_scale == 1
    torch.testing.assert_close(table.alpha**2 + table.sigma**2, torch.ones(14, dtype=torch.float64), rtol=0, atol=1e-15)
    alpha, sigma = table.alpha[:-1], table.sigma[:-1]
    wanted = {
        "variance_exploding": torch.sqrt(1 + (sigma / alpha) ** 2),
        "rectified_flow": 1 / (alpha + sigma),
    }.get(process.name, torch.ones_like(alpha))
    torch.testing.assert_close(table.scale[:-1], wanted, rtol=1e-14, atol=0)


# -- a textbook loop and the published samplers ------------------------------------------------------------------------

WEIGHTS = torch.tensor([0.6, 0.4], dtype=torch.float64)
MEANS = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
VARIANCES = torch.tensor([0.1, 0.5], dtype=torch.float64)


def score(z: Tensor, u: float) -> Tensor:
    """Gradient of the log-density at level u of a mixture of two Gaussians."""
    z = z.clone().requires_grad_()
    variance = math.exp(-u) * VARIANCES + 1 - math.exp(-u)
    square = (z - math.exp(-u / 2) * MEANS).square().flatten(1).sum(1)
    density = torch.logsumexp(WEIGHTS.log() - square / (2 * variance) - z.numel() / 2 * variance.log(), dim=0)
    return torch.autograd.grad(density, z)[0]


def textbook(u: list[float], noise: Keyed, volatility: float, stiffness: float = 1.0) -> Tensor:
    """The recurrence of Chen, Ren, Ying and Rotskoff, algorithm 1 in sequence; `stiffness` spoils its score factor."""
    y = noise.start(0).double()
    for m in range(len(u) - 1):
        e = u[m] - u[m + 1]
        xi = noise.draw(0, range(m, m + 1))[0].double()
        push = (1 + volatility**2) * stiffness * (math.exp(e / 2) - 1)
        y = math.exp(e / 2) * y + push * score(y, u[m]) + volatility * math.sqrt(math.exp(e) - 1) * xi
    return y


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("volatility", VOLATILITIES)
def test_the_score_form_is_the_papers_loop(prediction: Prediction, volatility: float) -> None:
    grid, noise = paper_grid(4, 0.2, 5e-3), Keyed(SHAPE, 3)
    wanted = textbook(grid.u.tolist(), noise, volatility)
    data = Mixture(WEIGHTS, MEANS, VARIANCES)
    for process in (ornstein_uhlenbeck(), variance_preserving(Schedule.linear()), rectified_flow()):
        table = exponential_integrator(process, grid, volatility=volatility, prediction=prediction)
        found = chain(data.denoiser(table), table, noise)[-1]
        # 45 steps in float64, whose coefficients at the clean end are up to 1/sigma = 14.
        assert gap(found, wanted) < 1e-12
    assert gap(textbook(grid.u.tolist(), noise, volatility, 1 + 1e-9), wanted) > 1e-10


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 50])
def test_the_clean_form_is_ddpm_and_ddim(betas: str, prediction: Prediction, spacing: str, steps: int) -> None:
    schedule = schedule_of(betas)
    for volatility, sampler in [(1.0, ddpm), (0.0, ddim)]:
        wanted = sampler(schedule, steps, spacing=spacing, prediction=prediction)
        u = -wanted.alpha.log() * 2
        options = {"form": "clean", "volatility": volatility, "prediction": prediction}
        table = exponential_integrator(variance_preserving(schedule), Grid(u, [0, steps]), **options)
        check_same_table(table, wanted)
        score_form = exponential_integrator(variance_preserving(schedule), Grid(u, [0, steps]), volatility=volatility)
        assert (score_form.c - wanted.c).abs().max() > 0.01 or not volatility


def check_same_table(table: Table, wanted: Table) -> None:
    torch.testing.assert_close(table.t, wanted.t, rtol=0, atol=1e-9)
    for field in ("a", "b", "c"):
        found, want = getattr(table, field), getattr(wanted, field)
        # ddpm's own floor of 1e-10 on its last noise is not part of the formula.
        want = torch.where(want.abs() <= 1e-10, 0.0, want) if field == "c" else want
        # 1 - alpha_bar of the first training levels has 12 digits.
        assert (found - want).abs().max() <= 1e-12 * want.abs().max().clamp(min=1), field


@pytest.mark.parametrize("prediction", ["sample", "v", "flow"])
def test_from_pure_noise_the_clean_form_is_ddpm_and_ddim(prediction: Prediction) -> None:
    schedule = Schedule.linear(rescale_zero_snr=True)
    for volatility, sampler in [(1.0, ddpm), (0.0, ddim)]:
        wanted = sampler(schedule, 20, spacing="trailing", prediction=prediction)
        u = -wanted.alpha.log() * 2
        assert u[0] == math.inf
        options = {"form": "clean", "volatility": volatility, "prediction": prediction}
        check_same_table(exponential_integrator(variance_preserving(schedule), Grid(u, [0, 20]), **options), wanted)
        # Infinity is the limit of high levels.
        flow = exponential_integrator(rectified_flow(), Grid(u, [0, 20]), **options)
        u[0] = 60.0
        high = exponential_integrator(rectified_flow(), Grid(u, [0, 20]), **options)
        for field in ("a", "b", "c", "t", "scale"):
            torch.testing.assert_close(getattr(flow, field), getattr(high, field), rtol=1e-12, atol=1e-10)


# -- order of the discretisation ---------------------------------------------------------------------------------------

EIGENVALUES = torch.tensor([0.05, 0.2, 0.7, 1.0, 2.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spaced", [uniform_grid, log_snr_grid])
def test_the_ode_is_of_first_order(form: Form, spaced: Callable[..., Grid]) -> None:
    mean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    data, noise = Gaussian(mean, EIGENVALUES), Keyed(SHAPE, 1)
    errors = []
    for steps in (64, 128, 256):
        table = exponential_integrator(ornstein_uhlenbeck(), spaced(5.0, 0.05, 1, steps), form=form, volatility=0.0)
        found = chain(data.denoiser(table), table, noise)[-1]
        first, last = ((table.alpha[i], table.sigma[i]) for i in (0, -1))
        errors.append(float((found - data.flow(noise.start(0)[None].double(), first, last)[0]).norm()))
    assert errors[0] < 0.5
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)


def excess_variance(table: Table) -> np.ndarray:
    """Variance of the sample over the exact one, eigenvalue by eigenvalue, from an exact start; less 1."""
    u = -2 * table.alpha.log()[:, None]
    exact = ((-u).exp() * EIGENVALUES + 1 - (-u).exp()).numpy()
    response = table.sigma[:-1, None].numpy() / exact[:-1]  # eps = -sigma s = sigma z/variance
    weights = sequential_weights(linear_chain(table.a[:, 0].numpy(), table.b[:, 0].numpy(), table.c.numpy(), response))
    return sample_variance(weights, exact[0]) / exact[-1] - 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("volatility", [0.5, 1.0, 1.5])
def test_every_form_of_the_sde_has_the_same_limit(form: Form, volatility: float) -> None:
    def excess(steps: int) -> np.ndarray:
        grid = log_snr_grid(6.0, 0.02, 1, steps)
        return excess_variance(exponential_integrator(ornstein_uhlenbeck(), grid, form=form, volatility=volatility))

    errors = {steps: np.abs(excess(steps)).max() for steps in (1000, 2000, 4000)}
    assert errors[4000] < 0.02
    assert errors[1000] / errors[2000] == pytest.approx(2, abs=0.1)
    assert errors[2000] / errors[4000] == pytest.approx(2, abs=0.05)
    # Richardson: the first-order part taken off, every form has the exact variance.
    assert np.abs(2 * excess(4000) - excess(2000)).max() < 3e-5


def test_a_wrong_noise_has_another_limit() -> None:
    table = exponential_integrator(ornstein_uhlenbeck(), log_snr_grid(6.0, 0.02, 1, 4000))
    wrong = dataclasses.replace(table, c=table.c * 1.05)
    assert np.abs(excess_variance(wrong)).min() > 0.03


# -- errors ------------------------------------------------------------------------------------------------------------

PURE = Grid(torch.tensor([torch.inf, 4.0, 1.0, 0.1]), [0, 3])


@pytest.mark.parametrize("process", [rectified_flow(), ornstein_uhlenbeck(), variance_preserving(Schedule.linear())])
@pytest.mark.parametrize("form", ["score", "epsilon"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pure_noise_is_refused_outside_the_clean_data_form(process: Process, form: Form, prediction: Prediction) -> None:
    message = rf"begins at pure noise \(alpha = 0\), where the form '{form}' does not exist; use the clean-data form"
    with pytest.raises(ValueError, match=message) as caught:
        exponential_integrator(process, PURE, form=form, prediction=prediction)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("process", "options", "message"),
    [
        (rectified_flow(), {"prediction": "epsilon"}, "not finite at node 0 .* needs sample, v or flow prediction"),
        (ornstein_uhlenbeck(), {"prediction": "v"}, "pure noise, for which ornstein_uhlenbeck has no time; begin at a finite"),
        (variance_exploding(0.1, 100), {"prediction": "v"}, "begins at u = inf, noisier than variance_exploding ever is"),
        (
            variance_preserving(Schedule.linear()),
            {"prediction": "v"},
            "begins at u = inf, noisier than variance_preserving ever is, u = 10.1177",
        ),
    ],
)
def test_pure_noise_is_refused_where_network_or_process_lack_it(process: Process, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exponential_integrator(process, PURE, form="clean", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "epsilo"}, "form is 'epsilo'; it must be one of score, epsilon, clean; did you mean 'epsilon'"),
        ({"times": "real time"}, "times is 'real time'; it must be one of real, nearest; did you mean 'real'"),
        ({"volatility": -0.5}, r"the volatility is -0.5; it must be 0 \(the ODE\) or more; 1 is the reverse SDE"),
        ({"volatility": math.inf}, "the volatility is inf; it must be 0"),
        ({"volatility": math.nan}, "the volatility is nan; it must be 0"),
        ({"prediction": "eps"}, "prediction is 'eps'; it must be one of epsilon, sample, v, flow"),
    ],
)
def test_every_error_says_what_was_given_and_what_was_expected(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        exponential_integrator(ornstein_uhlenbeck(), GRID, **options)

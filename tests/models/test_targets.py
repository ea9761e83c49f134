# SPDX-License-Identifier: Apache-2.0
"""Closed-form targets: every formula against an independent one (autograd, quadrature, an ODE solver, draws)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from paradiff.chain.prediction import Prediction, clean_coefficients
from paradiff.chain.table import Table
from paradiff.models.exact import Empirical, Gaussian, Mixture, digits

pytestmark = pytest.mark.filterwarnings("error")

Target = Gaussian | Mixture | Empirical
PREDICTIONS = get_args(Prediction)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(size: int) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=5)).Q


MEAN = draw(2, 3, seed=1)
SPECTRUM = torch.tensor([3.0, 1.0, 0.4, 0.1, 0.02, 0.0], dtype=torch.float64)
TARGETS: dict[str, Target] = {
    "gaussian": Gaussian(MEAN, SPECTRUM, orthonormal(6)),
    "diagonal gaussian": Gaussian(MEAN, SPECTRUM),
    "mixture": Mixture(torch.tensor([0.5, 0.3, 0.2]), 2 * draw(3, 2, 3, seed=2), torch.tensor([0.5, 0.1, 0.02])),
    "diagonal mixture": Mixture(torch.tensor([0.6, 0.4]), 2 * draw(2, 2, 3, seed=3), draw(2, 6, seed=4).square()),
    "empirical": Empirical(draw(40, 2, 3, seed=6)),
}
each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())


def make_table(prediction: Prediction, steps: int = 20, scale: Tensor | None = None) -> Table:
    """DDIM on a cosine schedule: x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D with D = p x + q m; in epsilon
    form a = alpha'/alpha, b = sigma' - a sigma."""
    angle = torch.linspace(1.5, 0.05, steps + 1, dtype=torch.float64)
    alpha, sigma = angle.cos(), angle.sin()
    p, q = clean_coefficients(prediction, alpha[:-1], sigma[:-1])
    ratio = sigma[1:] / sigma[:-1]
    weight = alpha[1:] - alpha[:-1] * ratio
    return Table(
        name="ddim",
        prediction=prediction,
        t=angle / 1.5 * 0.999,
        alpha=alpha,
        sigma=sigma,
        a=(ratio + weight * p)[:, None],
        b=(weight * q)[:, None],
        c=torch.zeros(steps, dtype=torch.float64),
        scale=scale,
    )


def walk(table: Table, denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """The sequential sampler of a table of band one without noise."""
    assert table.scale is not None
    for i in range(table.steps):
        m = denoise(table.scale[i].to(x.dtype) * x, table.t[i].expand(len(x)))
        x = table.a[i, 0] * x + table.b[i, 0] * m
    return x


@each_target
@pytest.mark.parametrize(("alpha", "sigma"), [(0.999, 0.03), (0.9, 0.4), (0.3, 0.95), (1.0, 5.0)])
def test_clean_estimate_obeys_the_score_identity(target: Target, alpha: float, sigma: float) -> None:
    x = (alpha * target.sample(50, torch.Generator().manual_seed(0)) + sigma * draw(50, 2, 3)).requires_grad_()
    (score,) = torch.autograd.grad(target.log_density(x, alpha, sigma).sum(), x)
    expected = (x + sigma**2 * score) / alpha
    # Both sides are float64; the worst factor between rounding in the score and in the estimate is 1/alpha.
    torch.testing.assert_close(target.clean(x, alpha, sigma), expected, rtol=0, atol=1e-9)


@each_target
def test_density_integrates_to_one_and_gives_the_clean_estimate_by_quadrature(target: Target) -> None:
    """On the line: D = int x0 p(x | x0) p(x0) dx0 / p(x), with the data's own density, or a sum, for p(x0)."""
    line: Target
    if isinstance(target, Gaussian):
        line = Gaussian(target.mean.flatten()[:1], target.eigenvalues[:1])
    elif isinstance(target, Mixture):
        variances = target.variances if target.variances.ndim == 1 else target.variances[:, :1]
        line = Mixture(target.weights, target.means.flatten(1)[:, :1], variances)
    else:
        line = Empirical(target.data.flatten(1)[:, :1])
    alpha, sigma = 0.8, 0.6
    grid = torch.linspace(-25, 25, 200_001, dtype=torch.float64)[:, None]
    # The trapezoidal rule converges geometrically for smooth decaying integrands: rounding is all that is left.
    spacing = 50 / 200_000
    assert float(line.log_density(grid, alpha, sigma).exp().sum() * spacing) == pytest.approx(1, abs=1e-12)
    x = torch.tensor([[-1.0], [0.2], [2.5]], dtype=torch.float64)
    if isinstance(line, Empirical):
        points, prior = line.data, torch.full((len(line.data),), 1 / len(line.data), dtype=torch.float64)
    else:
        points, prior = grid, line.log_density(grid, 1.0, 0.0).exp() * spacing
    likelihood = (-(x - alpha * points.T).square() / (2 * sigma**2)).exp() / (2 * torch.pi * sigma**2) ** 0.5
    evidence = likelihood @ prior
    torch.testing.assert_close(line.log_density(x, alpha, sigma), evidence.log(), rtol=0, atol=1e-10)
    mean = (likelihood @ (prior[:, None] * points)) / evidence[:, None]
    torch.testing.assert_close(line.clean(x, alpha, sigma), mean, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variances", [torch.tensor([0.3]), draw(1, 6, seed=8).square()], ids=["isotropic", "diagonal"])
def test_mixture_of_one_component_is_the_gaussian(variances: Tensor) -> None:
    mixture = Mixture(torch.ones(1), MEAN[None], variances)
    gaussian = Gaussian(MEAN, variances.double().flatten().expand(6))
    x = 2 * draw(20, 2, 3)
    alpha, sigma = torch.linspace(0.1, 1, 20).double(), torch.linspace(0.9, 0.01, 20).double()
    torch.testing.assert_close(mixture.clean(x, alpha, sigma), gaussian.clean(x, alpha, sigma), rtol=0, atol=1e-12)
    torch.testing.assert_close(mixture.log_density(x, alpha, sigma), gaussian.log_density(x, alpha, sigma))


@pytest.mark.parametrize("variance", [0.0, 1e-14])
def test_empirical_is_the_mixture_of_vanishing_variances(variance: float) -> None:
    empirical = TARGETS["empirical"]
    assert isinstance(empirical, Empirical)
    mixture = Mixture(torch.full((40,), 1 / 40), empirical.data, torch.full((40,), variance))
    sigma = torch.logspace(-1.5, 0.5, 30).double()
    x = 0.7 * empirical.sample(30, torch.Generator().manual_seed(1)) + sigma[:, None, None] * draw(30, 2, 3)
    # The variance adds 1e-14 to sigma^2 >= 1e-3: a relative change of 1e-11 in the logits.
    torch.testing.assert_close(empirical.clean(x, 0.7, sigma), mixture.clean(x, 0.7, sigma), rtol=0, atol=1e-9)
    expected = mixture.log_density(x, 0.7, sigma)
    torch.testing.assert_close(empirical.log_density(x, 0.7, sigma), expected, rtol=0, atol=1e-8)


def test_rows_have_their_own_levels_and_do_not_see_each_other() -> None:
    x, alpha, sigma = draw(30, 2, 3), torch.linspace(0.2, 1, 30).double(), torch.linspace(2, 0.05, 30).double()
    for target in TARGETS.values():
        together = target.clean(x, alpha, sigma)
        alone = torch.cat([target.clean(x[i : i + 1], float(alpha[i]), float(sigma[i])) for i in range(30)])
        # Matrix products of another size may add in another order.
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
        flat = target.clean(x.flatten(1), alpha, sigma)
        assert flat.shape == (30, 6)
        torch.testing.assert_close(flat, together.flatten(1), rtol=0, atol=0)


@each_target
def test_limits_without_noise_and_without_signal_exist(target: Target) -> None:
    clean = target.sample(10, torch.Generator().manual_seed(3))
    torch.testing.assert_close(target.clean(0.7 * clean, 0.7, 0.0), clean, rtol=0, atol=1e-9)
    blind = target.clean(draw(5, 2, 3), 0.0, 1.0)
    if isinstance(target, Mixture):
        mean = torch.einsum("k,k...->...", target.weights, target.means)
    else:
        mean = target.mean if isinstance(target, Gaussian) else target.data.mean(0)
    torch.testing.assert_close(blind, mean.expand(5, 2, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("vectors", [None, orthonormal(6)], ids=["diagonal", "rotated"])
@pytest.mark.parametrize("path", ["preserving", "exploding", "straight"])
def test_flow_is_the_solution_of_the_probability_flow_equation(vectors: Tensor | None, path: str) -> None:
    """With y = x/alpha and s = sigma/alpha the equation is dy/ds = (y - D)/s (Karras et al., arXiv 2206.00364, eq. 3);
    in x, dx/du = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D for any parameter u of the path."""
    levels: dict[str, Callable[[float], tuple[float, float, float, float]]] = {
        "preserving": lambda u: (np.sin(u), np.cos(u), np.cos(u), -np.sin(u)),
        "exploding": lambda u: (1.0, 1.5 - u, 0.0, -1.0),
        "straight": lambda u: (0.6 * u, 1 - 0.6 * u, 0.6, -0.6),
    }
    gaussian = Gaussian(MEAN, SPECTRUM, vectors)
    x = 1.5 * draw(4, 2, 3)

    def velocity(u: float, flat: np.ndarray) -> np.ndarray:
        alpha, sigma, alpha_rate, sigma_rate = levels[path](u)
        state = torch.from_numpy(flat).view(4, 2, 3)
        clean = gaussian.clean(state, alpha, sigma)
        return ((sigma_rate / sigma) * state + (alpha_rate - alpha * sigma_rate / sigma) * clean).flatten().numpy()

    span = (0.2, 1.4)
    solved = solve_ivp(velocity, span, x.flatten().numpy(), method="DOP853", rtol=1e-10, atol=1e-12).y[:, -1]
    found = gaussian.flow(x, levels[path](span[0])[:2], levels[path](span[1])[:2])
    torch.testing.assert_close(found.flatten(), torch.from_numpy(solved), rtol=0, atol=1e-7)  # the solver's own error


def test_flow_composes_and_inverts() -> None:
    gaussian = TARGETS["gaussian"]
    assert isinstance(gaussian, Gaussian)
    x, first, second, third = draw(7, 6), (0.1, 0.99), (torch.full((7,), 0.5), 0.8), (0.95, torch.full((7,), 0.3))
    direct = gaussian.flow(x, first, third)
    torch.testing.assert_close(gaussian.flow(gaussian.flow(x, first, second), second, third), direct, rtol=0, atol=1e-12)
    torch.testing.assert_close(gaussian.flow(direct, third, first), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_first_order_sampler_approaches_the_flow_at_first_order(prediction: Prediction) -> None:
    gaussian = TARGETS["gaussian"]
    assert isinstance(gaussian, Gaussian)
    x = draw(6, 2, 3)
    errors = []
    for steps in (100, 200, 400):
        table = make_table(prediction, steps)
        levels = [(float(table.alpha[i]), float(table.sigma[i])) for i in (0, -1)]
        found = walk(table, gaussian.denoiser(table), x)
        errors.append(float((found - gaussian.flow(x, levels[0], levels[1])).norm()))
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert ((ratios > 1.8) & (ratios < 2.2)).all(), errors  # order one halves the error; second-order terms give 10 %


@each_target
def test_samples_have_the_moments_of_the_density(target: Target) -> None:
    count = 40_000
    draws = target.sample(count, torch.Generator().manual_seed(0))
    assert draws.shape == (count, 2, 3)
    assert draws.dtype == torch.float64
    assert torch.equal(draws, target.sample(count, torch.Generator().manual_seed(0)))
    if isinstance(target, Gaussian):
        mean = target.mean.flatten()
        basis = torch.eye(6).double() if target.eigenvectors is None else target.eigenvectors
        covariance = basis @ target.eigenvalues.diag() @ basis.T
    else:
        empirical = isinstance(target, Empirical)
        points = (target.data if empirical else target.means).flatten(1)
        weights = torch.full((len(points),), 1 / len(points), dtype=torch.float64) if empirical else target.weights
        mean = weights @ points
        covariance = torch.einsum("k,ki,kj->ij", weights, points - mean, points - mean)
        if not empirical:
            variances = target.variances if target.variances.ndim == 2 else target.variances[:, None].expand(-1, 6)
            covariance = covariance + (weights @ variances).diag()
    flat = draws.flatten(1)
    deviation = covariance.diagonal().sqrt()
    # Five standard errors; 42 numbers leave a chance of 2e-5 that an honest sampler fails, and the seed is fixed.
    assert ((flat.mean(0) - mean).abs() <= 5 * deviation / count**0.5 + 1e-12).all()
    products = (flat - mean)[:, :, None] * (flat - mean)[:, None, :]
    assert ((products.mean(0) - covariance).abs() <= 5 * products.std(0) / count**0.5 + 1e-12).all()


@each_target
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_denoiser_predicts_what_its_name_says(target: Target, prediction: Prediction) -> None:
    """The output by its definition, and the clean estimate back from it by the table's own p and q."""
    scale = torch.linspace(0.5, 2, 21, dtype=torch.float64)
    table = make_table(prediction, scale=scale)
    nodes = torch.tensor([7, 0, 19, 3, 3, 12])
    alpha, sigma = table.alpha[nodes], table.sigma[nodes]
    state = alpha[:, None, None] * target.sample(6, torch.Generator().manual_seed(4)) + draw(6, 2, 3)
    m = target.denoiser(table)(scale[nodes][:, None, None] * state, table.t[nodes])
    clean = target.clean(state, alpha, sigma)
    eps = (state - alpha[:, None, None] * clean) / sigma[:, None, None]
    expected = {
        "epsilon": eps,
        "sample": clean,
        "v": alpha[:, None, None] * eps - sigma[:, None, None] * clean,
        "flow": eps - clean,
    }
    torch.testing.assert_close(m, expected[prediction], rtol=0, atol=1e-10)
    back = table.p[nodes][:, None, None] * state + table.q[nodes][:, None, None] * m
    # Epsilon prediction divides by alpha = 0.07 on the way back.
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-10)


@each_target
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_float32_states_give_the_float64_output_rounded_once(target: Target, prediction: Prediction) -> None:
    table = make_table(prediction)
    nodes = torch.arange(20)
    x = (target.sample(20, torch.Generator().manual_seed(4)) + draw(20, 2, 3)).float()
    denoise = target.denoiser(table)
    m = denoise(x, table.t[:-1])
    assert m.dtype == torch.float32
    assert torch.equal(m, denoise(x.double(), table.t[nodes]).float())
    assert torch.equal(m, denoise(x, table.t[nodes].float()))


def test_float32_digits_are_accurate_where_two_data_compete() -> None:
    """Half-way between a digit and its nearest neighbour the weights hang on the difference of two large products."""
    target = digits()
    data = target.data.flatten(1)
    distances = torch.cdist(data[:300], data)
    distances.scatter_(1, torch.arange(300)[:, None], torch.inf)
    for sigma in (0.01, 0.1, 1.0):
        alpha = (1 - min(sigma, 0.99) ** 2) ** 0.5
        x = alpha * (data[:300] + data[distances.argmin(1)]) / 2 + 0.02 * sigma * draw(300, 64)
        x = x.float().view(-1, 1, 8, 8)
        error = (target.clean(x, alpha, sigma) - target.clean(x.double(), alpha, sigma)).abs().max()
        assert error < 1e-7  # half a unit in the last place of a number up to one is 3e-8; float32 logits give 4e-2
    assert float((target.clean(x[:1], 0.99995, 0.01) - target.data[0]).abs().max()) > 0.05  # neither datum has won


def test_digits_are_all_there_and_scaled() -> None:
    target = digits()
    assert target.data.shape == (1797, 1, 8, 8)
    assert target.data.min() == -1
    assert target.data.max() == 1
    assert target.sample(3, torch.Generator().manual_seed(0)).shape == (3, 1, 8, 8)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        digits()


def with_times(table: Table, t: Tensor) -> Table:
    return Table(table.name, table.prediction, t, table.alpha, table.sigma, table.a, table.b, table.c)


def test_nodes_that_share_a_time_must_share_their_levels() -> None:
    target = TARGETS["gaussian"]
    table = make_table("v", 6)
    t = table.t.clone()
    t[3] = t[2]
    with pytest.raises(ValueError, match=r"nodes [23] and [23] share the time .* not their levels"):
        target.denoiser(with_times(table, t))
    # Heun's method evaluates at the same node twice, and may visit it again: equal levels are welcome.
    twice = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    ones = torch.ones(6, 1, dtype=torch.float64)
    alpha, sigma = table.alpha[twice], table.sigma[twice]
    ratio = sigma[1:] / sigma[:-1]
    weight = (alpha[1:] - alpha[:-1] * ratio)[:, None]
    p, q = (value[:, None] for value in clean_coefficients("v", alpha[:-1], sigma[:-1]))
    repeated = Table(
        "twice", "v", table.t[twice], alpha, sigma, ratio[:, None] + weight * p, weight * q, torch.zeros(6).double()
    )
    x = draw(1, 6).expand(6, 6) * ones
    m = target.denoiser(repeated)(x, repeated.t[:-1])
    expected = target.denoiser(table)(x, table.t[twice[:-1]])
    torch.testing.assert_close(m, expected, rtol=0, atol=1e-12)


def test_unknown_times_are_refused() -> None:
    table = make_table("epsilon")
    denoise = TARGETS["empirical"].denoiser(table)
    x = draw(2, 6)
    for wrong in (float(table.t[4]) + 1e-9, -1.0, 7.0, float("nan")):
        with pytest.raises(ValueError, match=r"the time \S+ matches 0 of the 21 times of table 'ddim'.*must match one"):
            denoise(x, torch.tensor([float(table.t[0]), wrong], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"times have shape \(1,\); with 2 states it must be \(2,\)"):
        denoise(x, table.t[:1])


def test_the_samples_own_time_is_known_where_noise_is_left_there() -> None:
    table = make_table("epsilon")
    x, t = draw(2, 6), table.t[-1:].expand(2)
    expected = (x - table.alpha[-1] * TARGETS["gaussian"].clean(x, table.alpha[-1], table.sigma[-1])) / table.sigma[-1]
    torch.testing.assert_close(TARGETS["gaussian"].denoiser(table)(x, t), expected, rtol=0, atol=1e-12)


def test_whole_times_are_found_in_any_dtype_that_tells_them_apart() -> None:
    table = with_times(make_table("epsilon", 400), torch.arange(800, -1, -2).double())
    denoise = TARGETS["gaussian"].denoiser(table)
    x, nodes = draw(3, 6), torch.tensor([5, 0, 399])
    expected = denoise(x, table.t[nodes])
    for dtype in (torch.int64, torch.int32, torch.float32, torch.float16):
        assert torch.equal(denoise(x, table.t[nodes].to(dtype)), expected)
    with pytest.raises(ValueError, match=r"the time \d+ matches [2-9] of the 401 times"):
        denoise(x, table.t[nodes].bfloat16())


NAN = float("nan")
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "mean nan": (lambda: Gaussian(torch.tensor([0.0, NAN]), torch.ones(2)), "mean holds 1 numbers that are not finite"),
    "mean empty": (
        lambda: Gaussian(torch.ones(0), torch.ones(0)),
        r"mean has shape \(0,\); it must be an array of one number or more",
    ),
    "eigenvalues nan": (lambda: Gaussian(torch.zeros(2), torch.tensor([1.0, NAN])), "eigenvalues holds 1 numbers"),
    "eigenvalue count": (
        lambda: Gaussian(torch.zeros(3), torch.ones(2)),
        r"eigenvalues has shape \(2,\); a mean of 3 numbers asks for \(3,\)",
    ),
    "eigenvalue sign": (
        lambda: Gaussian(torch.zeros(2), torch.tensor([1.0, -0.5])),
        "smallest eigenvalue is -0.5; a covariance has none below zero",
    ),
    "eigenvectors shape": (
        lambda: Gaussian(torch.zeros(2), torch.ones(2), torch.eye(3)),
        r"eigenvectors has shape \(3, 3\); a mean of 2 numbers asks for \(2, 2\)",
    ),
    "eigenvectors skew": (
        lambda: Gaussian(torch.zeros(2), torch.ones(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
        "not orthonormal: V\\^T V differs from the identity by up to 0.5",
    ),
    "weights sum": (
        lambda: Mixture(torch.tensor([0.5, 0.4]), torch.zeros(2, 3), torch.ones(2)),
        "weights add up to 0.9 and the smallest is 0.4; they must be positive and add up to 1",
    ),
    "weights sign": (
        lambda: Mixture(torch.tensor([1.5, -0.5]), torch.zeros(2, 3), torch.ones(2)),
        "weights add up to 1 and the smallest is -0.5",
    ),
    "weights nan": (
        lambda: Mixture(torch.tensor([NAN, 1]), torch.zeros(2, 3), torch.ones(2)),
        "weights holds 1 numbers",
    ),
    "means count": (
        lambda: Mixture(torch.tensor([0.5, 0.5]), torch.zeros(3, 2), torch.ones(2)),
        r"weights have shape \(2,\), the means \(3, 2\), the variances \(2,\); for K components",
    ),
    "variances shape": (
        lambda: Mixture(torch.tensor([0.5, 0.5]), torch.zeros(2, 3), torch.ones(2, 2)),
        r"the variances \(2, 2\); for K components of d numbers it must be \(K,\), \(K, ...\) and \(K,\) or \(K, d\)",
    ),
    "variance sign": (
        lambda: Mixture(torch.tensor([0.5, 0.5]), torch.zeros(2, 3), torch.tensor([1.0, -2.0])),
        "smallest variance is -2; none may be below zero",
    ),
    "means nan": (lambda: Mixture(torch.ones(1), torch.full((1, 2), NAN), torch.ones(1)), "means holds 2 numbers"),
    "variances nan": (
        lambda: Mixture(torch.ones(1), torch.ones(1, 2), torch.tensor([NAN])),
        "variances holds 1 numbers",
    ),
    "data shape": (
        lambda: Empirical(torch.zeros(4)),
        r"data have shape \(4,\); it must be \(n, ...\), one row a datum",
    ),
    "data empty": (
        lambda: Empirical(torch.zeros(0, 4)),
        r"data has shape \(0, 4\); it must be an array of one number or more",
    ),
    "data nan": (lambda: Empirical(torch.tensor([[NAN, torch.inf]])), "data holds 2 numbers that are not finite"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
def test_bad_data_are_refused_with_a_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@each_target
def test_states_and_levels_that_do_not_fit_are_refused(target: Target) -> None:
    for call in (target.clean, target.log_density):
        with pytest.raises(ValueError, match=r"states have shape \(5, 4\); they must be \(R, ...\) with 6 numbers a row"):
            call(draw(5, 4), 1.0, 1.0)
        with pytest.raises(ValueError, match=r"states have shape \(6,\); they must be \(R, ...\)"):
            call(draw(6), 1.0, 1.0)
        with pytest.raises(ValueError, match=r"alpha has shape \(4,\); with 5 states it must be \(5,\) or \(\)"):
            call(draw(5, 6), torch.ones(4), 1.0)
        with pytest.raises(ValueError, match=r"sigma has shape \(5, 1\); with 5 states it must be \(5,\) or \(\)"):
            call(draw(5, 6), 1.0, torch.ones(5, 1))


def test_densities_and_flows_without_spread_are_refused() -> None:
    x = draw(2, 2, 3)
    gaussian = TARGETS["gaussian"]  # one eigenvalue is zero
    assert isinstance(gaussian, Gaussian)
    points = Mixture(torch.ones(1), MEAN[None], torch.zeros(1))
    for target in (gaussian, points, TARGETS["empirical"]):
        with pytest.raises(ValueError, match=r"the density does not exist: at sigma = 0 .* take sigma above 0"):
            target.log_density(x, 1.0, 0.0)
    with pytest.raises(ValueError, match="the flow cannot start there: at sigma = 0"):
        gaussian.flow(x, (1.0, 0.0), (0.5, 0.5))

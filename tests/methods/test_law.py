# SPDX-License-Identifier: Apache-2.0
"""PIADM draws from the law that it promises: against exact draws of mixtures, the sequential chain, and trained digits.

20,000 chains (10,000 where d = 8, 5,000 where d = 64) are one state `[20000, d]` that shares one window. A chain stops at the
level eta, so its samples are those of the mixture with noise of that level, which is again a mixture and drawn exactly. What
compares the two:

- `two_sample`: for 16 random projections, the projections on the modes, the distance to the nearest mode and the log-density,
  Kolmogorov-Smirnov distances and differences of means, each set Bonferroni at level 1e-3; and a permutation test of the
  energy distance at level 5e-3.
- Means and covariances within 5, mode weights within 4 standard errors of the exact ones.

Steps are so many that four seeds of the sequential chain pass all of this: its variance within a mode is off by 1.2 % (d = 2;
score form 1.9 %) or 0.3 % (d = 8 and 64), where the tests see 4, 3 and 1.4 %. They see a fault: a score or a noise 5 % too
large, only two sweeps, a noise used again, a mode a quarter too heavy are each planted, and `two_sample` fails.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from paradiff import Keyed, Solution, Table, piadm_ode, piadm_sde, sample, sequential
from paradiff.chain.slope import shifted
from paradiff.methods import WindowMethod
from paradiff.models.exact import Mixture
from paradiff.models.pixel import Model, load
from paradiff.samplers import exponential_integrator, log_snr_grid, ornstein_uhlenbeck
from paradiff.samplers.exponential import Form, Times
from paradiff.solver import WindowRecord
from paradiff.solver.solution import Status

KINDS: dict[str, tuple[Callable[..., WindowMethod], float]] = {"sde": (piadm_sde, 1.0), "ode": (piadm_ode, 0.0)}
each_kind = pytest.mark.parametrize("kind", KINDS)
START = 8.0  # T: what is left of the data there changes a variance by less than a tenth of a standard error
CHAINS = {2: 20_000, 8: 10_000, 64: 5_000}
PERMUTATIONS = 999
LEVELS = {"distribution": 1e-3, "mean": 1e-3, "energy": 5e-3}


# -- mixtures ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A centred mixture with components of one variance, a chain's grid for it, and how PIADM is asked for it.

    Attributes:
        weights: `[K]`.
        means: `[K, d]`.
        variance: Of every component, in every direction.
        stop: eta.
        steps: N.
        blocks: Of the method.
        window: Likewise; it bounds the memory.
    """

    weights: Tensor
    means: Tensor
    variance: float
    stop: float
    steps: int
    blocks: int
    window: int | None = None

    @property
    def spread(self) -> float:
        """Variance of the data, a coordinate."""
        return float((self.weights @ self.means.square()).mean()) + self.variance

    def table(self, kind: str, form: Form = "clean", steps: int | None = None) -> Table:
        grid = log_snr_grid(START, self.stop, 1, steps or self.steps)
        return exponential_integrator(ornstein_uhlenbeck(), grid, form=form, volatility=KINDS[kind][1])

    def network(self, table: Table) -> Callable[[Tensor, Tensor], Tensor]:
        """The optimal network for rows `[R, ..., d]`, by products of matrices where targets.Mixture is general."""
        levels = dict(zip(table.t.tolist(), zip(table.alpha.tolist(), table.sigma.tolist(), strict=True), strict=True))
        levels |= dict(zip(table.t.float().tolist(), levels.values(), strict=True))  # as states in float32 are given them

        def network(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = torch.tensor([levels[k] for k in t.tolist()], dtype=torch.float64).T
            variance = alpha**2 * self.variance + sigma**2
            means = self.means.to(x.dtype)
            rows = x.flatten(1, -2) if x.ndim > 2 else x[:, None]
            share = self.weights.log() - (alpha**2 / variance / 2)[:, None] * self.means.square().sum(1)
            # [R, K, n]: a softmax over a last dimension of a few modes takes several times as long.
            logits = (means @ rows.mT).mul_(lifted(alpha / variance, x)).add_(share.to(x.dtype)[..., None])
            pull = logits.softmax(1).mul_(lifted(-alpha * sigma / variance, x))
            return (pull.mT @ means).addcmul_(rows, lifted(sigma / variance, x)).view_as(x)

        return network

    def draw(self, seed: int) -> Tensor:
        """Exact draws at the level eta, `[CHAINS, d]`."""
        count = CHAINS[self.means.shape[1]]
        generator = torch.Generator().manual_seed(seed)
        mode = torch.multinomial(self.weights, count, True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.stopped[0][mode] + math.sqrt(self.stopped[1]) * noise

    @property
    def stopped(self) -> tuple[Tensor, float]:
        """Means and variance of the components at the level eta."""
        signal = math.exp(-self.stop)
        return math.sqrt(signal) * self.means, signal * self.variance + 1 - signal

    def responsibilities(self, x: Tensor) -> Tensor:
        """`[n, K]`, of the components for draws at the level eta; their means are the weights."""
        means, variance = self.stopped
        return (self.weights.log() - (x[:, None] - means).square().sum(2) / (2 * variance)).softmax(1)

    def features(self, x: Tensor) -> Tensor:
        """`[n, F]` numbers whose distributions are compared."""
        means, variance = self.stopped
        random = torch.randn(means.shape[1], 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        directions = torch.cat([random, means.T], 1)
        squares = (x[:, None] - means).square().sum(2)
        density = (self.weights.log() - squares / (2 * variance)).logsumexp(1)
        return torch.cat([x @ directions, squares.amin(1, keepdim=True), density[:, None]], 1)


def lifted(values: Tensor, like: Tensor) -> Tensor:
    """`[R]` as `[R, 1, 1]` of another's dtype."""
    return values.to(like.dtype).view(-1, 1, 1)


def centred(weights: list[float], means: Tensor, *rest: float | int) -> Problem:
    share = torch.tensor(weights, dtype=torch.float64)
    return Problem(share, means - share @ means, *rest)  # pyright: ignore[reportArgumentType]


def ring() -> Problem:
    """Eight modes in a plane, 3.5 standard deviations apart and more, but two of them 2.2."""
    angle = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6.6], dtype=torch.float64) * (2 * math.pi / 7.6)
    means = 2.5 * torch.stack([angle.cos(), angle.sin()], 1)
    return centred([0.05, 0.1, 0.2, 0.15, 0.05, 0.25, 0.1, 0.1], means, 0.1, 0.2, 128, 4)


def cloud(dimension: int, size: float, *rest: float | int) -> Problem:
    """Four modes, 3.7 standard deviations apart and more (d = 8), 7.6 (d = 64)."""
    generator = torch.Generator().manual_seed(dimension)
    means = size * torch.randn(4, dimension, generator=generator, dtype=torch.float64)
    return centred([0.4, 0.3, 0.2, 0.1], means, *rest)


PROBLEMS = {2: ring(), 8: cloud(8, 0.75, 0.02, 0.2, 160, 6), 64: cloud(64, 0.3, 0.01, 0.2, 64, 3, 8)}
each_dimension = pytest.mark.parametrize("dimension", PROBLEMS)


@each_dimension
def test_the_fast_network_is_the_mixtures(dimension: int) -> None:
    problem = PROBLEMS[dimension]
    table = problem.table("sde")
    mixture = Mixture(problem.weights, problem.means, torch.full_like(problem.weights, problem.variance))
    x = torch.randn(30, dimension, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = table.t[:30]
    wanted = mixture.denoiser(table)(x, t)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):  # float32: logits up to 1e2
        for rows in (x, x[:, None].expand(-1, 3, -1)):
            found = problem.network(table)(rows.to(dtype), t).view(30, -1, dimension)
            torch.testing.assert_close(found.double(), wanted[:, None].expand_as(found), atol=bound, rtol=0)


def drawn(
    problem: Problem, table: Table, method: WindowMethod, count: int | None = None, noise: Keyed | None = None, seed: int = 5
) -> Solution:
    """A run of `count` chains in one window, float32."""
    dimension = problem.means.shape[1]
    noise = noise or Keyed((count or CHAINS[dimension], dimension), seed)
    return sample(problem.network(table), table, noise, method)


def library(problem: Problem, kind: str, tolerance: float | None = None) -> WindowMethod:
    return KINDS[kind][0](problem.blocks, slope=shifted(problem.spread), tolerance=tolerance, window=problem.window)


# -- the tests of a law ------------------------------------------------------------------------------------------------


def two_sample(problem: Problem, found: Tensor, wanted: Tensor) -> dict[str, float]:
    """What tells that two sets of `[n, d]` draws, equally many, differ in law: the p-values below their levels, by test."""
    a, b = problem.features(found), problem.features(wanted)
    distance = max(kolmogorov_smirnov(x, y) for x, y in zip(a.T, b.T, strict=True))
    difference = float(((a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / len(a)).sqrt()).abs().max())
    p = {
        "distribution": a.shape[1] * 2 * math.exp(-(distance**2) * len(a)),
        "mean": a.shape[1] * math.erfc(difference / math.sqrt(2)),
        "energy": energy(found[:600], wanted[:600]),
    }
    return {test: value for test, value in p.items() if value < LEVELS[test]}


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """Largest difference of two empirical distribution functions."""
    a, b = a.contiguous().sort().values, b.contiguous().sort().values
    both = torch.cat([a, b])
    counts = (torch.searchsorted(s, both, right=True) for s in (a, b))
    return float((next(counts) - next(counts)).abs().max()) / len(a)


def energy(a: Tensor, b: Tensor) -> float:
    """p-value of the energy distance among exchanges of the two sets."""
    both = torch.cat([a, b]).float()
    distance, sign = torch.cdist(both, both), exchanges(len(a), len(b))
    statistic = -(sign * (distance @ sign)).sum(0)
    return float((statistic >= statistic[0]).float().mean())


@cache
def exchanges(first: int, second: int) -> Tensor:
    """To which of two sets each draw belongs, as 1 and -1: as it is, and after each permutation."""
    generator = torch.Generator().manual_seed(2)
    sign = torch.ones(first + second, PERMUTATIONS + 1)
    sign[first:] = -1
    for k in range(1, PERMUTATIONS + 1):
        sign[:, k] = sign[torch.randperm(len(sign), generator=generator), 0]
    return sign


def moments_and_weights(problem: Problem, x: Tensor) -> None:
    """Asserts that means, covariances and mode weights lie within their Monte Carlo errors."""
    means, variance = problem.stopped
    deviation = x.mean(0) / x.std(0) * math.sqrt(len(x))  # the mixture is centred
    assert deviation.abs().max() < 5
    covariance = means.T @ (problem.weights[:, None] * means) + variance * torch.eye(x.shape[1])
    second, fourth = x.T @ x / len(x), x.square().T @ x.square() / len(x)
    error = ((fourth - second.square()) / len(x)).sqrt()
    assert ((second - covariance) / error).abs().max() < 5
    share = problem.responsibilities(x)
    assert ((share.mean(0) - problem.weights) / share.std(0) * math.sqrt(len(x))).abs().max() < 4


@cache
def exact(dimension: int) -> Tensor:
    return PROBLEMS[dimension].draw(11)


def in_law(dimension: int, found: Tensor) -> None:
    """Asserts that draws are those of the mixture at the level where the chain stops."""
    found = found.double()
    assert two_sample(PROBLEMS[dimension], found, exact(dimension)) == {}
    moments_and_weights(PROBLEMS[dimension], found)


@each_dimension
def test_exact_draws_pass_the_tests_of_the_law(dimension: int) -> None:
    in_law(dimension, PROBLEMS[dimension].draw(12))


@each_kind
@each_dimension
def test_samples_have_the_exact_law(dimension: int, kind: str) -> None:
    problem = PROBLEMS[dimension]
    table = problem.table(kind)
    solution = drawn(problem, table, library(problem, kind))
    assert solution.rounds < table.steps / 2
    in_law(dimension, solution.sample[0])


# The variance within a mode is off by 1.9 % (SDE) and 1.5 % (ODE), in proportion to 1/N.
@each_kind
@pytest.mark.parametrize("dimension", [2, 8])
def test_samples_have_the_law_of_the_data_themselves(dimension: int, kind: str) -> None:
    """Where a chain goes down to a level that is no more than 0.5 % of a mode's variance."""
    problem = dataclasses.replace(PROBLEMS[dimension], stop=1e-4, steps=400 if kind == "sde" else 240, window=16)
    solution = drawn(problem, problem.table(kind), library(problem, kind, 1e-2))
    data = dataclasses.replace(problem, stop=0.0)
    found = solution.sample[0].double()
    assert two_sample(data, found, data.draw(11)) == {}
    moments_and_weights(data, found)


@pytest.mark.parametrize(("kind", "steps", "blocks", "sweeps"), [("sde", 320, 8, 6), ("ode", 192, 4, 5)])
def test_the_published_mode_has_the_exact_law(kind: str, steps: int, blocks: int, sweeps: int) -> None:
    problem = PROBLEMS[2]
    solution = drawn(problem, problem.table(kind, "score", steps), KINDS[kind][0](blocks, sweeps))
    assert solution.rounds == blocks * sweeps
    in_law(2, solution.sample[0])


# -- faults ------------------------------------------------------------------------------------------------------------


class Repeated(Keyed):
    """The fault: noise that comes again every few nodes."""

    def __init__(self, period: int) -> None:
        super().__init__((CHAINS[2], 2), 5)
        self.period = period

    def draw(self, sample: int, nodes: range) -> Tensor:
        return torch.cat([Keyed.draw(self, sample, range(n % self.period, n % self.period + 1)) for n in nodes])


def stronger(table: Table, **factors: float) -> Table:
    changed = {name: getattr(table, name) * factor for name, factor in factors.items()}
    return dataclasses.replace(table, **changed, exact_variance=False)


def lopsided(problem: Problem) -> Problem:
    """One mode a quarter heavier, the rest in proportion lighter; the means stay."""
    weights = problem.weights.clone()
    weights[2] *= 1.25
    return dataclasses.replace(problem, weights=weights / weights.sum())


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("sde", "score coefficient"),
        ("sde", "noise coefficient"),
        ("sde", "two sweeps"),
        ("sde", "every node's noise is the first one's"),
        ("sde", "every block's noise is the first one's"),
        ("sde", "a mode's weight"),
        ("ode", "score coefficient"),
        ("ode", "two sweeps"),
        ("ode", "a mode's weight"),
    ],
)
def test_a_fault_is_seen_by_the_two_sample_test(kind: str, fault: str) -> None:
    problem = PROBLEMS[2]
    table, method, noise, assumed = problem.table(kind), library(problem, kind), None, problem
    match fault:
        case "score coefficient":
            table = stronger(table, b=1.05)
        case "noise coefficient":
            table = stronger(table, c=1.05)
        case "two sweeps":
            table, method = problem.table(kind, "score"), KINDS[kind][0](4, 2)
        case "every node's noise is the first one's":
            noise = Repeated(1)
        case "every block's noise is the first one's":
            noise = Repeated(problem.steps // problem.blocks)
        case _:
            assumed = lopsided(problem)
    found = drawn(assumed, table, method, noise=noise).sample[0].double()
    assert two_sample(problem, found, exact(2)) != {}


# -- the chain ---------------------------------------------------------------------------------------------------------


@each_kind
@each_dimension
def test_samples_are_those_of_the_sequential_chain(dimension: int, kind: str) -> None:
    problem = PROBLEMS[dimension]
    table = problem.table(kind)
    wanted = drawn(problem, table, sequential(), 4000).sample
    # At the default tolerance the SDE's are 2e-2 (d = 2 and 8) and 4e-2 (d = 64) apart: a few of the 4000 chains stand between
    # modes and answer strongly.
    solution = drawn(problem, table, library(problem, kind, 2e-4 if kind == "sde" else None), 4000)
    assert (solution.sample - wanted).square().mean().sqrt() < 1e-3
    assert solution.rounds < table.steps


# -- a mixture in 2048 dimensions --------------------------------------------------------------------------------------

ENOUGH = 1e-2  # total squared distance to the sequential sample, of 2048 coordinates


@cache
def large() -> Problem:
    means = math.sqrt(0.5) * torch.randn(8, 2048, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return centred([1 / 8] * 8, means, 0.05, 1e-3, 0, 1)


def coupled(
    form: Form, kind: str, steps: int, method: WindowMethod, samples: int, dtype: torch.dtype
) -> tuple[float, Solution]:
    """The largest squared distance to the sequential sample, and the run."""
    grid = log_snr_grid(10.0, 1e-3, 1, steps)
    table = exponential_integrator(ornstein_uhlenbeck(), grid, form=form, volatility=KINDS[kind][1])
    network, noise = large().network(table), Keyed((2048,), 0, samples)
    wanted = sample(network, table, noise, sequential(), dtype=torch.float64).sample
    solution = sample(network, table, noise, method, dtype=dtype)
    return float((solution.sample - wanted).square().sum(1).max()), solution


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "steps", "sweeps"), [("sde", 240, 22), ("ode", 120, 6)])
def test_few_sweeps_of_one_block_are_enough_in_2048_dimensions(kind: str, steps: int, sweeps: int, dtype: torch.dtype) -> None:
    method = KINDS[kind][0](1, sweeps, slope=shifted(large().spread))
    error, solution = coupled("clean", kind, steps, method, 2, dtype)
    assert error <= ENOUGH
    assert solution.rounds == sweeps


def test_iterates_of_the_score_form_grow_before_they_converge() -> None:
    early, _ = coupled("score", "sde", 240, piadm_sde(1, 22), 1, torch.float32)
    late, solution = coupled("score", "sde", 240, piadm_sde(1, 60), 1, torch.float32)
    changes = [change for sweep in solution.history if isinstance(sweep, WindowRecord) for change in sweep.change]
    assert early > 1e3 > ENOUGH >= late
    assert 1e3 < max(changes) < math.inf


# -- trained digits ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Model:
    return load("digits")


def gaps(found: Tensor, wanted: Tensor) -> Tensor:
    """Root mean square difference of each sample."""
    return (found - wanted).flatten(1).square().mean(1).sqrt()


@pytest.mark.parametrize(("kind", "steps"), [("sde", 100), ("ode", 40)])
def test_tolerance_0_gives_the_sequential_digits(kind: str, steps: int, digits: Model) -> None:
    table, noise = digits.exponential(f"exponential_{kind}", steps), Keyed(digits.shape, 0, 2)
    wanted = sample(digits, table, noise, sequential()).sample
    found = sample(digits, table, noise, KINDS[kind][0](4, tolerance=0.0))
    assert found.status is Status.EXACT
    assert gaps(found.sample, wanted).max() < 1e-5
    assert wanted.std() > 0.3


@cache
def agreement() -> Callable[[Tensor], float]:
    """The share of pictures that two classifiers, trained on real digits, take for the same digit."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    pixels, labels = (np.asarray(v) for v in load_digits(return_X_y=True))
    train, held, labels, wanted = train_test_split(pixels / 8 - 1, labels, test_size=360, random_state=0)
    first, second = SVC(C=10).fit(train, labels), KNeighborsClassifier(3).fit(train, labels)
    assert min(first.score(held, wanted), second.score(held, wanted)) > 0.97

    def share(pictures: Tensor) -> float:
        rows = pictures.flatten(1).clamp(-1, 1).numpy()
        return float(np.mean(first.predict(rows) == second.predict(rows)))

    return share


@pytest.mark.parametrize(("kind", "steps"), [("sde", 50), ("ode", 40)])
def test_the_digits_are_recognised(kind: str, steps: int, digits: Model) -> None:
    table = digits.exponential(f"exponential_{kind}", steps)
    solution = sample(digits, table, Keyed(digits.shape, 0, 32), KINDS[kind][0](4))
    assert agreement()(solution.sample) >= 0.8
    noise = torch.randn(500, *digits.shape, generator=torch.Generator().manual_seed(0))
    assert agreement()(noise) < 0.35


# Whole times are off by half a training step at most, 5e-4 of the schedule; their pictures differ by less than one grey level.
@pytest.mark.parametrize(("kind", "steps"), [("sde", 200), ("ode", 50)])
def test_nearest_whole_times_shift_the_digits_slightly(kind: str, steps: int, digits: Model) -> None:
    real, process = digits.exponential(f"exponential_{kind}", steps), digits.process()

    def table(times: Times) -> Table:
        grid = log_snr_grid(process.highest, process.lowest, 1, steps - 1, clean=True)
        return exponential_integrator(
            process, grid, form="clean", volatility=KINDS[kind][1], prediction=real.prediction, times=times, clip=real.clip
        )

    torch.testing.assert_close(table("real").b, real.b)
    noise = Keyed(digits.shape, 0, 2)
    wanted, found = (sample(digits, table(times), noise, sequential()).sample for times in ("real", "nearest"))
    apart = gaps(found, wanted)
    assert apart.min() > 1e-5
    assert apart.max() < 2 / 255

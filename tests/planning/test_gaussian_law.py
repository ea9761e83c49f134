# SPDX-License-Identifier: Apache-2.0
"""The law of Picard samples of Gaussian data: against dense propagation, closed forms and numbers known to two digits."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from paradiff import Schedule
from paradiff.chain.prediction import Prediction
from paradiff.chain.slope import freeze_epsilon, shifted
from paradiff.planning import gaussian_law as law
from paradiff.planning.gaussian_law import Array, LinearChain
from paradiff.samplers import exponential_integrator, heun, ornstein_uhlenbeck
from paradiff.samplers.grid import Grid, paper_grid

TOLERANCE = 1e-2
END = 1e-3
LAST = 1e-12


def random_chain(steps: int, eigenvalues: int, seed: int = 0) -> LinearChain:
    rng = np.random.default_rng(seed)
    return law.linear_chain(
        1 + 0.1 * rng.random(steps),
        0.3 * rng.random(steps),
        rng.random(steps),
        -rng.random((steps, eigenvalues)),
        -rng.random((steps, eigenvalues)),
    )


def dense(chain: LinearChain, edges: tuple[int, ...], sweeps: int, stagger: int, carry: bool) -> Array:
    """Every node as a vector of coefficients of (y[0], xi), swept forward by equation (3); one eigenvalue a turn."""
    steps, count = chain.step.shape
    columns = []
    for e in range(count):
        fresh = np.eye(steps + 1)[1:] * chain.noise[:, e, None]
        nodes = np.zeros((steps + 1, steps + 1))
        nodes[0, 0] = 1
        done = [0] * (len(edges) - 1)
        while min(done) < sweeps:
            opening = [n for n, swept in enumerate(done) if swept == 0 and (n == 0 or done[n - 1] >= stagger)]
            for n in opening[:1]:
                nodes[edges[n] + 1 : edges[n + 1] + 1] = nodes[edges[n]]
            active = [n for n, swept in enumerate(done) if 0 < swept < sweeps or n in opening[:1]]
            old = nodes.copy()
            for n in active:
                start = nodes[edges[n]] if carry else old[edges[n]]
                for i in range(edges[n], edges[n + 1]):
                    here = start if i == edges[n] else nodes[i]
                    g, f = chain.sweep[i, e], chain.step[i, e]
                    nodes[i + 1] = g * here + (f - g) * old[i] + fresh[i]
                done[n] += 1
        columns.append(nodes[-1])
    return np.stack(columns, 1)


def grid_of(start: float, blocks: int, width: float) -> Grid:
    return paper_grid(blocks, min(width, start / blocks), END, length=start / blocks)


@cache
def problem(dimension: int, stochastic: bool) -> tuple[LinearChain, tuple[int, ...], Array, float]:
    """The longest steps 0.8^k whose sequential law spends half the tolerance."""
    start = math.log(dimension / TOLERANCE) + 2
    eigenvalues, count = law.log_uniform_spectrum(dimension)
    target = law.ou_variance(END, eigenvalues)
    for k in range(100):
        blocks = math.ceil(start)
        grid = grid_of(start, blocks, 0.8**k)
        edges = tuple(grid.edges)
        chain = law.ou_chain(grid.u.numpy(), eigenvalues, stochastic=stochastic)
        if law.kl(target, law.sample_variance(law.sequential_weights(chain)), count) <= TOLERANCE / 2:
            return chain, edges, target, count
    raise AssertionError("no steps were short enough")


def divergence(dimension: int, stochastic: bool, sweeps: int, stagger: int | None = None, carry: bool = True) -> float:
    chain, edges, target, count = problem(dimension, stochastic)
    weights = law.picard_weights(chain, edges, sweeps, stagger=stagger, carry=carry)
    return law.kl(target, law.sample_variance(weights), count)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize(("sweeps", "stagger"), [(1, 1), (3, 1), (3, 2), (3, 3), (5, 2), (7, 1), (7, 5), (7, 7)])
@pytest.mark.parametrize("edges", [(0, 9), (0, 3, 6, 9), (0, 1, 5, 7, 8, 12)])
def test_weights_are_those_of_a_dense_propagation(edges: tuple[int, ...], sweeps: int, stagger: int, carry: bool) -> None:
    chain = random_chain(edges[-1], 3)
    weights = law.picard_weights(chain, edges, sweeps, stagger=stagger, carry=carry)
    np.testing.assert_allclose(weights, dense(chain, edges, sweeps, stagger, carry), rtol=0, atol=LAST)


@pytest.mark.parametrize("edges", [(0, 8), (0, 5, 8), (0, 2, 5, 8)])
def test_as_many_sweeps_as_steps_give_the_sequential_chain(edges: tuple[int, ...]) -> None:
    chain = random_chain(8, 4)
    expected = law.sequential_weights(chain)
    longest = max(last - first for first, last in pairwise(edges))
    np.testing.assert_allclose(law.picard_weights(chain, edges, longest), expected, rtol=0, atol=LAST)
    np.testing.assert_allclose(law.picard_weights(chain, edges, 8, stagger=1), expected, rtol=0, atol=LAST)
    assert np.abs(law.picard_weights(chain, edges, 1) - expected).max() > 0.01


def test_sequential_weights_are_products_of_steps() -> None:
    chain = random_chain(5, 2)
    weights = law.sequential_weights(chain)
    np.testing.assert_allclose(weights[0], chain.step.prod(0))
    np.testing.assert_allclose(weights[3], chain.noise[2] * chain.step[3] * chain.step[4])


def test_a_sweep_whose_slope_is_the_response_is_exact_at_once() -> None:
    levels = np.linspace(2, 0.5, 11)
    eigenvalues = np.array([0.1, 1.0, 3.0])
    exact = -1 / law.ou_variance(levels[:-1], eigenvalues)
    chain = law.ou_chain(levels, eigenvalues, stochastic=True, slope=exact)
    np.testing.assert_allclose(law.picard_weights(chain, (0, 4, 10), 1), law.sequential_weights(chain), atol=LAST)


@pytest.mark.parametrize("carry", [True, False])
@pytest.mark.parametrize("sweeps", [1, 3, 4])
def test_blocks_in_turn_compose(sweeps: int, carry: bool) -> None:
    chain, edges = random_chain(11, 3), (0, 4, 6, 11)
    parts = []
    for first, last in pairwise(edges):
        block = LinearChain(chain.step[first:last], chain.sweep[first:last], chain.noise[first:last])
        parts.append(law.picard_weights(block, (0, last - first), sweeps))
    expected = parts[0]
    for part in parts[1:]:
        expected = np.concatenate([expected * part[0], part[1:]])
    weights = law.picard_weights(chain, edges, sweeps, stagger=sweeps, carry=carry)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=LAST)
    np.testing.assert_array_equal(weights, law.picard_weights(chain, edges, sweeps, carry=carry))


@pytest.mark.parametrize(
    ("eigenvalue", "expected"),
    [(1.0, [4.1e-1, 7.2e-2, 5.9e-3, 2.7e-4, 8.1e-6, 1.6e-7]), (0.1, [6.6e-1, 1.9e-1, 2.6e-2, 2.0e-3, 9.4e-5, 3.1e-6])],
)
def test_coupled_error_of_a_unit_block(eigenvalue: float, expected: list[float]) -> None:
    chain = law.ou_chain(np.linspace(2, 1, 65), [eigenvalue], stochastic=True)
    start, sequential = law.ou_variance(2.0, [eigenvalue]), law.sequential_weights(chain)
    errors = [law.coupled_error(law.picard_weights(chain, (0, 64), k), sequential, start)[0] for k in range(1, 7)]
    assert [f"{error:.1e}" for error in errors] == [f"{error:.1e}" for error in expected]


STEPS = {2: (58, 26), 4: (87, 53), 16: (183, 99), 64: (390, 254), 256: (812, 522), 1024: (1692, 1088), 4096: (3539, 2264)}
SWEEPS = {2: (4, 2), 4: (6, 3), 16: (6, 4), 64: (8, 5), 256: (8, 5)}


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dimension", STEPS)
def test_steps_to_half_the_tolerance(dimension: int, stochastic: bool) -> None:
    assert problem(dimension, stochastic)[1][-1] == STEPS[dimension][not stochastic]


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dimension", SWEEPS)
def test_sweeps_to_the_tolerance(dimension: int, stochastic: bool) -> None:
    reached = next(k for k in range(1, 20) if divergence(dimension, stochastic, k) <= TOLERANCE)
    assert reached == SWEEPS[dimension][not stochastic]


@pytest.mark.parametrize(
    ("stochastic", "carry", "stagger", "sweeps", "count"),
    [(True, True, 3, 10, 52), (True, False, 4, 10, 66), (False, True, 1, 5, 19), (False, False, 2, 6, 34)],
)
def test_blocks_in_flight_need_fewer_rounds(stochastic: bool, carry: bool, stagger: int, sweeps: int, count: int) -> None:
    edges = problem(4096, stochastic)[1]
    assert law.rounds(edges, sweeps, stagger) == count
    assert law.rounds(edges, SWEEPS[256][not stochastic]) > count
    assert divergence(4096, stochastic, sweeps, stagger, carry) <= TOLERANCE


@pytest.mark.parametrize("stochastic", [True, False])
def test_fine_steps_reach_the_marginal(stochastic: bool) -> None:
    eigenvalues = np.array([0.05, 1.0, 3.0])
    target, gaps = law.ou_variance(0.5, eigenvalues), []
    for steps in (500, 1000):
        chain = law.ou_chain(np.linspace(3, 0.5, steps + 1), eigenvalues, stochastic=stochastic)
        variance = law.sample_variance(law.sequential_weights(chain), law.ou_variance(3.0, eigenvalues))
        gaps.append(np.abs(variance - target).max())
    assert gaps[1] < 2e-3
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.02)


def test_distances_are_those_of_the_definitions() -> None:
    target, variance, count = np.array([0.3, 2.0]), np.array([0.5, 1.7]), 3.0
    p, q = (torch.distributions.Normal(0.0, torch.from_numpy(v).sqrt()) for v in (target, variance))
    expected = torch.distributions.kl_divergence(p, q).sum().item()
    assert law.kl(target, variance, count) == pytest.approx(count * expected, rel=1e-12)
    squared = (target + variance - 2 * np.sqrt(target * variance)).sum()
    assert law.wasserstein(target, variance, count) == pytest.approx(math.sqrt(count * squared), rel=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v", "flow"])
@pytest.mark.parametrize("volatility", [0.0, 1.0])
def test_the_chain_of_a_table_is_the_chain_of_its_form(prediction: Prediction, volatility: float) -> None:
    grid, eigenvalues = paper_grid(3, 0.2, 0.05), np.array([0.2, 1.0, 3.0])
    table = exponential_integrator(ornstein_uhlenbeck(), grid, volatility=volatility, prediction=prediction)
    found = law.table_chain(table, eigenvalues, freeze_epsilon)
    wanted = law.ou_chain(grid.u.numpy(), eigenvalues, stochastic=bool(volatility))
    for field in ("step", "sweep", "noise"):
        np.testing.assert_allclose(getattr(found, field), getattr(wanted, field), rtol=1e-12, atol=1e-14)
    shifted_chain = law.table_chain(table, eigenvalues, shifted(1.0))
    wanted = law.ou_chain(grid.u.numpy(), eigenvalues, stochastic=bool(volatility), slope=-1.0)
    np.testing.assert_allclose(shifted_chain.sweep, wanted.sweep, rtol=1e-12)
    with pytest.raises(ValueError, match="reads 2 states a step"):
        law.table_chain(heun(Schedule.linear(), 5), eigenvalues, shifted(1.0))


def test_spectrum() -> None:
    eigenvalues, count = law.log_uniform_spectrum(1024, 0.1, 4.0, grid=64)
    assert (eigenvalues.size, count) == (64, 16)
    assert eigenvalues.mean() == pytest.approx(1, rel=LAST)
    np.testing.assert_allclose(eigenvalues[1:] / eigenvalues[:-1], 40 ** (1 / 64), rtol=LAST)
    assert law.log_uniform_spectrum(3)[0].size == 3


def test_refusals() -> None:
    chain = random_chain(6, 2)
    with pytest.raises(ValueError, match="stagger is 4 for 3 sweeps"):
        law.picard_weights(chain, (0, 6), 3, stagger=4)
    with pytest.raises(ValueError, match="stagger is 0"):
        law.rounds((0, 6), 3, 0)
    for edges in ((0,), (0, 5), (1, 6), (0, 3, 3, 6)):
        with pytest.raises(ValueError, match="do not rise from 0 to 6"):
            law.picard_weights(chain, edges, 3)
    with pytest.raises(ValueError, match="do not fall"):
        law.ou_chain([1.0, 1.0], [1.0], stochastic=True)
    with pytest.raises(ValueError, match="a marginal has variance 0"):
        law.ou_chain([0.0, -1.0], [0.0], stochastic=True)
    with pytest.raises(ValueError, match="no spectrum of 0"):
        law.log_uniform_spectrum(0)
    with pytest.raises(ValueError, match="noise of shape"):
        law.linear_chain(np.ones(3), np.ones(3), np.ones(4), np.ones((3, 2)))
    with pytest.raises(ValueError, match="response has shape"):
        law.linear_chain(np.ones(3), np.ones(3), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match="the smallest variance is 0"):
        law.kl([1.0], [0.0])


@pytest.mark.parametrize(("stochastic", "sweeps"), [(True, 8), (False, 5)])
def test_the_slope_of_unit_data_solves_4096_dimensions_as_one_block(stochastic: bool, sweeps: int) -> None:
    """Eight sweeps, or five, are all the rounds there are; the score's own slope would not be near."""
    _, edges, target, count = problem(4096, stochastic)
    start = math.log(4096 / TOLERANCE) + 2
    blocks, steps = math.ceil(start), edges[-1]
    width = next(0.8**k for k in range(100) if grid_of(start, blocks, 0.8**k).steps == steps)
    found = {}
    for name, slope in (("shifted", -1.0), ("score", 0.0)):
        chain = law.ou_chain(
            grid_of(start, blocks, width).u.numpy(), law.log_uniform_spectrum(4096)[0], stochastic=stochastic, slope=slope
        )
        weights = law.picard_weights(chain, (0, steps), sweeps)
        found[name] = law.kl(target, law.sample_variance(weights), count)
    assert found["shifted"] <= TOLERANCE < 1 < found["score"]


@pytest.mark.parametrize("power", [1, 2, 3, 4, 6, 8, 10, 12])
def test_rounds_of_the_sde_in_turn_grow_like_the_square_of_the_blocks(power: int) -> None:
    """rounds/N^2 = K/N from a horizon of ln(d/tol) + 3, one grid of 64 eigenvalues for all dimensions."""
    start = math.log(2**power / TOLERANCE) + 3
    blocks = math.ceil(start)
    eigenvalues, _ = law.log_uniform_spectrum(2**20, grid=64)
    target, count = law.ou_variance(END, eigenvalues), 2**power / 64

    def divergence_of(weights: Array) -> float:
        return law.kl(target, law.sample_variance(weights), count)

    for k in range(100):
        grid = grid_of(start, blocks, 0.8**k)
        chain = law.ou_chain(grid.u.numpy(), eigenvalues, stochastic=True)
        if divergence_of(law.sequential_weights(chain)) <= TOLERANCE / 2:
            break
    reached = next(k for k in range(1, 20) if divergence_of(law.picard_weights(chain, tuple(grid.edges), k)) <= TOLERANCE)
    assert 0.4 <= reached / blocks <= 0.7

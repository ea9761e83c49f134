# SPDX-License-Identifier: Apache-2.0
"""The exact law of Picard samples of Gaussian data: no sampling noise, nothing but arithmetic.

Data N(0, diag(lambda)) in the coordinates of the Ornstein-Uhlenbeck process dx = -x/2 du + dB, u >= 0 the level of
noise. The marginal at level u is N(0, diag(v)) with the exact score

    s(z) = -z / v(u),    v(u) = exp(-u) lambda + 1 - exp(-u).                                                   (1)

With a linear score every coordinate is on its own. A chain of M steps is

    y[i+1] = F[i] y[i] + c[i] xi[i],    F[i] = A[i] + B[i] S[i],                                                (2)

with xi standard normal, A the factor of the state, B that of the network's prediction and S the prediction a unit of
state (S = -1/v for the score). One Picard sweep freezes the prediction but for a slope g, G[i] = A[i] + B[i] g[i]:

    x'[i+1] = G[i] x'[i] + (F[i] - G[i]) x[i] + c[i] xi[i];                                                     (3)

g = 0 with the score as the prediction is the sweep of PIADM (Chen, Ren, Ying and Rotskoff, NeurIPS 2024, arXiv
2405.15986). In the form that `picard_weights` runs, with the change d[i] = x'[i] - x[i],

    d[i+1] = G[i] d[i] + F[i] x[i] + c[i] xi[i] - x[i+1].                                                       (4)

The steps are cut into blocks. Block n opens once block n - 1 has had `stagger` sweeps: its nodes are filled with the
end of block n - 1 as it stands. Every open block is swept once a round and is final after `sweeps` sweeps of its own.
stagger = sweeps takes the blocks in turn, as PIADM does; fewer have several blocks in flight (the diagonal schedule of
Zhou and Sugiyama, ICML 2025, arXiv 2412.07435). With `carry`, the change d of a round crosses the edges of blocks;
without it, d is set to zero at the start of each block, which so starts from the end of the round before.

The sample is w[0] y[0] + sum_i w[i+1] xi[i] for weights w, one set an eigenvalue, found by running the transpose of
the sweeps backwards from the end: as much work as the sweeps themselves. Law, distances and the error against the
sequential chain with the same noise follow from the weights. All arrays are NumPy, float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from paradiff.chain.home import made_at_home
from paradiff.chain.slope import Slope, gaussian_gain, resolve
from paradiff.chain.table import Table

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LinearChain:
    """A chain (2) with the slopes (3) of its sweeps; M steps, E eigenvalues.

    Attributes:
        step: F `[M, E]`, what a step multiplies the state by.
        sweep: G `[M, E]`, what a sweep multiplies the change of the state by.
        noise: c `[M, E]`, the size of the fresh noise.
    """

    step: Array
    sweep: Array
    noise: Array


def linear_chain(
    state: ArrayLike, prediction: ArrayLike, noise: ArrayLike, response: ArrayLike, slope: ArrayLike = 0.0
) -> LinearChain:
    """The chain (2) from the coefficients of any step rule, in any coordinates.

    Args:
        state: A `[M]`, or `[M, E]` where it differs between eigenvalues; so for all that follow.
        prediction: B, the factor of the network's prediction.
        noise: c, the size of the fresh noise.
        response: S, the exact prediction a unit of state, `[M, E]`.
        slope: g, the part of the response that the sweep does not freeze; 0 for none.

    Raises:
        ValueError: If the shapes do not fit `[M, E]`.
    """
    full = np.asarray(response, dtype=np.float64)
    if full.ndim != 2:
        raise ValueError(f"response has shape {full.shape}; give one row a step and one column an eigenvalue")
    a, b, c, g = (
        _fit(value, full.shape, name)
        for value, name in zip((state, prediction, noise, slope), ("state", "prediction", "noise", "slope"), strict=True)
    )
    return LinearChain(step=a + b * full, sweep=a + b * g, noise=c)


def ou_variance(level: ArrayLike, eigenvalues: ArrayLike) -> Array:
    """v of equation (1): `[E]` for one level, `[L, E]` for L levels."""
    fade = np.exp(-np.asarray(level, dtype=np.float64))[..., None]
    return np.asarray(fade * np.asarray(eigenvalues) + 1 - fade, dtype=np.float64)


def ou_chain(levels: ArrayLike, eigenvalues: ArrayLike, *, stochastic: bool, slope: ArrayLike = 0.0) -> LinearChain:
    """The exponential integrator of PIADM between falling levels u[0] > ... > u[M], with the score (1).

    With e = u[i] - u[i+1]: A = exp(e/2), and B = 2 (exp(e/2) - 1), c = sqrt(exp(e) - 1) for the stochastic equation,
    B = exp(e/2) - 1, c = 0 for the probability-flow equation.

    Args:
        levels: u `[M + 1]`, such as those of a `Grid` (samplers/grid.py).
        eigenvalues: lambda `[E]`.
        stochastic: True for the stochastic equation.
        slope: g of (3), in units of the score's response.

    Raises:
        ValueError: If the levels do not fall, or an eigenvalue leaves a marginal without variance.
    """
    levels = np.asarray(levels, dtype=np.float64)
    width = levels[:-1] - levels[1:]
    if width.size == 0 or not np.all(width > 0):
        raise ValueError("the levels do not fall from each to the next; give at least two, the noisiest first")
    variance = ou_variance(levels[:-1], eigenvalues)
    if not np.all(variance > 0):
        raise ValueError(f"a marginal has variance {variance.min():.3g}; the score needs a positive one")
    push = np.expm1(width / 2)
    return linear_chain(push + 1, (2 if stochastic else 1) * push, np.sqrt(np.expm1(width)) * stochastic, -1 / variance, slope)


@made_at_home
def table_chain(table: Table, eigenvalues: ArrayLike, slope: Slope) -> LinearChain:
    """The chain of any table of one-step steps, with a slope of the window loop (chain/slope.py).

    Args:
        table: The table, in any coordinates, for data of mean 0.
        eigenvalues: lambda `[E]`.
        slope: The slope of the sweeps.

    Raises:
        ValueError: If a step of the table reads more than one state.
    """
    if table.band != 1:
        raise ValueError(f"table {table.name!r} reads {table.band} states a step; the law is known for one")
    p, q, a, b, c, g = (
        v.numpy()[:, None]
        for v in (
            table.p,
            table.q,
            table.a[:, 0],
            table.b[:, 0],
            table.c,
            resolve(slope, table)[:, 0],
        )
    )
    data = torch.from_numpy(np.array(eigenvalues, dtype=np.float64))
    response = (gaussian_gain(table.alpha[:-1, None], table.sigma[:-1, None], data).numpy() - p) / q
    shape = response.shape
    return LinearChain(a + b * response, np.broadcast_to(g, shape), np.broadcast_to(c, shape))


def sequential_weights(chain: LinearChain) -> Array:
    """w `[M + 1, E]` of the sequential chain: that of y[0], then those of xi[0] ... xi[M-1]."""
    after = np.concatenate([chain.step, np.ones_like(chain.step[:1])])[::-1].cumprod(0)[::-1]
    return np.concatenate([after[:1], after[1:] * chain.noise])


def picard_weights(
    chain: LinearChain, edges: tuple[int, ...], sweeps: int, *, stagger: int | None = None, carry: bool = True
) -> Array:
    """w `[M + 1, E]` of the end of the last block after all its sweeps: of y[0], then of xi[0] ... xi[M-1].

    Iterates that grow before they settle, as those of many score-form blocks in flight do, lose digits here just as
    they would in a sampler.

    Args:
        chain: The chain and the slopes of its sweeps.
        edges: 0 = edges[0] < ... < edges[N] = M, the blocks.
        sweeps: Sweeps of each block.
        stagger: Sweeps of a block before the next opens, 1 to `sweeps`; None takes the blocks in turn.
        carry: Whether the change of a round crosses the edges of blocks.

    Raises:
        ValueError: If the edges are not as said, or stagger is out of range.
    """
    steps, stagger = chain.step.shape[0], sweeps if stagger is None else stagger
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != steps or any(np.diff(edges) < 1):
        raise ValueError(f"the edges do not rise from 0 to {steps}, the number of steps, with a step in every block")
    _check_schedule(sweeps, stagger)
    blocks = len(edges) - 1
    state = np.zeros((steps + 1, chain.step.shape[1]))  # the derivative of the sample by each node
    state[-1] = 1
    noise = np.zeros_like(state[1:])
    for turn in reversed(range(rounds(edges, sweeps, stagger))):
        newest = min(turn // stagger, blocks - 1)
        oldest = max(0, (turn - sweeps) // stagger + 1)
        _transpose_sweep(chain, edges[oldest : newest + 2], carry, state, noise)
        if turn == newest * stagger:
            fill = state[edges[newest] + 1 : edges[newest + 1] + 1]
            state[edges[newest]] += fill.sum(0)
            fill[:] = 0
    return np.concatenate([state[:1], noise * chain.noise])


def rounds(edges: tuple[int, ...], sweeps: int, stagger: int | None = None) -> int:
    """Rounds of a schedule, (N - 1) stagger + sweeps; evaluations are `sweeps` a step whatever the stagger.

    Raises:
        ValueError: If stagger is out of range.
    """
    stagger = sweeps if stagger is None else stagger
    _check_schedule(sweeps, stagger)
    return (len(edges) - 2) * stagger + sweeps


def sample_variance(weights: Array, start_variance: ArrayLike = 1.0) -> Array:
    """Variance `[E]` of the sample; `start_variance` is that of y[0], one or `[E]`."""
    return weights[0] ** 2 * np.asarray(start_variance) + (weights[1:] ** 2).sum(0)


def coupled_error(weights: Array, other: Array, start_variance: ArrayLike = 1.0) -> Array:
    """E|y - y'|^2 `[E]` of two samples that share y[0] and xi, such as a Picard sample and the sequential one."""
    return sample_variance(weights - other, start_variance)


def kl(target: ArrayLike, variance: ArrayLike, count: ArrayLike = 1.0) -> float:
    """KL(N(0, diag target) || N(0, diag variance)), `count` coordinates an eigenvalue.

    Raises:
        ValueError: If a variance is not positive.
    """
    target, variance = np.asarray(target, dtype=np.float64), np.asarray(variance, dtype=np.float64)
    smallest = min(target.min(), variance.min())
    if not smallest > 0:
        raise ValueError(f"the smallest variance is {smallest:.3g}; the divergence needs positive ones")
    ratio = target / variance
    return float((np.asarray(count) / 2 * (ratio - 1 - np.log(ratio))).sum())


def wasserstein(target: ArrayLike, variance: ArrayLike, count: ArrayLike = 1.0) -> float:
    """The Wasserstein distance of order 2 between N(0, diag target) and N(0, diag variance), `count` as in `kl`."""
    return math.sqrt(float((np.asarray(count) * (np.sqrt(variance) - np.sqrt(target)) ** 2).sum()))


def log_uniform_spectrum(dimension: int, low: float = 0.1, high: float = 4.0, grid: int = 256) -> tuple[Array, float]:
    """Eigenvalues spread evenly in logarithm over [low, high], then scaled to mean 1.

    The E = min(dimension, grid) values are the midpoints of E equal cells of the logarithm.

    Returns:
        lambda `[E]`, and how many coordinates each stands for, dimension/E.

    Raises:
        ValueError: If a number is out of range.
    """
    if dimension < 1 or grid < 1 or not 0 < low <= high:
        raise ValueError(f"no spectrum of {dimension} eigenvalues on {grid} points between {low} and {high}")
    size = min(dimension, grid)
    eigenvalues = low * (high / low) ** ((np.arange(size) + 0.5) / size)
    return eigenvalues / eigenvalues.mean(), dimension / size


def _transpose_sweep(chain: LinearChain, edges: tuple[int, ...], carry: bool, state: Array, noise: Array) -> None:
    """The transpose of the sweep (4) over the blocks between `edges`, in place; `noise` is added to, without c."""
    first, last = edges[0], edges[-1]
    resets = set() if carry else set(edges)
    change = state[first + 1 : last + 1].copy()
    sweep, scratch = chain.sweep, np.empty_like(state[0])
    for i in range(last - 1, first, -1):
        if i not in resets:
            np.multiply(sweep[i], change[i - first], out=scratch)
            change[i - first - 1] += scratch
    noise[first:last] += change
    state[first + 1 : last + 1] -= change
    state[first:last] += chain.step[first:last] * change


def _fit(value: ArrayLike, shape: tuple[int, ...], name: str) -> Array:
    array = np.asarray(value, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name} of shape {np.shape(value)} does not fit {shape[0]} steps by {shape[1]} eigenvalues") from None


def _check_schedule(sweeps: int, stagger: int) -> None:
    if not 1 <= stagger <= sweeps:
        raise ValueError(f"stagger is {stagger} for {sweeps} sweeps; it must be from 1 to the number of sweeps")

# SPDX-License-Identifier: Apache-2.0
"""The coarse propagator of Parareal: one cheap step over an interval of many fine ones.

With the clean-data estimate frozen at D, the fine chain from node l to node r is a linear recurrence, and so one step:

    x[r] = a x[l] + d D + sum_{l<=i<r} w[i] z[i]                                                                  (1)

For every one-step sampler of paradiff.samplers this is the sampler's own step from l to r (steps of DDIM, DDPM, Euler and
their like compose when D is the same in all), and the last term is the exact aggregate of the interval's noises: its variance,
the sum of w^2, is what that sampler's long step would add, and its path is the fine chain's own.

`two_step` extrapolates D along its trend between the last two coarse nodes, D + u (D - D before), as DPM-Solver++(2M) does (Lu
et al., arXiv 2211.01095, algorithm 2): second order from the same network calls. That pays on deterministic chains, whose D
runs smoothly.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.slope import Slope, freeze_clean_data, over_intervals, resolve
from paradiff.chain.table import Table

DRAWN = 64  # noises held at once while an interval's are added up
LEVELS = 1e-9  # relative difference of levels at which a coarse table's node is a fine node


@dataclass(frozen=True)
class Coarse:
    """Coarse steps between some nodes of a fine table. M intervals, band P, N fine steps.

    Attributes:
        nodes: `M+1` fine nodes, rising, 0 and N included.
        state: `[M, P]` a of equation (1), for the node reached and, where the table reads earlier states, the P - 1 before it.
        clean: `[M, P]` d, likewise.
        weights: `[P, N]` w, likewise: fine step i counts in the interval it lies in.
        extrapolation: `[M]` u, the weight of D - D before; zero for a one-step propagator.
        slope: `[M]` for a propagator that needs no network after the first step: a change of x[l] reaches x[r] multiplied by
            it. None otherwise.
    """

    nodes: list[int]
    state: Tensor
    clean: Tensor
    weights: Tensor
    extrapolation: Tensor
    slope: Tensor | None = None

    def aggregate(self, noise: Noise, sample: int, interval: int) -> Tensor:
        """`[P, ...]` the noise term of equation (1) over one interval, in float64."""
        left, right = self.nodes[interval], self.nodes[interval + 1]
        parts = []
        for begin in range(left, right, DRAWN):
            end = min(begin + DRAWN, right)
            z = noise.draw(sample, range(begin, end)).double()
            parts.append(torch.tensordot(self.weights[:, begin:end].to(z.device, non_blocking=True), z, 1))
        return torch.stack(parts).sum(0)


def one_step(table: Table, nodes: Sequence[int]) -> Coarse:
    """Equation (1) between `nodes`."""
    band = table.band
    source = (torch.arange(table.steps)[:, None] - torch.arange(band)).clamp(min=0)
    slope, forcing = freeze_clean_data(table), (table.b / table.q[source]).sum(1).tolist()
    rows = slope.tolist()
    state, clean = torch.zeros(2, len(nodes) - 1, band, dtype=torch.float64)
    weights = torch.zeros(band, table.steps, dtype=torch.float64)
    for n, (left, right) in enumerate(itertools.pairwise(nodes)):
        recent = [(1.0, 0.0)] * band  # what came before the interval counts as its first state
        for i in range(left, right):
            a = sum(g * r[0] for g, r in zip(rows[i], recent, strict=True))
            d = sum(g * r[1] for g, r in zip(rows[i], recent, strict=True)) + forcing[i]
            recent = [(a, d), *recent[:-1]]
        state[n], clean[n] = torch.tensor(recent, dtype=torch.float64).T
        for k in range(min(band, right - left)):
            weights[k, left : right - k] = table.c[left : right - k] * _reach(rows, left, right - k)
    return Coarse(list(nodes), state, clean, weights, torch.zeros(len(nodes) - 1, dtype=torch.float64))


def _reach(rows: list[list[float]], left: int, right: int) -> Tensor:
    """`[right-left]` factor by which the state after each step left ... right-1 reaches the state at `right`."""
    factors = [0.0] * (right - left)
    factors[-1] = 1.0
    for i in range(right - left - 2, -1, -1):  # the state left + i + 1 is read by steps left + i + 1 + j
        later = range(min(len(rows[0]), right - left - 1 - i))
        factors[i] = sum(rows[left + i + 1 + j][j] * factors[i + 1 + j] for j in later)
    return torch.tensor(factors, dtype=torch.float64)


def two_step(table: Table, nodes: Sequence[int]) -> Coarse:
    """Equation (1) with the clean-data estimate extrapolated by half the ratio of this interval's length to the last one's,
    in log-SNR, at most 1/2. The first interval, and intervals that begin or end at no noise or no signal, take one step."""
    log_snr = (table.alpha / table.sigma).log()[list(nodes)]
    length = log_snr.diff()
    extrapolation = torch.zeros_like(length)
    extrapolation[1:] = (length[1:] / length[:-1] / 2).clamp(max=0.5)
    extrapolation[~(extrapolation > 0)] = 0
    extrapolation[1:][~torch.isfinite(length[1:]) | ~torch.isfinite(length[:-1])] = 0
    return replace(one_step(table, nodes), extrapolation=extrapolation)


def between(table: Table, nodes: Sequence[int], slope: Slope) -> Coarse:
    """A propagator that needs no network: equation (1) with D from the first state alone, then changes carried by `slope`."""
    found = over_intervals(resolve(slope, table), list(nodes))[:, 0]
    return replace(one_step(table, nodes), slope=found)


def of_table(table: Table, coarse: Table) -> Coarse:
    """The steps of another table of band 1, whose nodes are nodes of the fine one; its noises are the fine chain's aggregates,
    scaled to its own c.

    Raises:
        ValueError: If a node of `coarse` is no node of the fine table, it does not run from the first to the last of them, its
            band is not 1, or it adds noise in an interval where the fine table adds none.
    """
    if coarse.band != 1:
        raise ValueError(f"the coarse table {coarse.name!r} has band {coarse.band}; a coarse propagator is a one-step sampler")
    nodes = [_node_of(table, coarse, k) for k in range(coarse.steps + 1)]
    if nodes[0] != 0 or nodes[-1] != table.steps:
        raise ValueError(
            f"the coarse table {coarse.name!r} runs from fine node {nodes[0]} to {nodes[-1]}; it must run from 0 to "
            f"{table.steps}, the whole chain (leading spacing begins at other times for other numbers of steps): give fine "
            "nodes as indices instead"
        )
    own = one_step(table, nodes)
    state, clean, weights = own.state.clone(), own.clean.clone(), own.weights.clone()
    state[:, 0] = coarse.a[:, 0] - coarse.b[:, 0] * coarse.p / coarse.q
    clean[:, 0] = coarse.b[:, 0] / coarse.q
    for n, (left, right) in enumerate(itertools.pairwise(nodes)):
        size, wanted = float(weights[0, left:right].norm()), float(coarse.c[n])
        if size == 0 < wanted:
            raise ValueError(
                f"the coarse table {coarse.name!r} adds noise between fine nodes {left} and {right}, where {table.name!r} adds "
                "none: both must take their noise from one path; give a deterministic coarse table"
            )
        weights[0, left:right] *= wanted / size if size > 0 else 1.0
    return replace(own, state=state, clean=clean, weights=weights)


def _node_of(table: Table, coarse: Table, k: int) -> int:
    """The fine node at the levels of the coarse table's node k."""
    alpha, sigma = coarse.alpha[k], coarse.sigma[k]
    mismatch = (table.alpha - alpha).abs() / alpha.clamp(min=1e-3) + (table.sigma - sigma).abs() / sigma.clamp(min=1e-3)
    fits = (mismatch <= LEVELS).nonzero()[:, 0].tolist()  # two of a two-stage sampler, of which one lies within a step
    node = next((n for n in fits if n in table.restarts), int(mismatch.argmin()))
    if k == coarse.steps and mismatch[-1] <= LEVELS:
        node = table.steps
    if mismatch[node] > LEVELS:
        raise ValueError(
            f"node {k} of the coarse table {coarse.name!r} (alpha = {float(alpha):.6g}, sigma = {float(sigma):.6g}) is no node "
            f"of the fine table {table.name!r}; the nearest is node {node} (alpha = {float(table.alpha[node]):.6g}, sigma = "
            f"{float(table.sigma[node]):.6g}): give fine nodes as indices instead"
        )
    return node


def propagator_mismatch(table: Table, coarse: Coarse, edges: Sequence[int], size: float = 1.0) -> Tensor:
    """`[B]` how far the derivative of the coarse propagator over a block may be from that of the fine one: the largest
    difference over Gaussian data of variances up to 100 times their mean square `size`, along the deterministic chain between
    the same nodes. Zero where the two are the same step.

    Stochastic chains are measured by the deterministic one too: for Gaussian data their steps compose exactly, and what real
    data add to the mismatch is of the same order. Where levels are a guide only, a deterministic one-step chain is measured by
    its own coefficients, too.
    """
    variance = size * torch.logspace(-4, 2, 49, dtype=torch.float64)[:, None]
    extrapolates = bool(coarse.extrapolation.any())
    found = []
    for left, right in itertools.pairwise(edges):
        if table.band == 1 and not extrapolates:
            fine = _derivative(table, range(left, right + 1), variance)
        else:  # of higher order than its own nodes' Euler steps
            spread = table.alpha[[left, right]] ** 2 * variance + table.sigma[[left, right]] ** 2
            fine = (spread[:, 1] / spread[:, 0]).sqrt()
        if coarse.slope is not None:
            other = coarse.slope[coarse.nodes.index(left)]
        else:
            other = _derivative(table, [n for n in coarse.nodes if left <= n <= right], variance)
        apart = (fine - other).abs()
        if table.band == 1 and not table.stochastic and not table.exact_levels:
            apart = torch.maximum(apart, (_own_derivative(table, slice(left, right), variance) - other).abs())
        found.append(float(apart.max()))
    return torch.tensor(found, dtype=torch.float64)


def _derivative(table: Table, nodes: Sequence[int], variance: Tensor) -> Tensor:
    """`[V]` derivative of deterministic steps along `nodes`, for Gaussian data of variance `[V, 1]`."""
    alpha, sigma = table.alpha[list(nodes)], table.sigma[list(nodes)]
    shrink = sigma[1:] / sigma[:-1]
    gain = alpha[1:] - alpha[:-1] * shrink
    slope = alpha[:-1] * variance / (alpha[:-1] ** 2 * variance + sigma[:-1] ** 2)
    return (shrink + gain * slope).prod(1)


def _own_derivative(table: Table, steps: slice, variance: Tensor) -> Tensor:
    """As `_derivative`, of the steps' own coefficients, which levels that are a guide only do not determine."""
    alpha, sigma, p, q = table.alpha[:-1][steps], table.sigma[:-1][steps], table.p[steps], table.q[steps]
    slope = (alpha * variance / (alpha**2 * variance + sigma**2) - p) / q
    return (table.a[steps, 0] + table.b[steps, 0] * slope).prod(1)

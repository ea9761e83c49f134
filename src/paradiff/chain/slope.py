# SPDX-License-Identifier: Apache-2.0
"""Slopes G: how a change of one state is carried to the next.

Every parallel-in-time method is an approximate Newton step on the residual r[i] = Phi_i(x) - x[i+1] of the chain:

    delta[i+1] = sum_{j<P} G[i,j] delta[i-j] + r[i],      x <- x + delta                                        (1)

and differs from its siblings in G, the stand-in for the derivative of the step. The derivative of step i with respect to
x[i-j] is a[i,j] + b[i,j] dm/dx, so a guess g for the derivative of the clean-data estimate, D = p x + q m, gives

    G[i,j] = a[i,j] + b[i,j] (g[i-j] - p[i-j]) / q[i-j].                                                        (2)

| slope | G | known from |
|---|---|---|
| `zero` | 0 | Jacobi iteration; Song et al., arXiv 2002.03629 |
| `identity` | 1 on the last state | Picard iteration; ParaDiGMS, arXiv 2305.16317 |
| `freeze_epsilon` | (2) with g = 1/alpha: a[i] in epsilon form | exponential integrators, ParaTAA, arXiv 2402.09970 |
| `freeze_clean_data` | (2) with g = 0: a[i] + b[i]/sigma[i] in epsilon form | - |
| `shifted(v)` | (2) with g = alpha v/(alpha^2 v + sigma^2): data of variance v | c_skip of EDM, arXiv 2206.00364 |

Any array `[N]` or `[N, P]` will do as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.table import Table

Slope = Callable[[Table], Tensor] | Tensor


def zero(table: Table) -> Tensor:
    """G = 0, `[N, P]`: nodes do not see each other's changes until the next sweep."""
    return torch.zeros_like(table.a)


def identity(table: Table) -> Tensor:
    """G = 1 on the last state, `[N, P]`: changes add up, so that (1) is a cumulative sum."""
    slope = torch.zeros_like(table.a)
    slope[:, 0] = 1
    return slope


def _from_clean_slope(table: Table, g: Tensor) -> Tensor:
    """Equation (2) for g `[N]`."""
    output_slope = (g - table.p) / table.q
    nodes = torch.arange(table.steps)
    slope = table.a.clone()
    for j in range(table.band):
        slope[:, j] += table.b[:, j] * output_slope[(nodes - j).clamp(min=0)]
    return slope


def freeze_epsilon(table: Table) -> Tensor:
    """The noise estimate does not answer to the state, `[N, P]`. At alpha = 0 (only ever node 0, whose state is given and
    never changes) the slope is that of frozen clean data."""
    return _from_clean_slope(table, torch.where(table.alpha[:-1] > 0, 1 / table.alpha[:-1], 0.0))


def gaussian_gain(alpha: Tensor, sigma: Tensor, variance: float) -> Tensor:
    """g = alpha v/(alpha^2 v + sigma^2), the derivative of the clean-data estimate of Gaussian data with respect to the state.

    Args:
        alpha: Signal levels.
        sigma: Noise levels, of the same shape.
        variance: v, of the data, in the data's own units squared.
    """
    return alpha * variance / (alpha**2 * variance + sigma**2)


def freeze_clean_data(table: Table) -> Tensor:
    """The clean-data estimate does not answer to the state, `[N, P]`."""
    return _from_clean_slope(table, torch.zeros_like(table.p))


@dataclass(frozen=True)
class Shifted:
    """The slope that `shifted` returns: equation (2) with g = `gaussian_gain`.

    Attributes:
        variance: v.
    """

    variance: float

    def __call__(self, table: Table) -> Tensor:
        """G `[N, P]`."""
        return _from_clean_slope(table, gaussian_gain(table.alpha[:-1], table.sigma[:-1], self.variance))


def shifted(variance: float) -> Shifted:
    """The clean-data estimate answers as it does for Gaussian data.

    Args:
        variance: Variance of the data, in the data's own units squared.

    Raises:
        ValueError: If `variance` is not positive and finite.
    """
    if not 0 < variance < float("inf"):
        raise ValueError(f"the data variance is {variance}; it must be positive and finite")
    return Shifted(variance)


def resolve(slope: Slope, table: Table) -> Tensor:
    """The slope as an array `[N, P]` in float64.

    Raises:
        ValueError: If an array has another shape or is not finite.
    """
    found = slope(table) if callable(slope) else torch.as_tensor(slope, dtype=torch.float64)
    if found.ndim == 1:
        found = torch.cat([found[:, None], torch.zeros(len(found), table.band - 1, dtype=torch.float64)], dim=1)
    if tuple(found.shape) != (table.steps, table.band):
        raise ValueError(
            f"the slope has shape {tuple(found.shape)}; table {table.name!r} has {table.steps} steps and band "
            f"{table.band}, so it must be [{table.steps}] or [{table.steps}, {table.band}]"
        )
    if not torch.isfinite(found).all():
        raise ValueError(f"the slope is not finite at step {int((~torch.isfinite(found)).any(1).nonzero()[0])}")
    return found


def over_intervals(slope: Tensor, edges: list[int]) -> Tensor:
    """The slope of whole sub-intervals, `[M, P']`, for nodes at `edges` `[M+1]`.

    With single-step intervals it is `slope` itself. For longer ones a change at the left edge is carried through the fine
    steps; earlier states count as unchanged, so P' = 1.
    """
    return slope if _single(edges) else carried(slope, edges)[:, :1]


def _single(edges: list[int]) -> bool:
    return len(edges) == edges[-1] - edges[0] + 1


def carried(slope: Tensor, edges: list[int]) -> Tensor:
    """How changes of the P states up to the left edge of each sub-interval reach its right edge, `[M, P]`."""
    band = slope.shape[1]
    if _single(edges):
        return slope
    rows = slope.tolist()
    found = torch.empty(len(edges) - 1, band, dtype=torch.float64)
    for n, (left, right) in enumerate(itertools.pairwise(edges)):
        for k in range(band):
            recent = [float(j == k) for j in range(band)]
            for i in range(left, right):
                recent = [sum(rows[i][j] * recent[j] for j in range(band)), *recent[:-1]]
            found[n, k] = recent[0]
    return found


def inverse(slope: Tensor) -> Tensor:
    """(I - G)^-1 of a window, `[W, W]`, lower triangular with unit diagonal.

    Args:
        slope: `[W, P]` rows of the window's nodes. Changes before the window are zero.
    """
    width, band = slope.shape
    system = torch.eye(width, dtype=torch.float64)
    for j in range(min(band, width - 1)):
        system.diagonal(-1 - j).sub_(slope[1 + j :, j])
    return torch.linalg.solve_triangular(system, torch.eye(width, dtype=torch.float64), upper=False, unitriangular=True)

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
| `identity` | 1 on the state that a step is taken from | Picard iteration; ParaDiGMS, arXiv 2305.16317 |
| `freeze_epsilon` | (2) with g = 1/alpha: a[i] in epsilon form | exponential integrators, ParaTAA, arXiv 2402.09970 |
| `freeze_clean_data` | (2) with g = 0: a[i] + b[i]/sigma[i] in epsilon form | - |
| `shifted(v)` | (2) with g = alpha v/(alpha^2 v + sigma^2): data of variance v | c_skip of EDM, arXiv 2206.00364 |

Any array `[N]` or `[N, P]` will do as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from paradiff.chain.table import Table
from paradiff.errors import require_real, shown

Slope = Callable[[Table], Tensor] | Tensor

DATA_VARIANCE = 0.25
"""v, the variance of the data that every method assumes where its caller gives none, for data in -1 ... 1: in Gaussian slopes,
initial guesses, errors along Parareal's blocks, and collocation's forcing. It is EDM's, whose sigma_data is 0.5 (arXiv
2206.00364). The bundled digits have 0.29 a pixel; with 0.29 or 0.5 mean rounds change by a few hundredths of themselves at most
(benchmarks/tolerance.py)."""


STAGE = 1e-3
"""Weight of the last state, with the noise estimate frozen, below which a step is a later stage, as a share of the largest."""


def refuse_no_slope(slope: object, name: str = "the slope") -> None:
    """Refuses what is no function and no tensor.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(slope, type) or not (callable(slope) or isinstance(slope, Tensor)):
        raise ValueError(
            f"{name} is {shown(slope)}; it must be a function of a table, such as paradiff.slopes.identity, or a tensor [N] "
            "or [N, P]"
        )


def zero(table: Table) -> Tensor:
    """G = 0, `[N, P]`: nodes do not see each other's changes until the next sweep."""
    return torch.zeros_like(table.a)


def identity(table: Table) -> Tensor:
    """G = 1 on the state that a step is taken from, `[N, P]`: changes add up, so that (1) is a cumulative sum. That is the last
    state, but in the second stage of a step, which is taken from the state before the first (`taken_from`)."""
    return torch.nn.functional.one_hot(taken_from(table), table.band).to(table.a)


def taken_from(table: Table) -> Tensor:
    """`[N]` how many nodes before the last state the state lies that each step is taken from: 0 but in later stages of a step,
    which read the state predicted by the stage before through the network alone."""
    weights = freeze_epsilon(table).abs()
    return torch.where(weights[:, 0] < STAGE * weights.amax(1), weights.argmax(1), 0)


def staged(table: Table) -> bool:
    """Whether some steps have several stages."""
    return bool(taken_from(table).any())


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


def gaussian_gain(alpha: Tensor, sigma: Tensor, variance: float | Tensor) -> Tensor:
    """g = alpha v/(alpha^2 v + sigma^2), the derivative of the clean-data estimate of Gaussian data with respect to the state.

    Args:
        alpha: Signal levels.
        sigma: Noise levels, of the same shape.
        variance: v, of the data, in the data's own units squared; one, or several, of a shape that broadcasts.
    """
    return alpha * variance / (alpha**2 * variance + sigma**2)


def freeze_clean_data(table: Table) -> Tensor:
    """The clean-data estimate does not answer to the state, `[N, P]`."""
    return _from_clean_slope(table, torch.zeros_like(table.p))


@dataclass(frozen=True, repr=False)
class Shifted:
    """The slope that `shifted` returns: equation (2) with g = `gaussian_gain`.

    Attributes:
        variance: v.
    """

    variance: float

    def __repr__(self) -> str:
        return f"shifted({self.variance:g})"

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
    require_real("the data variance", variance, positive=True)
    return Shifted(float(variance))


def label(slope: Callable[..., object]) -> str:
    """A function's short name: its own, or the repr of an object that is called, where that says more than an address."""
    name = getattr(slope, "__name__", None)
    if isinstance(name, str):
        return name.strip("<>")
    text = repr(slope)
    return type(slope).__name__ if " at 0x" in text else shown(slope)


def resolve(slope: Slope, table: Table) -> Tensor:
    """The slope as an array `[N, P]` in float64.

    Raises:
        ValueError: If it is no function of a table and no array, or an array has another shape, holds truth values or complex
            numbers, or is not finite.
    """
    refuse_no_slope(slope)
    found = slope(table) if callable(slope) else slope
    named = f"the slope {label(slope)}" if callable(slope) and label(slope) != "lambda" else "the slope"
    expected = f"[{table.steps}] or [{table.steps}, {table.band}]"
    if not isinstance(found, Tensor | np.ndarray):
        raise ValueError(f"{named} returned {shown(found)} for table {table.name!r}; it must return a tensor, {expected}")
    found = torch.as_tensor(found)
    if found.dtype == torch.bool or found.is_complex():
        kind = "truth values" if found.dtype == torch.bool else "complex numbers"
        raise ValueError(f"{named} is made of {kind}; it must be a tensor of real numbers, {expected}")
    found = found.detach().to("cpu", torch.float64)
    if found.ndim == 1:
        found = torch.cat([found[:, None], torch.zeros(len(found), table.band - 1, dtype=torch.float64)], dim=1)
    if tuple(found.shape) != (table.steps, table.band):
        raise ValueError(
            f"{named} has shape {tuple(found.shape)}; table {table.name!r} has {table.steps} steps and band "
            f"{table.band}, so it must be {expected}"
        )
    if not torch.isfinite(found).all():
        raise ValueError(f"{named} is not finite at step {int((~torch.isfinite(found)).any(1).nonzero()[0])}")
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
    """(I - G)^-1 of a window, `[.., W, W]`, lower triangular with unit diagonal.

    Args:
        slope: `[.., W, P]` rows of the window's nodes. Changes before the window are zero.
    """
    *several, width, band = slope.shape
    system = torch.eye(width, dtype=torch.float64).repeat(*several, 1, 1)
    for j in range(min(band, width - 1)):
        system.diagonal(-1 - j, -2, -1).sub_(slope[..., 1 + j :, j])
    one = torch.eye(width, dtype=torch.float64).expand_as(system)
    return torch.linalg.solve_triangular(system, one, upper=False, unitriangular=True)


class Inverses:
    """(I - G)^-1 of stretches of the chain, and the same on the device in the dtype of the states.

    That of a stretch is a part of that of any longer one around it, since G is triangular. So it is made once for overlapping
    stretches of the chain, which hold all those of up to `length` nodes; for longer ones it is made as it is asked for.

    Args:
        slope: `[N, P]` G.
        move: Moves values to the device and the dtype of the states.
        length: Nodes of the stretches that are asked for most.
    """

    def __init__(self, slope: Tensor, move: Callable[[Tensor], Tensor], length: int) -> None:
        self._slope, self._move, self._length = slope, move, min(max(length, 16), 96)  # the rest is dearer than to make anew

    def __call__(self, lo: int, hi: int) -> Tensor:
        """`[W, W]` in float64 on the CPU, for the rows lo ... hi - 1 of the slope."""
        return inverse(self._slope[lo:hi]) if hi - lo > self._length else self._part(self._all, lo, hi)

    def moved(self, lo: int, hi: int) -> Tensor:
        """`[W, W]` on the device."""
        return self._move(self(lo, hi)) if hi - lo > self._length else self._part(self._all_moved, lo, hi)

    def strict(self, lo: int, hi: int) -> Tensor:
        """`[W, W]` on the device, without its diagonal of ones."""
        return self._move(self(lo, hi).tril(-1)) if hi - lo > self._length else self._part(self._all_strict, lo, hi)

    def _part(self, every: Tensor, lo: int, hi: int) -> Tensor:
        which = lo // self._length
        inside = slice(lo - which * self._length, hi - which * self._length)
        return every[which, inside, inside]

    @cached_property
    def _all(self) -> Tensor:
        """`[S, 2 L, 2 L]`, of stretches that begin L nodes apart; at once, since small tensors that stay, made while large ones
        come and go, leave a process with memory that it cannot give back."""
        steps, length = len(self._slope), self._length
        beyond = -(-steps // length) * length + length - steps
        rows = torch.cat([self._slope, self._slope.new_zeros(beyond, self._slope.shape[1])]).unfold(0, 2 * length, length)
        return inverse(rows.mT)

    @cached_property
    def _all_moved(self) -> Tensor:
        return self._move(self._all)

    @cached_property
    def _all_strict(self) -> Tensor:
        return self._move(self._all.tril(-1))

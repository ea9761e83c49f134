# SPDX-License-Identifier: Apache-2.0
"""The collocation system: a fine chain whose network is evaluated at one node of every mesh interval.

Between its mesh points e[0] = 0 < e[1] < ... < e[M] = N the chain is eliminated by its own recurrence (interval.py). The
unknowns are M forcings u[k], each evaluated at one state y[k]. The forcings at fine nodes are interpolated from these, so that

    y[k] = f[k] x[0] + sum_j R[k,j] u[j] + n[k],      u[k] = u(y[k]),      x[N] = f[M] x[0] + sum_j R[M,j] u[j] + n[M]    (1)

with the influence matrix R and the exact contribution n of the chain's own noises. The system is implicit: where interpolation
reads later forcings, R has entries above its diagonal. Its solution is the sample of the fine chain up to the interpolation
error.

Two kinds of interpolation:

- order 0: the forcing of an interval is a constant, evaluated at the interval's averaged state (interval.py). On stochastic
  chains this is of strong order 1.5.
- order q >= 1: the nodes are the intervals' left mesh points. The forcing between them is the polynomial of degree q in
  log(alpha^2/sigma^2) through the q + 1 nodes nearest to the interval. For deterministic chains; on stochastic ones it is of
  strong order 1.

Near it: exponential collocation; Lagrange interpolation in Picard blocks (arXiv 2510.18242); collocation of low degree for
diffusion sampling (arXiv 2601.10708); Picard-Chebyshev and spectral deferred correction methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from paradiff.methods.collocation.interval import Interval, Recurrence


class CollocationSystem:
    """Equation (1) for one mesh.

    Args:
        recurrence: The fine chain's.
        points: `M+1` mesh points as fine nodes, 0 and N included.
        order: Degree of the interpolation.

    Attributes:
        points: As given.
        intervals: The M mesh intervals.
        averaged: Whether nodes are averaged states: order 0.
        nodes: `[M]` fine nodes at whose times the network is evaluated.
        initial: `[M+1]` f, the weights of x[0].
        influence: `[M+1, M]` R.
        noise_weights: `[M+1, M, P]` weights in (1) of what is added to the P states at each interval's right end, such as its
            noises.
        point_initial: `[M+1, P]` f of the states at the mesh points, and at the P - 1 fine nodes before each.
        point_influence: `[M+1, P, M]` R of these states.
        point_noise_weights: `[M+1, P, M, P]` noise weights of these states.
        interpolation: `[N, M]` weights of the forcings u[k] in the forcing at each fine node.

    Raises:
        ValueError: If the mesh has too few points for the order.
    """

    def __init__(self, recurrence: Recurrence, points: Sequence[int], order: int) -> None:
        steps = recurrence.table.steps
        self.recurrence, self.points, self.order = recurrence, list(points), order
        self.intervals: list[Interval] = [recurrence.interval(left, right) for left, right in pairwise(self.points)]
        count, band = len(self.intervals), recurrence.table.band
        if count < order + 1:
            raise ValueError(
                f"interpolation of order {order} was asked for on {count} nodes; it needs at least {order + 1}: give more "
                "nodes, or a lower order"
            )
        self.averaged = order == 0
        self.nodes = torch.tensor([g.node if self.averaged else g.left for g in self.intervals])
        self.interpolation = self._interpolation(steps)
        # Weights of x[0], of the forcings and of the noises in the states at the mesh points, side by side.
        ends = torch.zeros(count + 1, band, 1 + count + count * band, dtype=torch.float64)
        self._ends, of_forcings, of_noises = ends, slice(1, 1 + count), slice(1 + count, None)
        ends[0, 0, 0] = 1
        added = torch.zeros_like(ends[1:])
        for interval, own in zip(self.intervals, added.unbind(), strict=True):
            first = max(interval.left - band + 1, 0)
            forcings = self.interpolation[first : interval.right]
            torch.mm(interval.forcing[:, interval.forcing.shape[1] - len(forcings) :], forcings, out=own[:, of_forcings])
        added[:, :, of_noises].unflatten(2, (count, band)).diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).fill_(1)
        for interval, own, (before, after) in zip(self.intervals, added.unbind(), pairwise(ends.unbind()), strict=True):
            torch.addmm(own, interval.carry, before, out=after)
        self.point_initial, self.point_influence = ends[:, :, 0], ends[:, :, of_forcings]
        self.point_noise_weights = ends[:, :, of_noises].unflatten(2, (count, band))
        self.initial, self.influence, self.noise_weights = (
            v[:, 0].clone() for v in (self.point_initial, self.point_influence, self.point_noise_weights)
        )
        if self.averaged:
            found = self.carried(self.intervals, range(count))
            self.initial[:-1], self.influence[:-1], self.noise_weights[:-1] = found
            own_forcings = torch.tensor([interval.state_forcing for interval in self.intervals], dtype=torch.float64)
            self.influence[:-1].diagonal().add_(own_forcings)

    def carried(self, intervals: Sequence[Interval], points: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """f `[J]`, R `[J, M]` and noise weights `[J, M, P]` of the averaged states of J intervals that start at mesh points of
        the given numbers, without the weights of their own forcings."""
        count, band = len(self.intervals), self.recurrence.table.band
        nothing = torch.zeros(0, band, dtype=torch.float64)
        weights = torch.stack([interval.state_carry for interval in intervals]) if intervals else nothing
        found = (weights[:, None] @ self._ends[list(points)])[:, 0]
        return found[:, 0], found[:, 1 : 1 + count], found[:, 1 + count :].unflatten(1, (count, band))

    def _interpolation(self, steps: int) -> Tensor:
        """`[N, M]` Lagrange's polynomials of the nodes nearest to each interval, at the fine nodes in it."""
        count, order = len(self.intervals), self.order
        lengths = torch.tensor([interval.right - interval.left for interval in self.intervals])
        first = (torch.arange(count) - order // 2).clamp(0, count - order - 1)
        chosen = first[:, None] + torch.arange(order + 1)  # [M, q+1]
        place = self.recurrence.log_snr
        at = place[torch.tensor(self.points[:-1])[chosen]]
        apart = (at[:, :, None] - at[:, None]) + torch.eye(order + 1, dtype=torch.float64)  # [M, q+1, q+1]
        chosen, at, apart = (v.repeat_interleave(lengths, 0) for v in (chosen, at, apart))
        factors = (place[:, None, None] - at[:, None]) / apart
        factors.diagonal(dim1=1, dim2=2).fill_(1)
        return torch.zeros(steps, count, dtype=torch.float64).scatter_(1, chosen, factors.prod(2))


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """`[K, b, d]` weighted sums of values `[M, b, d]`, by weights `[K, M]`."""
    return (weights @ values.flatten(1)).view(-1, *values.shape[1:])


def noise_states(weights: Tensor, ends: Tensor) -> Tensor:
    """`[K, ...]` contribution of the noises of M intervals, `[M, P, ...]` in the states at their right ends, to K states, by
    weights `[K, M, P]` of the same dtype and device."""
    return (weights.flatten(1) @ ends.flatten(0, 1).flatten(1)).view(-1, *ends.shape[2:])

"""A sparse table: a fine chain, of which the network is evaluated at a few states only.

Between its edges e[0] = 0 < e[1] < ... < e[M] = N the chain is eliminated by its own recurrence (interval.py), so that all
there is left to know are M drives u[k], each asked for at one state y[k]. With the drives at fine nodes interpolated from
these,

    y[k] = f[k] x[0] + sum_j R[k,j] u[j] + n[k],      u[k] = u(y[k]),      x[N] = f[M] x[0] + sum_j R[M,j] u[j] + n[M]     (1)

where n is the exact share of the chain's own noises. (1) is implicit: R reaches to later nodes as well, where interpolation
does. Its solution is the sample of the fine chain, up to the interpolation error.

Two kinds of interpolation:

- order 0: the drive of a gap is a constant, asked for at the gap's averaged state (interval.py). For stochastic chains, where
it is
  of strong order 1.5.
- order q >= 1: nodes are the gaps' left edges, and the drive between them is the polynomial of degree q in log(alpha^2/sigma^2)
  through the q + 1 nodes nearest to the gap. For deterministic chains; on a stochastic one it is of strong order 1 only.

Near it: exponential collocation; Lagrange interpolation in Picard blocks (arXiv 2510.18242); collocation of low degree for
diffusion sampling (arXiv 2601.10708); Picard-Chebyshev and spectral deferred correction methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.methods.collocation.interval import Interval, Recurrence


class CollocationSystem:
    """Equation (1) for one choice of edges.

    Args:
        recurrence: The fine chain's.
        edges: `M+1` fine nodes, 0 and N included.
        order: Degree of the interpolation.

    Attributes:
        edges: As given.
        gaps: The M gaps.
        nodes: `[M]` fine nodes at whose times the network is asked.
        start: `[M+1]` f.
        reach: `[M+1, M]` R.
        spread: `[M+1, M, P]` weights in (1) of what is added to the states at each gap's end, such as its own noises.
        edge_start: `[M+1, P]` f of the states at the edges, and at the P - 1 fine nodes before each.
        edge_reach: `[M+1, P, M]` their R.
        edge_spread: `[M+1, P, M, P]` their weights of what is added at each gap's end.
        interpolation: `[N, M]` weights of the drives u[k] in the drive at each fine node.

    Raises:
        ValueError: If the edges are too few for the order.
    """

    def __init__(self, recurrence: Recurrence, edges: Sequence[int], order: int) -> None:
        steps = recurrence.table.steps
        self.recurrence, self.edges, self.order = recurrence, list(edges), order
        self.gaps: list[Interval] = [recurrence.gap(left, right) for left, right in pairwise(self.edges)]
        count, band = len(self.gaps), recurrence.table.band
        if count < order + 1:
            raise ValueError(
                f"interpolation of order {order} was asked for on {count} nodes; it needs at least {order + 1}: give more "
                "nodes, or a lower order"
            )
        self.averaged = order == 0
        self.nodes = torch.tensor([g.node if self.averaged else g.left for g in self.gaps])
        self.interpolation = self._interpolation(steps)
        self.edge_start = torch.zeros(count + 1, band, dtype=torch.float64)
        self.edge_reach = torch.zeros(count + 1, band, count, dtype=torch.float64)
        self.edge_spread = torch.zeros(count + 1, band, count, band, dtype=torch.float64)
        self.edge_start[0, 0] = 1
        for k, gap in enumerate(self.gaps):
            first = max(gap.left - band + 1, 0)
            drives = self.interpolation[first : gap.right]
            self.edge_start[k + 1] = gap.carry @ self.edge_start[k]
            self.edge_reach[k + 1] = gap.carry @ self.edge_reach[k] + gap.drive[:, gap.drive.shape[1] - len(drives) :] @ drives
            self.edge_spread[k + 1] = torch.einsum("pr,rkq->pkq", gap.carry, self.edge_spread[k])
            self.edge_spread[k + 1, range(band), k, range(band)] += 1
        self.start, self.reach, self.spread = (v[:, 0].clone() for v in (self.edge_start, self.edge_reach, self.edge_spread))
        if self.averaged:
            for k, gap in enumerate(self.gaps):
                self.start[k], self.reach[k], self.spread[k] = self.carried(gap, k)
                self.reach[k, k] += gap.state_drive

    def carried(self, gap: Interval, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """f, R `[M]` and spread `[M, P]` of the averaged state of a gap from edge k on, but for its own drive."""
        weights = gap.state_carry
        spread = torch.einsum("p,pkq->kq", weights, self.edge_spread[k])
        return weights @ self.edge_start[k], weights @ self.edge_reach[k], spread

    def _interpolation(self, steps: int) -> Tensor:
        count, order = len(self.gaps), self.order
        found = torch.zeros(steps, count, dtype=torch.float64)
        place = self.recurrence.log_snr
        for k, gap in enumerate(self.gaps):
            first = min(max(k - order // 2, 0), count - order - 1)
            chosen = list(range(first, first + order + 1))
            inside, at = place[gap.left : gap.right], place[[self.edges[c] for c in chosen]]
            for c, own in zip(chosen, at, strict=True):
                others = at[at != own]
                found[gap.left : gap.right, c] = ((inside[:, None] - others) / (own - others)).prod(1)
        return found

    def noises(self, drawn: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """`[M+1, ...]` n of equation (1), from those of the gaps (`draw`)."""
        found = spread(self.spread, drawn)
        if self.averaged:
            found[:-1] += torch.stack([own for _, own in drawn])
        return found


def spread(weights: Tensor, drawn: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`[K, ...]` what the noises of M gaps (`draw`) are in K states, by weights `[K, M, P]`."""
    aggregate = torch.stack([z for z, _ in drawn])  # [M, P, ...]
    weights = weights.to(device=aggregate.device, dtype=aggregate.dtype)
    return torch.einsum("mkp,kpd->md", weights, aggregate.flatten(2)).view(-1, *aggregate.shape[2:])


def draw(gap: Interval, noise: Noise, sample: int) -> tuple[Tensor, Tensor]:
    """The aggregates of a gap's noises: `[P, ...]` in its end states, and `[...]` in its averaged state."""
    z = noise.draw(sample, range(gap.left, gap.right))
    weights = torch.cat([gap.noise, gap.state_noise[None]]).to(z.device)
    found = (weights @ z.double().flatten(1)).view(-1, *z.shape[1:])
    return found[:-1], found[-1]

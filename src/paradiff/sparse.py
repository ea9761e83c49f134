"""A sparse table: a fine chain, of which the network is evaluated at a few states only.

Between its edges e[0] = 0 < e[1] < ... < e[M] = N the chain is eliminated by its own recurrence (gap.py), so that all there is
left to know are M drives u[k], each asked for at one state y[k]. With the drives at fine nodes interpolated from these,

    y[k] = f[k] x[0] + sum_j R[k,j] u[j] + n[k],      u[k] = u(y[k]),      x[N] = f[M] x[0] + sum_j R[M,j] u[j] + n[M]     (1)

where n is the exact share of the chain's own noises. (1) is implicit: R reaches to later nodes as well, where interpolation
does. Its solution is the sample of the fine chain, up to the interpolation error.

Two kinds of interpolation:

- order 0: the drive of a gap is a constant, asked for at the gap's averaged state (gap.py). For stochastic chains, where it is
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

from paradiff.gap import Gap, Recurrence
from paradiff.noise import Noise


class Sparse:
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
        spread: `[M+1, M, P]` weights of the noises that end in each gap's end states.
        interpolation: `[N, M]` weights of the drives u[k] in the drive at each fine node.

    Raises:
        ValueError: If the edges are too few for the order.
    """

    def __init__(self, recurrence: Recurrence, edges: Sequence[int], order: int) -> None:
        steps = recurrence.table.steps
        self.recurrence, self.edges, self.order = recurrence, list(edges), order
        self.gaps: list[Gap] = [recurrence.gap(left, right) for left, right in pairwise(self.edges)]
        count, band = len(self.gaps), recurrence.table.band
        if count < order + 1:
            raise ValueError(
                f"interpolation of order {order} was asked for on {count} nodes; it needs at least {order + 1}: give more "
                "nodes, or a lower order"
            )
        self.averaged = order == 0
        self.nodes = torch.tensor([g.node if self.averaged else g.left for g in self.gaps])
        self.interpolation = self._interpolation(steps)
        self.start = torch.zeros(count + 1, dtype=torch.float64)
        self.reach = torch.zeros(count + 1, count, dtype=torch.float64)
        self.spread = torch.zeros(count + 1, count, band, dtype=torch.float64)  # of the gaps' noises
        of_start = torch.zeros(band, dtype=torch.float64)
        of_start[0] = 1
        of_drives = torch.zeros(band, count, dtype=torch.float64)
        of_noises = torch.zeros(band, count, band, dtype=torch.float64)
        for k, gap in enumerate(self.gaps):
            if self.averaged:
                self.start[k] = gap.state_carry @ of_start
                self.reach[k] = gap.state_carry @ of_drives
                self.reach[k, k] += gap.state_drive
                self.spread[k] = torch.einsum("p,pkq->kq", gap.state_carry, of_noises)
            else:
                self.start[k], self.reach[k], self.spread[k] = of_start[0], of_drives[0], of_noises[0]
            first = max(gap.left - band + 1, 0)
            drives = self.interpolation[first : gap.right]
            of_start = gap.carry @ of_start
            of_drives = gap.carry @ of_drives + gap.drive[:, gap.drive.shape[1] - len(drives) :] @ drives
            of_noises = torch.einsum("pr,rkq->pkq", gap.carry, of_noises)
            of_noises[torch.arange(band), k, torch.arange(band)] += 1
        self.start[count], self.reach[count], self.spread[count] = of_start[0], of_drives[0], of_noises[0]

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
        aggregate = torch.stack([z for z, _ in drawn])  # [M, P, ...]
        spread = self.spread.to(device=aggregate.device, dtype=aggregate.dtype)
        found = torch.einsum("mkp,kpd->md", spread, aggregate.flatten(2)).view(-1, *aggregate.shape[2:])
        if self.averaged:
            found[:-1] += torch.stack([own for _, own in drawn])
        return found


def draw(gap: Gap, noise: Noise, sample: int) -> tuple[Tensor, Tensor]:
    """The aggregates of a gap's noises: `[P, ...]` in its end states, and `[...]` in its averaged state."""
    z = noise.draw(sample, range(gap.left, gap.right))
    weights = torch.cat([gap.noise, gap.state_noise[None]]).to(z)
    found = (weights @ z.flatten(1)).view(-1, *z.shape[1:])
    return found[:-1], found[-1]

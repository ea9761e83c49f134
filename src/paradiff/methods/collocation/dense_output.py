"""The fine states that the drives of a sparse table imply: the chain's own recurrence, walked with interpolated drives."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.methods.collocation.system import CollocationSystem


class DenseOutput:
    """Equation (2) of interval.py for one sample, from any edge on.

    Args:
        sparse: The sparse table.
        drives: `[M, ...]` the drives found.
        edges: `[M, P, ...]` states at every edge and at the nodes before it that the chain reads.
        noise: The noises.
        sample: Which sample.
        move: Moves values to the states' device and dtype.
    """

    def __init__(
        self,
        sparse: CollocationSystem,
        drives: Tensor,
        edges: Tensor,
        noise: Noise,
        sample: int,
        move: Callable[[Tensor], Tensor],
    ) -> None:
        self._sparse, self._drives, self._edges = sparse, drives, edges
        self._noise, self._sample, self._move = noise, sample, move

    def __call__(self, steps: slice) -> tuple[Tensor, Tensor]:
        """`[n, ...]` states after n steps, and the network's outputs where these begin."""
        sparse, rec, table = self._sparse, self._sparse.recurrence, self._sparse.recurrence.table
        gap = bisect_right(sparse.edges, steps.start) - 1
        first = sparse.edges[gap]
        earliest = max(first - table.band + 1, 0)
        drives = self._times(self._move(sparse.interpolation[earliest : steps.stop]), self._drives)
        shifted, driven = (self._move(torch.tensor(v[first : steps.stop])) for v in (rec.shifted, rec.driven))
        z = None
        if table.stochastic:
            drawn = self._move(self._noise.draw(self._sample, range(first, steps.stop)))
            z = drawn * self._move(table.c[first : steps.stop]).view(-1, *[1] * (drawn.ndim - 1))
        states = [*self._edges[gap].flip(0)]  # the newest last
        for i in range(first, steps.stop):
            new = torch.zeros_like(states[-1])
            for j in range(min(table.band, i + 1)):
                new = new + shifted[i - first, j] * states[-1 - j] + driven[i - first, j] * drives[i - j - earliest]
            states.append(new if z is None else new + z[i - first])
        after = torch.stack(states[table.band :])[steps.start - first :]
        before = torch.stack(states[table.band - 1 : -1])[steps.start - first :]
        nu, g, p, q = (self._move(v[steps]).view(-1, *[1] * (before.ndim - 1)) for v in (rec.nu, rec.g, table.p, table.q))
        clean = drives[steps.start - earliest :] / nu + g * before
        return after, (clean - p * before) / q

    @staticmethod
    def _times(matrix: Tensor, values: Tensor) -> Tensor:
        return (matrix @ values.flatten(1)).view(-1, *values.shape[1:])

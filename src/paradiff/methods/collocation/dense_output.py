# SPDX-License-Identifier: Apache-2.0
"""Dense output: the states at all fine nodes, by the chain's own recurrence with interpolated forcings."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.methods.collocation.system import CollocationSystem


class DenseOutput:
    """Equation (2) of interval.py for one sample, from any mesh point on.

    Args:
        system: The collocation system.
        forcings: `[M, ...]` the forcings found.
        points: `[M, P, ...]` states at every mesh point and at the nodes before it that the chain reads.
        noise: The noises.
        sample: The sample.
        move: Moves values to the states' device and dtype.
        beside: `[N, ...]` the forcings at all nodes that those given are differences to; None for none.
    """

    def __init__(
        self,
        system: CollocationSystem,
        forcings: Tensor,
        points: Tensor,
        *,
        noise: Noise,
        sample: int,
        move: Callable[[Tensor], Tensor],
        beside: Tensor | None = None,
    ) -> None:
        self._system, self._forcings, self._points = system, forcings, points
        self._noise, self._sample, self._move, self._beside = noise, sample, move, beside

    def __call__(self, steps: slice) -> tuple[Tensor, Tensor]:
        """`[n, ...]` the states after n steps, and the network's outputs at the nodes where these steps begin."""
        system, rec, table = self._system, self._system.recurrence, self._system.recurrence.table
        interval = bisect_right(system.points, steps.start) - 1
        first = system.points[interval]
        earliest = max(first - table.band + 1, 0)
        forcings = self._times(self._move(system.interpolation[earliest : steps.stop]), self._forcings)
        if self._beside is not None:
            forcings = forcings + self._beside[earliest : steps.stop]
        shifted, forced = (self._move(torch.tensor(v[first : steps.stop])) for v in (rec.shifted, rec.forced))
        z = None
        if table.stochastic:
            drawn = self._move(self._noise.draw(self._sample, range(first, steps.stop)))
            z = drawn * self._move(table.c[first : steps.stop]).view(-1, *[1] * (drawn.ndim - 1))
        states = [*self._points[interval].flip(0)]  # the newest last
        for i in range(first, steps.stop):
            new = torch.zeros_like(states[-1])
            for j in range(min(table.band, i + 1)):
                new = new + shifted[i - first, j] * states[-1 - j] + forced[i - first, j] * forcings[i - j - earliest]
            states.append(new if z is None else new + z[i - first])
        after = torch.stack(states[table.band :])[steps.start - first :]
        before = torch.stack(states[table.band - 1 : -1])[steps.start - first :]
        nu, g, p, q = (self._move(v[steps]).view(-1, *[1] * (before.ndim - 1)) for v in (rec.nu, rec.g, table.p, table.q))
        clean = forcings[steps.start - earliest :] / nu + g * before
        return after, (clean - p * before) / q

    @staticmethod
    def _times(matrix: Tensor, values: Tensor) -> Tensor:
        return (matrix @ values.flatten(1)).view(-1, *values.shape[1:])

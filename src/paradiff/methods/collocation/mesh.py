# SPDX-License-Identifier: Apache-2.0
"""Mesh points: where they go before anything is known of the sample, and how a mesh is refined.

The first mesh equidistributes a monitor function of log(alpha^2/sigma^2) (de Boor): every interval contains an equal share of
its integral. On a deterministic chain single steps, which are taken as the chain takes them, may hold more: near the data they
are long, and would use up the shares of several intervals. The digits network, DDIM 50, window 4, 12 seeds: 24 equal shares are
21 intervals, for some begin at one node, and err by 1.2e-3 in the median; 21 intervals with single steps left out err by
0.9e-3.

The monitor is constant but for a peak of three times the height where the sample decides what it will be, or a little before:
chain/sensitivity.py's decision. There the clean-data estimates of trained networks bend most. On a stochastic chain the error
of an interval grows with the square of its length in log(alpha^2/sigma^2); the monitor decays quickly towards pure noise, and
stays high until the noise is invisible. The shape was measured on the bundled digits network.

Once the errors of the intervals are estimated, those that matter are subdivided. A part of one of n has 1/n^2 of the interval's
error, so that n is in proportion to the root of that error.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from paradiff.chain.sensitivity import decision
from paradiff.chain.table import Table
from paradiff.methods.collocation.control import MeshControl
from paradiff.methods.collocation.interval import finite_log_snr


class Mesh:
    """The mesh points of one chain.

    Args:
        table: The sampler.
        control: The monitor function's numbers.
        nodes: `[bins]` node counts of equal parts of the range of log(alpha^2/sigma^2) (mesh_store.py), in any unit, in place
            of the monitor function.

    Attributes:
        candidates: Fine nodes at which an interval may begin: those at which the chain starts afresh, or all where it does so
            at fewer than a quarter; of several at one level the last.
    """

    def __init__(self, table: Table, control: MeshControl, nodes: Sequence[float] | None = None) -> None:
        self._control = control
        place = finite_log_snr(table)
        afresh = table.restarts[:-1]
        begins = afresh if 4 * len(afresh) >= table.steps else list(range(table.steps))
        self.candidates: list[int] = []
        highest = -float("inf")
        for i, node in enumerate(begins):
            after = float(place[begins[i + 1]]) if i + 1 < len(begins) else float("inf")
            if float(place[node]) > highest and after > float(place[node]) + 1e-6:
                self.candidates.append(node)
                highest = float(place[node])
        if self.candidates[0] != 0:
            self.candidates = [0, *self.candidates]
        self._steps, self._stochastic = table.steps, table.stochastic
        length = (place[1:] - place[:-1]).clamp(min=0)
        middle = (place[1:] + place[:-1]) / 2
        self._bin = bins(middle, place, control.bins)
        if nodes is None:
            weight = monitor(middle, table.stochastic, control)
        else:
            weight = torch.tensor(nodes, dtype=torch.float64)[self._bin]
        self._integral = torch.cat([torch.zeros(1, dtype=torch.float64), (weight * length).cumsum(0)])
        self._integrals: list[float] = self._integral.tolist()

    def in_bins(self, left: int = 0, right: int | None = None) -> Tensor:
        """`[bins]` share of an interval, or of the whole chain, that lies in each of the equal parts of the range."""
        inside = slice(left, right)
        integral = self._integral.diff()[inside]
        found = torch.zeros(self._control.bins, dtype=torch.float64).index_add(0, self._bin[inside], integral)
        return found / found.sum() if found.sum() > 0 else found

    def points(self, count: int) -> list[int]:
        """The mesh points of at most `count` intervals from node 0 to the end. The last interval begins at the last candidate,
        so that the step that lands on the sample stands alone."""
        first = self._shared(count) if self._stochastic or count == 1 else self._least(count)
        return [*first, self._steps]

    def _shared(self, count: int) -> list[int]:
        """Where intervals begin that hold about equal shares of the integral; fewer where several would begin at one node."""
        candidates = torch.tensor(self.candidates)
        integral = self._integral[candidates]
        wanted = integral[-1] * torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
        after = torch.searchsorted(integral, wanted).clamp(1, max(len(integral) - 1, 1))
        before, after = integral[after - 1], integral[after.clamp(max=len(integral) - 1)]
        nearest = torch.where((before - wanted).abs() <= (after - wanted).abs(), before, after)
        return sorted({0, *candidates[torch.searchsorted(integral, nearest)].tolist()[1:]})

    def _least(self, count: int) -> list[int]:
        """Where intervals begin: those of several steps hold as little of the integral as can be, single steps any."""
        low, high = 0.0, self._integrals[self.candidates[-1]]
        for _ in range(40):
            level = (low + high) / 2
            low, high = (low, level) if len(self._filled(level)) <= count else (level, high)
        return self._filled(high)

    def _filled(self, most: float) -> list[int]:
        """Where intervals begin that hold at most so much of the integral, or a single step."""
        integrals = [self._integrals[node] for node in self.candidates]
        found = [0]
        while found[-1] < len(integrals) - 1:
            after = found[-1] + 1
            found.append(max(after, bisect_right(integrals, integrals[found[-1]] + most, after) - 1))
        return [self.candidates[n] for n in found]

    def _between(self, left: int, right: int) -> list[int]:
        """The candidates between two fine nodes."""
        return self.candidates[bisect_right(self.candidates, left) : bisect_left(self.candidates, right)]

    def subdivide(self, left: int, right: int, parts: int) -> list[int]:
        """The mesh points, `right` left out, of an interval subdivided into at most `parts` of about equal integral."""
        inside, integral = self._between(left, right), self._integrals
        found = [left]
        if inside:
            first, last = integral[left], integral[min(right, self._steps - 1)]
            for k in range(1, parts):
                node = min(inside, key=lambda n: abs(integral[n] - first - (last - first) * k / parts))
                if node > found[-1]:
                    found.append(node)
        return found

    def refine(
        self,
        points: Sequence[int],
        *,
        shares: Sequence[float],
        groups: Sequence[Sequence[int]],
        wanted: float,
        most: int,
        most_parts: int,
    ) -> list[int]:
        """The mesh points with intervals subdivided until their errors suffice.

        Args:
            points: The mesh points.
            shares: Error of each group of intervals, root mean square at the sample; infinite where it is not known.
            groups: The numbers of the intervals of each group.
            wanted: Root of the sum of squares that the errors shall have.
            most: Most intervals; where they do not suffice, all parts are longer.
            most_parts: Most parts of one interval.
        """
        room = [min(1 + len(self._between(left, right)), most_parts) for left, right in pairwise(points)]
        if max(shares) == 0:
            return list(points)
        if math.inf in shares:
            shares, level = [float(math.isinf(e)) for e in shares], self._control.unknown_parts**-2
        else:
            level = self._level(shares, [max(room[n] for n in group) for group in groups], wanted)
        while level <= max(shares) * self._control.level_margin:
            parts_of = [1] * len(room)
            for share, group in zip(shares, groups, strict=True):
                for n in group:
                    parts_of[n] = max(parts_of[n], min(_parts(share, level), room[n]))
            found = [
                point
                for (left, right), parts in zip(pairwise(points), parts_of, strict=True)
                for point in self.subdivide(left, right, parts)
            ]
            if len(found) <= most:
                return [*found, self._steps]
            level *= self._control.level_growth
        return list(points)

    def _level(self, shares: Sequence[float], room: Sequence[int], wanted: float) -> float:
        """The highest level of error to which all shares may be brought so that together they leave at most `wanted`."""
        low, high = 1e-6 * max(shares), max(shares)
        for _ in range(40):
            level = (low + high) / 2
            parts = [_parts(e, level) for e in shares]
            left = sum(
                (e / n**self._control.subdivision_exponent) ** 2
                for e, n, most in zip(shares, parts, room, strict=True)
                if n < most
            )
            low, high = (level, high) if left <= wanted**2 else (low, level)
        return low


def bins(values: Tensor, place: Tensor, count: int) -> Tensor:
    """Number of the part in which values lie, of `count` equal parts of the range of `place`."""
    return ((values - place[0]) / (place[-1] - place[0]).clamp(min=1e-300) * count).long().clamp(0, count - 1)


def _parts(share: float, level: float) -> int:
    """Parts of an interval of which each has at most the error `level`."""
    return max(1, math.ceil(math.sqrt(share / level) - 1e-9))


def monitor(log_snr: Tensor, stochastic: bool, control: MeshControl) -> Tensor:
    """The monitor function, in any unit, at values of log(alpha^2/sigma^2)."""
    lead = control.stochastic_lead if stochastic else control.deterministic_lead
    peak = control.peak * decision(log_snr + lead)
    if not stochastic:
        return control.plateau + peak
    fall = 1.0
    for side, sign in ((control.noise_side, -1), (control.data_side, 1)):
        fall = fall + ((sign * (log_snr - side.begin)).clamp(min=0) / side.width) ** side.power
    return (control.plateau + peak) / fall

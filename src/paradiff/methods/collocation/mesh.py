"""Where nodes go: the edges of a sparse table, before anything is known of the sample, and after.

On a stochastic chain what a gap leaves out grows with the square of its length in log(alpha^2/sigma^2), and matters most
where the sample decides what it will be. Edges are placed so that the gaps of an ordinary sample contribute about equally:
with a density that is highest about the level at which the data's standard deviation, 1/2 or so, is the noise's, falls off
quickly towards pure noise, and stays until the noise is invisible. The shape was measured on the bundled digits network.

On a deterministic chain edges are even in log(alpha^2/sigma^2), but for three times as many about signal-to-noise ratio 1,
where trained networks' clean-data estimates bend most.

Once it is known what the gaps of a sample leave out, those that matter are cut: into n parts of which each leaves out 1/n^2 as
much, so that n goes as the root of a gap's share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from paradiff.chain.table import Table
from paradiff.methods.collocation.control import MeshControl
from paradiff.methods.collocation.interval import finite_log_snr


class Mesh:
    """Edges for one chain.

    Args:
        table: The sampler.
        control: The monitor function's numbers.
        nodes: How many gaps each of `control.bins` equal parts of the range of log(alpha^2/sigma^2) needs (mesh_store.py), in
            any unit, in place of `density`.

    Attributes:
        candidates: Fine nodes at which a gap may begin: those at which the chain starts afresh, or all where there are hardly
            any such, and of several at one level the last.
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
        self._steps = table.steps
        length = (place[1:] - place[:-1]).clamp(min=0)
        middle = (place[1:] + place[:-1]) / 2
        self._bin = bins(middle, place, control.bins)
        if nodes is None:
            weight = density(middle, table.stochastic, control)
        else:
            weight = torch.tensor(nodes, dtype=torch.float64)[self._bin]
        self._amount = torch.cat([torch.zeros(1, dtype=torch.float64), (weight * length).cumsum(0)])

    def in_bins(self, left: int = 0, right: int | None = None) -> Tensor:
        """`[bins]` the share of a gap, or of the whole chain, that lies in each of the equal parts of the range."""
        inside = slice(left, right)
        amount = self._amount.diff()[inside]
        found = torch.zeros(self._control.bins, dtype=torch.float64).index_add(0, self._bin[inside], amount)
        return found / found.sum() if found.sum() > 0 else found

    def edges(self, count: int) -> list[int]:
        """At most `count` gaps from node 0 to the end; the last begins at the last candidate, so that the step that lands on
        the sample stands alone."""
        candidates = torch.tensor(self.candidates)
        amount = self._amount[candidates]
        found = [0]
        for k in range(1, count):
            node = int(candidates[(amount - amount[-1] * k / max(count - 1, 1)).abs().argmin()])
            if node > found[-1]:
                found.append(node)
        return [*found, self._steps]

    def split(self, left: int, right: int, parts: int) -> list[int]:
        """The edges, `right` left out, of a gap cut into at most `parts` of about equal amount."""
        inside = [n for n in self.candidates if left < n < right]
        found = [left]
        if inside:
            first, last = float(self._amount[left]), float(self._amount[min(right, self._steps - 1)])
            for k in range(1, parts):
                node = min(inside, key=lambda n: abs(float(self._amount[n]) - first - (last - first) * k / parts))
                if node > found[-1]:
                    found.append(node)
        return found

    def cut(
        self,
        edges: Sequence[int],
        shares: Sequence[float],
        groups: Sequence[Sequence[int]],
        wanted: float,
        most: int,
        most_parts: int,
    ) -> list[int]:
        """The edges with the gaps cut as they need it.

        Args:
            edges: As they are.
            shares: What each group of gaps leaves out of the sample; infinite where that is not known.
            groups: The numbers of the gaps of each group.
            wanted: What all of them, in squares, may leave out.
            most: Most gaps; where they do not suffice, all parts are longer.
            most_parts: Most parts that a gap is cut into.
        """
        room = [min(1 + sum(left < n < right for n in self.candidates), most_parts) for left, right in pairwise(edges)]
        if math.inf in shares:
            shares, level = [float(math.isinf(e)) for e in shares], self._control.unknown_parts**-2
        else:
            level = self._level(shares, [max(room[n] for n in group) for group in groups], wanted)
        while level <= max(shares) * self._control.level_margin:
            cuts = [1] * len(room)
            for share, group in zip(shares, groups, strict=True):
                for n in group:
                    cuts[n] = max(cuts[n], min(_parts(share, level), room[n]))
            found = [
                edge
                for (left, right), parts in zip(pairwise(edges), cuts, strict=True)
                for edge in self.split(left, right, parts)
            ]
            if len(found) <= most:
                return [*found, self._steps]
            level *= self._control.level_growth
        return list(edges)

    def _level(self, shares: Sequence[float], room: Sequence[int], wanted: float) -> float:
        """To which all shares are brought: the highest that suffices."""
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
    """In which of `count` equal parts of the range of `place` values lie."""
    return ((values - place[0]) / (place[-1] - place[0]).clamp(min=1e-300) * count).long().clamp(0, count - 1)


def _parts(share: float, level: float) -> int:
    return max(1, math.ceil(math.sqrt(share / level) - 1e-9))


def density(log_snr: Tensor, stochastic: bool, control: MeshControl) -> Tensor:
    """Density of gaps, in any unit, at values of log(alpha^2/sigma^2)."""
    at = control.stochastic_peak if stochastic else control.deterministic_peak
    peak = control.peak * torch.exp(-(((log_snr - at) / control.peak_width) ** 2) / 2)
    if not stochastic:
        return control.plateau + peak
    fall = 1.0
    for side, sign in ((control.noise_side, -1), (control.data_side, 1)):
        fall = fall + ((sign * (log_snr - side.begin)).clamp(min=0) / side.width) ** side.power
    return (control.plateau + peak) / fall

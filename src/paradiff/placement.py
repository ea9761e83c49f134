"""Where nodes go: the edges of a sparse table, before anything is known of the sample.

On a stochastic chain what a gap leaves out grows with the square of its length in log(alpha^2/sigma^2), and matters most
where the sample decides what it will be. Edges are placed so that the gaps of an ordinary sample contribute about equally:
with a density that is highest about the level at which the data's standard deviation, 1/2 or so, is the noise's, falls off
quickly towards pure noise, and stays until the noise is invisible. The shape was measured on the bundled digits network.

On a deterministic chain edges are even in log(alpha^2/sigma^2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.gap import finite_log_snr
from paradiff.table import Table

PLATEAU, DECISION = 1.0, 2.0  # heights of the density's two parts
DECISION_AT, DECISION_WIDTH = -1.2, 1.5
NOISE_SIDE, DATA_SIDE = (-0.6, 1.3, 1.8), (5.0, 2.5, 2.0)  # where the density begins to fall off, how far, which power


class Placement:
    """Edges for one chain.

    Args:
        table: The sampler.

    Attributes:
        candidates: Fine nodes at which a gap may begin: those at which the chain starts afresh, or all where there are hardly
            any such, and of several at one level the last.
    """

    def __init__(self, table: Table) -> None:
        place = finite_log_snr(table)
        afresh = table.restarts[:-1]
        nodes = afresh if 4 * len(afresh) >= table.steps else list(range(table.steps))
        self.candidates: list[int] = []
        highest = -float("inf")
        for i, node in enumerate(nodes):
            after = float(place[nodes[i + 1]]) if i + 1 < len(nodes) else float("inf")
            if float(place[node]) > highest and after > float(place[node]) + 1e-6:
                self.candidates.append(node)
                highest = float(place[node])
        if self.candidates[0] != 0:
            self.candidates = [0, *self.candidates]
        self._steps = table.steps
        length = (place[1:] - place[:-1]).clamp(min=0)
        weight = density((place[1:] + place[:-1]) / 2) if table.stochastic else torch.ones_like(length)
        self._amount = torch.cat([torch.zeros(1, dtype=torch.float64), (weight * length).cumsum(0)])

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


def density(log_snr: Tensor) -> Tensor:
    """Density of gaps on a stochastic chain, in any unit, at values of log(alpha^2/sigma^2)."""
    decision = DECISION * torch.exp(-(((log_snr - DECISION_AT) / DECISION_WIDTH) ** 2) / 2)
    fall = 1.0
    for (begin, width, power), sign in ((NOISE_SIDE, -1), (DATA_SIDE, 1)):
        fall = fall + ((sign * (log_snr - begin)).clamp(min=0) / width) ** power
    return (PLATEAU + decision) / fall

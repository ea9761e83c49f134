"""What interpolation leaves out of a sparse table, estimated gap by gap.

The drives found are compared with those of a coarser interpolation, made of the same nodes:

- order 0: two neighbouring gaps make one gap of twice the length, with an averaged state of its own. The network is asked
  there: half as many rows as there are gaps. What the one gap makes of its drive is compared with what the two make of theirs.
- order q >= 1: every second node is left out, and its drive is compared with what the others interpolate there. No further
  evaluation.

Each comparison is the defect of a gap of twice the length. It is carried to the sample as the chain would carry it, by the
sparse table and by what the pairs know of the network's derivative (methods/secant.py), which is how a sample about to decide
what it will be shows that it is: there, early defects grow. Defects are independent, so their squares add up; and a gap of half
the length leaves out less by

    2.2 for order 0;      r for orders from 1.                                                                      (1)

At order 0 a gap's own defect is of second order in its noise, which would allow 2 sqrt(2); that of trained networks falls a
little more slowly (1.2 ... 1.6 towards pure noise, 1.6 ... 2.8 elsewhere, measured on the digits network against its own
sequential states). At higher orders a smooth drive would allow r = 2^(q+1), but trained networks are not smooth in time at the
scale of 20 nodes. So r is observed: three nodes of four are left out too, and r is how much more that does, divided by 1.5 and
between 1.2 and 3.

The sparse table answers to a defect as Gaussian data would, and the pairs know the few directions only in which the sweeps have
moved a state. A defect of order 0 lies along what the data vary in, and there a sample answers otherwise: more strongly
while the noise hides it, since the data vary more in such directions than on average, and less in the end, when it is decided.
With l = log(alpha^2/sigma^2), three samples of the digits network, restarted from states that their own defects had changed:
1.3 to 5 times as strongly at l = -2 (one that was about to decide, 1.5 to 26 times below 0), about twice at 0, and 0.2 to 0.8
times from 3 on. Taking 0.4 in the end left errors of four times the estimate on a mixture in the plane. So

    0.7 + 2.7/(1 + exp(l/0.8))                                                                                      (2)

times as strongly is taken for granted.

A defect of order 0 is random, and what grows of it is its part along one or two directions: a single number, which is small
by chance as often as not. So each is carried in the directions of its neighbours' defects too, and the mean square is taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.methods.collocation.control import DefectControl
from paradiff.methods.collocation.interval import Interval
from paradiff.methods.collocation.system import CollocationSystem, draw


class DoubledIntervals:
    """Neighbouring gaps of a sparse table of order 0 two by two, as J gaps of twice the length: from the first on, and without
    those of single steps, which leave nothing out.

    Args:
        sparse: The sparse table, with M gaps.
        control: The numbers of equation (2).

    Attributes:
        first: Number of the first of each two gaps.
        gaps: The gaps of twice the length.
        nodes: `[J]` fine nodes at whose times the network is asked.
        start: `[J]` f of equation (1) of system.py for their averaged states.
        reach: `[J, M]` their R.
        spread: `[J, M, P]` their weights of what is added at each gap's end.
        weight: `[J]` of a gap's own drive in the state at its end.
        weights: `[J, M]` of the drives of the two.
        effect: `[M+1, J]` weights of the defects in the states.
        answer: `[J]` equation (2).
    """

    def __init__(self, sparse: CollocationSystem, control: DefectControl) -> None:
        self._sparse, self.first, n = sparse, list[int](), 0
        while n + 1 < len(sparse.gaps):
            single = sparse.gaps[n + 1].right - sparse.gaps[n].left == 2
            if not single:
                self.first.append(n)
            n += 1 if single else 2
        pairs = [(n, sparse.gaps[n], sparse.gaps[n + 1]) for n in self.first]
        self.gaps: list[Interval] = [sparse.recurrence.gap(left.left, right.right) for _, left, right in pairs]
        self.nodes = torch.tensor([gap.node for gap in self.gaps], dtype=torch.int64)
        count, band = len(sparse.gaps), sparse.recurrence.table.band
        self.start = torch.zeros(len(pairs), dtype=torch.float64)
        self.reach, self.weights = (torch.zeros(len(pairs), count, dtype=torch.float64) for _ in range(2))
        self.spread = torch.zeros(len(pairs), count, band, dtype=torch.float64)
        self.weight = torch.tensor([float(gap.drive[0].sum()) for gap in self.gaps], dtype=torch.float64)
        for j, ((n, left, right), gap) in enumerate(zip(pairs, self.gaps, strict=True)):
            self.weights[j, n] = (right.carry[0] * left.drive.sum(1)).sum()
            self.weights[j, n + 1] = right.drive[0].sum()
            self.start[j], self.reach[j], self.spread[j] = sparse.carried(gap, n)
            self.reach[j] += gap.state_drive * self.weights[j] / self.weights[j].sum()
        self.effect = sparse.spread[:, [n + 1 for n in self.first], 0]
        self.answer = answer(sparse.recurrence.log_snr[[right.left for _, _, right in pairs]], control)

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """The edges of the two gaps of each."""
        lefts = [self._sparse.gaps[n] for n in self.first]
        return [(left.left, left.right, gap.right) for left, gap in zip(lefts, self.gaps, strict=True)]

    def own(self, noise: Noise, sample: int) -> Tensor:
        """`[J, ...]` a sample's own noises in the averaged states."""
        return torch.stack([draw(gap, noise, sample)[1] for gap in self.gaps])


def answer(log_snr: Tensor, control: DefectControl) -> Tensor:
    """How many times as strongly as with Gaussian data a sample answers to a defect at such levels: equation (2)."""
    return control.late_sensitivity + control.early_sensitivity * torch.sigmoid(-log_snr / control.sensitivity_width)


def left_out(sparse: CollocationSystem, every: int = 2) -> tuple[list[int], Tensor]:
    """The nodes but for every second or so, and the weights `[J, M]` of all drives in their defects: minus what the others
    interpolate there. Without those between single steps, which leave nothing out; none where too few are left for the
    order."""
    count = len(sparse.gaps)
    kept = [n for n in range(count) if n % every == 0 or n == count - 1]
    gone = [n for n in range(count) if n not in kept and sparse.edges[n + 1] - sparse.edges[n - 1] > 2]
    if len(kept) < sparse.order + 1:
        return [], torch.zeros(0, count, dtype=torch.float64)
    coarse = CollocationSystem(sparse.recurrence, [*(sparse.edges[n] for n in kept), sparse.edges[-1]], sparse.order)
    weights = torch.zeros(len(gone), count, dtype=torch.float64)
    weights[:, kept] = -coarse.interpolation[sparse.nodes[gone]]
    weights[torch.arange(len(gone)), gone] = 1
    return gone, weights


def reduction(second: float, fourth: float | None, control: DefectControl) -> float:
    """r of equation (1).

    Args:
        second: What the sample makes of every second node left out.
        fourth: What it makes of three of four left out; None where too few nodes are left.
        control: Bounds of r.
    """
    rate = 0.0 if fourth is None else fourth / max(second, 1e-300)
    return min(max(rate / control.ratio_safety, control.least_ratio), control.most_ratio)


def directions(defects: Tensor, neighbours: int) -> list[Tensor]:
    """Defects `[J, b, d]`, and as many others of the same size in the directions of their `neighbours` on either side."""
    count, size = len(defects), defects.square().sum(2, keepdim=True).sqrt()
    found = []
    for step in range(-neighbours, neighbours + 1):
        at = (torch.arange(count, device=defects.device) + step).clamp(0, count - 1)
        found.append(defects[at] * torch.where(size[at] > 0, size / size[at].clamp(min=1e-300), 0.0))
    return found

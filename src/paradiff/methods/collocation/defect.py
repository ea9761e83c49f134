# SPDX-License-Identifier: Apache-2.0
"""Interpolation defects: how far the forcings found are from a coarser interpolation of the same mesh.

- order 0: two neighbouring intervals are taken as one of twice the length (step doubling), with an averaged state of its own.
  The network is evaluated there, at half as many rows as there are intervals. The defect is the difference that the forcing of
  the one interval and those of the two make to the state at the right end.
- order q >= 1: every second node is left out. The defect is the difference of its forcing to the interpolation of the others.
  No further evaluation.

A defect is propagated to the sample by the linearized system (linearization.py), secant pairs included: for a sample about to
decide what it will be, they show that early defects grow. Defects are independent, so their squares add up. The error of a mesh
is smaller than the effect of its defects, which belong to intervals of twice the length, by the convergence ratio

    2.2 at order 0;      r from order 1.                                                                            (1)

At order 0 an interval's defect is of second order in its noise, for which smooth statistics give 2 sqrt(2). Defects of trained
networks fall a little more slowly: by 1.2 ... 1.6 towards pure noise and 1.6 ... 2.8 elsewhere, measured on the digits network
against its own sequential states. From order 1 a smooth forcing gives r = 2^(q+1), but trained networks are not smooth in time
at the scale of 20 nodes. So r is observed (Richardson): three nodes of four are left out too, and r is the ratio of the two
effects, divided by 1.5 and bounded to 1.2 ... 3.

The collocation system responds to a defect as Gaussian data would, and secant pairs cover only the few directions in which
sweeps moved a state. A defect of order 0 lies in directions in which the data vary. There a sample responds more strongly while
the noise hides it, since the data vary more in such directions than on average, and less once it is decided. With l =
log(alpha^2/sigma^2), three samples of the digits network were restarted from states changed by their own defects. They
responded 1.3 to 5 times as strongly at l = -2 (one that was about to decide, 1.5 to 26 times below 0), about twice at 0, and
0.2 to 0.8 times from 3 on. A factor of 0.4 at the end left errors of four times the estimate on a mixture in the plane. The
factor

    0.7 + 2.7 u,      u = 1/(1 + exp(l))                                                                            (2)

is taken, u being what is undecided (chain/sensitivity.py), beside what the secant pairs have observed.

A defect of order 0 is random, and only its part along one or two directions grows. That part is a single number and small by
chance as often as not. So each defect is propagated in the directions of its neighbours' defects too, and the mean square is
taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paradiff.chain.data_scale import unusual
from paradiff.chain.sensitivity import undecided
from paradiff.methods.collocation.control import DefectControl
from paradiff.methods.collocation.interval import Interval
from paradiff.methods.collocation.system import CollocationSystem


class DoubledIntervals:
    """Step doubling at order 0: neighbouring intervals in J pairs from the first on, each taken as one interval of twice the
    length. Two single steps make no pair, since they have no interpolation error.

    Args:
        system: The collocation system, with M intervals.
        control: The numbers of equation (2).

    Attributes:
        first: Number of the first interval of each pair.
        intervals: The intervals of twice the length.
        nodes: `[J]` fine nodes at whose times the network is evaluated.
        initial: `[J]` f of equation (1) of system.py for their averaged states.
        influence: `[J, M]` R of the same.
        noise_weights: `[J, M, P]` weights in them of what is added at each interval's right end.
        weight: `[J]` weight of a doubled interval's own forcing in the state at its right end.
        weights: `[J, M]` weights of the forcings of the pair in the same state.
        effect: `[M+1, J]` weights of the defects in the states and, last, in the sample.
        sensitivity: `[J]` equation (2).
    """

    def __init__(self, system: CollocationSystem, control: DefectControl) -> None:
        self._system, self.first, n = system, list[int](), 0
        while n + 1 < len(system.intervals):
            single = system.intervals[n + 1].right - system.intervals[n].left == 2
            if not single:
                self.first.append(n)
            n += 1 if single else 2
        pairs = [(n, system.intervals[n], system.intervals[n + 1]) for n in self.first]
        self.intervals: list[Interval] = [system.recurrence.interval(left.left, right.right) for _, left, right in pairs]
        self.nodes = torch.tensor([interval.node for interval in self.intervals], dtype=torch.int64)
        own = torch.tensor([interval.state_forcing for interval in self.intervals], dtype=torch.float64)
        self.weight = torch.tensor([float(interval.forcing[0].sum()) for interval in self.intervals], dtype=torch.float64)
        of_first = [float((right.carry[0] * left.forcing.sum(1)).sum()) for _, left, right in pairs]
        of_second = [float(right.forcing[0].sum()) for *_, right in pairs]
        self.weights, rows = torch.zeros(len(pairs), len(system.intervals), dtype=torch.float64), torch.arange(len(pairs))
        for later, found in enumerate((of_first, of_second)):
            self.weights[rows, torch.tensor(self.first, dtype=torch.int64) + later] = torch.tensor(found, dtype=torch.float64)
        self.initial, influence, self.noise_weights = system.carried(self.intervals, self.first)
        self.influence = influence + own[:, None] * self.weights / self.weights.sum(1, keepdim=True)
        self.effect = system.noise_weights[:, [n + 1 for n in self.first], 0]
        place = system.recurrence.log_snr[[right.left for _, _, right in pairs]]
        size = unusual(system.recurrence.variance)  # small data decide later, and no estimate falls for large ones
        self.sensitivity = sensitivity(place + min(math.log(size), 0.0), control)

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """Left, middle and right mesh point of each pair."""
        lefts = [self._system.intervals[n] for n in self.first]
        return [(left.left, left.right, interval.right) for left, interval in zip(lefts, self.intervals, strict=True)]


def sensitivity(log_snr: Tensor, control: DefectControl) -> Tensor:
    """Response of a sample to a defect at given levels, relative to Gaussian data: equation (2)."""
    return control.late_sensitivity + control.early_sensitivity * undecided(log_snr)


def interpolation_defects(system: CollocationSystem, every: int = 2) -> tuple[list[int], Tensor]:
    """The defects of order q >= 1.

    Args:
        system: The collocation system, with M intervals.
        every: Every node whose number divides by this is kept, and the last node.

    Returns:
        The J nodes left out, and `[J, M]` weights of all forcings in their defects. Nodes between single steps are not left
        out, since nothing is interpolated there; J is 0 where too few nodes would be kept for the order.
    """
    count = len(system.intervals)
    kept = [n for n in range(count) if n % every == 0 or n == count - 1]
    omitted = [n for n in range(count) if n not in kept and system.points[n + 1] - system.points[n - 1] > 2]
    if len(kept) < system.order + 1:
        return [], torch.zeros(0, count, dtype=torch.float64)
    coarse = CollocationSystem(system.recurrence, [*(system.points[n] for n in kept), system.points[-1]], system.order)
    weights = torch.zeros(len(omitted), count, dtype=torch.float64)
    weights[:, kept] = -coarse.interpolation[system.nodes[omitted]]
    weights[torch.arange(len(omitted)), omitted] = 1
    return omitted, weights


def convergence_ratio(second: float, fourth: float | None, control: DefectControl) -> float:
    """r of equation (1).

    Args:
        second: Effect of the defects on the sample with every second node left out.
        fourth: The same with three nodes of four left out; None where too few nodes are kept.
        control: Bounds of r.
    """
    rate = 0.0 if fourth is None else fourth / max(second, 1e-300)
    return min(max(rate / control.ratio_safety, control.least_ratio), control.most_ratio)

"""What interpolation leaves out of a sparse table, estimated gap by gap.

The drives found are compared with those of a coarser interpolation, made of the same nodes:

- order 0: two neighbouring gaps make one gap of twice the length, with an averaged state of its own. The network is asked
  there, in one further round of half as many rows as there are gaps. What the one gap makes of its drive is compared with
  what the two make of theirs.
- order q >= 1: every second node is left out, and its drive is compared with what the others interpolate there. No further
  evaluation.

Each comparison is the defect of a gap of twice the length. It is carried to the sample as the chain would carry it, by the
sparse table and by what the pairs know of the network's derivative (secant.py), which is how a sample about to decide what it
will be shows that it is: there, early defects grow. Defects are independent, so their squares add up; and a gap of half the
length leaves out less by

    2 sqrt(2) for order 0: a gap's own defect is of second order in its noise;      2 for orders from 1,             (1)

where a smooth drive would allow 2^(q+1), but trained networks are not smooth in time at the scale of 20 nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.gap import Gap
from paradiff.sparse import Sparse

REDUCTION = {True: 2 * 2**0.5, False: 2.0}  # equation (1), by whether states are averaged
CAUTION = 1.5


@dataclass(frozen=True, eq=False)
class Merged:
    """Two neighbouring gaps of a sparse table of order 0 as one.

    Attributes:
        first: Number of the first of the two gaps.
        gap: The one gap.
        weight: Of its drive, in the state at its end.
        weights: Of the two drives there.
    """

    first: int
    gap: Gap
    weight: float
    weights: tuple[float, float]


def merged(sparse: Sparse) -> list[Merged]:
    """Neighbouring gaps two by two, from the first; those of single steps, which leave nothing out, stay alone."""
    found, n = [], 0
    while n + 1 < len(sparse.gaps):
        left, right = sparse.gaps[n], sparse.gaps[n + 1]
        if right.right - left.left == 2:
            n += 1
            continue
        gap = sparse.recurrence.gap(left.left, right.right)
        carried = float((right.carry[0] * left.drive.sum(1)).sum())
        found.append(Merged(n, gap, float(gap.drive[0].sum()), (carried, float(right.drive[0].sum()))))
        n += 2
    return found


def left_out(sparse: Sparse) -> tuple[list[int], Tensor]:
    """Every second node, and the weights `[J, M]` of all drives in the defects of these: minus what the others interpolate."""
    count = len(sparse.gaps)
    kept = [n for n in range(count) if n % 2 == 0 or n == count - 1]
    gone = [n for n in range(count) if n not in kept]
    if len(kept) < sparse.order + 1:
        return [], torch.zeros(0, count, dtype=torch.float64)
    coarse = Sparse(sparse.recurrence, [*(sparse.edges[n] for n in kept), sparse.edges[-1]], sparse.order)
    weights = torch.zeros(len(gone), count, dtype=torch.float64)
    weights[:, kept] = -coarse.interpolation[sparse.nodes[gone]]
    weights[torch.arange(len(gone)), gone] = 1
    return gone, weights

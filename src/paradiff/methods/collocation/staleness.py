# SPDX-License-Identifier: Apache-2.0
"""Staleness: how far the forcing of each node may have moved since it was last evaluated, and the sample with it.

The **staleness** of a node is |change of its state| times the Lipschitz constant of its forcing, propagated to the sample by
the linearized system. The Lipschitz constant is the largest quotient |du|/|dx| observed at the node, and at least
`lipschitz_cap` times that of the clean-data estimate for Gaussian data. A node evaluated once has no quotient yet; the larger
of those of its nearest neighbours that have one is used. Neighbours are compared by the quotient of the network's output, which
varies little from node to node: at the noisy end it can be far above any clean-data estimate's for a trained network.

The part of a change along directions that secant pairs cover is known up to its `pair_uncertainty`. Changes near the rounding
of the network's outputs are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.methods.collocation.interval import Recurrence


def lipschitz_floor(recurrence: Recurrence, nodes: Tensor, cap: float) -> Tensor:
    """`[M]` Lipschitz constant of the forcing at fine nodes, |nu (D' - g)|, for slopes D' of the clean-data estimate between 0
    and the smaller of 1/alpha and `cap` v alpha/sigma^2, which is `cap` times the slope for Gaussian data at high noise."""
    table = recurrence.table
    steepest = torch.minimum(
        1 / table.alpha[nodes].clamp(min=1e-12), cap * recurrence.variance * table.alpha[nodes] / table.sigma[nodes] ** 2
    )
    span = torch.maximum(recurrence.g[nodes], steepest - recurrence.g[nodes])
    return recurrence.nu[nodes] * span


def lipschitz(quotients: Tensor, q_u: Tensor, floor: Tensor) -> Tensor:
    """`[M]` Lipschitz constants of the forcings.

    Args:
        quotients: `[M]` largest quotient observed at each node; 0 where there is none.
        q_u: `[M]` size of the weight of the network's output in the forcing.
        floor: `[M]` `lipschitz_floor`.
    """
    index = torch.arange(1, len(quotients) + 1, device=quotients.device)
    both = torch.stack([quotients, quotients.flip(0)])
    nearest = torch.where(both > 0, index, 0).cummax(1).values  # the last one before each node, from either end; 0 for none
    of_outputs = torch.nn.functional.pad(torch.stack([quotients / q_u, (quotients / q_u).flip(0)]), (1, 0))
    before, after = of_outputs.gather(1, nearest)
    return torch.maximum(floor, torch.maximum(before, after.flip(0)) * q_u)


def beyond_rounding(squares: Tensor, states: Tensor, least: float) -> Tensor:
    """`[M, b]` whether changes of states `[M, b, d]`, with sums of squares `[M, b]`, are larger than `least` times them."""
    return squares > least**2 * torch.linalg.vector_norm(states, dim=2).square()

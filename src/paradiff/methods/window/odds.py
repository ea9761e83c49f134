# SPDX-License-Identifier: Apache-2.0
"""Whether the errors of a sample's nodes may have made another sample of it: by how much they shift the odds of its outcomes.

Errors that are carried along the chain (carried_error.py) are carried to first order. A sample that passes close to where it is
decided between two outcomes ends at the other one for an error that is small beside its distance, and the first order, which
holds on either side, does not show it. An error e of d numbers' root mean square, in a direction in which the outcomes differ
by D (root mean square), shifts the logarithm of their odds by l = d alpha/sigma^2 D e, and the clean-data estimate by
p (1 - p) D l, with p the probability of one of them. With a shift r of the estimate that was seen, and outcomes as close as
this allows (p = 1/2),

    l = 2 (d alpha/sigma^2 r e)^(1/2),      D = 2 (r/(d alpha/sigma^2 e))^(1/2).                                    (1)

Where l is more than the control's `odds` says, D is told of the sample, if errors grow there: alpha r > e. It is looked at on
deterministic chains, which forget nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.step import Step


class Odds:
    """Equation (1) on one table.

    Args:
        step: The table on a device.
        most: Shift of the logarithm of the odds beyond which a sample may be another one.
    """

    def __init__(self, step: Step, most: float) -> None:
        table, self._members, self._most = step.table, step.members, most
        evidence = (table.alpha / table.sigma**2)[: table.steps].nan_to_num(posinf=0.0)
        self._columns = step.move(torch.stack([table.p, table.q, evidence, table.alpha[: table.steps]]))

    def __call__(self, node: int, states: Tensor, outputs: Tensor) -> Tensor:
        """What errors of nodes make of the sample.

        Args:
            node: The first node.
            states: `[n, w, ...]` errors of the states of n nodes, w at once, as far as it is known how outputs answer.
            outputs: `[n, w, ...]` what outputs do.

        Returns:
            `[b]` D of equation (1), in the data's units, for each member: the largest of those whose l is more; 0 for none.
        """
        p, q, evidence, alpha = self._columns[:, node : node + len(states), None, None]
        e, m = (self._members(v.flatten(0, 1)).unflatten(0, v.shape[:2]) for v in (states, outputs))
        r = torch.addcmul(p[..., None] * e, q[..., None], m)
        size, shift = (v.square().mean(3).sqrt() for v in (e, r))  # [n, w, b]
        pulls = e.shape[3] * evidence * size
        apart = 2 * (shift / pulls.clamp(min=torch.finfo(e.dtype).tiny)).sqrt()
        found = torch.where((4 * pulls * shift > self._most**2) & (alpha * shift > size), apart, 0.0)
        return found.flatten(0, 1).amax(0)

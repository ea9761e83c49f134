# SPDX-License-Identifier: Apache-2.0
"""The network's outputs at nodes that passed, as later steps of a multistep chain read them.

A sweep evaluates the network at the states before its update. Of the nodes that pass in it, the last one is evaluated once
more, as the first of the next window; those before it are not, so that their outputs m belong to states that have changed since
by d. A step reads states and outputs of such nodes with weights a and b, up to 1.5 each in SA-Solver, that nearly cancel; of a
change of the state alone they leave b J d in the chain, where J is the derivative of m: several times what the change itself
leaves. So outputs follow their states by the derivative for Gaussian data of variance v (chain/slope.py),

    m <- m + (g - p)/q d,      g = alpha v/(alpha^2 v + sigma^2),                                               (1)

which costs no row. What the network answers beyond that stays in the chain: b (J - (g - p)/q) d.
"""

from __future__ import annotations

from torch import Tensor

from paradiff.chain.slope import DATA_VARIANCE, gaussian_gain
from paradiff.chain.step import Step
from paradiff.chain.table import column


class PastOutputs:
    """Equation (1) on one table.

    Args:
        step: The table on a device.
    """

    def __init__(self, step: Step) -> None:
        table = step.table
        gain = gaussian_gain(table.alpha[:-1], table.sigma[:-1], DATA_VARIANCE)
        self._slope = step.move((gain - table.p) / table.q)

    def follow(self, node: int, outputs: Tensor, changes: Tensor) -> None:
        """Outputs at the nodes from `node` on follow their states, in place.

        Args:
            node: The first of the nodes.
            outputs: `[n, ...]` at the states before the sweep.
            changes: `[n, ...]` changes of the states since.
        """
        outputs.addcmul_(column(self._slope[node : node + len(outputs)], outputs), changes)

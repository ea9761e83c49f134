# SPDX-License-Identifier: Apache-2.0
"""The linearized collocation system: how its states and the sample change with its forcings."""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.methods.secant import SecantJacobian


class Linearization:
    """Equation (1) of system.py, linearized at the current forcings: its influence matrix, and a low-rank Jacobian of the
    forcings from secant pairs.

    Args:
        influence: `[M+1, M]` weights of the forcings in the states and, last, in the sample.
        nodes: `[M]` fine nodes of the forcings.
        dx: `[M, k, b, d]` changes of the states in k secant pairs a node.
        du: `[M, k, b, d]` changes of the forcings in these pairs.
        uncertainty: Share of a change that stays uncertain along directions that the pairs cover, 0 to 1.
    """

    def __init__(self, influence: Tensor, nodes: Tensor, dx: Tensor, du: Tensor, uncertainty: float) -> None:
        self._uncertainty = uncertainty
        self.nodes, self._influence, self._dx, self._du = nodes, influence, dx, du
        self._jacobian = SecantJacobian(dx, [(influence[:-1], du)]) if dx.shape[1] else None

    def states(self, base: Tensor, known: Tensor) -> Tensor:
        """`[M+1, b, d]` states and sample with forcings that follow their states: one Newton step.

        Args:
            base: `[M+1, b, d]` states and sample with the forcings as evaluated.
            known: `[M, b, d]` the states at which these were evaluated.
        """
        if self._jacobian is None:
            return base
        follow = _along(self._du, self._jacobian(base[:-1] - known))
        return base + (self._influence @ follow.flatten(1)).view_as(base)

    def unknown(self, changes: Tensor) -> Tensor:
        """`[M, b, d]` changes of the states, reduced to their uncertain share along the directions of the pairs."""
        return (
            changes
            if self._jacobian is None
            else changes - (1 - self._uncertainty) * _along(self._dx, self._jacobian.own(changes))
        )

    def on_sample(self, changes: Tensor, influence: Tensor) -> Tensor:
        """`[J, b, d]` change of the sample by each of J changes of forcings.

        Args:
            changes: `[J, b, d]`.
            influence: `[M+1, J]` weights of each change in the states and, last, in the sample, before other forcings follow.
        """
        found = influence[-1][:, None, None] * changes
        if self._jacobian is None:
            return found
        onto = torch.einsum("nkbd,jbd->bnkj", self._dx, changes) * influence[:-1, None]
        weights = self._influence[-1][:, None, None] * self._jacobian.solve(onto)  # [b, n, k, J]
        pairs = self._du.permute(2, 0, 1, 3).flatten(1, 2)  # [b, n k, d]
        return found + (weights.flatten(1, 2).mT @ pairs).transpose(0, 1)


def _along(pairs: Tensor, weights: Tensor) -> Tensor:
    """`[M, b, d]` sums of pairs `[M, k, b, d]` by weights `[M, k, b, 1]`, without a copy of the pairs."""
    return torch.einsum("nkbd,nkb->nbd", pairs, weights[..., 0])

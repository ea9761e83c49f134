"""How the states of a sparse system, and the sample, answer to a change of its drives."""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.methods.secant import SecantJacobian


class Linearization:
    """Equation (1) of system.py, linearized at the drives found: its own reach, and the drives' derivatives as far as pairs of
    earlier rounds know them.

    Args:
        reach: `[M+1, M]` weights of the drives in the states and, last, in the sample.
        nodes: `[M]` fine nodes of the drives.
        dx: `[M, k, b, d]` changes of states that were seen.
        du: `[M, k, b, d]` those of the drives.
        uncertainty: Share of a change that stays uncertain along directions that pairs cover.
    """

    def __init__(self, reach: Tensor, nodes: Tensor, dx: Tensor, du: Tensor, uncertainty: float) -> None:
        self._uncertainty = uncertainty
        self.nodes, self._reach, self._dx, self._du = nodes, reach, dx, du
        self._model = SecantJacobian(dx, [(reach[:-1], du)]) if dx.shape[1] else None

    def states(self, base: Tensor, known: Tensor) -> Tensor:
        """`[M+1, b, d]` states and sample, if drives follow.

        Args:
            base: `[M+1, b, d]` what they are with the drives as evaluated.
            known: `[M, b, d]` the states at which these were evaluated.
        """
        if self._model is None:
            return base
        follow = (self._du * self._model(base[:-1] - known)).sum(1)
        return base + (self._reach @ follow.flatten(1)).view_as(base)

    def unknown(self, changes: Tensor) -> Tensor:
        """`[M, b, d]` changes of the states, with the part along what the pairs have seen made smaller."""
        return (
            changes if self._model is None else changes - (1 - self._uncertainty) * (self._dx * self._model.own(changes)).sum(1)
        )

    def on_sample(self, changes: Tensor, reach: Tensor) -> Tensor:
        """`[J, b, d]` change of the sample by each of J changes.

        Args:
            changes: `[J, b, d]`.
            reach: `[M+1, J]` weights of each in the states and, last, in the sample, before the drives follow.
        """
        found = reach[-1][:, None, None] * changes
        if self._model is None:
            return found
        onto = torch.einsum("nkbd,jbd->bnkj", self._dx, changes) * reach[:-1, None]
        return found + torch.einsum("n,nkbd,bnkj->jbd", self._reach[-1], self._du, self._model.solve(onto))

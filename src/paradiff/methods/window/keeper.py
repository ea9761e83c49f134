# SPDX-License-Identifier: Apache-2.0
"""The newest evaluations of every node of one sample, for its trajectory."""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.table import Table, column
from paradiff.solver.trajectory import Part


class Keeper:
    """Keeps N states, as many clean-data estimates, and their changes between the last evaluations.

    Args:
        table: The chain.
        x0: `[...]` a state, for shape, dtype and device.
        pairs: Changes kept of each node.
    """

    def __init__(self, table: Table, x0: Tensor, pairs: int) -> None:
        self._table = table
        self._states = x0.new_zeros(table.steps, *x0.shape)
        self._clean = torch.zeros_like(self._states)
        self._changes = x0.new_zeros(2, table.steps, pairs, *x0.shape)
        self._seen = torch.zeros(table.steps, dtype=torch.bool, device="cpu")

    def take(self, nodes: Tensor, states: Tensor, outputs: Tensor) -> None:
        """Takes evaluations.

        Args:
            nodes: `[R]` fine nodes, on the CPU.
            states: `[R, ...]` states there, not scaled.
            outputs: `[R, ...]` outputs there, limits included.
        """
        table, at = self._table, nodes.to(states.device, non_blocking=True)
        clean = column(table.p[nodes], states) * states + column(table.q[nodes], states) * outputs
        again = self._seen[nodes].nonzero()[:, 0]
        if self._changes.shape[2] and len(again):
            rows = again.to(states.device, non_blocking=True)
            old = at[rows]
            new = torch.stack([states[rows] - self._states[old], clean[rows] - self._clean[old]])
            self._changes[:, old] = torch.cat([self._changes[:, old, 1:], new[:, :, None]], 2)
        self._states[at], self._clean[at], self._seen[nodes] = states, clean, True

    def part(self) -> Part:
        """The trajectory: all nodes that were evaluated."""
        nodes = self._seen.nonzero()[:, 0]
        at = nodes.to(self._states.device, non_blocking=True)
        dx, dclean = self._changes[:, at]
        return Part(nodes, self._states[at], self._clean[at], dx=dx, dclean=dclean)

# SPDX-License-Identifier: Apache-2.0
"""What all samples of a run share: starts, and the chain's long steps with a frozen clean-data estimate."""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.slope import freeze_clean_data
from paradiff.chain.step import Step
from paradiff.chain.table import Table
from paradiff.methods.chords.options import ChordsOptions


class ChordsSetup:
    """See the module.

    Args:
        table: The sampler.
        method: The method.
        device: Where states live.
        dtype: Their dtype.
        shared_window: Whether a state is a batch of members.

    Attributes:
        starts: The nodes at which the cores start.
        rounding: Relative precision of the states.
    """

    def __init__(
        self, table: Table, method: ChordsOptions, device: torch.device, dtype: torch.dtype, shared_window: bool
    ) -> None:
        self.table, self.method, self.device = table, method, device
        self.rounding = torch.finfo(dtype).eps
        self.starts = method.starts_on(table)
        self.step = Step(table, device, dtype, shared_window)
        self.t, self.move = self.step.t, self.step.move
        self.p, self.q = table.p.tolist(), table.q.tolist()
        self._slope = freeze_clean_data(table)[:, 0].tolist()
        self._forcing = (table.b[:, 0] / table.q).tolist()
        self._long: dict[tuple[int, int], tuple[float, float]] = {}

    def clean(self, node: int, x: Tensor, output: Tensor) -> Tensor:
        """The clean-data estimate at a node."""
        return self.p[node] * x + self.q[node] * output

    def long_step(self, left: int, right: int, x: Tensor, clean: Tensor) -> Tensor:
        """The state at node `right` from that at `left`, with the clean-data estimate frozen."""
        if (left, right) not in self._long:
            state, forcing = 1.0, 0.0
            for i in range(left, right):
                state, forcing = self._slope[i] * state, self._slope[i] * forcing + self._forcing[i]
            self._long[left, right] = state, forcing
        state, forcing = self._long[left, right]
        return state * x + forcing * clean

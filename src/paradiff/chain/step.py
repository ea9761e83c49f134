# SPDX-License-Identifier: Apache-2.0
"""One step of the chain, equation (1) of table.py, for many rows at once on one device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paradiff.chain.table import Table, column


def uploaded(values: Sequence[int] | Sequence[bool] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Whole numbers or truth values on a device, without waiting for it: an index made of a list waits for all its work."""
    kind = torch.bool if values and isinstance(values[0], bool) else torch.int64
    return torch.tensor(values, dtype=kind).to(device, non_blocking=True)


class Step:
    """The table's coefficients on a device, in the dtype of the states, and the step that they make.

    Every solver takes its steps here, so that a state computed from the same states and noises has the same bits whichever
    solver computes it.

    Args:
        table: The sampler.
        device: Where states live.
        dtype: Their dtype.
        shared_window: Whether a state is a batch `[b, ...]` of members, each of which is to come out right.

    Attributes:
        t: `[N+1]` times for the network, on the CPU; int64 where all are whole numbers that it holds.
        scaled: Whether the network sees states at another scale.
    """

    def __init__(self, table: Table, device: torch.device, dtype: torch.dtype, shared_window: bool = False) -> None:
        self.table, self.device, self.dtype, self.shared_window = table, device, dtype, shared_window
        self.t = table.times
        self.scaled = bool((table.scale != 1).any())
        self.a, self.b, self.c, self.scale = (self.move(v) for v in (table.a, table.b, table.c, table.scale))

    def move(self, values: Tensor) -> Tensor:
        """Values on the device, in the dtype of the states; from the host without waiting for the device's work."""
        return values.to(device=self.device, dtype=self.dtype, non_blocking=values.device.type == "cpu")

    def members(self, values: Tensor) -> Tensor:
        """`[R, b, d]` values `[R, ...]` of states, by their members; a state without any is one."""
        return values.flatten(2) if self.shared_window and values.ndim > 2 else values.flatten(1)[:, None]

    def mean_squares(self, change: Tensor) -> Tensor:
        """`[R, b]` mean square of changes `[R, ...]` of states, for each member."""
        return self.members(change).square().mean(2)

    def mean_square(self, change: Tensor) -> Tensor:
        """`[R]` mean square of changes `[R, ...]` of states; with members, that of the member which changed most."""
        return self.mean_squares(change).amax(1)

    def seen(self, at: slice | Tensor, x: Tensor) -> Tensor:
        """`[R, ...]` states as the network expects them, from states `x` at the nodes `at` (on the device)."""
        return x * column(self.scale[at], x) if self.scaled else x

    def __call__(self, at: slice | Tensor, states: Sequence[Tensor], outputs: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        """`[R, ...]` states after one step.

        Args:
            at: Slice, or integer tensor on the device, of the R nodes i.
            states: x[i-j] for j = 0 ... P-1, each `[R, ...]`.
            outputs: m[i-j], likewise.
            noise: z[i]; not looked at by a deterministic table.
        """
        phi = column(self.a[at, 0], states[0]) * states[0]
        phi.addcmul_(column(self.b[at, 0], phi), outputs[0])
        for j in range(1, self.table.band):
            phi.addcmul_(column(self.a[at, j], phi), states[j])
            phi.addcmul_(column(self.b[at, j], phi), outputs[j])
        if self.table.stochastic:
            assert noise is not None
            phi.addcmul_(column(self.c[at], phi), noise)
        return phi

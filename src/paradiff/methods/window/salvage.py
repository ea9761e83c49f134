# SPDX-License-Identifier: Apache-2.0
"""What is left of a sweep in which a state overflowed."""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.errors import NotFinite
from paradiff.methods.window.setup import WindowSetup


def finite_nodes(setup: WindowSetup, phi: Tensor, sample: int, first: int, sweeps: int) -> int:
    """How many leading nodes of a window took a finite step.

    Args:
        setup: What all samples share.
        phi: `[W, ...]` the steps from the window's nodes.
        sample: The sample, for messages.
        first: The window's first node.
        sweeps: Sweeps of the window's oldest node, for messages.

    Raises:
        ValueError: If there is none, or the method has a fixed number of sweeps.
    """
    finite = torch.isfinite(phi.flatten(1).square().mean(1)).tolist()
    count = finite.index(False) if False in finite else len(finite)
    if count == 0:
        node = setup.edges[first]
        raise NotFinite(
            f"sample {sample} is not finite after node {node} (time {float(setup.table.t[node]):g}), whose own state "
            "is that of the sequential chain: the model returned NaN or infinity, or overflowed its dtype; check its "
            "weights, its dtype and the times it was trained on"
        )
    if setup.method.sweeps is not None:
        raise ValueError(
            f"sample {sample} overflowed {phi.dtype} at node {setup.edges[first + count]}, "
            f"{sweeps} sweeps after its block began: sweeps with this linear part expand before they converge; use "
            "shorter blocks, a slope that stays bounded (freeze_clean_data, shifted), or no fixed number of sweeps"
        )
    return count

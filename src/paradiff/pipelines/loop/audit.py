# SPDX-License-Identifier: Apache-2.0
"""The audit: whether a pass of the loop is a function of its node and its state alone, as a parallel run takes it to be.

A pass is evaluated a second time, at the same node and from the same state, by an execution with another past: a later pass
(`vector`), or a call of the pipeline that did not make the passes before (`lanes`). What both give to the scheduler's step,

    output  m = f(node, state),        state  s = E(node, state),

must agree up to rounding. If not, the loop keeps something from one pass to the next, and the executor is refused.

Rounding depends on the rows of a network call, and guidance enlarges it. Granted is a difference of 4 eps^(2/3), relative to
the norm of what is compared, with eps of the coarsest dtype involved: 1e-4 in float32, 0.04 in float16, 0.16 in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.errors import Carried

KEEPS = "the loop keeps something from one pass to the next"
"""How the sentence of a failed audit begins."""


def granted(eps: float) -> float:
    """The relative difference that rounding explains, for outputs whose coarsest dtype has this eps."""
    return 4 * eps ** (2 / 3)


def relative_difference(found: Tensor, wanted: Tensor) -> Tensor:
    """`[n]` the largest difference between the members of two states, relative to the members' mean norm.

    Args:
        found: `[n, B, ...]`.
        wanted: `[n, B, ...]`.
    """
    dtype = torch.promote_types(wanted.dtype, torch.float32)
    a, b = found.to(dtype).flatten(1), wanted.to(dtype).flatten(1)
    members = wanted.shape[1] if wanted.ndim > 1 else 1
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, a - b).unflatten(1, (members, -1)).norm(dim=2)
    size = torch.where(b.isfinite(), b, 0.0).unflatten(1, (members, -1)).norm(dim=2).mean(1, keepdim=True)
    return (difference / size.clamp_min(torch.finfo(dtype).tiny)).amax(1)


def judge(node: int, output: float, state: float, eps: float, how: str) -> None:
    """Refuses a loop whose pass gave something else the second time.

    Args:
        node: The pass's node.
        output: Relative difference of the network's outputs that the scheduler's step was given.
        state: Relative difference of the states that it was given.
        eps: That of the coarsest dtype involved.
        how: How the two executions differ, the sentence's end.

    Raises:
        Carried: If a difference is beyond rounding.
    """
    bound = granted(eps)
    for what, value in (("the state", state), ("the network's output", output)):
        if not value <= bound:
            raise Carried(
                f"{KEEPS}: at step {node} {what} given to the scheduler differs by {value:.2g} of its size {how}, where "
                f"rounding explains {bound:.2g}"
            )

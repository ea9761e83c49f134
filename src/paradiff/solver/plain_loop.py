# SPDX-License-Identifier: Apache-2.0
"""The whole result of a run beside the plain loop's, for `check="every"`.

Rows that are evaluated again show what a model does to them; what it does to the sample shows in the plain loop's alone. That
is walked twice, the second time with outputs that are moved by a tenth of what rounding may do to them. What lies between the
two is what rounding does to the sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.solver.judge import Judge
from paradiff.solver.protocol import Batch
from paradiff.solver.solution import ErrorEstimate, Solution

MOVED = 0.1
"""Share of the rounding limit by which outputs are moved."""

BEYOND = 3.0
"""Multiple of what lies between two walks that rounding explains."""

TWICE = 2.0
"""Multiple of the estimated error that is borne."""


class PlainOutputs:
    """Outputs for the plain loop.

    Args:
        judge: What evaluates.
        moved: Whether outputs are moved.
    """

    def __init__(self, judge: Judge, *, moved: bool) -> None:
        self._judge, self._moved = judge, moved

    def __call__(self, batch: Batch) -> Tensor:
        """Outputs of some rows."""
        outputs = self._judge.evaluated(batch)
        if not self._moved:
            return outputs
        signs = 1 - 2 * (torch.arange(outputs[0].numel(), device="cpu") % 2).view(outputs.shape[1:]).to(outputs)
        return outputs * (1 + MOVED * self._judge.limit(batch.x) * signs)


def compare(found: Solution, plain: Tensor, moved: Tensor, limit: float) -> None:
    """Compares a run's samples with the plain loop's.

    Args:
        found: What the run came to.
        plain: `[B, ...]` the plain loop's samples.
        moved: `[B, ...]` those of outputs that were moved.
        limit: Relative difference of two outputs that rounding explains.

    Raises:
        ValueError: If a sample lies further from the plain loop's than twice its estimated error and rounding.
    """
    for k, estimate in enumerate(found.error_estimates):
        off, between = _rms(found.sample[k] - plain[k]), _rms(moved[k] - plain[k])
        explained = max(limit * max(_rms(plain[k]), 1.0), BEYOND * between)
        if not off <= max(TWICE * estimate.estimated_error, explained):
            raise ValueError(_apart(k, off, estimate, explained))


def _apart(k: int, off: float, estimate: ErrorEstimate, explained: float) -> str:
    return (
        f"sample {k} is {off:.2g} from the plain loop's in the root mean square, its estimated error is "
        f"{estimate.estimated_error:.2g}, and rounding explains {explained:.1g}. The model's rows depend on their number, "
        "their places or earlier calls; or its numbers are rounded to a coarser dtype than the evaluator's; or the estimate is "
        "too small: compute a row's output from its own state, time and conditioning alone, give the evaluator the network's "
        "dtype, or a smaller tolerance"
    )


def _rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.double().square().mean().sqrt())

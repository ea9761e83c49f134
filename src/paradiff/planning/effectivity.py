# SPDX-License-Identifier: Apache-2.0
"""How large a method's estimates are beside the true errors: the effectivity index of error control."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from paradiff.solver.solution import ROUNDING

CAUTIOUS = 10.0
"""Index above which an estimate is too large to be of use."""


@dataclass(frozen=True)
class Effectivity:
    """The effectivity indices of some samples: estimate over true error, each at least `ROUNDING`.

    Attributes:
        median: The median index.
        within: The share of samples with an index from 1 to 10.
        below: The share of samples with an index below 1, whose error is above its estimate.
    """

    median: float
    within: float
    below: float

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> Effectivity:
        """That of samples, as pairs of estimate and true error; of one at least."""
        indices = [index_of(estimate, error) for estimate, error in pairs]
        return cls(
            median=statistics.median(indices),
            within=statistics.mean(1 <= index <= CAUTIOUS for index in indices),
            below=statistics.mean(index < 1 for index in indices),
        )

    def to_json(self) -> dict[str, float | None]:
        """The numbers by name; None for an infinite median."""
        return {**dataclasses.asdict(self), "median": self.median if math.isfinite(self.median) else None}

    def __str__(self) -> str:
        return f"{self.median:.1f}, {self.within:.0%} from 1 to {CAUTIOUS:g}, {self.below:.0%} below"


def index_of(estimate: float, error: float) -> float:
    """The effectivity index of one sample."""
    return max(estimate, ROUNDING) / max(error, ROUNDING)

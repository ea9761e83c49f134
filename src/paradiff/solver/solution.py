"""What a solver returns: the sample, what it cost, and how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from paradiff.solver.records import Record


class Status(Enum):
    """How a run ended. The value is the general sentence; `Solution.message` is the same with the run's own numbers."""

    EXACT = "every node was reached by the chain's own steps"
    CONVERGED = "every sample met the method's rule"
    STOPPED = "the run ended before the method's rule was met"
    SEQUENTIAL = "the chain was walked step by step, as the plain call does"

    @property
    def code(self) -> str:
        """The member's name in small letters, as run.json has it."""
        return self.name.lower()

    @property
    def trust(self) -> int:
        """A rank to compare by: of several runs the one of least trust speaks for all."""
        return TRUST.index(self)

    def message(self, detail: str | None = None) -> str:
        """Code and sentence; `detail` in place of the general sentence."""
        return f"{self.code}: {detail or self.value}"


TRUST = (Status.SEQUENTIAL, Status.STOPPED, Status.CONVERGED, Status.EXACT)


@dataclass(frozen=True)
class ErrorEstimate:
    """How far to trust one sample.

    Attributes:
        residual: The largest root mean square change that any node saw in the sweep that made it final.
        estimated_error: Estimate of the root mean square difference to the sequential sample, in the data's units. An
            estimate, not a bound: see docs/certificate.md.
        rounds: Rounds in which the sample took part.
        evaluations: Its rows.
        interpolation_error: The part of the estimated error that comes from interpolation between nodes; 0 for methods that
            evaluate every node.
    """

    residual: float
    estimated_error: float
    rounds: int
    evaluations: int
    interpolation_error: float = 0.0

    @property
    def iteration_error(self) -> float:
        """The part of the estimated error that comes from sweeps not made; the two parts are independent."""
        if math.isinf(self.estimated_error):
            return math.inf
        return math.sqrt(max(self.estimated_error**2 - self.interpolation_error**2, 0.0))


@dataclass(frozen=True)
class Solution:
    """The result of a run.

    Attributes:
        sample: `[B, ...]` samples.
        status: How the run ended.
        message: The same as a sentence with the run's own numbers.
        rounds: Sequential batched network calls, start-up included.
        evaluations: Rows.
        seconds: The whole clock: noise, start-up and bookkeeping included.
        certificates: One a sample.
        history: One entry a sweep and sample, in order; for Parareal one a round and sample.
    """

    sample: Tensor
    status: Status
    message: str
    rounds: int
    evaluations: int
    seconds: float
    error_estimates: list[ErrorEstimate]
    history: list[Record]

    @property
    def residual(self) -> float:
        """The largest residual of any sample."""
        return max(c.residual for c in self.error_estimates)

    @property
    def estimated_error(self) -> float:
        """The largest estimated error of any sample."""
        return max(c.estimated_error for c in self.error_estimates)

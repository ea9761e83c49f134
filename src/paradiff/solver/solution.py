"""What a solver returns: the sample, what it cost, and how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class WindowRecord:
    """One sweep of one sample's window.

    Attributes:
        round: The round at which the sweep ended, counted from 1.
        sample: The sample.
        first: The first node of the window, whose state is final.
        change: Root mean square change of the nodes after it, one number a node.
        passed: How many of these nodes became final; 0 for the last sweep of a corrector, which moved the node `first`.
    """

    round: int
    sample: int
    first: int
    change: list[float]
    passed: int


@dataclass(frozen=True)
class PararealRecord:
    """One round of one sample's wavefront (methods/parareal/solver.py).

    Attributes:
        round: The round, counted from 1.
        sample: The sample.
        rows: Block and iteration of every row that the sample had evaluated.
        values: Edge, iteration and root mean square change of every block edge that got a new value; the change is infinite
            for an edge's first value.
        passed: How many block edges became final.
    """

    round: int
    sample: int
    rows: list[tuple[int, int]]
    values: list[tuple[int, int, float]]
    passed: int


@dataclass(frozen=True)
class CollocationRecord:
    """One round of one sample's sparse system (methods/collocation/solver.py).

    Attributes:
        round: The round, counted from 1.
        sample: The sample.
        nodes: The fine nodes at which the sample had the network evaluated.
        of: How many nodes it has now.
        change: Root mean square change of the sample.
        interpolation_error: Estimated error from interpolation; infinite before it was estimated.
        iteration_error: Estimated error from sweeps not made.
        passed: 1 if this made the sample final.
    """

    round: int
    sample: int
    nodes: list[int]
    of: int
    change: float
    interpolation_error: float
    iteration_error: float
    passed: int = 0


Record = WindowRecord | PararealRecord | CollocationRecord


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
        status: A sentence.
        rounds: Sequential batched network calls, start-up included.
        evaluations: Rows.
        seconds: The whole clock: noise, start-up and bookkeeping included.
        certificates: One a sample.
        history: One entry a sweep and sample, in order; for Parareal one a round and sample.
    """

    sample: Tensor
    status: str
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

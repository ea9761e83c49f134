# SPDX-License-Identifier: Apache-2.0
"""What a solver returns: the sample, what it cost, and how far to trust it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from paradiff.solver.records import Record
from paradiff.solver.trajectory import Trajectory

ROUNDING = 2e-6
"""Errors of this size are rounding of float32, which no estimate tells."""


class Status(Enum):
    """How a run ended. The value is the general sentence; `Solution.message` is the same with the run's own numbers.

    "Exact" means that every state came out of the chain's own step from the states before it and the model's outputs there.
    That is the sequential sample, up to the rounding by which an output depends on the size of its batch, where the output of a
    row depends on that row alone (row_check.py).
    """

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
        estimated_error: Estimate of the root mean square difference to the sequential sample, in the data's units. It is no
            bound: docs/error_estimate.md says how often it held.
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
class ErrorBound:
    """What a calibration says of the errors of samples (planning/calibration.py): a share of them is at most the bound.

    Attributes:
        factor: What estimates, of `ROUNDING` at least, are multiplied by.
        coverage: The share of samples that err by at most the bound, over the seeds of calibrations and of runs.
        seeds: The seeds that it was calibrated on.
    """

    factor: float
    coverage: float
    seeds: int

    def of(self, estimated_error: float) -> float:
        """The bound of a sample, in the data's units.

        Args:
            estimated_error: Its estimated error.
        """
        return self.factor * max(estimated_error, ROUNDING)

    def said(self, estimated_error: float) -> str:
        """The bound of a run as a clause.

        Args:
            estimated_error: The largest estimate of its samples.
        """
        return (
            f"by calibration on {self.seeds} seeds, {100 * self.coverage:g} of 100 samples err by at most {self.factor:.2g} "
            f"times their estimate, {self.of(estimated_error):.2g} here"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """The result of a run.

    Attributes:
        sample: `[B, ...]` samples.
        status: How the run ended.
        message: The same as a sentence with the run's own numbers.
        rounds: Sequential batched network calls, start-up included.
        evaluations: Rows.
        seconds: The whole clock: noise, start-up and bookkeeping included.
        error_estimates: One a sample.
        history: One record a sweep and sample, in order; for Parareal one a round and sample.
        checked_rows: Rows that were evaluated again to check the model (row_check.py); they are in none of the counts above,
            and in the seconds.
        cut: Whether an observer ended the run.
        trajectory: The states of all samples and what the network said of them, where the run was asked to keep them.
        calibrated: What a calibration of the method on this model and chain says of the samples' errors; None where there is
            none (`paradiff.calibrate`), and for a run that was stopped.
    """

    sample: Tensor
    status: Status
    message: str
    rounds: int
    evaluations: int
    seconds: float
    error_estimates: list[ErrorEstimate]
    history: list[Record]
    checked_rows: int = 0
    cut: bool = False
    trajectory: Trajectory | None = None
    calibrated: ErrorBound | None = None

    @property
    def residual(self) -> float:
        """The largest residual of any sample."""
        return max(e.residual for e in self.error_estimates)

    @property
    def estimated_error(self) -> float:
        """The largest estimated error of any sample."""
        return max(e.estimated_error for e in self.error_estimates)

    @property
    def error_bound(self) -> float | None:
        """The largest calibrated bound of any sample's error; None where none is known."""
        return None if self.calibrated is None else self.calibrated.of(self.estimated_error)

    @property
    def stats(self) -> dict[str, str | int | float]:
        """What the run cost and how far to trust it, as a flat dictionary of texts and numbers."""
        return {
            "status": self.status.code,
            "samples": len(self.sample),
            "rounds": self.rounds,
            "evaluations": self.evaluations,
            "checked_rows": self.checked_rows,
            "seconds": self.seconds,
            "estimated_error": self.estimated_error,
            "interpolation_error": max(e.interpolation_error for e in self.error_estimates),
            "residual": self.residual,
            **({} if self.calibrated is None else {"error_bound": self.calibrated.of(self.estimated_error)}),
        }

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.sample.shape[1:]))
        cost = f"{self.rounds} rounds, {self.evaluations} evaluations, {self.seconds:.3g} s"
        return f"Solution({len(self.sample)} of {shape}, {cost},\n         {self.message})"

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same samples, estimates, counts and history; the clock and the check's rows do not
        count."""
        if not isinstance(other, Solution):
            return NotImplemented
        mine, theirs = (
            {k: v for k, v in vars(s).items() if k not in ("sample", "seconds", "checked_rows")} for s in (self, other)
        )
        a, b = self.sample, other.sample
        return mine == theirs and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)

    __hash__ = None  # pyright: ignore[reportAssignmentType]  (equal solutions may have been made apart)

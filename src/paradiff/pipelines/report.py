# SPDX-License-Identifier: Apache-2.0
"""The cost and the estimated error of a pipeline's parallel call."""

from __future__ import annotations

from dataclasses import dataclass

from paradiff.solver.records import Record
from paradiff.solver.solution import ErrorBound, ErrorEstimate, Status
from paradiff.solver.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """One call of a pipeline.

    Attributes:
        pipeline: The name of the pipeline's class.
        scheduler: The name of the scheduler's class.
        method: The method's name.
        executor: `vector`, `lanes` or `sequential`.
        steps: Steps of the chain; None for a sequential call.
        tolerance: The method's, or a larger one if the networks' dtype does not resolve that; None for a sequential call.
        window: Parts of the chain that were solved at once, at most; None for a sequential call.
        parts: Parts of the chain that the method iterated on; None for a sequential call.
        unit: What the parts are called, such as `nodes`; None for a sequential call.
        rounds: What the call waits for, one after the other: passes of the loop's body, the first one included, and checks; 0
            for a sequential call.
        rows: States at which the network was evaluated, those of checks included; 0 for a sequential call.
        checks: Network calls among them that evaluate one state again to compare it, each a round and a row.
        network_calls: Network calls in the loop, checks included; 0 for a sequential call. A round has several where its pass
            calls several networks, or `max_rows` cuts it.
        network_rows: Rows that entered the networks in the loop, those of checks and padding included; 0 for a sequential
            call. A state has several with guidance, or with several images.
        filled_rows: Rows of padding among them.
        max_rows: Largest number of rows in one network call, which is smaller than the given one where memory ran out; None for
            no bound, and for a sequential call.
        refused_calls: Network calls in the loop of tries that came to nothing.
        refused_rows: Rows of these calls.
        seconds: Duration of the whole call: text encoders, solver, decoding.
        network_seconds: The part of it within network calls of the loop, as seen from the host.
        status: How the solver ended; `Status.SEQUENTIAL` for a sequential call.
        message: The same as a sentence with the run's own numbers.
        error_estimate: Estimated error of the state at the loop's end, for the worst image; None for a sequential call.
        warnings: Sentences.
        history: One record a sweep; empty for a sequential call.
        trajectory: The states of the call and what the network said of them, where it was asked to keep them; None for a
            sequential call.
        calibrated: What a calibration of the method on this call says of the error of its state; None where there is none
            (`paradiff.calibrate`), for a call that was stopped and for a sequential one.
    """

    pipeline: str
    scheduler: str
    method: str
    executor: str
    steps: int | None
    tolerance: float | None
    window: int | None
    parts: int | None
    unit: str | None
    rounds: int
    rows: int
    checks: int
    network_calls: int
    network_rows: int
    filled_rows: int
    max_rows: int | None
    refused_calls: int
    refused_rows: int
    seconds: float
    network_seconds: float
    status: Status
    message: str
    error_estimate: ErrorEstimate | None
    warnings: list[str]
    history: list[Record]
    trajectory: Trajectory | None = None
    calibrated: ErrorBound | None = None

    @property
    def error_bound(self) -> float | None:
        """The calibrated bound of the error; None where none is known."""
        if self.calibrated is None or self.error_estimate is None:
            return None
        return self.calibrated.of(self.error_estimate.estimated_error)

    @property
    def passes(self) -> int:
        """Passes of the loop's body: the rounds without the checks."""
        return self.rounds - self.checks

    def __repr__(self) -> str:
        head = f"Report({self.pipeline}, {self.scheduler}, {self.method}, {self.executor}"
        if self.error_estimate is not None:
            head += f",\n       {self.rounds} rounds and {self.rows} rows for {self.steps} steps, "
            head += f"estimated error {self.error_estimate.estimated_error:.2g}"
        return head + f",\n       {self.seconds:.2f} s, {len(self.warnings)} warnings)"

    def __str__(self) -> str:
        lines = [f"{self.pipeline} with {self.scheduler}, {self.method}, {self.executor}: {self.message}"]
        if self.error_estimate is not None:
            padding = f", {self.filled_rows} of them padding" if self.filled_rows else ""
            lines.append(
                f"{self.rounds} rounds and {self.rows} rows instead of {self.steps} steps, {self.network_rows} network rows"
                f"{padding}; {self.seconds:.2f} s, {self.network_seconds:.2f} s of them in the networks"
            )
            lines.append(
                f"estimated error {self.error_estimate.estimated_error:.2g}, "
                f"largest change passed {self.error_estimate.residual:.2g}"
            )
        else:
            lines.append(f"{self.seconds:.2f} s")
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])

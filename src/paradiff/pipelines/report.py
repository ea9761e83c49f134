"""What a pipeline's parallel call cost, and how far to trust it."""

from __future__ import annotations

from dataclasses import dataclass, field

from paradiff.solver.records import Record
from paradiff.solver.solution import ErrorEstimate, Status


@dataclass(frozen=True)
class Report:
    """One call of a pipeline.

    Attributes:
        pipeline: Its class's name.
        scheduler: Its scheduler's.
        method: The method's name.
        executor: `vector`, `lanes` or `sequential`.
        steps: Steps of the chain; None where the call ran sequentially.
        rounds: Sequential batched passes of the loop body, the first one included.
        rows: States that the network was evaluated at.
        network_rows: Rows that the networks saw in the loop after its first pass: several a state with guidance or several
            images.
        seconds: The whole call: text encoders, solver, decoding.
        network_seconds: Of these, within network calls of the loop, as seen from the host.
        status: How the solver ended; `Status.SEQUENTIAL` for a plain call.
        message: The same as a sentence with the run's own numbers.
        certificate: How far to trust the state at the loop's end; of the worst image. None where the call ran sequentially.
        warnings: Sentences.
        history: One entry a sweep.
    """

    pipeline: str
    scheduler: str
    method: str
    executor: str
    steps: int | None
    rounds: int
    rows: int
    network_rows: int
    seconds: float
    network_seconds: float
    status: Status
    message: str
    error_estimate: ErrorEstimate | None
    warnings: list[str]
    history: list[Record] = field(repr=False)

    def __str__(self) -> str:
        lines = [f"{self.pipeline} with {self.scheduler}, {self.method}, {self.executor}: {self.message}"]
        if self.error_estimate is not None:
            lines.append(
                f"{self.rounds} rounds and {self.rows} rows instead of {self.steps} steps, {self.network_rows} network rows; "
                f"{self.seconds:.2f} s, {self.network_seconds:.2f} s of them in the networks"
            )
            lines.append(
                f"estimated error {self.error_estimate.estimated_error:.2g}, "
                f"largest change passed {self.error_estimate.residual:.2g}"
            )
        else:
            lines.append(f"{self.seconds:.2f} s")
        return "\n".join([*lines, *(f"warning: {w}" for w in self.warnings)])

# SPDX-License-Identifier: Apache-2.0
"""The account of a pipeline call, from which its report is made: the clock, the tries that came to nothing, the notes."""

from __future__ import annotations

import dataclasses
import time

from paradiff.pipelines.loop.driver import HALF, LoopSolver
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.report import Report
from paradiff.solver.protocol import Chooses
from paradiff.solver.solution import Status

NOTHING_GAINED = (
    "it took as many rounds as steps, so nothing was gained: the tolerance may be finer than the networks' answers allow, the "
    "window too narrow, or the loop may keep more than its state from one pass to the next, which check='every' looks for; "
    "where the networks enlarge differences as small as rounding, the sample may differ from the plain call's by more than told"
)


class Account:
    """What a call has come to so far. Its clock runs from the account's making.

    Args:
        pipeline: The name of the pipeline's class.
        scheduler: The name of the scheduler's class.
        method: The method's name.
        model: What the model is called in a stored trajectory.

    Attributes:
        notes: Sentences for the report.
        refused: The network calls of each try that came to nothing.
    """

    def __init__(self, pipeline: str, scheduler: str, method: str, model: str = "") -> None:
        self._begin, self._model = time.perf_counter(), model
        self._names = pipeline, scheduler, method
        self.notes: list[str] = []
        self.refused: list[Batching] = []

    def parallel(self, executor: str, solver: LoopSolver, batching: Batching) -> Report:
        """The report of a call that was made in parallel.

        Args:
            executor: The executor that made it.
            solver: The call's solver, which has ended.
            batching: The network calls of its loop.
        """
        solution = solver.solution
        assert solution is not None
        notes = [*self.notes, *solver.shortened]
        if solver.raised_tolerance is not None:
            notes = [
                *notes,
                f"the tolerance was raised to {solver.raised_tolerance:g}, which the dtypes of networks and states resolve",
            ]
        if solver.rounding > 0:
            states = solver.rounded_to in HALF
            dtype = str(solver.rounded_to if states else solver.first.output.dtype).removeprefix("torch.")
            what = "its states" if states else "what its outputs become"
            notes = [
                *notes,
                f"the plain call rounds {what} to {dtype} in each step, and the solver rounds otherwise: the samples of both "
                f"may differ by {solver.rounding:.2g} more than is told",
            ]
        status, message = solution.status, solution.message
        if isinstance(solver.method, Chooses):
            message = f"{message}; chosen: {solver.method.reason(solver.table)}"
        if solver.ended < solver.table.steps:
            status, message = Status.STOPPED, Status.STOPPED.message(f"the call was interrupted after step {solver.ended}")
        parts, unit = solver.fitted.progress(solver.table)
        if solver.passes + batching.checks >= solver.table.steps and solver.width > 1:
            notes = [*notes, NOTHING_GAINED]
        if (most := batching.bound.max_rows) != batching.bound.given:
            notes = [
                *notes,
                f"memory ran out at network calls of more than {most} rows, so they were cut: give max_rows={most}",
            ]
        pipeline, scheduler, method = self._names
        return Report(
            pipeline=pipeline,
            scheduler=scheduler,
            method=method,
            executor=executor,
            steps=solver.table.steps,
            tolerance=solver.fitted.tolerance,
            window=solver.fitted.width(solver.table),
            parts=parts,
            unit=unit,
            rounds=solver.passes + batching.checks,
            rows=solver.rows + batching.checks,
            checks=batching.checks,
            network_calls=batching.calls,
            network_rows=batching.rows,
            filled_rows=batching.filled,
            max_rows=batching.bound.max_rows,
            refused_calls=sum(one.calls for one in self.refused),
            refused_rows=sum(one.rows for one in self.refused),
            seconds=time.perf_counter() - self._begin,
            network_seconds=batching.seconds,
            status=status,
            message=message,
            error_estimate=solution.error_estimates[0],
            warnings=notes,
            history=solution.history,
            trajectory=None if solution.trajectory is None else dataclasses.replace(solution.trajectory, model=self._model),
        )

    def sequential(self, chosen: str | None = None) -> Report:
        """The report of a call that was made as the plain one.

        Args:
            chosen: Why it was chosen; None where it was not.
        """
        told = Status.SEQUENTIAL.message("the plain call")
        pipeline, scheduler, method = self._names
        return Report(
            pipeline=pipeline,
            scheduler=scheduler,
            method=method,
            executor="sequential",
            steps=None,
            tolerance=None,
            window=None,
            parts=None,
            unit=None,
            rounds=0,
            rows=0,
            checks=0,
            network_calls=0,
            network_rows=0,
            filled_rows=0,
            max_rows=None,
            refused_calls=sum(one.calls for one in self.refused),
            refused_rows=sum(one.rows for one in self.refused),
            seconds=time.perf_counter() - self._begin,
            network_seconds=0.0,
            status=Status.SEQUENTIAL,
            message=told if chosen is None else f"{told}; chosen: {chosen}",
            error_estimate=None,
            warnings=list(self.notes),
            history=[],
        )

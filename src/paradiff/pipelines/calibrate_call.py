# SPDX-License-Identifier: Apache-2.0
"""The calibration of a pipeline's call: the state at the end of its loop, in parallel and as the plain call has it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from paradiff.pipelines.calibrated import call_subject
from paradiff.pipelines.host.find import host_of
from paradiff.pipelines.host.host import Host
from paradiff.pipelines.known import OWN
from paradiff.pipelines.loop.whole_call import call_and_last_state
from paradiff.pipelines.plan_call import quiet
from paradiff.pipelines.report import Report
from paradiff.pipelines.run import Run
from paradiff.pipelines.settings import Settings
from paradiff.planning.calibration import Calibration
from paradiff.planning.calibrations import kept_calibration
from paradiff.solver.protocol import Method, Round
from paradiff.solver.solution import Status


def calibrate_call(
    pipeline: Any, call: Mapping[str, Any], method: Method, seeds: Sequence[int], coverage: float
) -> Calibration:
    """Calibrates a method on a pipeline's call (`paradiff.calibrate`).

    Raises:
        ValueError: If the call takes no generator, or has no parallel form; the sentence says why.
    """
    host = host_of(pipeline)
    given = {name: value for name, value in call.items() if name not in OWN}
    if "generator" not in inspect.signature(host.call).parameters:
        raise ValueError(f"the {host.name} takes no generator, so no seed decides on what it draws, and it has no calibration")
    runs: list[tuple[float, float]] = []
    with quiet(host.owner):
        for seed in seeds:
            found, report = _parallel(host, given, method, seed)
            if report.error_estimate is None:
                raise ValueError(
                    f"the {host.name} has no parallel form, so there is nothing to calibrate: {report.warnings[0]}"
                )
            plain = functools.partial(host.call, host.owner, **given, generator=torch.Generator().manual_seed(seed))
            _, last = call_and_last_state(host.scheduler, plain)
            assert last is not None
            error = float((found - last).double().square().flatten(1).mean(1).sqrt().amax())
            if report.status is not Status.STOPPED:
                runs.append((error, report.error_estimate.estimated_error))
    subject = call_subject(host, host.bound((), given), method, torch.float32)
    return kept_calibration(subject, runs, len(seeds), coverage)


def _parallel(host: Host, given: Mapping[str, Any], method: Method, seed: int) -> tuple[Tensor, Report]:
    """The state at the end of a parallel call's loop, and its report."""
    states: list[Tensor] = []

    def watch(round: Round) -> None:
        states[:] = [solver.final for solver in round.solvers if solver.done]

    run = Run(host, Settings(method=method, observer=watch))
    run(**given, generator=torch.Generator().manual_seed(seed))
    return (states[0] if states else torch.empty(0)), run.report

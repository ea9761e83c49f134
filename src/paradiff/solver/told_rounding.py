# SPDX-License-Identifier: Apache-2.0
"""What a run says of rounding: on chains where it reaches the sample (chain/roundoff.py) it is part of every estimate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paradiff.chain.data_scale import unusual
from paradiff.chain.roundoff import TOLD, roundoff
from paradiff.solver.protocol import Method, Problem, Run
from paradiff.solver.solution import ErrorEstimate, Status


def rounds_apart(method: Method, problem: Problem) -> bool:
    """Whether a run rounds otherwise than the chain that it stands for: one of several nodes at once does, and one whose chain
    is a scheduler's own."""
    table = problem.table
    apart = table.rounding is not None or method.width(table) > 1
    return apart and roundoff(table, _spacing(problem)) > TOLD


def with_roundoff(
    run: Run,
    problem: Problem,
    tolerance: float,
    samples: Tensor,
    estimates: Sequence[ErrorEstimate],
    status: Status,
    message: str,
) -> tuple[list[ErrorEstimate], Status, str]:
    """Estimates with what rounding adds to them, and how the run ended by these. Waits for the device.

    Args:
        run: The run, which has ended.
        problem: Its problem, of which `rounds_apart`.
        tolerance: That of the method.
        samples: `[B, ...]` samples.
        estimates: One a sample, without rounding.
        status: How it ended by these.
        message: The same as a sentence.
    """
    sizes = samples.double().flatten(1).square().mean(1).tolist()
    found = [roundoff(problem.table, _spacing(problem), unusual(size)) for size in sizes]
    raised = [
        dataclasses.replace(e, estimated_error=math.hypot(e.estimated_error, r)) for e, r in zip(estimates, found, strict=True)
    ]
    dtype = "float64" if _spacing(problem) < torch.finfo(torch.float32).eps else "float32"
    told = (
        f"steps of this chain pass from large terms to small ones, whose rounding in {dtype} sets samples apart by about "
        f"{max(found):.2g}: take more steps{'' if dtype == 'float64' else ', or states and networks of float64'}"
    )
    ended = run.status(raised)[0]
    if ended is Status.STOPPED and status is not Status.STOPPED:
        worst = max(e.estimated_error for e in raised)
        return (
            raised,
            ended,
            ended.message(f"an estimated error of {worst:.2g} was reached, where {tolerance:g} was asked for: {told}"),
        )
    if status is Status.EXACT:
        return raised, Status.CONVERGED, Status.CONVERGED.message(f"{Status.EXACT.value}, but {told}")
    return raised, status, f"{message}; {told}"


def _spacing(problem: Problem) -> float:
    """The coarsest spacing of the states here and where the chain is a scheduler's own, whose states of 16 bits are told of
    elsewhere (pipelines/loop/driver.py)."""
    single = torch.finfo(torch.float32).eps
    return max(torch.finfo(problem.dtype).eps, min(problem.resolution or 0.0, single))

# SPDX-License-Identifier: Apache-2.0
"""`sample` as the package offers it: with the method that is chosen, where none is named."""

from __future__ import annotations

from typing import cast

import torch

from paradiff.chain.noise import Noise
from paradiff.chain.table import Table
from paradiff.methods.presets import collocation
from paradiff.planning.auto import auto
from paradiff.planning.calibrations import bounded
from paradiff.solver import loop
from paradiff.solver.arguments import Start, begun, evaluates
from paradiff.solver.evaluator import Denoiser, Evaluator
from paradiff.solver.protocol import Evaluate, Method, Observer
from paradiff.solver.row_check import Check
from paradiff.solver.solution import Solution
from paradiff.solver.trajectory import Trajectory


def sample(
    denoiser: Denoiser | Evaluate,
    table: Table,
    noise: Noise,
    method: Method | None = None,
    *,
    start: Start = None,
    dtype: torch.dtype = torch.float32,
    observer: Observer | None = None,
    check: Check = "first",
    trajectory: Trajectory | None = None,
    keep_trajectory: bool = False,
) -> Solution:
    """Samples with one model: drives `solve` with an evaluator, on one device or on several ranks.

    Args:
        denoiser: The model as a function `(x, t) -> m` of rows (evaluator.py), or an evaluator: anything with the members of
            `Evaluate`.
        table: The sampler.
        noise: x[0] and the noises of every sample.
        method: The method (`paradiff.methods`); `auto()` by default, which chooses one and says so in the solution's message,
            and `collocation()` where there is a trajectory to begin from, or to keep. Where it was calibrated on this model and
            chain (`paradiff.calibrate`), the solution has the calibrated bound of its errors beside the estimate.
        start: `[B, ...]` states at node 0 to use instead of the noise's; or what to begin from: a solution of a run on this
            table that kept its trajectory, the trajectory, or the path of its file (docs/warm_starts.md).
        dtype: Dtype of states, float32 or float64.
        observer: Called after each round; it may ask the run to stop.
        check: Which rounds have rows evaluated again and compared, as `drive` has it: `first`, `every` or `off`. With `every`
            the plain loop is walked, too, twice, and its samples are compared with those of the run.
        trajectory: A trajectory to begin from, beside a `start` of states at node 0.
        keep_trajectory: Whether `Solution.trajectory` is kept: the state of every node that the method evaluates.

    Raises:
        ValueError: As `solve`, `Evaluator` and `drive` do.
        RanksFailed: If one of several ranks fails, or was given other arguments.
    """
    states, begin = begun(start, trajectory)
    chosen = method
    if chosen is None:
        chosen = auto() if begin is None and not keep_trajectory else collocation()
    evaluate = denoiser if evaluates(denoiser) else Evaluator(cast(Denoiser, denoiser))
    found = loop.sample(
        evaluate,
        table,
        noise,
        chosen,
        start=states,
        dtype=dtype,
        observer=observer,
        check=check,
        trajectory=begin,
        keep_trajectory=keep_trajectory,
    )
    return found if start is not None or begin is not None else bounded(found, evaluate, table, noise, chosen, dtype)

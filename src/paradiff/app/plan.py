# SPDX-License-Identifier: Apache-2.0
"""The command `paradiff plan`: options turned into a plan, printed, and drawn or written where that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from paradiff.app.environment import choose_device, use_threads
from paradiff.app.pipeline import call_arguments, refuse_pixel_options
from paradiff.app.pixels import make_table, with_defaults
from paradiff.app.request import Request
from paradiff.chain.noise import Keyed
from paradiff.errors import require_whole
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.models.files import is_pixel, read_index
from paradiff.models.pipeline import load_pipeline, set_sampler
from paradiff.models.pixel import load
from paradiff.pipelines.plan import plan as plan_it
from paradiff.planning.latency import LatencyCurve
from paradiff.planning.plan import Plan
from paradiff.solver.evaluator import Evaluator
from paradiff.whole_file import held_places


def plan(
    request: Request, *, devices: int, curve: str | None, pilots: int, batch: int, plot: Path | None, json: Path | None
) -> None:
    """Prints the plan.

    Args:
        request: The options of the model and its chain.
        devices: Devices that share a round's rows, simulated where they are several.
        curve: A latency curve as a text; None for that of this machine.
        pilots: Runs of each method that is tried.
        batch: Samples that are solved together; for pixel models.
        plot: Where seconds against windows are drawn; None for no picture.
        json: Where the plan is written; None for no file.

    Raises:
        ValueError: If an option does not fit the model, or is out of its range.
    """
    require_whole("--batch", batch, 1)
    require_whole("--devices", devices, 1)
    use_threads(request.threads)
    device, dtype = choose_device(request.device), getattr(torch, request.dtype)
    given = None if curve is None else LatencyCurve.of_text(curve)
    tolerance = DEFAULT_TOLERANCE if request.tolerance is None else request.tolerance
    options: dict[str, Any] = {
        "tolerance": tolerance,
        "most": request.window,
        "devices": devices,
        "curve": given,
        "pilots": pilots,
        "objective": request.objective,
        "deadline": request.deadline,
    }
    with held_places(plot, json):
        found = _planned(request, device, dtype, batch, options)
        if plot is not None:
            found.plot(plot)
        if json is not None:
            found.save(json)
    print(found)


def _planned(request: Request, device: torch.device, dtype: torch.dtype, batch: int, options: dict[str, Any]) -> Plan:
    """The plan of a pixel model's chain, or of a pipeline's call."""
    if is_pixel(read_index(request.model)):
        request = with_defaults(request)
        model = load(request.model, device=device, dtype=dtype)
        evaluator = Evaluator(model, max_rows=request.max_rows, device=device, dtype=dtype)
        return plan_it(evaluator, make_table(model, request), Keyed(model.shape, 0, batch), **options)
    if batch != 1:
        raise ValueError(f"--batch is {batch}, and {request.model!r} is called once a seed; leave it out")
    refuse_pixel_options(request)
    pipeline = load_pipeline(request.model, device=device, dtype=dtype, trust_remote_code=request.trust_remote_code)
    if request.sampler is not None:
        set_sampler(pipeline, request.sampler)
    return plan_it(pipeline, call_arguments(pipeline, request), **options)

# SPDX-License-Identifier: Apache-2.0
"""The command `paradiff calibrate`: options turned into a calibration, which is kept, printed, and written where that was asked
for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console

from paradiff.app.environment import choose_device, use_threads
from paradiff.app.options import parse_seeds
from paradiff.app.pipeline import call_arguments, refuse_pixel_options
from paradiff.app.pixels import make_table, with_defaults
from paradiff.app.request import Request
from paradiff.models.files import is_pixel, read_index
from paradiff.models.pipeline import load_pipeline, set_sampler
from paradiff.models.pixel import load
from paradiff.pipelines.calibrate import calibrate as calibrate_it
from paradiff.planning.calibration import Calibration
from paradiff.planning.calibrations import require_calibrated
from paradiff.planning.store import cache_folder
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.protocol import Method
from paradiff.whole_file import held_places, write_whole


def calibrate(request: Request, method: Method, *, coverage: float, file: Path | None) -> None:
    """Prints the calibration.

    Args:
        request: The options of the model, its chain and its seeds.
        method: The method.
        coverage: The share of samples that the bound is to hold for.
        file: Where the calibration is also written; None for no file.

    Raises:
        ValueError: If an option does not fit the model, or is out of its range.
    """
    require_calibrated(method, parse_seeds(request.seeds), coverage)
    with held_places(file):
        use_threads(request.threads)
        found = _calibrated(request, method, coverage)
        if file is not None:
            write_whole(file, f"{json.dumps(found.to_json(), indent=1)}\n".encode())
    console = Console(highlight=False)
    console.print(str(found), soft_wrap=True, markup=False)
    folder = cache_folder()
    if folder is None:
        console.print("it was not kept, since PARADIFF_CACHE is empty; name a folder there, and runs state the bound")
    elif not found.notes:
        console.print(f"kept in {folder}; runs of this model, chain and method state the bound", soft_wrap=True, markup=False)


def _calibrated(request: Request, method: Method, coverage: float) -> Calibration:
    """The calibration of a pixel model's chain, or of a pipeline's call."""
    device, dtype, seeds = choose_device(request.device), getattr(torch, request.dtype), parse_seeds(request.seeds)
    if is_pixel(read_index(request.model)):
        request = with_defaults(request)
        model = load(request.model, device=device, dtype=dtype)
        evaluator = Evaluator(model, max_rows=request.max_rows, device=device, dtype=dtype)
        return calibrate_it(evaluator, make_table(model, request), method, seeds, coverage=coverage)
    refuse_pixel_options(request)
    if request.max_rows is not None:
        raise ValueError(
            f"--max-rows is {request.max_rows}, and calls of {request.model!r} are calibrated without; leave it out"
        )
    pipeline = load_pipeline(request.model, device=device, dtype=dtype, trust_remote_code=request.trust_remote_code)
    if request.sampler is not None:
        set_sampler(pipeline, request.sampler)
    return calibrate_it(pipeline, call_arguments(pipeline, request), method, seeds, coverage=coverage)

# SPDX-License-Identifier: Apache-2.0
"""The command `paradiff explain`: options turned into a forecast of a parallel run."""

from __future__ import annotations

from typing import Any, cast

import torch

from paradiff.app.environment import choose_device, use_threads
from paradiff.app.pipeline import call_arguments, refuse_eta, refuse_steps
from paradiff.app.request import Request
from paradiff.errors import require_real
from paradiff.models.pipeline import load_pipeline, set_sampler
from paradiff.pipelines import explanation

OF_A_CALL = ("prompt", "negative_prompt", "guidance", "size")


def explain(request: Request, method: Any, *, timed: bool) -> None:
    """Prints the forecast.

    Args:
        request: The options; those of a call count where its networks are timed.
        method: The method.
        timed: Whether a call is made up to its second pass and its networks are timed.

    Raises:
        ValueError: If an option of a call is given and nothing is timed, or an option does not fit the pipeline.
    """
    refuse_steps(request.steps)
    given = [f"--{name.replace('_', '-')}" for name in OF_A_CALL if getattr(request, name) is not None]
    given += ["--argument"] * bool(request.argument)
    if given and not timed:
        raise ValueError(f"{given[0]} is for a call, and none is made; give --time, too, or leave it out")
    options = {} if request.eta is None else {"eta": request.eta}
    if request.eta is not None:
        require_real("eta", request.eta)
    use_threads(request.threads)
    place: dict[str, Any] = {}
    if timed:
        place = {"device": choose_device(request.device), "dtype": getattr(torch, request.dtype)}
    pipeline = load_pipeline(request.model, trust_remote_code=request.trust_remote_code, **place)
    if request.sampler is not None:
        set_sampler(pipeline, request.sampler)
    if options:
        refuse_eta(cast(Any, pipeline).scheduler)
    call = call_arguments(pipeline, request) if timed else None
    print(explanation.explain(pipeline, method, num_inference_steps=request.steps, call=call, **cast(dict[str, Any], options)))

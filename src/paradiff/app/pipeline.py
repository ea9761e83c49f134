# SPDX-License-Identifier: Apache-2.0
"""Pipelines with a loop of their own: options turned into the arguments of a call, and what came of each seed's into files."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from paradiff.app import plots
from paradiff.app.calls import Call, call_each
from paradiff.app.environment import environment
from paradiff.app.options import MOST_STEPS, effective_options, parse_argument, parse_size
from paradiff.app.outcome import CutShort, Outcome, Writer
from paradiff.app.previews import previews_into
from paradiff.app.request import Job, Request
from paradiff.app.run_json import Heading, pipeline_report
from paradiff.errors import require_real, shown
from paradiff.models.pipeline import load_pipeline, set_sampler
from paradiff.pipelines.pictures import pictures_of
from paradiff.solver.machine import Machine
from paradiff.solver.protocol import Observer
from paradiff.solver.trajectory import joined

PIXELS_ONLY = ("grid", "form")

NAMES = {"prompt": "prompt", "negative_prompt": "negative_prompt", "guidance": "guidance_scale", "eta": "eta"}
NAMES |= {"steps": "num_inference_steps"}
"""Options, and the arguments of a pipeline's call that they are."""

OWN = {"generator": "--seeds gives it", "output_type": "this command saves pictures and sound"}
OWN |= {"return_dict": "this command reads the result", "callback_on_step_end": "code cannot be given here"}
OWN |= {"callback": "code cannot be given here", "callback_steps": "code cannot be given here"}
OWN |= {"callback_on_step_end_tensor_inputs": "code cannot be given here"}
"""Arguments that `--argument` cannot give, and why."""


def refuse_pixel_options(request: Request) -> None:
    """Refuses what is for unconditional pixel models alone.

    Raises:
        ValueError: If there is such an option.
    """
    for name in PIXELS_ONLY:
        if getattr(request, name) is not None:
            raise ValueError(
                f"{option(name)} was given, but {request.model!r} is called through its own pipeline, which has none; it is "
                "for unconditional pixel models, such as digits"
            )
    if request.noise == "keyed":
        raise ValueError(
            f"noise is 'keyed', but {request.model!r} is called through its own pipeline, which draws its noise itself; leave "
            "out --noise"
        )


def sample_pipeline(job: Job, console: Console) -> Outcome:
    """Calls a pipeline once for each seed."""
    request = job.request
    pipeline = load_pipeline(
        request.model,
        device=job.device,
        dtype=job.dtype,
        trust_remote_code=request.trust_remote_code,
        machine=None if job.ranks is None else Machine(job.ranks),
    )
    if request.sampler is not None:
        set_sampler(pipeline, request.sampler)
    given = call_arguments(pipeline, request)
    calls: list[Call] = []
    observing: Callable[[int], Observer] | None = None
    if request.previews is not None:
        if job.ranks is not None:
            raise ValueError("--previews was given on several ranks, of which none has all states at once; leave it out")
        folder = Path(request.previews)
        estimates = f"estimated errors are of the {type(pipeline).__name__}'s states, in their units"
        console.print(estimates, soft_wrap=True, markup=False)

        def decoded(sample: Tensor) -> Tensor | None:
            return pictures_of(pipeline, sample.flatten(0, 1))

        def previews_of(seed: int) -> Observer:
            return previews_into(folder, console, name=f"seed-{seed}-", pictures=decoded)

        observing = previews_of

    try:
        call_each(
            pipeline,
            job.method,
            given,
            job.seeds,
            calls,
            max_rows=request.max_rows,
            deadline=job.deadline,
            compare=request.compare,
            ranks=job.ranks,
            devices=job.devices,
            begin=job.begin,
            keep=request.save_trajectory is not None,
            observing=observing,
        )
    except (Exception, KeyboardInterrupt) as cause:
        if not calls:
            raise
        seeds = ", ".join(str(call.seed) for call in calls)
        finished = f"seed {seeds} is finished" if len(calls) == 1 else f"seeds {seeds} are finished"
        raise CutShort(finished, pictures(calls)) from cause
    if job.notice:  # only a call itself shows what its pipeline refuses
        console.print(job.notice, soft_wrap=True, markup=False)
    for warning in dict.fromkeys(text for call in calls for text in call.report.warnings):
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)
    kept = [call.report.trajectory for call in calls if call.report.trajectory is not None]
    if request.save_trajectory is not None and len(kept) < len(calls):
        console.print("warning: no trajectory was saved, since a call was sequential", soft_wrap=True)
    writers = pictures(calls)
    if request.trace:
        drawn = trace(calls)
        writers += drawn
        if not drawn:
            console.print("warning: no trace was drawn, since no call ran in parallel", soft_wrap=True)
    kind, report = type(pipeline).__name__, calls[0].report
    steps = "" if report.steps is None else f"{report.steps} steps, "
    heading = Heading(arguments=request.to_json(), effective=effective(job, calls), environment=environment(job.device))
    contents = pipeline_report(heading, kind, calls, given)
    title = f"{kind}, {report.scheduler}, {steps}{job.counted()}"
    trajectory = joined(kept) if len(kept) == len(calls) else None
    return Outcome(contents=contents, title=title, writers=writers, trajectory=trajectory)


def effective(job: Job, calls: Sequence[Call]) -> dict[str, Any]:
    """The method's options as they took effect in the calls that ran in parallel; all calls have the same chain."""
    options = effective_options(job.method, job.called)
    report = next((call.report for call in calls if call.report.steps is not None), calls[0].report)
    for name, found in (("blocks", report.parts), ("window", report.window), ("tolerance", report.tolerance)):
        if name in options and found is not None and (options[name] is None or name == "tolerance"):
            options[name] = found
    shared = {"tolerance": report.tolerance, "window": report.window, "parts": report.parts, "unit": report.unit}
    return {**shared, "method_options": options}


def option(name: str) -> str:
    """An option as it is written."""
    return "--" + name.replace("_", "-")


def call_arguments(pipeline: Any, request: Request) -> dict[str, Any]:
    """The arguments of a pipeline's call that the options ask for.

    Args:
        pipeline: The pipeline, with the scheduler that it will run with.
        request: The options.

    Raises:
        ValueError: If the pipeline takes no such argument, two options give the same one, or one that it needs is missing.
    """
    refuse_steps(request.steps)
    refuse_not_finite(request)
    kind = type(pipeline).__name__
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {k: p for k, p in inspect.signature(pipeline.__call__).parameters.items() if p.kind in kinds}
    named = [(option(o), name, getattr(request, o)) for o, name in NAMES.items()]
    given: list[tuple[str, str, Any]] = [entry for entry in named if entry[2] is not None]
    if request.size is not None:
        width, height = parse_size(request.size)
        given += [("--size", "width", width), ("--size", "height", height)]
    given += [("--argument", *parse_argument(text)) for text in request.argument]
    arguments: dict[str, Any] = {}
    for source, name, value in given:
        if name in OWN:
            raise ValueError(f"{source} gives {name}, which cannot be given: {OWN[name]}")
        if name not in parameters:
            takes = ", ".join(k for k in parameters if k not in OWN)
            raise ValueError(f"{source} gives {name}, but the {kind} takes no such argument; it takes {takes}")
        if name in arguments:
            raise ValueError(f"{source} gives {name}, which was given before; give it once")
        arguments[name] = value
    if "generator" not in parameters:
        raise ValueError(f"the {kind} takes no generator, so no seed decides on what it draws; call it from Python")
    if "prompt" in parameters and not {"prompt", "prompt_embeds"} & set(arguments):
        raise ValueError(f'the {kind} needs a prompt; give one, such as --prompt "a red circle left of a blue square"')
    missing = next((k for k, p in parameters.items() if p.default is p.empty and k not in arguments), None)
    if missing is not None:
        raise ValueError(f"the {kind} needs {missing}; give it as --argument {missing}=VALUE")
    if arguments.get("eta") is not None:
        refuse_eta(pipeline.scheduler)
    return arguments | ({"output_type": "np"} if "output_type" in parameters else {})


def refuse_steps(steps: int | None) -> None:
    """Refuses a chain without steps, which a scheduler would divide by, and one of more than any scheduler is made for.

    Raises:
        ValueError: If a number of steps was given that is below 1 or above MOST_STEPS.
    """
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"{shown(steps)} steps were asked for; give at least 1 and at most {MOST_STEPS}")


def refuse_not_finite(request: Request) -> None:
    """Refuses numbers with which every picture would be NaN.

    Raises:
        ValueError: If the guidance is not finite, or eta is not finite or below 0.
    """
    if request.guidance is not None and not math.isfinite(request.guidance):
        raise ValueError(f"guidance is {request.guidance:g}; it must be a finite number")
    if request.eta is not None:
        require_real("eta", request.eta)


def refuse_eta(scheduler: Any) -> None:
    """Refuses an eta for a scheduler that would pass over it.

    Raises:
        ValueError: If the scheduler's step takes none.
    """
    if "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(
            f"eta was given, but the scheduler, a {type(scheduler).__name__}, has no eta; give it with --sampler ddim"
        )


def pictures(calls: Sequence[Call]) -> list[Writer]:
    """What writes the files of each seed, and samples.png, which shows all of them."""
    writers: list[Writer] = [partial(call.output.save, name=f"seed-{call.seed}") for call in calls]
    if any(call.output.pictures is not None for call in calls):
        writers.append(partial(_save_together, calls))
    return writers


def _save_together(calls: Sequence[Call], folder: Path) -> None:
    """Writes samples.png."""
    sheets = [sheet for call in calls if (sheet := call.output.sheet()) is not None]
    plots.grid(torch.stack([_pixels(np.array(sheet)) for sheet in sheets])).save(folder / "samples.png", format="PNG")


def trace(calls: Sequence[Call]) -> list[Writer]:
    """What draws the slowest seed's run; nothing where all seeds ran sequentially."""
    parallel = [call for call in calls if call.report.history]
    if not parallel:
        return []
    slowest = max(parallel, key=lambda call: call.report.rounds)
    report = slowest.report
    title = f"{report.scheduler}, {report.steps} steps, {report.method}: seed {slowest.seed}, the slowest of {len(calls)}"
    total = sum(record.passed for record in report.history)
    return [lambda folder: plots.save_history(report.history, 0, total, folder / "trace.png", title)]


def _pixels(levels: np.ndarray) -> Tensor:
    """8-bit levels as a picture `[C, H, W]` from -1 to 1."""
    picture = torch.from_numpy(levels).float() / 127.5 - 1
    return picture[None] if picture.ndim == 2 else picture.permute(2, 0, 1)

"""The command line's pipelines: options turned into the arguments of a pipeline's call, and what came of it into files."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paradiff.app import plots
from paradiff.app.calls import Call

PIXEL = ("grid", "form")
"""Options of unconditional pixel models alone."""

PIPELINE = ("prompt", "negative_prompt", "guidance", "size", "argument", "trust_remote_code")
"""Options of pipelines alone."""

NAMES = {"prompt": "prompt", "negative_prompt": "negative_prompt", "guidance": "guidance_scale", "eta": "eta"}
NAMES |= {"steps": "num_inference_steps"}
"""Options, and the arguments of a pipeline's call that they are."""

OWN = {"generator": "--seeds gives it", "output_type": "this command saves pictures and sound"}
OWN |= {"return_dict": "this command reads the result", "callback_on_step_end": "code cannot be given here"}
OWN |= {"callback": "code cannot be given here", "callback_steps": "code cannot be given here"}
OWN |= {"callback_on_step_end_tensor_inputs": "code cannot be given here"}
"""Arguments that `--argument` cannot give, and why."""


def refuse_pixel_options(model: str, options: Mapping[str, Any]) -> None:
    """Refuses what an unconditional pixel model was given for a pipeline.

    Raises:
        ValueError: If there is such an option.
    """
    for name in PIPELINE:
        if options[name] not in (None, False, []):
            raise ValueError(
                f"{option(name)} was given, but {model!r} is an unconditional pixel model, which takes none; it is for other "
                "pipelines, such as those that follow a text"
            )


def refuse_pipeline_options(model: str, options: Mapping[str, Any]) -> None:
    """Refuses what a pipeline was given for an unconditional pixel model.

    Raises:
        ValueError: If there is such an option.
    """
    for name in PIXEL:
        if options[name] is not None:
            raise ValueError(
                f"{option(name)} was given, but {model!r} is called through its own pipeline, which has none; it is for "
                "unconditional pixel models, such as digits"
            )
    if options["noise"] == "keyed":
        raise ValueError(
            f"noise is 'keyed', but {model!r} is called through its own pipeline, which draws its noise itself; leave out "
            "--noise"
        )


def option(name: str) -> str:
    """An option as it is written."""
    return "--" + name.replace("_", "-")


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from WIDTHxHEIGHT.

    Raises:
        ValueError: If the text is no such pair.
    """
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise ValueError(f"the size is {text!r}; give width and height in pixels as WIDTHxHEIGHT, such as 768x512")
    return int(found[1]), int(found[2])


def parse_argument(text: str) -> tuple[str, Any]:
    """Name and value from NAME=VALUE; the value as JSON where it is JSON, else as text.

    Raises:
        ValueError: If the text is no such pair.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"the argument is {text!r}; give it as NAME=VALUE, such as guidance_rescale=0.7")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def call_arguments(pipeline: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call that the options ask for.

    Args:
        pipeline: The pipeline, with the scheduler that it will run with.
        options: The command line's, None where not given.

    Raises:
        ValueError: If the pipeline takes no such argument, two options give the same one, or one that it needs is missing.
    """
    refuse_no_steps(options["steps"])
    kind = type(pipeline).__name__
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {k: p for k, p in inspect.signature(pipeline.__call__).parameters.items() if p.kind in kinds}
    given: list[tuple[str, str, Any]] = [(option(o), n, options[o]) for o, n in NAMES.items() if options[o] is not None]
    if options["size"] is not None:
        width, height = parse_size(options["size"])
        given += [("--size", "width", width), ("--size", "height", height)]
    given += [("--argument", *parse_argument(text)) for text in options["argument"] or []]
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


def refuse_no_steps(steps: int | None) -> None:
    """Refuses a chain without steps, which a scheduler would divide by.

    Raises:
        ValueError: If a number of steps was given that is below 1.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"{steps} steps were asked for; give at least 1")


def refuse_eta(scheduler: Any) -> None:
    """Refuses an eta for a scheduler that would pass over it.

    Raises:
        ValueError: If the scheduler's step takes none.
    """
    if "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(
            f"eta was given, but the scheduler, a {type(scheduler).__name__}, has no eta; give it with --sampler ddim"
        )


def save(calls: Sequence[Call], folder: Path) -> None:
    """Writes what each seed gave, and samples.png, which shows all of them."""
    sheets = []
    for call in calls:
        call.output.save(folder, f"seed-{call.seed}")
        sheet = call.output.sheet()
        if sheet is not None:
            sheets.append(_pixels(np.array(sheet)))
    if sheets:
        plots.grid(torch.stack(sheets)).save(folder / "samples.png", format="PNG")


def save_trace(calls: Sequence[Call], path: Path) -> bool:
    """Draws the slowest seed's run; False where all seeds ran sequentially."""
    parallel = [call for call in calls if call.report.history]
    if not parallel:
        return False
    slowest = max(parallel, key=lambda call: call.report.rounds)
    report = slowest.report
    title = f"{report.scheduler}, {report.steps} steps, {report.method}: seed {slowest.seed}, the slowest of {len(calls)}"
    total = sum(record.passed for record in report.history)
    plots.save_history(report.history, 0, total, path, title)
    return True


def _pixels(levels: np.ndarray) -> Tensor:
    """8-bit levels as a picture `[C, H, W]` from -1 to 1."""
    picture = torch.from_numpy(levels).float() / 127.5 - 1
    return picture[None] if picture.ndim == 2 else picture.permute(2, 0, 1)

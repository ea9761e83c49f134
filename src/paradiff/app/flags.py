# SPDX-License-Identifier: Apache-2.0
"""Options and arguments that commands share, as typer takes them.

Importing this module loads no torch: help, and refusals of options that are mistyped, need none of it.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from paradiff.app.ends import LATE
from paradiff.app.launched import TIMEOUT
from paradiff.app.options import PRESETS, read_value
from paradiff.app.parameters import Option

DTYPES = ("float32", "bfloat16", "float16")
NOISES = ("recorded", "keyed")

OUT = "paradiff-out"
"""The folder of a run that was given none; of the next one, `paradiff-out-2`."""

SAMPLERS = ("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m")
EXPONENTIAL = ("exponential_sde", "exponential_ode")

CHAIN, METHOD, OUTPUT, DEVICE, PIPELINES = "Model and chain", "Method", "Output", "Device", "Pipelines"

MODEL_HELP = "A bundled model such as `digits`, a folder in diffusers' pipeline format, or a hub id."
SAMPLER_HELP = f"One of {', '.join(SAMPLERS)}; for pixel models (ddpm by default) also {' and '.join(EXPONENTIAL)}, which take "
SAMPLER_HELP += "--grid and --form; for pipelines (their own by default) also a scheduler class of diffusers. ddim takes --eta."
STEPS_HELP = "Steps of the chain; 1000 for a pixel model, a pipeline's own number by default."
METHOD_HELP = f"One of {', '.join(PRESETS)}; `paradiff methods` says what they are. auto chooses among them."
OPTION_HELP = (
    "An option of the method, such as blocks=20, or objective=evaluations of auto; repeatable. `paradiff methods NAME` "
)
OPTION_HELP += "lists them."
OBJECTIVE_HELP = (
    "What auto makes least: latency (default), evaluations, or memory; or anytime: previews from the first round on."
)
WINDOW_HELP = "Nodes, or blocks, solved at once; none, for the whole chain, by default."
NOISE_HELP = "`recorded`: the draws of diffusers with each seed; pixel models: `keyed`, the same on every device."
DEVICE_HELP = "cpu, cuda, cuda:1, mps, or auto"
SEVERAL_HELP = f"{DEVICE_HELP}; all, or several such as cuda:0,cuda:1, which share each round."
ARGUMENT_HELP = "Any other argument of their call, such as negative_prompt=fog or width=512, JSON or text; repeatable."


class Command(TyperCommand):
    """A command that takes no empty text for an option: an unset variable of the shell is no wish for the default."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the command's arguments.

        Raises:
            ValueError: If the value of an option or argument is empty, or holds a NUL character.
        """
        given, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in order:
            value = given.get(parameter.name)
            texts = value if isinstance(value, list | tuple) else [value]
            texts = [text for text in texts if isinstance(text, str)]
            name = max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.name.upper()
            if not all(text.strip() for text in texts):
                raise ValueError(f"{name} is empty; give it a value, or leave it out")
            if any("\0" in text for text in texts):
                raise ValueError(f"{name} holds a NUL character, which no name, number or prompt has; leave it out")
        return super().parse_args(ctx, args)


def _parse_window(text: str) -> int | None:
    """A window from its text; `none` is the whole chain, as without the option.

    Raises:
        BadParameter: If the text is no whole number.
    """
    try:
        return cast(int | None, read_value("the window", text, int | None))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


# -- model and chain ---------------------------------------------------------------------------------------------------

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Sampler = Annotated[str | None, typer.Option(help=SAMPLER_HELP, rich_help_panel=CHAIN)]
Steps = Annotated[int | None, typer.Option(help=STEPS_HELP, rich_help_panel=CHAIN)]
Eta = Annotated[
    float | None,
    typer.Option(help="Share of the DDPM noise that ddim adds, 0 to 1; 0 by default.", rich_help_panel=CHAIN, hidden=True),
]
Grid = Annotated[str | None, typer.Option(help="Levels: log-snr (default) or uniform.", hidden=True)]
Form = Annotated[str | None, typer.Option(help="What a step freezes: clean (default), epsilon or score.", hidden=True)]
Seeds = Annotated[str, typer.Option(help="Seeds, one sample each: 0-15, or 0,3,7-9.", rich_help_panel=CHAIN)]
Noise = Annotated[str, typer.Option(help=NOISE_HELP, rich_help_panel=CHAIN)]

# -- method ------------------------------------------------------------------------------------------------------------

MethodName = Annotated[str, typer.Option(help=METHOD_HELP, rich_help_panel=METHOD)]
MethodOption = Annotated[
    list[str],
    typer.Option("--method-option", "-m", metavar="NAME=VALUE", help=OPTION_HELP, rich_help_panel=METHOD),
]
Window = Annotated[int | None, typer.Option(help=WINDOW_HELP, metavar="<int>", parser=_parse_window, rich_help_panel=METHOD)]
Objective = Annotated[
    str | None,
    typer.Option(
        metavar="WHAT",
        help=OBJECTIVE_HELP,
        rich_help_panel=METHOD,
        hidden=True,
    ),
]
Previews = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Write a picture of the samples after every round, and print its estimated error.",
        rich_help_panel=OUTPUT,
    ),
]
Tolerance = Annotated[
    float | None, typer.Option(help="What the method's rule allows; its own by default.", rich_help_panel=METHOD)
]

# -- device ------------------------------------------------------------------------------------------------------------

Device = Annotated[str, typer.Option(help=f"{DEVICE_HELP}.", rich_help_panel=DEVICE)]
Devices = Annotated[str, typer.Option(help=SEVERAL_HELP, rich_help_panel=DEVICE)]
Dtype = Annotated[
    str, typer.Option(help=f"The network's dtype: {', '.join(DTYPES)}; states are float32.", rich_help_panel=DEVICE)
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all cores by default.", rich_help_panel=DEVICE)]
MaxRows = Annotated[
    int | None, typer.Option(help="Most rows in one network call; no bound by default.", rich_help_panel=DEVICE)
]

Timeout = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help=f"Time within which ranks that torchrun started end where one of them stops or hangs; {TIMEOUT:g} by default.",
        rich_help_panel=DEVICE,
        hidden=True,
    ),
]

# -- output ------------------------------------------------------------------------------------------------------------

Out = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER", help=f"Output folder; {OUT} by default, or {OUT}-2, ... if it is used.", rich_help_panel=OUTPUT
    ),
]
Compare = Annotated[
    bool, typer.Option("--compare", help="Also run the sequential chain, in the same process.", rich_help_panel=OUTPUT)
]
Start = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Begin from the trajectory that --save-trajectory wrote, of the same chain.",
        rich_help_panel=METHOD,
    ),
]
SaveTrajectory = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write the run's trajectory, for --start: safetensors.", rich_help_panel=OUTPUT),
]
Trace = Annotated[
    bool,
    typer.Option("--trace", help="Draw trace.png: change by node, or iteration by block, and round.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace files in an output folder that is not empty.", rich_help_panel=OUTPUT)
]
Deadline = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help=f"Time within which auto finds the best sample; a call that would end later ends with the best that is known, and "
        f"the exit code is {LATE}.",
        rich_help_panel=METHOD,
    ),
]

# -- pipelines ---------------------------------------------------------------------------------------------------------

Prompt = Annotated[str | None, typer.Option(help="The text to follow.", rich_help_panel=PIPELINES)]
NegativePrompt = Annotated[str | None, typer.Option(help="The text to keep away from.", rich_help_panel=PIPELINES, hidden=True)]
Guidance = Annotated[float | None, typer.Option(help="guidance_scale; their own by default.", rich_help_panel=PIPELINES)]
Size = Annotated[
    str | None,
    typer.Option(metavar="WIDTHxHEIGHT", help="In pixels; their own by default.", rich_help_panel=PIPELINES, hidden=True),
]
Argument = Annotated[list[str], typer.Option(metavar="NAME=VALUE", help=ARGUMENT_HELP, rich_help_panel=PIPELINES)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel=PIPELINES)
]

# -- options that a command takes in its own way -----------------------------------------------------------------------

BULK: dict[str, Option] = {
    "model": (Model, ...),
    "seeds": (
        Annotated[str, typer.Option(help="Seeds, one sample each: 0-49999, or 0,3,7-9.", rich_help_panel=CHAIN)],
        ...,
    ),
    "method": (
        Annotated[
            str,
            typer.Option(
                help="As of `paradiff sample`; not auto, whose choices depend on the clock, and bytes would.",
                rich_help_panel=METHOD,
            ),
        ],
        "parasolver",
    ),
    "out": (
        Annotated[
            str,
            typer.Option(
                metavar="FOLDER",
                help="Output folder; that of a run that was cut short is gone on with.",
                rich_help_panel=OUTPUT,
            ),
        ],
        ...,
    ),
    "device": (
        Annotated[
            str,
            typer.Option(
                help=f"{DEVICE_HELP}; all, or several such as cuda:0,cuda:1, each with shards of its own.",
                rich_help_panel=DEVICE,
            ),
        ],
        "auto",
    ),
    "threads": (
        Annotated[int, typer.Option(help="CPU threads of each process, which bytes depend on.", rich_help_panel=DEVICE)],
        1,
    ),
    "deadline": (
        Annotated[
            float | None,
            typer.Option(
                metavar="SECONDS",
                help=f"Time after which no shard is begun; the exit code is then {LATE}, and the run can be gone on with.",
                rich_help_panel=OUTPUT,
            ),
        ],
        None,
    ),
}
"""Of `paradiff generate`."""

OF_A_SAMPLE = ("grid", "form", "seeds", "noise", "out", "compare", "trace", "overwrite", "timeout", "deadline", "previews")
OF_A_SAMPLE += ("start", "save_trajectory")
"""Options that only commands have that sample."""

OTHERS_THAN_SERVED = tuple(name for name in OF_A_SAMPLE if name not in ("grid", "form", "out"))
OTHERS_THAN_SERVED += ("method", "method_option", "window", "tolerance", "objective", "prompt", "negative_prompt", "guidance")
OTHERS_THAN_SERVED += ("size", "argument", "trust_remote_code")
"""Options that `paradiff serve` has not: they are its requests', or of calls that it does not make."""

SERVED: dict[str, Option] = {
    "sampler": (
        Annotated[
            str | None, typer.Option(help="That of requests that name none; ddpm, or a pipeline's own.", rich_help_panel=CHAIN)
        ],
        None,
    ),
    "steps": (
        Annotated[
            int | None, typer.Option(help="Steps of requests that name none; 1000, or a pipeline's own.", rich_help_panel=CHAIN)
        ],
        None,
    ),
    "device": (Device, "auto"),
    "out": (
        Annotated[
            str | None,
            typer.Option(
                metavar="FOLDER",
                help="Write requests and samples there; what a killed server left, the next one solves. Memory by default.",
                rich_help_panel=OUTPUT,
            ),
        ],
        None,
    ),
}
"""Of `paradiff serve`."""

OF_A_PIPELINE: dict[str, Option] = {
    "model": (Model, ...),
    "sampler": (Annotated[str | None, typer.Option(help="As of `paradiff sample`.", rich_help_panel=CHAIN)], None),
    "steps": (
        Annotated[
            int | None, typer.Option(help="Steps of the chain; the pipeline's own number by default.", rich_help_panel=CHAIN)
        ],
        None,
    ),
    "eta": (
        Annotated[float | None, typer.Option(help="Share of the DDPM noise that ddim adds, 0 to 1.", rich_help_panel=CHAIN)],
        None,
    ),
    "device": (Device, "auto"),
}
"""Of commands that only look at a pipeline."""

OF_A_PLAN: dict[str, Option] = {
    "model": (Model, ...),
    "window": (
        Annotated[
            int | None, typer.Option(help="Most rows of a sample in a round; no bound by default.", rich_help_panel=METHOD)
        ],
        None,
    ),
    "tolerance": (
        Annotated[
            float | None,
            typer.Option(
                help="Root mean square error that a sample may have by estimate; 4e-3 by default.", rich_help_panel=METHOD
            ),
        ],
        None,
    ),
    "objective": (Annotated[str | None, typer.Option(metavar="WHAT", help=OBJECTIVE_HELP, rich_help_panel=METHOD)], None),
    "deadline": (
        Annotated[
            float | None,
            typer.Option(metavar="SECONDS", help="Time within which the best sample is wanted.", rich_help_panel=METHOD),
        ],
        None,
    ),
    "device": (Device, "auto"),
}
"""Of `paradiff plan`."""

OTHERS_THAN_CALIBRATED = ("objective", *(name for name in OF_A_SAMPLE if name not in ("grid", "form", "seeds")))
"""Options that `paradiff calibrate` has not."""

CALIBRATED: dict[str, Option] = {
    "model": (Model, ...),
    "seeds": (
        Annotated[
            str,
            typer.Option(
                help="Seeds to measure on, such as 1000-1098: at least 19 for a coverage of 0.95, 99 for 0.99.",
                rich_help_panel=CHAIN,
            ),
        ],
        "1000000-1000038",
    ),
    "method": (
        Annotated[
            str,
            typer.Option(
                help="As of `paradiff sample`; not auto, which chooses anew for each run.",
                rich_help_panel=METHOD,
            ),
        ],
        ...,
    ),
    "device": (Device, "auto"),
}
"""Of `paradiff calibrate`."""

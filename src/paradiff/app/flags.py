# SPDX-License-Identifier: Apache-2.0
"""Options and arguments that commands share, as typer takes them.

Importing this module loads no torch: help, and refusals of options that are mistyped, need none of it.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand

from paradiff.app.launched import TIMEOUT
from paradiff.app.options import PRESETS, read_value
from paradiff.app.request import DTYPES

SAMPLERS = ("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m")
EXPONENTIAL = ("exponential_sde", "exponential_ode")

CHAIN, METHOD, OUTPUT, DEVICE, PIPELINES = "Model and chain", "Method", "Output", "Device", "Pipelines"

MODEL_HELP = "A bundled model such as `digits`, a folder in diffusers' pipeline format, or a hub id."
SAMPLER_HELP = f"One of {', '.join(SAMPLERS)}; for pixel models (ddpm by default) also {' and '.join(EXPONENTIAL)}, which take "
SAMPLER_HELP += "--grid and --form; for pipelines (their own by default) also a scheduler class of diffusers."
STEPS_HELP = "Steps of the chain; 1000 for a pixel model, a pipeline's own number by default."
METHOD_HELP = f"One of {', '.join(PRESETS)}; `paradiff methods` says what they are."
OPTION_HELP = "An option of the method, such as blocks=20; repeatable. `paradiff methods NAME` lists them."
WINDOW_HELP = "Nodes, or blocks, solved at once; none, for the whole chain, by default."
NOISE_HELP = "`recorded`: the draws of diffusers with each seed; pixel models: `keyed`, the same on every device."
DEVICE_HELP = "cpu, cuda, cuda:1, mps, or auto"
ARGUMENT_HELP = "Any other argument of their call, JSON or text; repeatable."


class Command(TyperCommand):
    """A command that takes no empty text for an option: an unset variable of the shell is no wish for the default."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the command's arguments.

        Raises:
            ValueError: If the value of an option or argument is empty.
        """
        given, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in order:
            value = given.get(parameter.name)
            texts = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(text, str) and not text.strip() for text in texts):
                name = max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.name.upper()
                raise ValueError(f"{name} is empty; give it a value, or leave it out")
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
    float | None, typer.Option(help="Share of the DDPM noise that ddim adds, 0 to 1; 0 by default.", rich_help_panel=CHAIN)
]
Grid = Annotated[str | None, typer.Option(help="Levels: log-snr (default) or uniform.", hidden=True)]
Form = Annotated[str | None, typer.Option(help="What a step freezes: clean (default), epsilon or score.", hidden=True)]
Seeds = Annotated[str, typer.Option(help="Seeds, one sample each: 0-15, or 0,3,7-9.", rich_help_panel=CHAIN)]
Noise = Annotated[str, typer.Option(help=NOISE_HELP, rich_help_panel=CHAIN)]

# -- method ------------------------------------------------------------------------------------------------------------

MethodName = Annotated[str, typer.Option(help=METHOD_HELP, rich_help_panel=METHOD)]
MethodOption = Annotated[
    list[str] | None,
    typer.Option("--method-option", "-m", metavar="NAME=VALUE", help=OPTION_HELP, rich_help_panel=METHOD),
]
Window = Annotated[int | None, typer.Option(help=WINDOW_HELP, metavar="<int>", parser=_parse_window, rich_help_panel=METHOD)]
Tolerance = Annotated[
    float | None, typer.Option(help="What the method's rule allows; its own by default.", rich_help_panel=METHOD)
]

# -- device ------------------------------------------------------------------------------------------------------------

Device = Annotated[str, typer.Option(help=f"{DEVICE_HELP}.", rich_help_panel=DEVICE)]
DeviceOrSeveral = Annotated[
    str, typer.Option(help=f"{DEVICE_HELP}; several by --devices all, or --devices cuda:0,cuda:1.", rich_help_panel=DEVICE)
]
Devices = Annotated[
    str | None,
    typer.Option(
        metavar="all|NAME,NAME",
        help="Devices of this machine that share each round, in one process, in place of --device: all, or cuda:0,cuda:1.",
        rich_help_panel=DEVICE,
        hidden=True,
    ),
]
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

# -- pipelines ---------------------------------------------------------------------------------------------------------

Prompt = Annotated[str | None, typer.Option(help="The text to follow.", rich_help_panel=PIPELINES)]
NegativePrompt = Annotated[str | None, typer.Option(help="The text to keep away from.", rich_help_panel=PIPELINES)]
Guidance = Annotated[float | None, typer.Option(help="guidance_scale; their own by default.", rich_help_panel=PIPELINES)]
Size = Annotated[
    str | None, typer.Option(metavar="WIDTHxHEIGHT", help="In pixels; their own by default.", rich_help_panel=PIPELINES)
]
Argument = Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help=ARGUMENT_HELP, rich_help_panel=PIPELINES)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel=PIPELINES)
]

# SPDX-License-Identifier: Apache-2.0
"""The command line: `paradiff sample`, `paradiff explain` and `paradiff methods`.

Importing this module loads no torch: help, and refusals of options that are mistyped, need none of it. What a command computes
with is imported when its options were found to be well-formed.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand

from paradiff.app.options import (
    PRESETS,
    argument_texts,
    introduction,
    make_method,
    name_of,
    parameters,
    parse_seeds,
    preset,
    read_value,
    summary,
    words,
)
from paradiff.app.outcome import CutShort
from paradiff.app.request import DTYPES, NOISES, Job, Request
from paradiff.app.signals import INTERRUPTED, TERMINATED, WORDS, EndedLate, finishing, termination
from paradiff.app.stream import Stream
from paradiff.errors import refuse_unknown
from paradiff.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from paradiff.app.folder import Folder

OUT = "paradiff-out"
"""The folder of a run that was given none; of the next one, `paradiff-out-2`."""

LONGEST = 800
"""Characters of a sentence."""

FAILED, REFUSED, LATE = 1, 2, 3
"""Exit codes of an error that nobody foresaw, of what was refused or could not be written, and of a run that its deadline
ended, whose files are written."""

EXIT_CODES = (
    f"Exit codes: 0, all is well; {FAILED}, a package is missing, memory ran out, or paradiff is at fault; {REFUSED}, what was "
    f"given is refused, or the output cannot be written; {LATE}, the deadline ended the run; {INTERRUPTED}, Ctrl-C; "
    f"{TERMINATED}, SIGTERM."
)

TRACEBACK = "PARADIFF_TRACEBACK"
"""The environment variable that asks for the traceback of an error that nobody foresaw."""

SAMPLERS = ("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m")
EXPONENTIAL = ("exponential_sde", "exponential_ode")

CHAIN, METHOD, OUTPUT, DEVICE, PIPELINES = "Model and chain", "Method", "Output", "Device", "Pipelines"

MODEL_HELP = "A bundled model such as `digits`, a folder in diffusers' pipeline format, or a hub id."
SAMPLER_HELP = f"One of {', '.join(SAMPLERS)}; for pixel models (ddpm by default) also {' and '.join(EXPONENTIAL)}, which take "
SAMPLER_HELP += "--grid and --form; for pipelines (their own by default) also a scheduler class of diffusers."
METHOD_HELP = f"One of {', '.join(PRESETS)}; `paradiff methods` says what they are."
OPTION_HELP = "An option of the method, such as blocks=20; repeatable. `paradiff methods NAME` lists them."


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


# Options that `sample` and `explain` share.
MethodName = Annotated[str, typer.Option(help=METHOD_HELP, rich_help_panel=METHOD)]
MethodOption = Annotated[
    list[str] | None,
    typer.Option("--method-option", "-m", metavar="NAME=VALUE", help=OPTION_HELP, rich_help_panel=METHOD),
]
Window = Annotated[
    int | None,
    typer.Option(
        help="Nodes, or blocks, solved at once; none, for the whole chain, by default.",
        metavar="<int>",
        parser=_parse_window,
        rich_help_panel=METHOD,
    ),
]
Tolerance = Annotated[
    float | None, typer.Option(help="What the method's rule allows; its own by default.", rich_help_panel=METHOD)
]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, epilog=EXIT_CODES)


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _paradiff(
    context: typer.Context,
    _: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Parallel-in-time sampling for diffusion and flow models: the sequential chain's own sample, in fewer rounds."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(cls=Command)
def sample(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)] = "digits",
    sampler: Annotated[str | None, typer.Option(help=SAMPLER_HELP, rich_help_panel=CHAIN)] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of the chain; 1000 for a pixel model, a pipeline's own number by default.", rich_help_panel=CHAIN
        ),
    ] = None,
    eta: Annotated[
        float | None,
        typer.Option(help="Share of the DDPM noise that ddim adds, 0 to 1; 0 by default.", rich_help_panel=CHAIN),
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Levels: log-snr (default) or uniform.", hidden=True)] = None,
    form: Annotated[
        str | None, typer.Option(help="What a step freezes: clean (default), epsilon or score.", hidden=True)
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, one sample each: 0-15, or 0,3,7-9.", rich_help_panel=CHAIN)] = "0",
    noise: Annotated[
        str,
        typer.Option(
            help="`recorded`: the draws of diffusers with each seed; pixel models: `keyed`, the same on every device.",
            rich_help_panel=CHAIN,
        ),
    ] = NOISES[0],
    method: MethodName = "parasolver",
    method_option: MethodOption = None,
    window: Window = None,
    tolerance: Tolerance = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help=f"Output folder; {OUT} by default, or {OUT}-2, ... if it is used.", rich_help_panel=OUTPUT
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace files in an output folder that is not empty.", rich_help_panel=OUTPUT),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Also run the sequential chain, in the same process.", rich_help_panel=OUTPUT),
    ] = False,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="Draw trace.png: change by node, or iteration by block, and round.", rich_help_panel=OUTPUT
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.", rich_help_panel=DEVICE)] = "auto",
    dtype: Annotated[
        str,
        typer.Option(help=f"The network's dtype: {', '.join(DTYPES)}; states are float32.", rich_help_panel=DEVICE),
    ] = DTYPES[0],
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.", rich_help_panel=DEVICE)] = None,
    max_rows: Annotated[
        int | None, typer.Option(help="Most rows in one network call; no bound by default.", rich_help_panel=DEVICE)
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help=f"Time after which a parallel call ends with the best that is known; the exit code is then {LATE}.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The text to follow.", rich_help_panel=PIPELINES)] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="The text to keep away from.", rich_help_panel=PIPELINES)] = None,
    guidance: Annotated[
        float | None, typer.Option(help="guidance_scale; their own by default.", rich_help_panel=PIPELINES)
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WIDTHxHEIGHT", help="In pixels; their own by default.", rich_help_panel=PIPELINES),
    ] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Any other argument of their call, JSON or text; repeatable.",
            rich_help_panel=PIPELINES,
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel=PIPELINES),
    ] = False,
) -> None:
    """Sample a model or call a pipeline in parallel over time; write pictures, run.json and, if asked, a trace."""
    request = Request(
        model=model,
        sampler=sampler,
        steps=steps,
        eta=eta,
        grid=grid,
        form=form,
        seeds=seeds,
        noise=noise,
        method=method,
        method_option=method_option or [],
        window=window,
        tolerance=tolerance,
        out=OUT if out is None and overwrite else out,
        compare=compare,
        trace=trace,
        overwrite=overwrite,
        device=device,
        dtype=dtype,
        threads=threads,
        max_rows=max_rows,
        deadline=deadline,
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance=guidance,
        size=size,
        argument=argument or [],
        trust_remote_code=trust_remote_code,
    )
    solver, called = make_method(method, request.method_option, window=window, tolerance=tolerance)
    run(request, solver, called)


def run(request: Request, solver: Any, called: dict[str, Any]) -> None:
    """Runs a well-formed request, writes its files and shows its figures."""
    import torch
    from rich.console import Console

    from paradiff.app import environment, run_json
    from paradiff.app.folder import LAST, rescued
    from paradiff.models.files import is_pixel, read_index
    from paradiff.solver import Deadline, Status

    console = Console(highlight=False, file=cast(Any, Stream(sys.stdout)))
    environment.use_threads(request.threads)
    deadline = None if request.deadline is None else Deadline(request.deadline)
    device, dtype = environment.choose_device(request.device), getattr(torch, request.dtype)
    if is_pixel(read_index(request.model)):
        from paradiff.app.pixels import sample_pixels as sample_it
        from paradiff.app.pixels import with_defaults

        request = with_defaults(request)
    else:
        from paradiff.app.pipeline import refuse_pixel_options
        from paradiff.app.pipeline import sample_pipeline as sample_it

        refuse_pixel_options(request)
    with claimed(request) as folder:
        place = str(folder.path)
        job = Job(
            request=dataclasses.replace(request, out=place),
            seeds=parse_seeds(request.seeds),
            method=solver,
            called=called,
            device=device,
            dtype=dtype,
            deadline=deadline,
            notice=f"{OUT} is not empty; this run goes to {place}" if place != OUT and request.out is None else "",
        )
        try:
            outcome = sample_it(job, console)
        except CutShort as cut:
            cut.saved = rescued(cut.writers, "what they gave")
            raise
        with finishing(place):
            folder.fill([*outcome.writers, lambda place: run_json.write_json(outcome.contents, place / LAST)])
    show(console, outcome.contents, request.method, outcome.title)
    console.print(f"{outcome.contents['status']}; written to {place}", soft_wrap=True)
    if deadline is not None and deadline.stopped and outcome.contents["status_code"] == Status.STOPPED.code:
        console.print(f"the deadline of {deadline.seconds:g} s ended it", soft_wrap=True)
        raise typer.Exit(LATE)


def claimed(request: Request) -> AbstractContextManager[Folder]:
    """The output folder of a run, for as long as it lasts."""
    from paradiff.app.folder import next_folder, output_folder

    return next_folder(Path(OUT)) if request.out is None else output_folder(Path(request.out), request.overwrite)


@app.command(cls=Command)
def explain(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    sampler: Annotated[str | None, typer.Option(help="As of `paradiff sample`.", rich_help_panel=CHAIN)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the chain; the pipeline's own number by default.", rich_help_panel=CHAIN)
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Share of the DDPM noise that ddim adds, 0 to 1.", rich_help_panel=CHAIN)
    ] = None,
    method: MethodName = "parasolver",
    method_option: MethodOption = None,
    window: Window = None,
    tolerance: Tolerance = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", rich_help_panel=PIPELINES),
    ] = False,
) -> None:
    """Say what a parallel run of a pipeline would do, without calling its networks."""
    solver, _ = make_method(method, method_option or [], window=window, tolerance=tolerance)

    from paradiff.app.pipeline import refuse_eta, refuse_no_steps
    from paradiff.models.pipeline import load_pipeline, set_sampler
    from paradiff.pipelines.explanation import explain as explain_pipeline

    refuse_no_steps(steps)
    pipeline = load_pipeline(model, trust_remote_code=trust_remote_code)
    if sampler is not None:
        set_sampler(pipeline, sampler)
    options = {} if eta is None else {"eta": eta}
    if options:
        refuse_eta(cast(Any, pipeline).scheduler)
    print(explain_pipeline(pipeline, solver, num_inference_steps=steps, **options))


@app.command(cls=Command)
def methods(name: Annotated[str | None, typer.Argument(help="A method, to see its options.")] = None) -> None:
    """List the methods, or say of one what it is, where it comes from, and which options it has."""
    if name is None:
        width = max(map(len, PRESETS))
        for one in PRESETS:
            print(f"{one:{width}}  {summary(preset(one))}")
        return
    refuse_unknown("method", name, list(PRESETS))
    print(described(preset(name)))


def described(build: Callable[..., Any]) -> str:
    """A method's documentation, and its options with their defaults and what may be given."""
    from textwrap import fill

    texts = argument_texts(build)
    lines = [introduction(build), "", "Options (-m NAME=VALUE):"]
    for option, parameter in parameters(build).items():
        given = ", ".join(words(parameter.annotation))
        default = parameter.default
        required = default is parameter.empty
        shown = default if isinstance(default, int | float | str) else "none" if default is None else name_of(default)
        end = "has to be given" if required else f"default {str(shown).lower().replace(' ', '-')}"
        lines += ["", f"  {option}: {given}; {end}"]
        if option in texts:
            lines.append(fill(texts[option], 120, initial_indent="      ", subsequent_indent="      "))
    return "\n".join(lines if len(lines) > 3 else [lines[0], "", "It has no options."])


def show(console: Console, result: dict[str, Any], method: str, title: str) -> None:
    """The table at the end of a run."""
    from rich.table import Table

    sheet = Table(title=title, title_justify="left")
    for heading in ("", "rounds", "evaluations", "seconds", "speed-up", "error to sequential"):
        sheet.add_column(heading, justify="left" if not heading else "right")
    errors = [s["error"]["rms"] for s in result["samples"] if s["error"]]
    speedup = f"{result['speedup']['seconds']:.2f}x" if result["speedup"] else "-"
    error = (
        f"{max(errors):.1e} RMS, worst" if errors else f"{max(s['estimated_error'] for s in result['samples']):.1e} estimated"
    )
    rounds, evaluations = ("-" if result[k] is None else str(result[k]) for k in ("rounds", "evaluations"))
    sheet.add_row(method, rounds, evaluations, f"{result['seconds']:.2f}", speedup, error)
    if result["sequential"]:
        reference = result["sequential"]
        counts = (str(reference["rounds"]), str(reference["evaluations"]), f"{reference['seconds']:.2f}")
        sheet.add_row("sequential", *counts, "1.00x", "0")
    console.print(sheet)


def _as_typed(sentence: str) -> str:
    """A sentence of the library, with None as the command line has it."""
    return re.sub(r"\bor None\b", "or none", sentence)


def _unforeseen(error: Exception) -> str:
    """The sentence of an error that nobody foresaw: that memory ran out, or that paradiff is at fault."""
    line = next(iter(str(error).splitlines()), "")
    said = f"{type(error).__name__}: {line}" if line else type(error).__name__
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
        return f"memory ran out ({said}); give fewer seeds, a smaller window, or --max-rows"
    return f"{said}; this is a fault of paradiff: please report it with the command ({TRACEBACK}=1 shows where)"


def _one_line(text: str) -> str:
    """A sentence in one line of a length that can be read, whatever texts it repeats."""
    line = " ".join(text.splitlines())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} [...] {line[-LONGEST // 4 :]}"


def _told(error: Exception) -> tuple[str, int]:
    """The sentence of an error, and the exit code."""
    if isinstance(error, ValueError):
        return _as_typed(str(error)), REFUSED
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename!r}' if error.filename else ''}", REFUSED
    if hasattr(error, "format_message"):  # of typer's
        return error.format_message(), getattr(error, "exit_code", REFUSED)  # pyright: ignore[reportAttributeAccessIssue]
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    return _unforeseen(error), FAILED


def main() -> None:
    """The entry point. Exit codes: errors, one sentence each, are 2, those that nobody foresaw 1, a run that its deadline ended
    3, Ctrl-C 130, SIGTERM 143."""
    end = ""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before Python started
            setattr(sys, name, io.StringIO())
    with termination() as came:
        try:
            code = app(standalone_mode=False)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except EndedLate as late:
            code, end = late.code, str(late)
        except CutShort as cut:
            cause = cast(Exception | KeyboardInterrupt, cut.__cause__)
            if isinstance(cause, KeyboardInterrupt):
                number = came[0] if came else SIGINT
                code, end = 128 + number, f"{WORDS[number]}: {cut}; {cut.saved}"
            else:
                sentence, code = _told(cause)
                end = f"error: {sentence}; {cut}; {cut.saved}"
        except ModuleNotFoundError:
            raise  # a package of an extra, perhaps: app/__init__.py names it
        except Exception as error:
            sentence, code = _told(error)
            end = f"error: {sentence}"
    if code == INTERRUPTED and not end:
        number = came[0] if came else SIGINT
        code, end = 128 + number, f"{WORDS[number]}: nothing was written"
    if end:
        print(_one_line(end), file=sys.stderr)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()

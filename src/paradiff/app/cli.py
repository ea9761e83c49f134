"""The command line: `paradiff sample` and `paradiff explain`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Sheet

from paradiff.app import pipeline as cli_pipeline
from paradiff.app import plots
from paradiff.app.calls import call_each
from paradiff.app.environment import environment
from paradiff.app.options import METHODS, OPTIONS, SLOPES, make_method, parse_seeds
from paradiff.app.run_json import output_folder, pipeline_report, report, write_json
from paradiff.chain.noise import Keyed, Noise, Recorded
from paradiff.chain.table import Table
from paradiff.models.pipeline import load_pipeline, set_sampler
from paradiff.models.pixel import EXPONENTIAL, GRIDS, SCHEDULERS, Model, is_pixel, load, read_index
from paradiff.pipelines import explain as explain_pipeline
from paradiff.samplers.exponential import Form
from paradiff.samplers.schedule import refuse_unknown
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.loop import sample as run_solver
from paradiff.solver.protocol import Batch, Method, Round
from paradiff.solver.solution import Solution

SAMPLERS = (*SCHEDULERS, *EXPONENTIAL)
SAMPLER_HELP = f"Pixel models: one of {', '.join(SAMPLERS)}; ddpm by default. Pipelines: one of {', '.join(SCHEDULERS)} or a "
SAMPLER_HELP += "scheduler class of diffusers; their own by default."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _paradiff() -> None:
    """Parallel-in-time sampling for diffusion and flow models: the sequential chain's own sample, in fewer rounds."""


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(help="A bundled model such as `digits`, a folder in diffusers' pipeline format, or a hub id.")
    ] = "digits",
    prompt: Annotated[str | None, typer.Option(help="pipelines: the text to follow.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="pipelines: the text to keep away from.")] = None,
    guidance: Annotated[float | None, typer.Option(help="pipelines: guidance_scale; their own by default.")] = None,
    size: Annotated[str | None, typer.Option(help="pipelines: WIDTHxHEIGHT in pixels; their own by default.")] = None,
    argument: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="pipelines: any other argument of their call, JSON or text; repeatable."),
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=SAMPLER_HELP)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the chain; 1000 for a pixel model, a pipeline's own number by default.")
    ] = None,
    eta: Annotated[float | None, typer.Option(help="Share of the DDPM noise that ddim adds, 0 to 1; default 0.")] = None,
    grid: Annotated[
        str | None, typer.Option(help=f"exponential_sde and exponential_ode: levels, {' (default) or '.join(GRIDS)}.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="exponential_sde and exponential_ode: what a step freezes, clean (default), epsilon or score."),
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "parasolver",
    window: Annotated[int | None, typer.Option(help="Nodes, or blocks, solved at once; the whole chain by default.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="See the method's documentation; its own default if left out.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="parasolver: `error` (default) or `change`, the published rule; srds: also `sample` or `image`."),
    ] = None,
    stride: Annotated[int | None, typer.Option(help="parasolver: sequential steps in a sub-interval; default 1.")] = None,
    warmup: Annotated[int | None, typer.Option(help="parasolver, quasi_newton: steps really taken first; default 0.")] = None,
    slope: Annotated[str | None, typer.Option(help=f"All but srds: {', '.join(SLOPES)} or shifted:VARIANCE.")] = None,
    secants: Annotated[
        int | None, typer.Option(help="quasi_newton, collocation: pairs of earlier sweeps kept for each node; default 3, 4.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="collocation: nodes to begin with; by the tolerance if left out.")] = None,
    max_nodes: Annotated[int | None, typer.Option(help="collocation: most nodes of a sample; the whole chain's.")] = None,
    order: Annotated[
        int | None, typer.Option(help="collocation: degree of the interpolation; default 0 with noise, else 3.")
    ] = None,
    shift: Annotated[float | None, typer.Option(help="collocation: variance of the data; estimated by default.")] = None,
    exact: Annotated[
        bool | None, typer.Option("--exact", help="collocation: verify the sample over all nodes of the chain.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="collocation: `chain` (default), `ode` or `sde`.")] = None,
    warm_start: Annotated[
        str | None, typer.Option(metavar="FILE", help="collocation: file that stores where this model's samples need nodes.")
    ] = None,
    blocks: Annotated[
        int | None, typer.Option(help="srds: blocks of the chain; near sqrt(2 STEPS) by default. piadm: has to be given.")
    ] = None,
    sweeps: Annotated[int | None, typer.Option(help="piadm: sweeps of every block; as the tolerance says by default.")] = None,
    stagger: Annotated[int | None, typer.Option(help="piadm: sweeps after which the next block joins; else in turn.")] = None,
    corrector: Annotated[
        str | None, typer.Option(help="piadm_ode: underdamped Langevin after each block, STEPSxSWEEPS; none by default.")
    ] = None,
    coarse: Annotated[
        str | None,
        typer.Option(help="srds: one-step (default), two-step, a number of steps a block, or what --slope takes."),
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="srds: `pipelined` (default) or `batched`.")] = None,
    iterations: Annotated[int | None, typer.Option(help="srds: iterations to be made whatever the rule would say.")] = None,
    rows: Annotated[int | None, typer.Option(help="srds: most rows of one sample in one round; no bound by default.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, one sample each: 0-15, or 0,3,7-9.")] = "0",
    noise: Annotated[
        str | None,
        typer.Option(help="`recorded` (default): the draws of diffusers with each seed; pixel models: `keyed`: device-free."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("paradiff-out"),
    compare: Annotated[bool, typer.Option("--compare", help="Also run the sequential chain, in the same process.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Draw trace.png: change by node, or iteration by block, and round.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files in an output folder that is not empty.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"The network's dtype: {', '.join(DTYPES)}; states are float32.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Most rows in one network call; no bound by default.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="pipelines: run Python code that comes with the model.")
    ] = False,
) -> None:
    """Sample a model or call a pipeline in parallel over time; write pictures, run.json and, if asked, a trace."""
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    console = Console(highlight=False)
    arguments["noise"] = noise or "recorded"
    refuse_unknown("method", method, list(METHODS))
    refuse_unknown("dtype", dtype, list(DTYPES))
    refuse_unknown("noise", arguments["noise"], ["recorded", "keyed"])
    chosen, solver = parse_seeds(seeds), make_method(method, **{option: arguments[option] for option in OPTIONS})
    use_threads(threads)
    place = choose_device(device)
    if is_pixel(read_index(model)):
        cli_pipeline.refuse_pixel_options(model, arguments)
        arguments |= {"sampler": sampler or "ddpm", "steps": 1000 if steps is None else steps, "eta": eta or 0.0}
        refuse_unknown("sampler", arguments["sampler"], SAMPLERS)
        run_it = sample_pixels
    else:
        cli_pipeline.refuse_pipeline_options(model, arguments)
        run_it = sample_pipeline
    with output_folder(out, overwrite) as folder:
        result, title = run_it(console, folder, solver, chosen, place, arguments)
        write_json(result, folder / "run.json")
    show(console, result, method, title)
    console.print(f"{result['status']}; written to {out}", soft_wrap=True)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="A bundled model, a folder in diffusers' pipeline format, or a hub id.")],
    sampler: Annotated[str | None, typer.Option(help=SAMPLER_HELP)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the chain; the pipeline's own number by default.")] = None,
    eta: Annotated[float | None, typer.Option(help="Share of the DDPM noise that ddim adds, 0 to 1.")] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "parasolver",
    window: Annotated[int | None, typer.Option(help="Nodes, or blocks, solved at once; the whole chain by default.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="The method's own if left out.")] = None,
    blocks: Annotated[int | None, typer.Option(help="srds, piadm: blocks of the chain.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
) -> None:
    """Say what a parallel run of a pipeline would do, without calling its networks."""
    refuse_unknown("method", method, list(METHODS))
    solver = make_method(method, window=window, tolerance=tolerance, blocks=blocks)
    cli_pipeline.refuse_no_steps(steps)
    pipeline = load_pipeline(model, trust_remote_code=trust_remote_code)
    if sampler is not None:
        set_sampler(pipeline, sampler)
    options = {} if eta is None else {"eta": eta}
    if options:
        cli_pipeline.refuse_eta(cast(Any, pipeline).scheduler)
    print(explain_pipeline(pipeline, solver, num_inference_steps=steps, **options))


def sample_pixels(
    console: Console,
    folder: Path,
    solver: Method,
    seeds: list[int],
    device: torch.device,
    arguments: dict[str, Any],
) -> tuple[dict[str, Any], str]:
    """Samples an unconditional pixel model into a folder, all seeds in one batch; the contents of run.json, and a title."""
    dtype, max_rows = DTYPES[arguments["dtype"]], arguments["max_rows"]
    sampler, steps, method, noise = (arguments[name] for name in ("sampler", "steps", "method", "noise"))
    loaded = load(arguments["model"], device=device, dtype=dtype)
    table = make_table(loaded, sampler, steps, arguments["eta"], arguments["grid"], arguments["form"])
    edges = solver.edges(table)
    evaluator = Evaluator(loaded, max_rows=max_rows, device=device, dtype=dtype)
    warm_up(evaluator, loaded, table, len(seeds), solver.width(table))

    def timed(label: str, run: Method) -> tuple[Solution, float]:
        return run_timed(console, label, run, table, evaluator, loaded, seeds, noise)

    solution, seconds = timed(method, solver)
    sequential = timed("sequential", solver.reference()) if arguments["compare"] else None
    result = report(solution, seconds, seeds, sequential, arguments, environment(device))
    plots.grid(solution.sample).save(folder / "samples.png", format="PNG")
    for seed, x in zip(seeds, solution.sample, strict=True):
        plots.to_image(x).save(folder / f"seed-{seed}.png", format="PNG")
    if arguments["trace"]:
        slowest = max(range(len(seeds)), key=lambda k: solution.error_estimates[k].rounds)
        title = f"{sampler}, {steps} steps, {method}: seed {seeds[slowest]}, the slowest of {len(seeds)}"
        plots.save_history(solution.history, slowest, len(edges) - 1, folder / "trace.png", title)
    return result, f"{sampler}, {steps} steps, {counted(seeds)}"


def sample_pipeline(
    console: Console,
    folder: Path,
    solver: Method,
    seeds: list[int],
    device: torch.device,
    arguments: dict[str, Any],
) -> tuple[dict[str, Any], str]:
    """Calls a pipeline into a folder, once for each seed; the contents of run.json, and a title."""
    dtype, trust = DTYPES[arguments["dtype"]], arguments["trust_remote_code"]
    pipeline = load_pipeline(arguments["model"], device=device, dtype=dtype, trust_remote_code=trust)
    if arguments["sampler"] is not None:
        set_sampler(pipeline, arguments["sampler"])
    given = cli_pipeline.call_arguments(pipeline, arguments)
    calls = call_each(pipeline, solver, given, seeds, max_rows=arguments["max_rows"], compare=arguments["compare"])
    cli_pipeline.save(calls, folder)
    for warning in dict.fromkeys(text for call in calls for text in call.report.warnings):
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)
    if arguments["trace"] and not cli_pipeline.save_trace(calls, folder / "trace.png"):
        console.print("warning: no trace was drawn, since no call ran in parallel", soft_wrap=True)
    kind, report = type(pipeline).__name__, calls[0].report
    steps = "" if report.steps is None else f"{report.steps} steps, "
    return pipeline_report(kind, calls, given, arguments, environment(device)), (
        f"{kind}, {report.scheduler}, {steps}{counted(seeds)}"
    )


def counted(seeds: Sequence[int]) -> str:
    """`1 sample`, `2 samples`."""
    return f"{len(seeds)} sample{'s' * (len(seeds) > 1)}"


def use_threads(threads: int | None) -> None:
    """Bounds the CPU's threads.

    Raises:
        ValueError: If the bound is below 1.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)


def make_table(model: Model, sampler: str, steps: int, eta: float, grid: str | None, form: str | None) -> Table:
    """The table of a sampler with the options that were given.

    Raises:
        ValueError: If an option is not one of the sampler's, or has a value it cannot take.
    """
    if sampler not in EXPONENTIAL:
        for name, value in (("grid", grid), ("form", form)):
            if value is not None:
                raise ValueError(f"--{name} was given, but sampler {sampler!r} has none; {', '.join(EXPONENTIAL)} do")
        return model.table(sampler, steps, eta=eta)
    if eta:
        raise ValueError(f"eta is {eta:g}, but sampler {sampler!r} has no eta; give it with sampler 'ddim'")
    refuse_unknown("form", form or "clean", get_args(Form))
    return model.exponential(sampler, steps, grid=grid or "log-snr", form=cast(Form, form or "clean"))


def choose_device(name: str) -> torch.device:
    """A device by name; `auto` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device is {name!r}, which is not to be had here; give cpu, or auto") from error
    return device


def warm_up(evaluator: Evaluator, model: Model, table: Table, samples: int, width: int) -> None:
    """Evaluates a round of one row a sample and one of `width`, untimed: what a first call sets up is in nobody's clock."""
    for rows in {samples, samples * width}:
        x = torch.zeros(rows, *model.shape, device=evaluator.device)
        evaluator(Batch(x, table.t[:1].expand(rows), torch.zeros(rows).long(), torch.zeros(rows).long()))


def run_timed(
    console: Console,
    label: str,
    method: Method,
    table: Table,
    evaluator: Evaluator,
    model: Model,
    seeds: list[int],
    noise: str,
) -> tuple[Solution, float]:
    """Runs one method under a progress bar; the solution and its whole clock, noise included."""
    parts, unit = method.progress(table)
    total = parts * len(seeds)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}  {{task.fields[rounds]}} rounds"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        bar = progress.add_task(label, total=total, rounds=0)

        def on_round(round: Round) -> None:
            progress.update(bar, advance=sum(record.passed for record in round.records), rounds=round.number)

        begin = time.perf_counter()
        source: Noise = Keyed(model.shape, seeds) if noise == "keyed" else recorded(model, seeds, evaluator)
        solution = run_solver(evaluator, table, source, method, observer=on_round)
        if evaluator.device.type == "cuda":
            torch.cuda.synchronize(evaluator.device)
        return solution, time.perf_counter() - begin


def recorded(model: Model, seeds: list[int], evaluator: Evaluator) -> Recorded:
    """The noise of plain pipeline calls, each with its own generator."""
    generators = [torch.Generator(evaluator.device).manual_seed(seed) for seed in seeds]
    return Recorded(model.shape, generators, dtype=evaluator.dtype or torch.float32)


def show(console: Console, result: dict[str, Any], method: str, title: str) -> None:
    """The table at the end of a run."""
    sheet = Sheet(title=title, title_justify="left")
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


def main() -> None:
    """The entry point: errors are one sentence and exit code 2, Ctrl-C is exit code 130."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {error.format_message()}", file=sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]
        code = getattr(error, "exit_code", 2)
    if code == 130:
        print("interrupted: nothing was written", file=sys.stderr)
    sys.exit(code or 0)

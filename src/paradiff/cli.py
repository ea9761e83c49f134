"""The command line: `paradiff sample`."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as Sheet

from paradiff import methods, piadm, plots, slope
from paradiff.corrector import Corrector, underdamped_langevin
from paradiff.environment import environment
from paradiff.evaluate import Batch, Evaluator
from paradiff.exponential import Form
from paradiff.hub import EXPONENTIAL, GRIDS, SCHEDULERS, Model, load
from paradiff.method import Method
from paradiff.noise import Keyed, Noise, Recorded
from paradiff.parareal import Parareal
from paradiff.run import output_folder, report, write_json
from paradiff.schedule import refuse_unknown
from paradiff.solution import Record, Solution, Sweep, Wave
from paradiff.solve import sample as run_solver
from paradiff.table import Table

METHODS: dict[str, Callable[..., Method | Parareal]] = {
    "sequential": methods.sequential,
    "jacobi": methods.jacobi,
    "paradigms": methods.paradigms,
    "parasolver": methods.parasolver,
    "srds": methods.srds,
    "piadm_sde": piadm.piadm_sde,
    "piadm_ode": piadm.piadm_ode,
}
SAMPLERS = (*SCHEDULERS, *EXPONENTIAL)
SLOPES: dict[str, Any] = {
    "zero": slope.zero,
    "identity": slope.identity,
    "freeze-epsilon": slope.freeze_epsilon,
    "freeze-clean-data": slope.freeze_clean_data,
}
OPTIONS = ("window", "tolerance", "rule", "stride", "warmup", "slope", "blocks", "coarse", "schedule", "iterations", "rows")
OPTIONS += ("sweeps", "stagger", "corrector")
COARSE = {"one-step": "one step", "two-step": "two step"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _paradiff() -> None:
    """Parallel-in-time sampling for diffusion and flow models: the sequential chain's own sample, in fewer rounds."""


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="`digits`, a folder in diffusers' pipeline format, or a hub id.")] = "digits",
    sampler: Annotated[str, typer.Option(help=f"One of {', '.join(SAMPLERS)}.")] = "ddpm",
    steps: Annotated[int, typer.Option(help="Steps of the chain.")] = 1000,
    eta: Annotated[float, typer.Option(help="Share of the DDPM noise that ddim adds, 0 to 1.")] = 0.0,
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
    warmup: Annotated[int | None, typer.Option(help="parasolver: steps really taken first; default 0.")] = None,
    slope: Annotated[str | None, typer.Option(help=f"parasolver, piadm: {', '.join(SLOPES)} or shifted:VARIANCE.")] = None,
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
        str, typer.Option(help="`recorded`: the draws of diffusers with each seed; `keyed`: device-free.")
    ] = "recorded",
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
) -> None:
    """Sample an unconditional pixel model in parallel over time; write pictures, run.json and, if asked, a trace."""
    arguments = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items()}
    console = Console(highlight=False)
    chosen = parse_seeds(seeds)
    refuse_unknown("method", method, list(METHODS))
    refuse_unknown("sampler", sampler, SAMPLERS)
    refuse_unknown("dtype", dtype, list(DTYPES))
    refuse_unknown("noise", noise, ["recorded", "keyed"])
    solver = make_method(method, **{option: arguments[option] for option in OPTIONS})
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)
    place = choose_device(device)
    with output_folder(out, overwrite) as folder:
        loaded = load(model, device=place, dtype=DTYPES[dtype])
        table = make_table(loaded, sampler, steps, eta, grid, form)
        edges = solver.edges(table)
        evaluator = Evaluator(loaded, max_rows=max_rows, device=place, dtype=DTYPES[dtype])
        warm_up(evaluator, loaded, table, len(chosen), widest(solver, table))

        def timed(label: str, run: Method | Parareal) -> tuple[Solution, float]:
            return run_timed(console, label, run, table, evaluator, loaded, chosen, noise)

        solution, seconds = timed(method, solver)
        sequential = timed("sequential", reference(solver)) if compare else None
        result = report(solution, seconds, chosen, sequential, arguments, environment(place))
        plots.grid(solution.sample).save(folder / "samples.png", format="PNG")
        for seed, x in zip(chosen, solution.sample, strict=True):
            plots.to_image(x).save(folder / f"seed-{seed}.png", format="PNG")
        if trace:
            slowest = max(range(len(chosen)), key=lambda k: solution.certificates[k].rounds)
            title = f"{sampler}, {steps} steps, {method}: seed {chosen[slowest]}, the slowest of {len(chosen)}"
            waves = [w for w in solution.history if isinstance(w, Wave)]
            if waves:
                plots.save_wavefront(waves, slowest, len(edges) - 1, folder / "trace.png", title)
            else:
                changes = [s for s in solution.history if isinstance(s, Sweep)]
                plots.save_trace(changes, slowest, len(edges) - 1, folder / "trace.png", title)
        write_json(result, folder / "run.json")
    show(console, result, method, f"{sampler}, {steps} steps, {len(chosen)} sample{'s' * (len(chosen) > 1)}")
    console.print(f"{solution.status}; written to {out}", soft_wrap=True)


def parse_seeds(text: str) -> list[int]:
    """Seeds from `0-15` or `0,3,7-9`.

    Raises:
        ValueError: If the text is no list of seeds, or names one twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise ValueError(
                f"seeds are {text!r}, of which {part.strip()!r} is no seed; give whole numbers and rising ranges, such as "
                "0-15 or 0,3,7-9"
            )
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    twice = next((s for s in seeds if seeds.count(s) > 1), None)
    if twice is not None:
        raise ValueError(f"seeds are {text!r}, which names seed {twice} twice; name each once")
    if max(seeds) >= 2**63:
        raise ValueError(f"the seed {max(seeds)} is too large; seeds are below 2^63")
    return seeds


def make_method(name: str, **options: Any) -> Method | Parareal:
    """The method of a name with the options that were given.

    Raises:
        ValueError: If an option is not one of the method's, or has a value it cannot take.
    """
    build = METHODS[name]
    known = inspect.signature(build).parameters
    given = {k: v for k, v in options.items() if v is not None}
    for option in given:
        if option not in known:
            takes = ", ".join(f"--{k}" for k in known if k in OPTIONS) or "no options"
            raise ValueError(f"--{option} was given, but method {name!r} has no such option; it takes {takes}")
    if "slope" in given:
        given["slope"] = parse_slope(given["slope"])
    if "coarse" in given:
        given["coarse"] = parse_coarse(given["coarse"])
    if "corrector" in given:
        given["corrector"] = parse_corrector(given["corrector"])
    missing = next((k for k, v in known.items() if v.default is v.empty and k not in given), None)
    if missing is not None:
        raise ValueError(f"method {name!r} needs --{missing}; give a number of {missing}")
    return build(**given)


def reference(method: Method | Parareal) -> Method:
    """The sequential method whose sample a method solves for: the plain chain, with the corrector's steps if there are any."""
    plain = methods.sequential()
    if isinstance(method, Parareal) or method.corrector is None:
        return plain
    corrector = dataclasses.replace(method.corrector, sweeps=method.corrector.steps)
    return dataclasses.replace(plain, blocks=method.blocks, corrector=corrector)


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


def parse_corrector(text: str) -> Corrector:
    """A corrector from STEPSxSWEEPS.

    Raises:
        ValueError: If the text is no such pair.
    """
    found = re.fullmatch("([0-9]+)x([0-9]+)", text)
    if not found:
        raise ValueError(f"the corrector is {text!r}; give steps and sweeps as STEPSxSWEEPS, such as 4x4")
    return underdamped_langevin(int(found[1]), int(found[2]))


def parse_slope(text: str) -> slope.Slope:
    """A slope by name; `shifted:V` for data of variance V."""
    if text.startswith("shifted:"):
        try:
            return slope.shifted(float(text.removeprefix("shifted:")))
        except ValueError as error:
            raise ValueError(f"the slope is {text!r}; shifted takes a positive data variance, such as shifted:0.5") from error
    refuse_unknown("slope", text, [*SLOPES, "shifted:VARIANCE"])
    if text not in SLOPES:
        raise ValueError(f"the slope is {text!r}; give a data variance, such as shifted:0.5")
    return SLOPES[text]


def parse_coarse(text: str) -> str | int | slope.Slope:
    """A coarse propagator: `one-step`, `two-step`, a number of steps a block, or a slope as `parse_slope` reads it.

    Raises:
        ValueError: If the text is none of these.
    """
    if re.fullmatch("-?[0-9]+", text):
        return int(text)
    if text.startswith("shifted:"):
        return parse_slope(text)
    refuse_unknown("coarse", text, [*COARSE, "a number of steps a block", *SLOPES, "shifted:VARIANCE"])
    return COARSE[text] if text in COARSE else parse_slope(text)


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


def widest(method: Method | Parareal, table: Table) -> int:
    """Rows of one sample in a round in which all that is solved at once takes part."""
    edges = method.edges(table)
    if isinstance(method, Method) and method.blocks is not None and method.blocks.stagger is None:
        edges = method.blocks.edges(table)
        intervals = max(b - a for a, b in itertools.pairwise(edges))
    else:
        intervals = len(edges) - 1
    bounds = (method.window, method.rows) if isinstance(method, Parareal) else (method.window,)
    return min(intervals if bound is None else bound for bound in (None, *bounds))


def warm_up(evaluator: Evaluator, model: Model, table: Table, samples: int, width: int) -> None:
    """Evaluates a round of one row a sample and one of `width`, untimed: what a first call sets up is in nobody's clock."""
    for rows in {samples, samples * width}:
        x = torch.zeros(rows, *model.shape, device=evaluator.device)
        evaluator(Batch(x, table.t[:1].expand(rows), torch.zeros(rows).long(), torch.zeros(rows).long()))


def run_timed(
    console: Console,
    label: str,
    method: Method | Parareal,
    table: Table,
    evaluator: Evaluator,
    model: Model,
    seeds: list[int],
    noise: str,
) -> tuple[Solution, float]:
    """Runs one method under a progress bar; the solution and its whole clock, noise included."""
    total = (len(method.edges(table)) - 1) * len(seeds)
    unit = "blocks" if isinstance(method, Parareal) else "nodes"
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
        rounds = 0

        def on_round(sweeps: Sequence[Record]) -> None:
            nonlocal rounds
            rounds += 1
            progress.update(bar, advance=sum(s.passed for s in sweeps), rounds=rounds)

        begin = time.perf_counter()
        source: Noise = Keyed(model.shape, seeds) if noise == "keyed" else recorded(model, seeds, evaluator)
        solution = run_solver(evaluator, table, source, method, progress=on_round)
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
    sheet.add_row(method, str(result["rounds"]), str(result["evaluations"]), f"{result['seconds']:.2f}", speedup, error)
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

# SPDX-License-Identifier: Apache-2.0
"""The command line: `paradiff sample`, `paradiff generate`, `paradiff explain` and `paradiff methods`.

Importing this module loads no torch: help, and refusals of options that are mistyped, need none of it. What a command computes
with is imported when its options were found to be well-formed.
"""

from __future__ import annotations

from typing import Annotated

import typer

from paradiff.app import flags
from paradiff.app.bulk import SHARD, Bulk
from paradiff.app.ends import EXIT_CODES, LATE, ended
from paradiff.app.flags import CHAIN, DEVICE, METHOD, OUTPUT, Command
from paradiff.app.launched import leave
from paradiff.app.method_page import described, summary
from paradiff.app.options import PRESETS, make_method, preset
from paradiff.app.request import DTYPES, NOISES, OUT, Request
from paradiff.errors import refuse_unknown
from paradiff.version import __version__

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
    model: flags.Model = "digits",
    sampler: flags.Sampler = None,
    steps: flags.Steps = None,
    eta: flags.Eta = None,
    grid: flags.Grid = None,
    form: flags.Form = None,
    seeds: flags.Seeds = "0",
    noise: flags.Noise = NOISES[0],
    method: flags.MethodName = "parasolver",
    method_option: flags.MethodOption = None,
    window: flags.Window = None,
    tolerance: flags.Tolerance = None,
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
    device: flags.DeviceOrSeveral = "auto",
    devices: flags.Devices = None,
    dtype: flags.Dtype = DTYPES[0],
    threads: flags.Threads = None,
    max_rows: flags.MaxRows = None,
    timeout: flags.Timeout = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help=f"Time after which a parallel call ends with the best that is known; the exit code is then {LATE}.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    prompt: flags.Prompt = None,
    negative_prompt: flags.NegativePrompt = None,
    guidance: flags.Guidance = None,
    size: flags.Size = None,
    argument: flags.Argument = None,
    trust_remote_code: flags.TrustRemoteCode = False,
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
        devices=devices,
        dtype=dtype,
        threads=threads,
        max_rows=max_rows,
        timeout=timeout,
        deadline=deadline,
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance=guidance,
        size=size,
        argument=argument or [],
        trust_remote_code=trust_remote_code,
    )
    solver, called = make_method(method, request.method_option, window=window, tolerance=tolerance)

    from paradiff.app.run import run

    run(request, solver, called)


@app.command(cls=Command)
def generate(
    model: flags.Model,
    seeds: Annotated[str, typer.Option(help="Seeds, one sample each: 0-49999, or 0,3,7-9.", rich_help_panel=CHAIN)],
    out: Annotated[
        str,
        typer.Option(
            metavar="FOLDER", help="Output folder; that of a run that was cut short is gone on with.", rich_help_panel=OUTPUT
        ),
    ],
    shard: Annotated[int, typer.Option(help="Samples of a file.", rich_help_panel=OUTPUT)] = SHARD,
    format: Annotated[
        str,
        typer.Option(
            help="`safetensors`: tensors, -1 to 1; `png`: a tar of the files that `paradiff sample` writes.",
            rich_help_panel=OUTPUT,
        ),
    ] = "safetensors",
    batch: Annotated[
        int | None,
        typer.Option(help="Samples that go through the chain in step; 64 for a pixel model, 8 for a pipeline by default."),
    ] = None,
    last: Annotated[
        int | None,
        typer.Option(
            help="Seeds at the end that the method solves in parallel over time; those that fill no batch by default.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    sampler: flags.Sampler = None,
    steps: flags.Steps = None,
    eta: flags.Eta = None,
    grid: flags.Grid = None,
    form: flags.Form = None,
    noise: flags.Noise = NOISES[0],
    method: flags.MethodName = "parasolver",
    method_option: flags.MethodOption = None,
    window: flags.Window = None,
    tolerance: flags.Tolerance = None,
    device: flags.Device = "auto",
    dtype: flags.Dtype = DTYPES[0],
    threads: Annotated[
        int, typer.Option(help="CPU threads of each process, which bytes depend on.", rich_help_panel=DEVICE)
    ] = 1,
    max_rows: flags.MaxRows = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help=f"Time after which no shard is begun; the exit code is then {LATE}, and the run can be gone on with.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    prompt: flags.Prompt = None,
    negative_prompt: flags.NegativePrompt = None,
    guidance: flags.Guidance = None,
    size: flags.Size = None,
    argument: flags.Argument = None,
    trust_remote_code: flags.TrustRemoteCode = False,
) -> None:
    """Sample many seeds into shards, in batches and the last few in parallel over time; go on with what was cut short."""
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
        out=out,
        compare=False,
        trace=False,
        overwrite=False,
        device=device,
        dtype=dtype,
        threads=threads,
        max_rows=max_rows,
        timeout=None,
        deadline=deadline,
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance=guidance,
        size=size,
        argument=argument or [],
        trust_remote_code=trust_remote_code,
    )
    bulk = Bulk(request=request, shard=shard, batch=batch, last=last, format=format)
    solver, called = make_method(method, request.method_option, window=window, tolerance=tolerance)

    from paradiff.app.generate import generate as generate_bulk

    generate_bulk(bulk, solver, called)


@app.command(cls=Command)
def explain(
    model: flags.Model,
    sampler: Annotated[str | None, typer.Option(help="As of `paradiff sample`.", rich_help_panel=CHAIN)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the chain; the pipeline's own number by default.", rich_help_panel=CHAIN)
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="Share of the DDPM noise that ddim adds, 0 to 1.", rich_help_panel=CHAIN)
    ] = None,
    method: flags.MethodName = "parasolver",
    method_option: flags.MethodOption = None,
    window: flags.Window = None,
    tolerance: flags.Tolerance = None,
    time: Annotated[
        bool,
        typer.Option(
            "--time",
            help="Also make a call up to its second pass, and time its networks on one state and on several.",
            rich_help_panel=flags.PIPELINES,
        ),
    ] = False,
    device: flags.Device = "auto",
    dtype: flags.Dtype = DTYPES[0],
    threads: flags.Threads = None,
    prompt: flags.Prompt = None,
    negative_prompt: flags.NegativePrompt = None,
    guidance: flags.Guidance = None,
    size: flags.Size = None,
    argument: flags.Argument = None,
    trust_remote_code: flags.TrustRemoteCode = False,
) -> None:
    """Say what a parallel run of a pipeline would do, without calling its networks unless they are to be timed."""
    request = Request(
        model=model,
        sampler=sampler,
        steps=steps,
        eta=eta,
        grid=None,
        form=None,
        seeds="0",
        noise="recorded",
        method=method,
        method_option=method_option or [],
        window=window,
        tolerance=tolerance,
        out=None,
        compare=False,
        trace=False,
        overwrite=False,
        device=device,
        dtype=dtype,
        threads=threads,
        max_rows=None,
        timeout=None,
        deadline=None,
        prompt=prompt,
        negative_prompt=negative_prompt,
        guidance=guidance,
        size=size,
        argument=argument or [],
        trust_remote_code=trust_remote_code,
    )
    solver, _ = make_method(method, request.method_option, window=window, tolerance=tolerance)

    from paradiff.app.explain import explain as explain_pipeline

    explain_pipeline(request, solver, timed=time)


@app.command(cls=Command)
def bench(
    out: Annotated[
        str,
        typer.Option(
            metavar="FOLDER", help="Where bench.json goes; rows that it has are not measured again.", rich_help_panel=OUTPUT
        ),
    ],
    problem: Annotated[
        list[str] | None,
        typer.Option(help="A problem, or a pattern such as mixture-*; repeatable; all by default.", rich_help_panel=CHAIN),
    ] = None,
    chain: Annotated[
        list[str] | None,
        typer.Option(
            help="A chain and its steps, or a pattern such as ddim:*; repeatable; all by default.", rich_help_panel=CHAIN
        ),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="A method, or a pattern; repeatable; all by default.", rich_help_panel=METHOD)
    ] = None,
    windows: Annotated[
        str, typer.Option(help="Most rows of a sample in a round, and `all` for no bound.", rich_help_panel=METHOD)
    ] = "2,3,4,8,16,32,all",
    seeds: Annotated[
        int,
        typer.Option(help="Seeds on which tolerances are chosen, and as many others that are measured.", rich_help_panel=CHAIN),
    ] = 8,
    curve: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS:SECONDS,...",
            help="The latency curve of the gains, such as 1:1,2:1.1,4:1.44; a call costs the same on any rows by default.",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", rich_help_panel=DEVICE)] = 1,
) -> None:
    """Measure every method on the library's problems and chains, at equal measured error, beside sequential solvers."""
    from pathlib import Path

    from rich.console import Console

    from paradiff.app.bench import Wanted, windows_of
    from paradiff.app.bench import bench as measure
    from paradiff.app.environment import use_threads

    wanted = Wanted(
        problems=problem or ["*"],
        chains=chain or ["*"],
        windows=windows_of(windows),
        methods=method or ["*"],
        seeds=seeds,
        curve=curve,
    )
    use_threads(threads)
    measure(wanted, Path(out), Console(width=200))


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


def main() -> None:
    """The entry point. Exit codes: errors, one sentence each, are 2, those that nobody foresaw 1, a run that its deadline ended
    3, Ctrl-C 130, SIGTERM 143."""
    leave(ended(lambda: app(standalone_mode=False)))


if __name__ == "__main__":
    main()

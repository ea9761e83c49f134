# SPDX-License-Identifier: Apache-2.0
"""The command line: `paradiff plan`, `sample`, `generate`, `serve`, `calibrate`, `explain`, `bench`, `methods` and `doctor`.

Importing this module loads no torch: help, and refusals of options that are mistyped, need none of it. What a command computes
with is imported when its options were found to be well-formed.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paradiff.app import flags
from paradiff.app.bulk import SHARD, Bulk
from paradiff.app.ends import EXIT_CODES, ended
from paradiff.app.flags import (
    BULK,
    CALIBRATED,
    CHAIN,
    DEVICE,
    METHOD,
    OF_A_PIPELINE,
    OF_A_PLAN,
    OF_A_SAMPLE,
    OTHERS_THAN_CALIBRATED,
    OTHERS_THAN_SERVED,
    OUTPUT,
    SERVED,
    Command,
)
from paradiff.app.launched import leave, size
from paradiff.app.method_page import described, summary
from paradiff.app.options import PRESETS, make_method, preset
from paradiff.app.parameters import taking
from paradiff.app.request import Request
from paradiff.errors import refuse_unknown
from paradiff.version import __version__

if TYPE_CHECKING:
    from paradiff.solver.protocol import Method

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, epilog=EXIT_CODES)


def _method_of(request: Request) -> tuple[Method, dict[str, Any]]:
    """A request's method, and what its preset was called with."""
    chosen: dict[str, Any] = {"objective": request.objective}
    if request.method == "auto" and size() == 1:  # ranks end together, by an observer that they agree on
        chosen["deadline"] = request.deadline
        given = {text.partition("=")[0] for text in request.method_option}
        if request.previews is not None and request.objective is None and "objective" not in given:
            chosen["objective"] = "anytime"
    return make_method(request.method, request.method_option, window=request.window, tolerance=request.tolerance, **chosen)


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
@taking(Request)
def sample(request: Request) -> None:
    """Sample a model or call a pipeline in parallel over time; write pictures, run.json and, if asked, a trace."""
    solver, called = _method_of(request)

    from paradiff.app.run import run

    run(request, solver, called)


@app.command(cls=Command)
@taking(
    Request,
    without=("compare", "trace", "overwrite", "timeout", "objective", "previews", "start", "save_trajectory"),
    otherwise=BULK,
)
def generate(
    request: Request,
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
) -> None:
    """Sample many seeds into shards, in batches and the last few in parallel over time; go on with what was cut short."""
    if request.method == "auto":
        raise ValueError(
            "--method is auto, whose choices depend on the clock, so that shards would not have the same bytes; name a method, "
            "such as the one that `paradiff plan` advises"
        )
    bulk = Bulk(request=request, shard=shard, batch=batch, last=last, format=format)
    solver, called = _method_of(request)

    from paradiff.app.generate import generate as generate_bulk

    generate_bulk(bulk, solver, called)


@app.command(cls=Command)
@taking(Request, without=OTHERS_THAN_SERVED, otherwise=SERVED)
def serve(
    request: Request,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine reach another one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for a free one.")] = 8765,
    active: Annotated[int, typer.Option(help="Requests that are solved at once.")] = 64,
    queue: Annotated[int, typer.Option(help="Requests that wait, at most; further ones are refused.")] = 1024,
    keep: Annotated[int, typer.Option(help="Ended requests that are kept in memory, at most.")] = 4096,
    drain: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time that what was accepted has after Ctrl-C or SIGTERM.")
    ] = 30.0,
) -> None:
    """Serve a model on this machine: requests share network calls, each with as many nodes at once as the load allows."""
    from paradiff.app.serve import serve as serve_it

    serve_it(request, host=host, port=port, active=active, queue=queue, keep=keep, drain=drain)


@app.command(cls=Command)
@taking(Request, without=(*OF_A_SAMPLE, "max_rows"), otherwise=OF_A_PIPELINE)
def explain(
    request: Request,
    time: Annotated[
        bool,
        typer.Option(
            "--time",
            help="Also make a call up to its second pass, and time its networks on one state and on several.",
            rich_help_panel=flags.PIPELINES,
        ),
    ] = False,
) -> None:
    """Say what a parallel run of a pipeline would do, without calling its networks unless they are to be timed."""
    solver, _ = _method_of(request)

    from paradiff.app.explain import explain as explain_pipeline

    explain_pipeline(request, solver, timed=time)


@app.command(cls=Command)
@taking(
    Request, without=(*(name for name in OF_A_SAMPLE if name != "deadline"), "method", "method_option"), otherwise=OF_A_PLAN
)
def plan(
    request: Request,
    pilots: Annotated[
        int, typer.Option(help="Runs of each method that is tried; 0 foresees all from what is known.", rich_help_panel=METHOD)
    ] = 1,
    batch: Annotated[int, typer.Option(help="Samples that are solved together, of a pixel model.", rich_help_panel=CHAIN)] = 1,
    devices: Annotated[
        int, typer.Option(help="Devices that share the rows of each round; several are simulated.", rich_help_panel=DEVICE)
    ] = 1,
    curve: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS:SECONDS,...",
            help="The latency curve of another device, such as 1:0.05,2:0.051,4:0.06; this machine's by default.",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw seconds against windows, a PNG file.", rich_help_panel=OUTPUT)
    ] = None,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write the whole plan, a JSON file.", rich_help_panel=OUTPUT)
    ] = None,
) -> None:
    """Say what is fastest on this machine, and whether anything beats the sequential chain, before it is spent."""
    from pathlib import Path

    from paradiff.app.plan import plan as plan_it

    plan_it(
        dataclasses.replace(request, method="sequential"),
        devices=devices,
        curve=curve,
        pilots=pilots,
        batch=batch,
        plot=None if plot is None else Path(plot),
        json=None if json is None else Path(json),
    )


@app.command(cls=Command)
@taking(Request, without=OTHERS_THAN_CALIBRATED, otherwise=CALIBRATED)
def calibrate(
    request: Request,
    coverage: Annotated[
        float, typer.Option(help="Share of samples that the bound is to hold for.", rich_help_panel=METHOD)
    ] = 0.95,
    json: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write the calibration, a JSON file.", rich_help_panel=OUTPUT)
    ] = None,
) -> None:
    """Measure how far a method's samples err beside their estimates, so that later runs state a bound of their errors."""
    from pathlib import Path

    solver, _ = _method_of(request)

    from paradiff.app.calibrate import calibrate as calibrate_it

    calibrate_it(request, solver, coverage=coverage, file=None if json is None else Path(json))


@app.command(cls=Command)
def doctor(
    device: flags.Device = "auto",
    threads: flags.Threads = None,
) -> None:
    """Say what this machine can do: devices, versions, bundled models, seconds of a call by its rows, and what is missing."""
    from paradiff.app.doctor import doctor as examine

    examine(device, threads)


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

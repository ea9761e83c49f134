# SPDX-License-Identifier: Apache-2.0
"""A run of `paradiff sample`: a well-formed request computed, written and shown."""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import typer
from rich.console import Console
from rich.table import Table

from paradiff.app import environment, run_json
from paradiff.app.ends import LATE
from paradiff.app.flags import OUT
from paradiff.app.folder import LAST, Folder, next_folder, output_folder, rescued
from paradiff.app.launched import clock_of, rank, team
from paradiff.app.options import parse_seeds
from paradiff.app.outcome import CutShort
from paradiff.app.previews import preview_folder
from paradiff.app.request import Job, Request
from paradiff.app.signals import finishing, whole_from
from paradiff.app.stream import Stream
from paradiff.models.files import is_pixel, read_index
from paradiff.solver.arguments import require_warm
from paradiff.solver.deadline import Deadline
from paradiff.solver.solution import Status
from paradiff.solver.trajectory import Trajectory
from paradiff.whole_file import require_place


def run(request: Request, solver: Any, called: dict[str, Any]) -> None:
    """Runs a well-formed request, writes its files and shows its figures."""
    written: list[str] = []
    with whole_from(written):
        _run(request, solver, called, written)


def _run(request: Request, solver: Any, called: dict[str, Any], written: list[str]) -> None:
    """Does so; notes where the files are, once they are."""
    console = Console(highlight=False, file=cast(Any, Stream(sys.stdout)), quiet=rank() > 0)
    environment.use_threads(request.threads)
    devices = environment.choose_devices(request.device)
    device = devices[0]
    dtype = getattr(torch, request.dtype)
    if is_pixel(read_index(request.model)):
        from paradiff.app.pixels import sample_pixels as sample_it
        from paradiff.app.pixels import with_defaults

        request = with_defaults(request)
    else:
        from paradiff.app.pipeline import refuse_pixel_options
        from paradiff.app.pipeline import sample_pipeline as sample_it

        refuse_pixel_options(request)
    begin = None if request.start is None else Trajectory.load(request.start)
    require_warm(solver, begin, request.save_trajectory is not None)
    with team(request.to_json(), device) as ranks:
        if request.save_trajectory is not None and rank() == 0:
            refuse_unfit(request.save_trajectory)
        own = getattr(solver, "deadline", None) is not None
        deadline = None if request.deadline is None or own else Deadline(request.deadline, clock=clock_of(ranks))
        with claimed(request) as folder, preview_folder(request.previews):
            place = "" if folder is None else str(folder.path)
            job = Job(
                request=dataclasses.replace(request, out=place),
                seeds=parse_seeds(request.seeds),
                method=solver,
                called=called,
                device=device,
                devices=devices if len(devices) > 1 else None,
                dtype=dtype,
                deadline=deadline,
                begin=begin,
                ranks=ranks,
                notice=f"{OUT} is not empty; this run goes to {place}" if place != OUT and request.out is None else "",
            )
            try:
                outcome = sample_it(job, console)
            except CutShort as cut:
                cut.saved = "" if folder is None else rescued(cut.writers, "what they gave")
                raise
            if folder is not None:
                with finishing(written, place):
                    folder.fill([*outcome.writers, lambda place: run_json.write_json(outcome.contents, place / LAST)])
            if request.save_trajectory is not None and outcome.trajectory is not None and rank() == 0:
                try:
                    outcome.trajectory.save(request.save_trajectory)
                except ValueError as error:
                    raise ValueError(f"{error}; the run itself is whole and is written to {place}") from error
    show(console, outcome.contents, request.method, outcome.title)
    console.print(f"{outcome.contents['status']}; written to {place}", soft_wrap=True)
    ended = outcome.contents["status_code"] == Status.STOPPED.code and (own or (deadline is not None and deadline.stopped))
    if ended:
        console.print(f"the deadline of {solver.deadline if own else request.deadline:g} s ended it", soft_wrap=True)
        raise typer.Exit(LATE)


def refuse_unfit(trajectory: str) -> None:
    """Refuses the path of a file that could not be written.

    Raises:
        ValueError: If it is a folder, a pipe or a device, its folder does not exist, or the file system refuses it.
    """
    path = Path(trajectory).absolute()
    if os.path.isdir(path):  # which is False of a name that is too long
        raise ValueError(f"--save-trajectory is {trajectory!r}, which is a folder; give the path of a file")
    if not path.parent.is_dir():
        raise ValueError(f"--save-trajectory is {trajectory!r}, whose folder does not exist; make it first")
    require_place(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"--save-trajectory is {trajectory!r}, which is no regular file; give another path")


def claimed(request: Request) -> AbstractContextManager[Folder | None]:
    """The output folder of a run, for as long as it lasts; None on ranks that write nothing."""
    if rank() > 0:
        return nullcontext()
    if request.out is None and not request.overwrite:
        return next_folder(Path(OUT))
    return output_folder(Path(OUT if request.out is None else request.out), request.overwrite)


def show(console: Console, result: dict[str, Any], method: str, title: str) -> None:
    """The table at the end of a run."""
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

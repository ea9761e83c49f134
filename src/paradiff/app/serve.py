# SPDX-License-Identifier: Apache-2.0
"""The command `paradiff serve`: a model behind HTTP until a signal comes, and then what was accepted to its end."""

from __future__ import annotations

import dataclasses
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from paradiff.app.environment import choose_device, use_threads
from paradiff.app.outcome import CutShort
from paradiff.app.pipeline import refuse_pixel_options
from paradiff.app.pixels import make_table, with_defaults
from paradiff.app.request import Request
from paradiff.app.shelf import REQUESTS, Shelf
from paradiff.app.signals import noting
from paradiff.app.stream import Stream
from paradiff.app.web import Server
from paradiff.chain.table import Table
from paradiff.errors import require_real, require_whole
from paradiff.models.files import is_pixel, is_policy, read_index
from paradiff.models.pipeline import load_pipeline
from paradiff.models.pixel import Model, load
from paradiff.serving import Engine, SampleRequest, ServedModel
from paradiff.serving.pipeline import refuse_class, served_pipeline

LOOKS = 0.25
"""Seconds between looks whether the engine is well."""


def served(model: Model, request: Request) -> ServedModel:
    """A pixel model as an engine serves it.

    Args:
        model: The model.
        request: The options of the command, which requests may differ from.
    """

    def chain(asked: SampleRequest) -> Table:
        given = {name: value for name in ("sampler", "steps", "eta") if (value := getattr(asked, name)) is not None}
        return make_table(model, with_defaults(dataclasses.replace(request, **given)))

    return ServedModel(
        denoiser=model,
        shape=model.shape,
        chain=chain,
        max_rows=request.max_rows,
        device=model.unet.device,
        dtype=model.unet.dtype,
    )


def _loaded(request: Request, *, pixel: bool) -> ServedModel:
    """The model or the pipeline of the options."""
    device, dtype = choose_device(request.device), getattr(torch, request.dtype)
    if pixel:
        return served(load(request.model, device=device, dtype=dtype), request)
    pipeline = load_pipeline(request.model, device=device, dtype=dtype)
    return served_pipeline(pipeline, sampler=request.sampler, steps=request.steps, eta=request.eta, max_rows=request.max_rows)


def serve(request: Request, *, host: str, port: int, active: int, queue: int, keep: int, drain: float) -> None:
    """Serves a model, or a pipeline that follows a text, until SIGINT or SIGTERM.

    Args:
        request: The options of the model and its chain.
        host: The address to listen on.
        port: The port; 0 for a free one.
        active: Requests that are solved at once.
        queue: Requests that wait, at most.
        keep: Ended requests that are kept in memory, at most.
        drain: Seconds that what was accepted has after the signal.

    Raises:
        ValueError: If an option does not fit the model, or is out of its range.
        CutShort: At the end.
    """
    require_whole("--port", port, 0, ", 0 for a free one", most=65535)
    for name, value, least in (("--active", active, 1), ("--queue", queue, 0), ("--keep", keep, 1)):
        require_whole(name, value, least)
    require_real("--drain, in seconds,", drain)
    console = Console(highlight=False, file=cast(Any, Stream(sys.stdout)))

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    use_threads(request.threads)
    index = read_index(request.model)
    if is_pixel(index):
        request = with_defaults(request)
    elif not is_policy(index):  # of which the loader says what it is
        refuse_class(str(index["_class_name"]))
        refuse_pixel_options(request)
    shelf = None if request.out is None else Shelf(Path(request.out))
    with nullcontext() if shelf is None else shelf.claimed():
        left = [] if shelf is None else shelf.left()
        with Server(host, port, shelf) as server:
            engine = Engine(
                _loaded(request, pixel=is_pixel(index)),
                active=active,
                queue=queue,
                keep=keep,
                sink=None if shelf is None else shelf.keep,
            )
            server.engine = engine
            for id, asked in left:
                _submit_left(engine, id, asked, request)
            if left:
                say(f"{len(left)} requests that were accepted before are solved first")
            _run(server, engine, shelf, drain, say, request.model)


def _submit_left(engine: Engine, id: str, asked: SampleRequest, request: Request) -> None:
    """Gives the engine a request that was accepted before.

    Raises:
        ValueError: If it does not fit the model, as those of another one.
    """
    try:
        engine.submit(asked, id, anew=True)
    except ValueError as error:
        raise ValueError(
            f"{request.out!r} has request {id} left, which does not fit {request.model!r} ({error}); serve the model that it "
            f"was accepted for, give another folder, or remove {REQUESTS}/{id}.json there"
        ) from error


def _run(server: Server, engine: Engine, shelf: Shelf | None, drain: float, say: Any, model: str) -> None:
    """Listens until a signal comes."""
    listening = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": LOOKS}, daemon=True)
    try:
        listening.start()
        say(f"{model} is served on {server.url}")
        if not server.loopback:
            say(f"warning: {server.url} is not this machine's own address: whoever reaches it may send requests")
        while engine.ready:
            threading.Event().wait(LOOKS)
        raise RuntimeError(engine.fault)
    except KeyboardInterrupt as cause:
        came: list[int] = []
        with noting(came):  # a second signal ends the drain
            lost = engine.close(drain, hurry=lambda: bool(came))
        server.shutdown()
        made = int(engine.metrics.value("ended_total", "done"))
        cut = CutShort(f"{made} {'sample was' if made == 1 else 'samples were'} made", [])
        cut.saved = "nothing that was accepted is lost"
        if lost:
            fate = "lost" if shelf is None else "left for the next start"
            for job in lost:
                print(f"{fate}: {job.id}", file=sys.stderr)
            cut.saved = f"{len(lost)} that were accepted are {fate}"
            cut.saved += "" if shelf is None else f" on {str(shelf.path)!r}"
        raise cut from cause

# SPDX-License-Identifier: Apache-2.0
"""A run of `paradiff generate`: the shards of a request that are missing, computed one after the other.

Any number of processes may run the same command on one folder at the same time, on one machine or on several that share the
folder. Under torchrun each rank begins at a place of its own (`RANK`, `WORLD_SIZE`), and so does the process of each of several
devices (workers.py); they meet only in the folder (store.py), so that no process group is needed, and one that dies leaves its
shard to the others.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from paradiff.app import environment, launched
from paradiff.app.bulk import Bulk, Shard, in_turn, shards_of
from paradiff.app.ends import LATE
from paradiff.app.makers import Maker, PipelineMaker, PixelMaker
from paradiff.app.options import make_method, parse_seeds
from paradiff.app.outcome import CutShort
from paradiff.app.packing import Sample, pack
from paradiff.app.pipeline import refuse_pixel_options
from paradiff.app.pixels import with_defaults
from paradiff.app.store import Store
from paradiff.app.stream import Stream
from paradiff.app.workers import working
from paradiff.models.files import digests, folder_of, is_pixel, read_index
from paradiff.solver.protocol import Method

POLL = 0.2
"""Seconds between looks at the folder while other processes compute what is missing."""

AGAIN = "run the same command again for the others"

ROUNDS_OTHERWISE = ("device", "torch", "paradiff", "diffusers", "numpy", "instructions")
"""What of the environment bytes may depend on."""


@dataclass(kw_only=True)
class Work:
    """The computing of the missing shards by this process.

    Attributes:
        store: The folder.
        maker: What computes samples.
        shards: All shards.
        format: Of the shards.
        deadline: Seconds after which no shard is begun; None for no bound.
        place: This process's place among all that the command runs as.
        count: How many these are.
        late: Whether that was so.
        own: Samples of shards that this process has written.
    """

    store: Store
    maker: Maker
    shards: Sequence[Shard]
    format: str
    deadline: float | None
    place: int
    count: int
    late: bool = False
    own: int = 0
    _begin: float = field(default_factory=time.monotonic)

    def run(self, progress: Progress) -> None:
        """Computes shards until none is missing, or the deadline is over; waits for those of other processes."""
        bar = progress.add_task("samples", total=sum(len(shard.seeds) for shard in self.shards))
        while missing := self.store.missing():
            progress.update(bar, completed=self._there(missing))
            if not any(
                [self._computed(shard, progress, bar) for shard in in_turn(missing, self.place, self.count) if not self._over()]
            ):
                if self._over():
                    self.late = True
                    return
                time.sleep(POLL)
        progress.update(bar, completed=self._there([]))

    def _there(self, missing: Sequence[Shard]) -> int:
        """Samples of the shards that are there."""
        return sum(len(shard.seeds) for shard in self.shards) - sum(len(shard.seeds) for shard in missing)

    def _over(self) -> bool:
        return self.deadline is not None and time.monotonic() - self._begin >= self.deadline

    def _computed(self, shard: Shard, progress: Progress, bar: Any) -> bool:
        """Whether this process had the shard to compute; it is whole then."""
        with self.store.claimed(shard) as ours:
            if not ours:
                return False
            make = self.maker.batched if shard.mode == "batched" else self.maker.parallel
            samples: list[Sample] = []
            for seeds in shard.batches:
                samples += make(seeds)
                progress.update(bar, advance=len(seeds))
            self.store.put(shard, pack(self.format, shard.mode, shard.seeds, samples))
        self.own += len(shard.seeds)
        return True


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A run that a process takes part in.

    Attributes:
        store: The folder.
        shards: All shards.
        maker: What computes samples on this process's device.
        contents: What the manifest says beside the shards.
    """

    store: Store
    shards: Sequence[Shard]
    maker: Maker
    contents: Mapping[str, Any]

    def work(self, bulk: Bulk, place: int, count: int) -> Work:
        """The work of the process at a place."""
        deadline = bulk.request.deadline
        return Work(
            store=self.store,
            maker=self.maker,
            shards=self.shards,
            format=bulk.format,
            deadline=deadline,
            place=place,
            count=count,
        )


def begun(bulk: Bulk, method: Method, called: Mapping[str, Any], device: torch.device) -> Begun:
    """Begins a run, or goes on with it, in this process.

    Args:
        bulk: What was asked for.
        method: The method.
        called: What its preset was called with.
        device: This process's device.

    Raises:
        ValueError: If an option does not fit the model, or the folder holds another run.
    """
    request = bulk.request
    store = Store(Path(cast(str, request.out)))
    if is_pixel(read_index(request.model)):
        bulk, kind = bulk.with_request(with_defaults(request)), PixelMaker
    else:
        refuse_pixel_options(request)
        kind = PipelineMaker
    maker: Maker = kind(bulk, method, called, device, getattr(torch, request.dtype))
    seeds = parse_seeds(request.seeds)
    last = len(seeds) % maker.batch if bulk.last is None else bulk.last
    shards = shards_of(seeds, shard=bulk.shard, batch=maker.batch, last=last, together=maker.together, format=bulk.format)
    asked = {**bulk.to_json(), "device": device.type, "batch": maker.batch, "last": last}
    contents = {
        "request": asked,
        "method_options": maker.effective,
        "model": digests(folder_of(request.model, trust_remote_code=request.trust_remote_code)),
        "environment": _environment(device),
    }
    store.begin(contents, shards)
    return Begun(store=store, shards=shards, maker=maker, contents=contents)


def generate(bulk: Bulk, method: Method, called: Mapping[str, Any]) -> None:
    """Runs a well-formed request: computes the shards that are missing, and shows how many."""
    console = Console(highlight=False, file=cast(Any, Stream(sys.stdout)), quiet=launched.rank() > 0)
    request = bulk.request
    environment.use_threads(request.threads)
    devices = environment.choose_devices(request.device)
    run = begun(bulk, method, called, devices[0])
    store, shards = run.store, run.shards

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    if found := len(shards) - len(store.missing()):
        say(f"{found} of {len(shards)} shards are in {store.path}")
    count = launched.size() * len(devices)
    work = run.work(bulk, launched.rank(), count)
    others = [str(device) for device in devices[1:]]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with (
            working(join, [(bulk, name, place, count) for place, name in enumerate(others, start=1)], others) as workers,
            Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, refresh_per_second=4) as progress,
        ):
            work.run(progress)
            workers.finish(wait=work.late)
        if not work.late:
            store.finish(run.contents)
    except (Exception, KeyboardInterrupt) as cause:
        if not isinstance(cause, KeyboardInterrupt) and not isinstance(cause.__cause__, OSError):
            store.abandon()
            raise
        cut = CutShort(_counted(shards, store), [])
        cut.saved = AGAIN
        raise cut from cause
    for warning in [*run.maker.warnings, *workers.failures]:
        say(f"warning: {warning}")
    if work.late:
        say(f"the deadline of {request.deadline:g} s ended it: {_counted(shards, store)}; {AGAIN}")
        raise typer.Exit(LATE)
    seeds = sum(len(shard.seeds) for shard in shards)
    say(f"{seeds} samples in {len(shards)} shards are in {store.path}, {work.own} of them made by this process")


def join(bulk: Bulk, device: str, place: int, count: int) -> None:
    """Takes part in a run as a further process, which shows nothing.

    Args:
        bulk: What was asked for.
        device: This process's device.
        place: Its place among all processes of the command.
        count: How many these are.
    """
    request = bulk.request
    environment.use_threads(request.threads)
    method, called = make_method(request.method, request.method_option, window=request.window, tolerance=request.tolerance)
    with Progress(disable=True) as progress:
        begun(bulk, method, called, torch.device(device)).work(bulk, place, count).run(progress)


def _environment(device: torch.device) -> dict[str, Any]:
    """What of this process bytes may depend on."""
    found: dict[str, Any] = dict(environment.environment(device))
    found["instructions"] = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else "of the device"
    return {name: found[name] for name in ROUNDS_OTHERWISE}


def _counted(shards: Sequence[Shard], store: Store) -> str:
    """`3 of 12 shards are whole`."""
    return f"{len(shards) - len(store.missing())} of {len(shards)} shards are whole in {str(store.path)!r}"

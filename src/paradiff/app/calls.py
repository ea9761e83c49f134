# SPDX-License-Identifier: Apache-2.0
"""A pipeline called once for each seed, in parallel over time and, to compare, as it is.

Each call has a generator of its own on the CPU, as `pipe(..., generator=torch.Generator().manual_seed(seed))` has.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from paradiff.app.launched import rank
from paradiff.app.media import Output, read_output
from paradiff.pipelines.loop.source import reads_index
from paradiff.pipelines.report import Report
from paradiff.pipelines.run import Run, parallelize
from paradiff.solver.deadline import Deadline
from paradiff.solver.protocol import Method, Observer, Round
from paradiff.solver.ranks import Ranks
from paradiff.solver.trajectory import Trajectory


@dataclass(frozen=True)
class Plain:
    """A seed's plain call: what it gave, its steps and its whole clock."""

    output: Output
    steps: int
    seconds: float


@dataclass(frozen=True)
class Call:
    """A seed's parallel call: what it gave, what the library reports of it, its whole clock; and the plain call, if any."""

    seed: int
    output: Output
    report: Report
    seconds: float
    plain: Plain | None = None


def call_each(
    pipeline: Any,
    method: Method,
    arguments: Mapping[str, Any],
    seeds: Sequence[int],
    calls: list[Call],
    *,
    max_rows: int | None = None,
    deadline: Deadline | None = None,
    compare: bool = False,
    ranks: Ranks | None = None,
    devices: Sequence[torch.device] | None = None,
    bars: bool = True,
    begin: Trajectory | None = None,
    keep: bool = False,
    observing: Callable[[int], Observer] | None = None,
) -> None:
    """Calls a pipeline once for each seed, in parallel over time; with `compare`, also as it is.

    The parallel calls come first. On an accelerator whose clocks are to be compared, an untimed call precedes them.

    Args:
        pipeline: The pipeline.
        method: The method.
        arguments: The call's arguments, without the generator.
        seeds: The seeds.
        calls: Where each call goes as soon as it is finished.
        max_rows: Most rows in one network call.
        deadline: What ends a parallel call that takes too long; its clock starts with each.
        compare: Whether plain calls follow.
        ranks: The ranks that share the work; the first of them shows progress.
        devices: The devices of this process that share it, the pipeline's own first.
        bars: Whether calls show their progress on a terminal.
        begin: The trajectories that the calls begin from, one a seed; None for none.
        keep: Whether reports have the trajectories of their calls.
        observing: What observes the call of a seed, beside the deadline; None for nothing.

    Raises:
        ValueError: If the pipeline refuses its arguments, the method does not fit its chain, or its output cannot be saved.
    """
    if begin is not None and begin.samples != len(seeds):
        raise ValueError(
            f"the trajectory is of {begin.samples} seeds, and {len(seeds)} are asked for; begin from one of as many seeds"
        )
    shared = (pipeline, method, max_rows, ranks, devices, begin, keep)
    context: Run | None = None
    quiet = not (bars and sys.stderr.isatty()) or rank() > 0
    vector = reads_index(type(pipeline)) == []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* was called sequentially", RuntimeWarning)  # told at the end
        for k, seed in enumerate(seeds):
            if context is None or begin is not None or observing is not None:
                observer = deadline if observing is None else both(observing(seed), deadline)
                context = _context(*shared, k, observer)
            with context:
                if compare and k == 0 and pipeline.device.type != "cpu":
                    pipeline.set_progress_bar_config(disable=True)
                    timed(pipeline, arguments, generator_of(seed))
                # Lanes are many loops, each with a bar of its own.
                pipeline.set_progress_bar_config(disable=quiet or not vector, desc=f"seed {seed}", unit="round")
                if deadline is not None:
                    deadline.start()
                output, seconds = timed(pipeline, arguments, generator_of(seed))
                calls.append(Call(seed, output, context.report, seconds))
    for k, call in enumerate(calls if compare else ()):
        pipeline.set_progress_bar_config(disable=quiet, desc=f"seed {call.seed}, sequential", unit="step")
        plain = functools.partial(_plain, pipeline, arguments, call.seed)
        calls[k] = dataclasses.replace(call, plain=plain() if ranks is None else ranks.by_first(plain, pipeline.device))


def _context(
    pipeline: Any,
    method: Method,
    max_rows: int | None,
    ranks: Ranks | None,
    devices: Sequence[torch.device] | None,
    begin: Trajectory | None,
    keep: bool,
    place: int,
    observer: Observer | None,
) -> Run:
    """The pipeline made parallel, for all seeds, or for the one whose trajectory stands at a place."""
    return parallelize(
        pipeline,
        method,
        max_rows=max_rows,
        observer=observer,
        mesh=ranks,
        devices=devices,
        start=None if begin is None else begin.only(place),
        keep_trajectory=keep,
    )


def both(one: Observer, other: Observer | None) -> Observer:
    """An observer that shows each round to two, and asks the run to stop where one of them does."""
    if other is None:
        return one

    def observer(round: Round, /) -> bool | None:
        found = [one(round), other(round)]
        return any(found)

    return observer


def _plain(pipeline: Any, arguments: Mapping[str, Any], seed: int) -> Plain:
    """A seed's plain call."""
    with counted_steps(pipeline.scheduler) as count:
        output, seconds = timed(pipeline, arguments, generator_of(seed))
    return Plain(output, count[0], seconds)


def generator_of(seed: int) -> torch.Generator:
    """What a seed's call draws from."""
    return torch.Generator().manual_seed(seed)


def timed(
    pipeline: Any, arguments: Mapping[str, Any], generator: torch.Generator | list[torch.Generator]
) -> tuple[Output, float]:
    """One call, and its whole clock.

    Args:
        pipeline: The pipeline.
        arguments: The call's arguments, without the generator.
        generator: The generator, or one for each sample.

    Raises:
        ValueError: If the pipeline refuses its arguments, or its output cannot be saved.
    """
    given = copy.deepcopy(dict(arguments))  # some pipelines write into their arguments
    begin = time.perf_counter()
    try:
        result = pipeline(**given, generator=generator)
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        text = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise ValueError(f"the {type(pipeline).__name__} failed with these arguments: {text}") from error
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
    seconds = time.perf_counter() - begin
    return read_output(result, pipeline), seconds


@contextmanager
def counted_steps(scheduler: Any) -> Iterator[list[int]]:
    """Counts the steps of a scheduler's class, copies of the scheduler included."""
    kind = type(scheduler)
    own, step, count = "step" in vars(kind), kind.step, [0]

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return step(*args, **kwargs)

    kind.step = counted
    try:
        yield count
    finally:
        if own:
            kind.step = step
        else:
            del kind.step

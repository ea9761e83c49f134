# SPDX-License-Identifier: Apache-2.0
"""The plan of a pipeline's call: its networks are timed with the call's conditioning in place, and pilots are whole calls."""

from __future__ import annotations

import copy
import functools
import inspect
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from paradiff.chain.table import Table
from paradiff.errors import Unsupported, require_whole
from paradiff.methods.presets import parasolver
from paradiff.pipelines.explanation import default_steps, executor_of, set_timesteps, timed
from paradiff.pipelines.host.find import host_of
from paradiff.pipelines.host.host import Host
from paradiff.pipelines.known import OWN, CallKnown
from paradiff.pipelines.run import Run
from paradiff.pipelines.settings import Settings
from paradiff.pipelines.timing import Timing
from paradiff.planning.choice import Choice
from paradiff.planning.cost import Devices, Trace
from paradiff.planning.identity import table_key
from paradiff.planning.latency import LatencyCurve
from paradiff.planning.pilots import SEED
from paradiff.planning.plan import Plan
from paradiff.planning.planner import devices_asked
from paradiff.planning.store import digest
from paradiff.planning.traces import Traces
from paradiff.planning.trials import Trials
from paradiff.planning.wish import Objective, Wish
from paradiff.samplers.scheduler.probe import probe
from paradiff.solver.protocol import Round

WIDEST = 16
"""Most states of a call that is timed."""

PATIENCE = 1.5
"""Times as long as the plain call that a pilot's networks may take before it is cut."""


def plan_call(
    pipeline: Any,
    call: Mapping[str, Any],
    *,
    tolerance: float,
    most: int | None,
    devices: Devices | int,
    curve: LatencyCurve | None,
    pilots: int,
    objective: Objective | None,
    deadline: float | None,
) -> Plan:
    """Plans a call (`paradiff.plan`).

    Raises:
        ValueError: If an argument is of another kind, or the call has no parallel form; the sentence says why.
    """
    devices = devices_asked(tolerance, pilots, most, devices, curve)
    wish = Wish(tolerance, most, None, objective, deadline, devices=devices)
    host = host_of(pipeline)
    run = Run(host, Settings(method=parasolver()))
    call = {name: value for name, value in call.items() if name not in OWN}
    steps = call.get("num_inference_steps")
    steps = default_steps(host) if steps is None else steps
    require_whole("num_inference_steps", steps, 1)
    notes: list[str] = []
    refused: list[str] = []
    table = _chain(host, steps, call, notes)
    executor = executor_of(run, refused, notes)
    if refused:
        raise ValueError(f"the {host.name} has no parallel form, so there is nothing to choose: {refused[0]}")
    own = curve is None
    known = CallKnown(host, host.bound((), call))
    traces = Traces(digest(known.key, table_key(table)), host.device)
    notes += traces.notes
    with quiet(host.owner):
        if curve is None:
            found = timed(host, steps, call, executor, min(steps, WIDEST), notes)
            if not found:
                raise ValueError(f"the {host.name} has no parallel form, so there is nothing to choose: {notes[-1]}")
            curve = _curve(found)
            known.keep_curve(curve)
        trials = Trials(table, 1, tolerance, curve, devices, most, traces.known if own else {})
        if pilots:
            begin = time.perf_counter()
            calls = _Calls(host, call, table, curve)
            trials.make(pilots, calls.plain, calls.pilot, outside=True)
            if trials.tried:
                notes.append(f"pilot calls of {'; '.join(trials.tried)} took {time.perf_counter() - begin:.2g} s")
            if own and trials.made:
                traces.add(trials.made)
    return trials.plan(notes, wish, simulated=not own)


def _chain(host: Host, steps: int, call: Mapping[str, Any], notes: list[str]) -> Table:
    """The chain of a call.

    Raises:
        ValueError: If its scheduler has none.
    """
    scheduler = copy.deepcopy(host.scheduler)
    set_timesteps(scheduler, steps, notes)
    takes = inspect.signature(scheduler.step).parameters
    options = {name: call[name] for name in ("eta",) if call.get(name) is not None and name in takes}
    try:
        return probe(scheduler, scheduler.timesteps, options)
    except Unsupported as unsupported:
        raise ValueError(f"the chain has no parallel form, so there is nothing to choose: {unsupported}") from unsupported


def _curve(found: list[Timing]) -> LatencyCurve:
    """The seconds of a pass of all networks of the loop, by its states."""
    common = set.intersection(*({*one.seconds} for one in found))
    return LatencyCurve({states: sum(one.seconds[states] for one in found) for states in sorted(common)}, {})


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """No progress bars and no warnings of pilots."""
    before = vars(pipeline).get("_progress_bar_config")
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            vars(pipeline).pop("_progress_bar_config", None)
        else:
            vars(pipeline)["_progress_bar_config"] = before


class _Calls:
    """Whole calls of the pipeline, with a seed of their own."""

    def __init__(self, host: Host, call: Mapping[str, Any], table: Table, curve: LatencyCurve) -> None:
        self._host, self._call, self._table, self._curve = host, call, table, curve

    def plain(self) -> Trace:
        """The trace of the plain call."""
        seconds = self._called(functools.partial(self._host.call, self._host.owner), 0)
        runs = ((1.0, self._table.steps),)
        return Trace(runs, 1, max(seconds - self._curve(1) * self._table.steps, 0.0))

    def pilot(self, one: Choice, number: int, plain: float) -> Trace | None:
        """The trace of a parallel call."""
        spent, rows = 0.0, 0

        def watch(round: Round) -> bool:
            nonlocal spent, rows
            before, rows = rows, sum(solver.error_estimate.evaluations for solver in round.solvers)
            spent += self._curve.within(max(1, rows - before))
            return spent > PATIENCE * plain

        run = Run(self._host, Settings(method=one.method, observer=watch))
        seconds = self._called(run, number)
        report = run.report
        if report.executor == "sequential":
            return None
        mean = report.rows / report.rounds
        return Trace(((mean, report.rounds),), 1, max(seconds - self._curve.within(mean) * report.rounds, 0.0))

    def _called(self, what: Any, number: int) -> float:
        """The seconds of a call."""
        takes = inspect.signature(self._host.call).parameters
        own = {"generator": torch.Generator().manual_seed(SEED + number)} if "generator" in takes else {}
        begin = time.perf_counter()
        what(**self._call, **own)
        return time.perf_counter() - begin

# SPDX-License-Identifier: Apache-2.0
"""Unconditional pixel models: all seeds of a run sampled in one batch, and what came of it into files."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from paradiff.app import plots
from paradiff.app.environment import environment
from paradiff.app.options import effective_options
from paradiff.app.outcome import Outcome, Writer
from paradiff.app.previews import previews_into
from paradiff.app.request import Job, Request
from paradiff.app.run_json import Heading, report
from paradiff.chain.noise import Keyed, Noise, Recorded
from paradiff.chain.table import Table
from paradiff.errors import refuse_unknown
from paradiff.methods.presets import sequential
from paradiff.models.pixel import EXPONENTIAL, SCHEDULERS, Model, load
from paradiff.planning.calibrations import bounded
from paradiff.samplers.exponential import Form
from paradiff.solver.deadline import Deadline
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.loop import sample
from paradiff.solver.machine import Machine
from paradiff.solver.protocol import Batch, Chooses, Method, Observer, Round
from paradiff.solver.solution import Solution
from paradiff.solver.trajectory import require_model

PIPELINES_ONLY = ("prompt", "negative_prompt", "guidance", "size", "argument", "trust_remote_code")


def with_defaults(request: Request) -> Request:
    """A request with the defaults of pixel models.

    Raises:
        ValueError: If it has an option that is for pipelines alone, or an unknown sampler.
    """
    for name in PIPELINES_ONLY:
        if getattr(request, name) not in (None, False, []):
            raise ValueError(
                f"--{name.replace('_', '-')} was given, but {request.model!r} is an unconditional pixel model, which takes "
                "none; it is for other pipelines, such as those that follow a text"
            )
    request = dataclasses.replace(
        request,
        sampler="ddpm" if request.sampler is None else request.sampler,
        steps=1000 if request.steps is None else request.steps,
        eta=0.0 if request.eta is None else request.eta,
    )
    refuse_unknown("sampler", cast(str, request.sampler), (*SCHEDULERS, *EXPONENTIAL))
    return request


def make_table(model: Model, request: Request) -> Table:
    """The table of a request's sampler, with the options that were given.

    Raises:
        ValueError: If an option is not one of the sampler's, or has a value it cannot take.
    """
    sampler, steps, eta = cast(str, request.sampler), cast(int, request.steps), cast(float, request.eta)
    if sampler not in EXPONENTIAL:
        for name in ("grid", "form"):
            if getattr(request, name) is not None:
                raise ValueError(f"--{name} was given, but sampler {sampler!r} has none; {', '.join(EXPONENTIAL)} do")
        return model.table(sampler, steps, eta=eta)
    if eta:
        raise ValueError(f"eta is {eta:g}, but sampler {sampler!r} has no eta; give it with sampler 'ddim'")
    grid = "log-snr" if request.grid is None else request.grid
    form = "clean" if request.form is None else request.form
    refuse_unknown("form", form, get_args(Form))
    return model.exponential(sampler, steps, grid=grid, form=cast(Form, form))


def noise_of(kind: str, seeds: Sequence[int], model: Model, evaluator: Evaluator) -> Noise:
    """The noise of seeds: keyed, or that of plain pipeline calls, each with its own generator."""
    if kind == "keyed":
        return Keyed(model.shape, seeds)
    generators = [torch.Generator(evaluator.device).manual_seed(seed) for seed in seeds]
    return Recorded(model.shape, generators, dtype=evaluator.dtype or torch.float32)


@dataclass(frozen=True, kw_only=True)
class Batched:
    """All seeds of a pixel model, ready to be run by one method and another."""

    model: Model
    table: Table
    evaluator: Evaluator
    job: Job
    console: Console

    def warm_up(self, width: int) -> None:
        """Evaluates a round of one row a sample and one of `width`, untimed: what a first call sets up is in nobody's clock."""
        samples = len(self.job.seeds)
        for rows in {samples, samples * width}:
            x = torch.zeros(rows, *self.model.shape, device=self.evaluator.device)
            self.evaluator(Batch(x, self.table.t[:1].expand(rows), torch.zeros(rows).long(), torch.zeros(rows).long()))

    def run(
        self,
        label: str,
        method: Method,
        deadline: Deadline | None = None,
        previews: Observer | None = None,
        *,
        warm: bool = False,
    ) -> tuple[Solution, float]:
        """Runs a method under a progress bar, up to a deadline; the solution and its whole clock, noise included.

        With `warm` the run begins from the job's trajectory, and keeps its own, as far as that was asked for.
        The plain chain without a deadline is not watched, so that its samples march in step (methods/window/march.py), as in a
        loop by hand.
        """
        chosen = method.chosen(self.table, len(self.job.seeds)) if isinstance(method, Chooses) else method
        if chosen == sequential() and deadline is None and previews is None:
            with self.console.status(label):
                return self._timed(method, None, warm=warm)
        parts, unit = chosen.progress(self.table)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn(f"{{task.completed:.0f}}/{{task.total:.0f}} {unit}  {{task.fields[rounds]}} rounds"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            bar = progress.add_task(label, total=parts * len(self.job.seeds), rounds=0)

            def on_round(round: Round) -> bool:
                progress.update(bar, advance=sum(record.passed for record in round.records), rounds=round.number)
                if previews is not None:
                    previews(round)
                return deadline is not None and deadline(round)

            if deadline is not None:
                deadline.start()
            return self._timed(method, on_round, warm=warm)

    def _timed(self, method: Method, observer: Observer | None, *, warm: bool) -> tuple[Solution, float]:
        begin = time.perf_counter()
        noise = noise_of(self.job.request.noise, self.job.seeds, self.model, self.evaluator)
        solution = sample(
            self.evaluator,
            self.table,
            noise,
            method,
            observer=observer,
            start=self.job.begin if warm else None,
            keep_trajectory=warm and self.job.request.save_trajectory is not None,
        )
        if self.evaluator.device.type == "cuda":
            torch.cuda.synchronize(self.evaluator.device)
        return solution, time.perf_counter() - begin


def effective(job: Job, chosen: Method, table: Table) -> dict[str, Any]:
    """The method's options, and what it chose, as they took effect on a table."""
    parts, unit = chosen.progress(table)
    options = effective_options(job.method, job.called)
    if options.get("blocks", 0) is None:
        options["blocks"] = parts
    if options.get("window", 0) is None:
        options["window"] = chosen.width(table)
    window = options.get("window", chosen.width(table))
    return {"tolerance": job.method.tolerance, "window": window, "parts": parts, "unit": unit, "method_options": options}


def sample_pixels(job: Job, console: Console) -> Outcome:
    """Samples a pixel model, all seeds in one batch."""
    request = job.request
    model = load(request.model, device=job.device, dtype=job.dtype, machine=None if job.ranks is None else Machine(job.ranks))
    table = make_table(model, request)
    evaluator = Evaluator(
        model, max_rows=request.max_rows, device=job.device, dtype=job.dtype, mesh=job.ranks, devices=job.devices
    )
    batched = Batched(model=model, table=table, evaluator=evaluator, job=job, console=console)
    method = chosen = job.method
    if isinstance(method, Chooses):
        batched.warm_up(1)
        method = method.for_model(evaluator, table, noise_of(request.noise, job.seeds, model, evaluator))
        job = dataclasses.replace(job, method=method)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            chosen = method.chosen(table, len(job.seeds)) if isinstance(method, Chooses) else method
        for one in said:
            console.print(f"warning: {one.message}", soft_wrap=True, markup=False)
    edges = chosen.edges(table)
    batched.warm_up(chosen.width(table))
    if job.notice:
        console.print(job.notice, soft_wrap=True, markup=False)
    previews = None if request.previews is None else previews_into(Path(request.previews), console)
    if job.begin is not None:
        require_model(job.begin, named(model))
    solution, seconds = batched.run(request.method, method, job.deadline, previews, warm=True)
    if job.begin is None:
        solution = bounded(solution, evaluator, table, noise_of(request.noise, job.seeds, model, evaluator), method)
    plain = batched.run("sequential", method.reference()) if request.compare else None
    heading = Heading(arguments=request.to_json(), effective=effective(job, chosen, table), environment=environment(job.device))
    result = report(heading, solution, seconds, job.seeds, plain)
    chain = f"{request.sampler}, {request.steps} steps"
    writers: list[Writer] = [lambda folder: plots.grid(solution.sample).save(folder / "samples.png", format="PNG")]
    writers += [partial(_save, x, f"seed-{seed}.png") for seed, x in zip(job.seeds, solution.sample, strict=True)]
    if request.trace:
        slowest = max(range(len(job.seeds)), key=lambda k: solution.error_estimates[k].rounds)
        title = f"{chain}, {request.method}: seed {job.seeds[slowest]}, the slowest of {len(job.seeds)}"
        writers.append(
            lambda folder: plots.save_history(solution.history, slowest, len(edges) - 1, folder / "trace.png", title)
        )
    kept = None if solution.trajectory is None else dataclasses.replace(solution.trajectory, model=named(model))
    return Outcome(contents=result, title=f"{chain}, {job.counted()}", writers=writers, trajectory=kept)


def named(model: Model) -> str:
    """What a model is called in stored trajectories."""
    network = model.unet
    return f"{type(network).__name__} of {sum(p.numel() for p in network.parameters())} weights"


def _save(sample: Tensor, name: str, folder: Path) -> None:
    """Writes one sample's picture."""
    plots.to_image(sample).save(folder / name, format="PNG")

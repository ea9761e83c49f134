"""Sparse nodes: rounds, evaluations, errors and seconds of `collocation`, and how far its estimate of the error holds.

Parts, each written to the JSON as it ends; root mean square errors to the sequential sample of the same noises:

- digits: the trained network, DDPM and DDIM of 1000 steps, one seed at a time, beside the window methods.
- many: the same network and DDPM, 64 more seeds in one batch: how often samples are dear, and how often estimates hold.
- clock: whole-clock seconds beside the sequential chain of the same run, one sample and a batch, two threads.
- rivals: how many steps in turn a sequential solver of higher order takes to be as near. Deterministic: diffusers' solvers, at
  the times that they round to and at the real ones of their levels. Stochastic: long steps on the chain's own Brownian path.
- closed: mixtures of Gaussians in 2, 64 and 1024 dimensions and empirical digits, whose denoisers are exact.
- pipelines: the bundled text pipelines with guidance; errors in units of the latents' standard deviation.
- fixed: what interpolation alone leaves out, by the number of nodes, the order and the shift.
- scatter: every estimate of the file beside the true error; the share of samples that erred by more than twice the estimate.

    python benchmarks/sparse.py --quick
    python benchmarks/sparse.py --json benchmarks/results/sparse.json
    python benchmarks/sparse.py --only rivals,scatter --json FILE              (rows of other parts in the file stay)
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from harness import Denoiser, arguments, finish
from matplotlib.figure import Figure
from pipelines import GUIDANCE, Bench
from rich.console import Console
from rich.table import Table as Sheet
from torch import Tensor

from paradiff import Evaluator, Recorded, Schedule, Solution, Table, Visit, ddim, ddpm, parallelize, sample, sequential
from paradiff.coarse import Coarse, of_table, one_step, two_step
from paradiff.collocation import VARIANCE, placement_on
from paradiff.continuum import continuum
from paradiff.exponential import exponential_integrator
from paradiff.gap import Recurrence
from paradiff.grid import Grid
from paradiff.hub import load
from paradiff.methods import AnyMethod, collocation, parasolver, quasi_newton
from paradiff.sparse import Sparse, draw
from paradiff.targets import Mixture, digits

EQUAL = 4e-3  # half a grey level of data in -1 ... 1
STEPS = 1000
IMAGE = (1, 8, 8)
MOST_ROUNDS = 1500  # at which a method that does not come to rest is given up
TOLERANCES = (4e-3, 1e-2, 2e-3)
WINDOWS = {"ddpm": (16, 32), "ddim": (24,)}
DIMENSIONS = (2, 64, 1024)
BATCH, MOST_ROWS = 64, 256
MANY = range(8, 72)
RIVAL_STEPS = (10, 15, 20, 25, 30, 40, 50)
LONG_STEPS = (20, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500)
SPACINGS = ("linspace", "leading", "trailing")
SIGMAS = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
NODES = (16, 24, 32, 48, 64, 96, 128)
SHIFTS = (0.05, 0.1, 0.25, 0.5, 1.0)
ORDERS = {"ddpm": (0, 1), "ddim": (1, 3, 5)}
TIGHT = 1e-4
FLOW = "flow Euler"
CHAINS = (("DDIM", 200), (FLOW, 200), ("DDIM", 500), (FLOW, 500), ("DDPM", 500))
IMAGES = 4
REMEMBERED = 6  # calls

Row = dict[str, Any]


def rms(gap: Tensor) -> list[float]:
    """Root mean square of every row."""
    return gap.double().square().flatten(1).mean(1).sqrt().tolist()


class Problem:
    """A network, a table and seeds; sequential samples are computed once.

    Args:
        name: What the data are.
        denoiser: The network.
        table: The table.
        shape: Shape of one sample.
    """

    def __init__(self, name: str, denoiser: Denoiser, table: Table, shape: tuple[int, ...] = IMAGE) -> None:
        self.name, self.denoiser, self.table, self.shape = name, denoiser, table, shape
        self._references: dict[int, Tensor] = {}
        self.sequential_seconds: dict[int, float] = {}  # of seeds that were sampled alone

    def noise(self, seeds: Iterable[int]) -> Recorded:
        """What plain pipeline calls with these seeds draw."""
        return Recorded(self.shape, [torch.Generator().manual_seed(seed) for seed in seeds])

    def solve(
        self, method: AnyMethod, seeds: Sequence[int], *, most_rows: int | None = None, table: Table | None = None
    ) -> tuple[Solution, float]:
        """Samples, and the whole clock, noise included."""
        rounds = 0

        def count(_: Any) -> None:
            nonlocal rounds
            rounds += 1
            if rounds > MOST_ROUNDS:
                raise ValueError(f"not at rest after {MOST_ROUNDS} rounds")

        table = self.table if table is None else table
        begin = time.perf_counter()
        evaluator = Evaluator(self.denoiser, max_rows=most_rows)
        solution = sample(evaluator, table, self.noise(seeds), method, progress=count if method.name != "sequential" else None)
        return solution, time.perf_counter() - begin

    def references(self, seeds: Sequence[int], alone: bool = False) -> Tensor:
        """Sequential samples; one seed at a time, and timed, or those that are missing in one batch."""
        if alone:
            for seed in seeds:
                if seed not in self.sequential_seconds:
                    solution, self.sequential_seconds[seed] = self.solve(sequential(), [seed])
                    self._references[seed] = solution.sample[0]
        elif missing := [seed for seed in seeds if seed not in self._references]:
            self._references.update(zip(missing, self.solve(sequential(), missing)[0].sample, strict=True))
        return torch.stack([self._references[seed] for seed in seeds])

    def measure(
        self,
        part: str,
        method: AnyMethod,
        seeds: Sequence[int],
        *,
        alone: bool = True,
        reference: Tensor | None = None,
        **more: Any,
    ) -> Row:
        """A method's row: each seed alone, or all in one batch."""
        reference = self.references(seeds) if reference is None else reference
        found, seconds = [], []
        for group in [[seed] for seed in seeds] if alone else [seeds]:
            solution, clock = self.solve(method, group)
            found += self.samples(solution, reference[len(found) : len(found) + len(group)], group)
            seconds.append(clock)
        known = [self.sequential_seconds[seed] for seed in seeds if seed in self.sequential_seconds]
        return row(
            part,
            self,
            method,
            found,
            seconds=sum(seconds) / len(seeds) if alone else None,
            sequential_seconds=sum(known) / len(known) if alone and len(known) == len(seeds) else None,
            **more,
        )

    @staticmethod
    def samples(solution: Solution, reference: Tensor, seeds: Sequence[int]) -> list[Row]:
        """What a row keeps of every sample."""
        nodes = nodes_of(solution.history)
        errors = rms(solution.sample - reference)
        return [
            {
                "seed": seed,
                "rounds": c.rounds,
                "evaluations": c.evaluations,
                "error": error,
                "estimated": c.estimated_error,
                "gap_error": c.gap_error,
                "sweep_error": c.sweep_error,
                "nodes": nodes.get(k),
            }
            for k, (seed, c, error) in enumerate(zip(seeds, solution.certificates, errors, strict=True))
        ]


def nodes_of(history: Iterable[Any]) -> dict[int, int]:
    """How many nodes every sample came to."""
    return {entry.sample: entry.of for entry in history if isinstance(entry, Visit)}


def row(part: str, problem: Any, method: Any, samples: list[Row], **more: Any) -> Row:
    """The row of a method; `problem` has a name and a table, or is (problem, table, steps)."""
    name, table, steps = problem if isinstance(problem, tuple) else (problem.name, problem.table.name, problem.table.steps)
    rounds, rows, errors = ([s[k] for s in samples] for k in ("rounds", "evaluations", "error"))
    nodes = [s["nodes"] for s in samples if s["nodes"] is not None]
    return {
        "part": part,
        "problem": name,
        "table": table,
        "steps": steps,
        "method": method.name,
        "window": getattr(method, "window", None),
        "tolerance": method.tolerance,
        "target": getattr(method, "target", "chain"),
        "seeds": len(samples),
        "rounds": statistics.mean(rounds),
        "rounds_max": max(rounds),
        "evaluations": statistics.mean(rows),
        "evaluations_max": max(rows),
        "error_median": statistics.median(errors),
        "error_max": max(errors),
        "estimated": max(s["estimated"] for s in samples),
        "nodes_max": max(nodes) if nodes else None,
        **more,
        "samples": samples,
    }


@cache
def trained(sampler: str) -> Problem:
    """The bundled digits network on a chain of 1000 steps, called once so that what a first call sets up is in no clock."""
    model = load("digits")
    table = model.table(sampler, STEPS)
    with torch.inference_mode():
        for _ in range(3):
            model(torch.zeros(1, *IMAGE), table.t[:1].long())
    return Problem("digits", model, table)


# -- digits and clock ---------------------------------------------------------------------------------------------------------


def part_digits(seeds: Sequence[int]) -> Iterator[Row]:
    """Each seed alone, beside the window methods."""
    for sampler, windows in WINDOWS.items():
        problem = trained(sampler)
        reference = problem.references(seeds, alone=True)
        for window in windows:
            problem.solve(collocation(window=window), seeds[:1])  # coefficients are made once for a table
            methods = [collocation(window=window, tolerance=tolerance) for tolerance in TOLERANCES]
            for method in (*methods, quasi_newton(window), parasolver(window)):
                yield problem.measure("digits", method, seeds, reference=reference)


def part_many(seeds: Sequence[int]) -> Iterator[Row]:
    """Seeds that no other part has."""
    problem, more = trained("ddpm"), MANY if len(seeds) >= 8 else MANY[:8]
    for method in (collocation(window=16), quasi_newton(16), parasolver(16)):
        yield problem.measure("many", method, more, alone=False)


def part_clock(seeds: Sequence[int]) -> Iterator[Row]:
    """Seconds on two threads: one sample, the median of three seeds in turns; then a batch, once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quick = len(seeds) < 8
        yield from clock_alone(range(1 if quick else 3))
        yield from clock_batch(range(8 if quick else BATCH))
    finally:
        torch.set_num_threads(threads)


def clock_alone(seeds: Sequence[int]) -> Iterator[Row]:
    """Batch 1, in turns, so that what else the machine does falls on all alike."""
    problem = trained("ddpm")
    methods: list[AnyMethod] = [collocation(window=window) for window in WINDOWS["ddpm"]]
    fresh = [load("digits").table("ddpm", STEPS) for _ in methods]
    first = [problem.solve(method, seeds[:1], table=table)[1] for method, table in zip(methods, fresh, strict=True)]
    for method in methods:
        problem.solve(method, seeds[:1])
    seconds: list[list[float]] = [[] for _ in (None, *methods)]
    samples: list[list[Row]] = [[] for _ in methods]
    for seed in seeds:
        plain, clock = problem.solve(sequential(), [seed])
        seconds[0].append(clock)
        for k, method in enumerate(methods):
            solution, clock = problem.solve(method, [seed])
            seconds[k + 1].append(clock)
            samples[k] += problem.samples(solution, plain.sample, [seed])
    for method, found, clock, begun in zip(methods, samples, seconds[1:], first, strict=True):
        ratios = [a / b for a, b in zip(seconds[0], clock, strict=True)]
        yield row(
            "clock",
            problem,
            method,
            found,
            batch=1,
            threads=torch.get_num_threads(),
            seconds=statistics.median(clock),
            sequential_seconds=statistics.median(seconds[0]),
            ratio=statistics.median(ratios),
            first_seconds=begun,  # the first run on a table, its coefficients included
        )


def clock_batch(seeds: Sequence[int]) -> Iterator[Row]:
    """One batch, at several windows; the fastest is marked."""
    problem = trained("ddpm")
    plain, clock = problem.solve(sequential(), seeds)
    found = []
    for window in (4, 8, 16, 32):
        method = collocation(window=window)
        solution, seconds = problem.solve(method, seeds, most_rows=MOST_ROWS)
        found.append(
            row(
                "clock",
                problem,
                method,
                problem.samples(solution, plain.sample, seeds),
                batch=len(seeds),
                max_rows=MOST_ROWS,
                threads=torch.get_num_threads(),
                rounds_of_batch=solution.rounds,
                seconds=seconds,
                sequential_seconds=clock,
                ratio=clock / seconds,
            )
        )
    max(found, key=lambda r: r["ratio"])["fastest"] = True
    yield from found


# -- rivals -------------------------------------------------------------------------------------------------------------------


def part_rivals(seeds: Sequence[int]) -> Iterator[Row]:
    """Sequential solvers of higher order, in steps; and collocation, in rounds."""
    problem = trained("ddim")
    equation = Problem("digits", problem.denoiser, continuum(problem.table, "ode"))
    references = {"chain": problem.references(seeds), "ode": equation.references(seeds)}
    yield {
        **rival_row(problem, "ddim", STEPS, rms(references["chain"] - references["ode"]), "ode"),
        "spacing": "leading",
    }
    for target in ("chain", "ode"):
        for window in (*WINDOWS["ddim"], None):
            method = collocation(window=window, target=target)
            yield problem.measure("rivals", method, seeds, reference=references[target])
    yield from deterministic(problem, references, seeds)
    problem = trained("ddpm")
    reference = problem.references(seeds)
    for window in (*WINDOWS["ddpm"], None):
        yield problem.measure("rivals", collocation(window=window), seeds, reference=reference)
    yield from stochastic(problem, reference, seeds)


def rival_row(problem: Problem, solver: str, steps: int, errors: list[float], target: str = "chain", **more: Any) -> Row:
    """The row of a sequential solver: `steps` network calls in turn."""
    counts = dict.fromkeys(("rounds", "rounds_max", "evaluations", "evaluations_max"), steps)
    return {
        "part": "rivals",
        "problem": problem.name,
        "table": problem.table.name,
        "steps": problem.table.steps,
        "method": solver,
        "window": 1,
        "tolerance": None,
        "target": target,
        "seeds": len(errors),
        **counts,
        "error_median": statistics.median(errors),
        "error_max": max(errors),
        "estimated": None,
        **more,
    }


def deterministic(problem: Problem, references: dict[str, Tensor], seeds: Sequence[int]) -> Iterator[Row]:
    """diffusers' multistep solvers on the network's own config, from the same start."""
    config = dict(load("digits").config)
    noise = problem.noise(seeds)
    start = torch.stack([noise.start(k) for k in range(len(seeds))])
    kinds = {"UniPC": diffusers.UniPCMultistepScheduler, "DPM-Solver++": diffusers.DPMSolverMultistepScheduler}
    for name, kind in kinds.items():
        for order in (2, 3):
            for spacing in (*SPACINGS, *SIGMAS):
                option = {"timestep_spacing": spacing} if spacing in SPACINGS else {f"use_{spacing}": True}
                if spacing in SIGMAS and f"use_{spacing}" not in kind().config:
                    continue
                for real in (False,) if spacing in SPACINGS else (False, True):
                    for steps in counts_for(RIVAL_STEPS, seeds):
                        scheduler = kind.from_config(config, solver_order=order, **option)
                        found = walk(problem.denoiser, scheduler, start, steps, real)
                        for target, reference in references.items():
                            errors = rms(found - reference)
                            yield rival_row(
                                problem, f"{name}, order {order}", steps, errors, target, spacing=spacing, real_times=real
                            )


@torch.inference_mode()
def walk(denoiser: Denoiser, scheduler: Any, x: Tensor, steps: int, real: bool) -> Tensor:
    """A scheduler's own loop; with `real`, the network hears the times of the levels and not those that they round to."""
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    x = x * scheduler.init_noise_sigma
    known = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt().log().numpy()
    levels = scheduler.sigmas[: len(scheduler.timesteps)].double().log().numpy()
    times = torch.from_numpy(np.interp(levels, known, np.arange(len(known)))).float()
    for k, t in enumerate(scheduler.timesteps):
        m = denoiser(scheduler.scale_model_input(x, t), (times[k] if real else t).expand(len(x)))
        x = scheduler.step(m, t, x).prev_sample
    return x


def stochastic(problem: Problem, reference: Tensor, seeds: Sequence[int]) -> Iterator[Row]:
    """Long steps whose noises are the exact aggregates of the chain's: of several kinds, at several placements, and of ever
    more steps until the error is small enough."""
    noise, table = problem.noise(seeds), problem.table
    z = torch.stack([noise.draw(k, range(table.steps)) for k in range(len(seeds))]).double()
    start = torch.stack([noise.start(k) for k in range(len(seeds))]) * table.start_scale
    path, recurrence = Brownian(problem, z, start), Recurrence(table, VARIANCE)
    solvers: dict[str, Callable[[list[int]], Tensor]] = {
        "one step": lambda nodes: path.walk(one_step(table, nodes)),
        "two step": lambda nodes: path.walk(two_step(table, nodes)),
        "exponential SDE, score": lambda nodes: path.walk(of_table(table, exponential(table, nodes, "score"))),
        "averaged states, explicit": lambda nodes: path.averaged(Sparse(recurrence, nodes, 0), noise, 1),
        "averaged states, corrected": lambda nodes: path.averaged(Sparse(recurrence, nodes, 0), noise, 2),
    }
    for spacing, place in PLACES.items():
        for solver, solve in solvers.items():
            if solver.startswith("exponential") and spacing == "collocation's":
                continue  # no better there than the other one-step solver
            sizes = {len(nodes) - 1: nodes for nodes in (place(table, n) for n in counts_for(LONG_STEPS, seeds))}
            for steps, nodes in sizes.items():
                errors = rms(solve(nodes) - reference)
                calls = 2 * steps if solver.endswith("corrected") else steps
                yield rival_row(problem, solver, calls, errors, spacing=spacing)
                if max(errors) < EQUAL:
                    break


def counts_for(counts: Sequence[int], seeds: Sequence[int]) -> Sequence[int]:
    """Numbers of steps that are tried: of a quick run every third, and the last."""
    return counts if len(seeds) >= 8 else counts[-1::-3][::-1]


def _even(place: Tensor, count: int) -> list[int]:
    """Nodes 0 ... N, `count` gaps or fewer, as even as can be in a rising coordinate of nodes 0 ... N - 1."""
    wanted = np.linspace(float(place[0]), float(place[-1]), count)
    return [*np.unique(np.interp(wanted, place.numpy(), np.arange(len(place))).round().astype(int)).tolist(), len(place)]


PLACES: dict[str, Callable[[Table, int], list[int]]] = {
    "even in time": lambda table, count: _even(-table.t[:-1].double(), count),
    "even in log-SNR": lambda table, count: _even((table.alpha / table.sigma)[:-1].log(), count),
    "collocation's": lambda table, count: placement_on(table).edges(count),
}


def exponential(table: Table, nodes: Sequence[int], form: Any) -> Table:
    """An exponential integrator of the SDE between nodes of a chain; its last step lands on the clean-data estimate."""
    u = -2 * table.alpha[list(nodes)].log()
    u[-1] = 0
    return exponential_integrator(load("digits").process(), Grid(u, [0, len(nodes) - 1]), form=form)


class Brownian:
    """Sequential walks on the Brownian path of some seeds.

    Args:
        problem: The problem, of a one-step table.
        z: `[B, N, ...]` the chain's noises.
        start: `[B, ...]` x[0].
    """

    def __init__(self, problem: Problem, z: Tensor, start: Tensor) -> None:
        self.problem, self.z, self.start = problem, z, start

    @torch.inference_mode()
    def network(self, x: Tensor, node: int) -> Tensor:
        """The network's output at a node, float64."""
        seen, t = x * float(self.problem.table.scale[node]), self.problem.table.t[node]
        return self.problem.denoiser(seen.float(), t.expand(len(x))).double()

    def walk(self, coarse: Coarse) -> Tensor:
        """One call of the network a coarse step."""
        table, x, before = self.problem.table, self.start.double(), None
        for gap, (left, right) in enumerate(zip(coarse.nodes, coarse.nodes[1:], strict=False)):
            clean = float(table.p[left]) * x + float(table.q[left]) * self.network(x, left)
            ahead = clean if before is None else clean + float(coarse.lead[gap]) * (clean - before)
            noise = torch.einsum("n,bn...->b...", coarse.weights[0, left:right], self.z[:, left:right])
            x, before = float(coarse.state[gap, 0]) * x + float(coarse.clean[gap, 0]) * ahead + noise, clean
        return x

    def averaged(self, sparse: Sparse, noise: Recorded, passes: int) -> Tensor:
        """The sparse system's own integrator, but in turn: the drive of a gap, in its own averaged state, is the last gap's;
        further passes take it from the network again."""
        table, rec, seeds = self.problem.table, sparse.recurrence, range(len(self.z))
        drawn = [[draw(gap, noise, k) for k in seeds] for gap in sparse.gaps]
        parts = [(torch.stack([e for e, _ in d], 1), torch.stack([own for _, own in d])) for d in drawn]
        share = sparse.noises(parts).double()
        x0 = self.start.double()
        drives = torch.zeros(len(sparse.gaps), *x0.shape, dtype=torch.float64)
        for k, node in enumerate(sparse.nodes.tolist()):
            if k:
                drives[k] = drives[k - 1]
            for _ in range(passes):
                y = float(sparse.start[k]) * x0 + share[k] + torch.tensordot(sparse.reach[k, : k + 1], drives[: k + 1], 1)
                m = self.network(y, node)
                drives[k] = float(rec.nu[node]) * (
                    float(table.p[node] - rec.g[node]) * y + float(table.q[node]) * m  # the drive: gap.py
                )
        return float(sparse.start[-1]) * x0 + share[-1] + torch.tensordot(sparse.reach[-1], drives, 1)


def smallest(rows: list[Row]) -> list[Row]:
    """Of every solver the fewest network calls with every seed's error below `EQUAL`, beside collocation's rounds."""
    keys = list(dict.fromkeys((r["table"], r["target"], r["method"]) for r in rows if r["method"] != "collocation"))
    found = []
    for table, target, method in keys:
        chosen = [r for r in rows if (r["table"], r["target"], r["method"]) == (table, target, method)]
        good = [r for r in chosen if r["error_max"] < EQUAL]
        best = min(good, key=lambda r: r["rounds"]) if good else None
        near = min(chosen, key=lambda r: r["error_max"])
        ours = [r for r in rows if (r["table"], r["target"], r["method"]) == (table, target, "collocation")]
        found.append(
            {
                "table": table,
                "target": target,
                "solver": method,
                "steps": best["rounds"] if best else None,
                "how": how(best) if best else None,
                "smallest_error": near["error_max"],
                "smallest_error_steps": near["rounds"],
                "smallest_error_how": how(near),
                "collocation": [
                    {k: r[k] for k in ("window", "rounds", "rounds_max", "evaluations", "error_max")} for r in ours
                ],
            }
        )
    return found


def how(row: Row) -> str:
    """Spacing and times of a rival."""
    return row["spacing"] + (", real times" if row.get("real_times") else "")


# -- closed -------------------------------------------------------------------------------------------------------------------


def part_closed(seeds: Sequence[int]) -> Iterator[Row]:
    """Networks that are exact."""
    schedule = Schedule.linear()
    targets: dict[str, tuple[Any, tuple[int, ...]]] = {f"mixture {d}": (mixture(d), (d,)) for d in DIMENSIONS}
    targets["empirical digits"] = (digits(), IMAGE)
    for name, (target, shape) in targets.items():
        for sampler in ("ddpm", "ddim"):
            table = (ddpm if sampler == "ddpm" else ddim)(schedule, STEPS)
            problem = Problem(name, target.denoiser(table), table, shape)
            reference = problem.references(seeds)
            for window in (*WINDOWS[sampler][-1:], None):
                yield problem.measure("closed", collocation(window=window), seeds, reference=reference)


def mixture(size: int) -> Mixture:
    """Eight Gaussians in a box of -1 ... 1."""
    generator = torch.Generator().manual_seed(size)
    means = 2 * torch.rand(8, size, generator=generator, dtype=torch.float64) - 1
    weights = torch.rand(8, generator=generator, dtype=torch.float64) + 0.5
    variances = 0.01 + 0.04 * torch.rand(8, generator=generator, dtype=torch.float64)
    return Mixture(weights / weights.sum(), means, variances)


# -- pipelines ----------------------------------------------------------------------------------------------------------------


def guided(bench: Bench, method: Any, **more: Any) -> Row:
    """The row of a pipeline's calls in parallel."""
    samples, seconds, executor = [], [], ""
    with parallelize(bench.pipe, method) as run:
        for image, latents in enumerate(bench.references):
            found, clock = bench.call(bench.pipe, image)
            seconds.append(clock)
            report = run.report
            executor, c = report.executor, report.certificate
            assert c is not None, f"the call ran sequentially: {report.warnings}"
            samples.append(
                {
                    "seed": image,
                    "rounds": report.rounds,
                    "evaluations": report.rows,
                    "error": rms(found - latents)[0] / bench.spread,
                    "estimated": c.estimated_error / bench.spread,
                    "gap_error": c.gap_error / bench.spread,
                    "sweep_error": c.sweep_error / bench.spread,
                    "nodes": nodes_of(report.history).get(0),
                }
            )
    return row(
        "pipelines",
        (f"{bench.model}, guidance {GUIDANCE:g}", bench.chain, bench.steps),
        method,
        samples,
        executor=executor,
        spread=bench.spread,
        seconds=statistics.mean(seconds),
        sequential_seconds=bench.sequential_seconds,
        **more,
    )


def remembered(bench: Bench, folder: Path) -> Row:
    """The same, after as many other prompts and seeds as `REMEMBERED` have shown where nodes are needed."""
    method = collocation(window=16, memory=folder / f"{bench.chain}-{bench.steps}.json")
    with parallelize(bench.pipe, method):
        for image in range(100, 100 + REMEMBERED):
            bench.call(bench.pipe, image)
    return guided(bench, method, remembered=REMEMBERED)


def part_pipelines(seeds: Sequence[int]) -> Iterator[Row]:
    """Guided calls, one image each."""
    quick = len(seeds) < 8
    for chain, steps in CHAINS[:2] if quick else CHAINS:
        bench = Bench(chain, steps, len(seeds) if quick else IMAGES)
        for tolerance in (4e-3,) if chain == FLOW else (4e-3, 1e-3):
            yield guided(bench, collocation(window=16, tolerance=tolerance))
        if chain in (FLOW, "DDIM"):
            with tempfile.TemporaryDirectory() as folder:
                yield remembered(bench, Path(folder))


# -- fixed --------------------------------------------------------------------------------------------------------------------


def part_fixed(seeds: Sequence[int]) -> Iterator[Row]:
    """A fixed number of nodes, swept until the sweeps leave nothing: what is left is what interpolation leaves out."""
    for sampler, orders in ORDERS.items():
        problem = trained(sampler)
        reference = problem.references(seeds)
        usual = 0 if sampler == "ddpm" else 3
        settings = [(order, VARIANCE) for order in orders] + [(usual, shift) for shift in SHIFTS if shift != VARIANCE]
        for order, shift in settings:
            for nodes in NODES:
                method = collocation(nodes, order=order, shift=shift, max_nodes=nodes, tolerance=TIGHT)
                try:
                    yield problem.measure(
                        "fixed", method, seeds, alone=False, reference=reference, nodes=nodes, order=order, shift=shift
                    )
                except ValueError as error:
                    label = f"{sampler}, {nodes} nodes, order {order}, shift {shift:g}"
                    Console(stderr=True).print(f"[red]{label}: {error}[/red]")


def draw_nodes(rows: list[Row], path: Path) -> None:
    """Error against nodes: above by order, below by shift; lines are medians, dotted lines the worst."""
    chosen = [r for r in rows if r["part"] == "fixed"]
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    for column, sampler in enumerate(ORDERS):
        usual = 0 if sampler == "ddpm" else 3
        for line, field in enumerate(("order", "shift")):
            axes = panels[line][column]
            mine = [r for r in chosen if r["table"] == sampler]
            mine = [r for r in mine if (r["shift"] == VARIANCE if field == "order" else r["order"] == usual)]
            for number, value in enumerate(sorted({r[field] for r in mine})):
                curve = sorted((r["nodes"], r["error_median"], r["error_max"]) for r in mine if r[field] == value)
                x, middle, worst = zip(*curve, strict=True)
                label = f"{field} {value:g}" + (" (averaged states)" if field == "order" and value == 0 else "")
                axes.plot(x, middle, "o-", color=f"C{number}", label=label, ms=4)
                axes.plot(x, worst, ":", color=f"C{number}", lw=1)
            axes.axhline(EQUAL, color="black", lw=0.8)
            shared = f"shift {VARIANCE:g}" if field == "order" else f"order {usual}"
            axes.set(xscale="log", yscale="log", title=f"{sampler.upper()} {STEPS}, {shared}", xlabel="nodes")
            axes.set_xticks(NODES, [str(n) for n in NODES])
            axes.minorticks_off()
            axes.legend(fontsize=8)
    for line in panels:
        line[0].set_ylabel("error to the sequential sample")
    figure.suptitle("Trained digits: what interpolation leaves out; median of the seeds, dotted: the worst")
    figure.savefig(path, dpi=110)


# -- scatter ------------------------------------------------------------------------------------------------------------------


def pairs_of(rows: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """(estimated, true) of every sample of collocation, by part and kind of chain."""
    found: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r["method"] == "collocation" and "samples" in r:
            kind = "stochastic" if r["table"].lower() == "ddpm" else "deterministic"
            kept = [(s["estimated"], s["error"]) for s in r["samples"] if s["estimated"] is not None]
            found.setdefault(f"{r['part']}, {kind}", []).extend(kept)
    return found


def shares(rows: list[Row]) -> list[Row]:
    """How often the estimate held, by part and over all."""
    groups = pairs_of(rows)
    chosen = {**groups, "all": [pair for group in groups.values() for pair in group]}
    return [
        {
            "samples_of": name,
            "samples": len(pairs),
            "above_estimate": sum(true > guess for guess, true in pairs),
            "above_twice": sum(true > 2 * guess for guess, true in pairs),
            "share_above_twice": sum(true > 2 * guess for guess, true in pairs) / len(pairs),
            "ratio_median": statistics.median(true / guess for guess, true in pairs if guess > 0),
            "ratio_max": max(true / guess for guess, true in pairs if guess > 0),
        }
        for name, pairs in chosen.items()
        if pairs
    ]


def draw_scatter(rows: list[Row], path: Path) -> None:
    """True errors against estimated ones."""
    groups, counted = pairs_of(rows), {s["samples_of"]: s for s in shares(rows)}
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots()
    parts = list(dict.fromkeys(name.split(",")[0] for name in groups))
    for name, pairs in groups.items():
        count = counted[name]
        marker = "o" if name.endswith(", stochastic") else "^"
        label = f"{name}: {count['samples']}, {count['above_estimate']} above, {count['above_twice']} above twice"
        guess, true = zip(*pairs, strict=True)
        axes.scatter(guess, true, s=14, marker=marker, color=f"C{parts.index(name.split(',')[0])}", alpha=0.6, label=label)
    values = [v for pairs in groups.values() for pair in pairs for v in pair if v > 0]
    ends = [min(values) / 2, max(values) * 2]
    axes.plot(ends, ends, "k-", lw=1, label="true = estimated")
    axes.plot(ends, [2 * v for v in ends], "k--", lw=1, label="true = 2 estimated")
    axes.set(xscale="log", yscale="log", xlabel="estimated error", ylabel="true error", xlim=ends, ylim=ends)
    everything = counted["all"]
    axes.set_title(
        f"{everything['samples']} samples: {everything['above_estimate']} above the estimate, {everything['above_twice']} "
        f"above twice ({100 * everything['share_above_twice']:.1f} %)"
    )
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


# -- the command --------------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Sequence[int]], Iterator[Row]]] = {
    "digits": part_digits,
    "many": part_many,
    "clock": part_clock,
    "rivals": part_rivals,
    "closed": part_closed,
    "pipelines": part_pipelines,
    "fixed": part_fixed,
}


def show(title: str, rows: list[Row]) -> None:
    """A compact table of rows."""
    sheet = Sheet("problem", "table", "method", "window", "tolerance", "seeds", title=title)
    for heading in (
        "rounds (most)",
        "evaluations (most)",
        "error median (worst)",
        "estimated",
        "seconds",
        "sequential",
        "also",
    ):
        sheet.add_column(heading, justify="right")
    for r in rows:
        also = {k: r[k] for k in ("target", "batch", "ratio", "fastest", "nodes", "order", "shift") if k in r}
        sheet.add_row(
            r["problem"],
            f"{r['table']} {r['steps']}",
            r["method"],
            "-" if r["window"] is None else str(r["window"]),
            number(r["tolerance"]),
            str(r["seeds"]),
            f"{r['rounds']:.1f} ({r['rounds_max']})",
            f"{r['evaluations']:.0f} ({r['evaluations_max']})",
            f"{number(r['error_median'])} ({number(r['error_max'])})",
            number(r["estimated"]),
            number(r.get("seconds")),
            number(r.get("sequential_seconds")),
            ", ".join(f"{k} {number(v) if isinstance(v, float) else v}" for k, v in also.items() if v != "chain"),
        )
    Console(width=190).print(sheet)


def show_records(title: str, records: list[Row]) -> None:
    """A table of plain records."""
    if records:
        names = [k for k, v in records[0].items() if not isinstance(v, list)]
        sheet = Sheet(*names, title=title)
        for record in records:
            sheet.add_row(*(number(record[k]) if not isinstance(record[k], str) else record[k] for k in names))
        Console(width=190).print(sheet)


def number(value: float | None) -> str:
    """Three digits."""
    return "-" if value is None else f"{value:.3g}"


def finite(value: Any) -> Any:
    """Infinities become null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PARTS, "scatter"]
    parser.add_argument("--only", help=f"parts, with commas between: {', '.join(names)}; rows of others in the file stay")
    given = arguments(__doc__ or "", parser)
    wanted = given.only.split(",") if given.only else names
    if strange := set(wanted) - set(names):
        parser.error(f"there is no part {sorted(strange)[0]!r}; it must be of {', '.join(names)}")
    known = json.loads(given.json.read_text(encoding="utf-8")) if given.json and given.json.exists() else {}
    rows: list[Row] = known.get("rows", [])
    extra: dict[str, Any] = {k: known[k] for k in ("seconds_of_parts", "smallest", "scatter") if k in known}
    warnings.filterwarnings("ignore", module="diffusers")
    for part, make in PARTS.items():
        if part not in wanted:
            continue
        kept, mine, begin = [r for r in rows if r["part"] != part], [], time.perf_counter()
        for found in make(range(2 if given.quick else 8)):
            mine.append(finite(found))
            if part != "rivals" or found["method"] == "collocation":
                label = f"{found['problem']} {found['table']} {found['steps']} {found['method']} {found['window']}"
                errors = f"{found['rounds']:.1f} rounds, error {number(found['error_max'])}"
                Console(stderr=True, width=160).print(f"{part}: {label}: {errors}", highlight=False)
        rows = kept + mine
        seconds = time.perf_counter() - begin
        extra["seconds_of_parts"] = {**extra.get("seconds_of_parts", {}), part: seconds}
        if part == "rivals":
            extra["smallest"] = smallest(mine)
        finish(rows, given, extra, show=False)
        show(f"{part}, {seconds:.0f} s", [r for r in mine if part != "rivals" or r["method"] == "collocation"])
        if part == "rivals":
            show_records(f"fewest sequential network calls with every error below {EQUAL:g}", extra["smallest"])
        if part == "fixed" and given.json:
            draw_nodes(rows, given.json.with_name(f"{given.json.stem}_nodes.png"))
    if "scatter" in wanted and pairs_of(rows):
        extra["scatter"] = shares(rows)
        show_records("estimates and true errors", extra["scatter"])
        finish(rows, given, extra, show=False)
        if given.json:
            draw_scatter(rows, given.json.with_name(f"{given.json.stem}_scatter.png"))


if __name__ == "__main__":
    sys.exit(main())

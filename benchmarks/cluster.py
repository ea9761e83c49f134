# SPDX-License-Identifier: Apache-2.0
"""How fast G devices would be: a discrete simulation from latency curves and the rows of each round of real runs.

What is simulated, and what is measured, is said of every row: `part` is `measured` or `simulated`.

A run is a list of rounds, and a round has R rows. Rank g of G evaluates ceil(R / G) of them or what is left, as
`paradiff.solver.sharded` deals them out, and is done when its clock has gone on by t(rows), the latency curve. When the last
one is done, the outputs are gathered and every rank decides on the next round: the overhead of a round. Of the calls in which
the solver evaluates rows again to check the network, those of the first round are shared, each sequence whole on one rank;
those at the run's end are dealt out like a round's, and the others are made by every rank.
`speedup` is of a network that was seen to be right in a run before, `speedup_first` of that first run, and `speedup_unchecked`
is without the check.

- `measured`: two and four gloo ranks on this machine, whose network sleeps for t(W) = a + b W, beside the simulation of
  the same rounds. A method's overhead is that of a run with another window (`srds`: another number of steps) and another seed.
- `simulated`: up to 64 devices. Rounds are those of runs of the bundled networks; the curve is that of a GPU if `--curves`
  names a file of benchmarks/gpu.py, else one of three that are stated, no measured ones (STATED). Each method at the fastest of
  its windows.

    python benchmarks/cluster.py --quick
    python benchmarks/cluster.py --json benchmarks/results/cluster.json                 (the picture goes to cluster.png)
    python benchmarks/cluster.py --json benchmarks/results/cluster.json --draw-only
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.multiprocessing as processes
from drawing import BLACK, BLUE, GREEN, ORANGE, PURPLE, VERMILION, heading, legend, panels, plain_log, save
from harness import Results, Row, options, show
from problem import closed_form, rms, trained
from torch import Tensor

from paradiff import (
    Evaluator,
    Recorded,
    collocation,
    paradigms,
    parallelize,
    parasolver,
    quasi_newton,
    sample,
    sequential,
    srds,
)
from paradiff.models.pipeline import load_pipeline
from paradiff.pipelines.report import Report
from paradiff.planning import LatencyCurve
from paradiff.solver import PararealRecord
from paradiff.solver.crew import shares_of
from paradiff.solver.protocol import Batch, Method
from paradiff.solver.seen import MODELS

DEVICES = (1, 2, 4, 8, 16, 32, 64)
PUBLISHED = {
    ("DDPM", 1000): {"ParaSolver, LSUN Church": 12.1, "ParaSolver, Stable Diffusion 2": 8.1, "ParaDiGMS, LSUN Church": 2.9},
    ("DDIM", 50): {"ParaSolver, Stable Diffusion 2": 3.3},
    ("DDIM", 100): {"SRDS, long chains": 4.3},
    ("flow", 28): {"CHORDS, 50 steps": 2.9},
}
"""Whole-clock speed-ups on 8 devices, as their papers have them; of other networks."""

CALL = 0.025
"""Seconds of a network call of one row, in the stated curves: of the order of a Stable Diffusion's on a GPU, not measured."""

OVERHEAD = (5e-4, 1e-5)
"""Seconds of a round outside the network, and for each of its rows, in the stated curves; not measured."""

COLUMNS = ("part", "curve", "chain", "steps", "method", "window", "devices", "rounds", "evaluations", "error_max", "speedup")
BEST = (*COLUMNS, "speedup_first", "speedup_unchecked")


def linear(first: float, each: float) -> LatencyCurve:
    """The curve first + each * rows."""
    return LatencyCurve({1: first + each, 2: first + 2 * each})


STATED = {
    "a row fills the device": linear(0.0, CALL),
    "two rows cost 1.5 calls": linear(CALL / 2, CALL / 2),
    "8 rows fill the device": LatencyCurve({1: CALL, 8: CALL, 16: 2 * CALL}),
}


Apart = tuple[tuple[int, ...], ...]
"""The rows of the calls of each of some sequences."""


@dataclass(frozen=True)
class Trace:
    """What a run asked of its network.

    Attributes:
        rows: For each round its number of rows; below 0 for a call of rows that every rank evaluated again; for sequences of
            such calls that ranks share, the rows of each sequence's calls.
        dealt: Rows of each call of the check that ranks share.
    """

    rows: tuple[int | Apart, ...]
    dealt: tuple[int, ...] = ()

    @property
    def rounds(self) -> int:
        """Rounds, without rows that are evaluated again."""
        return len(self.unchecked.rows)

    @property
    def calls(self) -> tuple[int, ...]:
        """Rows of each network call of one device."""
        made = [[abs(rows)] if isinstance(rows, int) else [count for one in rows for count in one] for rows in self.rows]
        return (*(count for call in made for count in call), *self.dealt)

    @property
    def unchecked(self) -> Trace:
        """The same run with `check="off"`."""
        return Trace(tuple(rows for rows in self.rows if isinstance(rows, int) and rows > 0))

    @property
    def evaluations(self) -> int:
        """Their rows."""
        return sum(self.unchecked.calls)


def simulated(trace: Trace, devices: int, curve: LatencyCurve, overhead: tuple[float, float] = OVERHEAD) -> float:
    """Seconds of a run on several devices.

    Args:
        trace: Its rounds.
        devices: G.
        curve: Of each device.
        overhead: Seconds of a round outside the network, and for each of its rows.
    """
    clocks = [curve(1) if devices > 1 else 0.0] * devices  # each evaluates the first row, so that networks can be compared
    for rows in (*trace.rows, *trace.dealt):
        if not isinstance(rows, int):
            each = [sum(map(curve, calls)) for calls in rows]
            shares = [sum(each[k] for k in share) for share in shares_of(len(rows), devices)]
            clocks = [max(clocks) + max(shares) + overhead[0]] * devices
            continue
        if rows < 0:
            clocks = [clock + curve(-rows) for clock in clocks]
            continue
        dealt = [len(share) for share in shares_of(rows, devices)]
        clocks = [clock + curve(own) for clock, own in zip(clocks, dealt + [0] * (devices - len(dealt)), strict=True)]
        clocks = [max(clocks) + overhead[0] + overhead[1] * rows] * devices
    return max(clocks)


@dataclass
class Record:
    """The network calls of a run.

    Attributes:
        rows: As of `Trace`.
        dealt: As of `Trace`.
    """

    rows: list[int | Apart] = field(default_factory=list)
    dealt: list[int] = field(default_factory=list)

    def taken(self) -> Trace:
        """The calls since this was last asked."""
        found = Trace(tuple(self.rows), tuple(self.dealt))
        self.rows, self.dealt = [], []
        return found


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    """Records the network calls of all evaluators."""
    record = Record()
    call, again = Evaluator.__call__, Evaluator.evaluate_again
    dealt, apart = Evaluator.evaluate_dealt, Evaluator.evaluate_apart

    def of_a_round(evaluator: Evaluator, batch: Batch) -> Tensor:
        record.rows.append(len(batch.x))
        return call(evaluator, batch)

    def by_each(evaluator: Evaluator, batch: Batch) -> Tensor:
        record.rows.append(-len(batch.x))
        return again(evaluator, batch)

    def by_all(evaluator: Evaluator, batch: Batch) -> Tensor:
        record.dealt.append(len(batch.x))
        found = dealt(evaluator, batch)
        return again(evaluator, batch) if found is None else found

    def by_one(evaluator: Evaluator, sequences: Sequence[Sequence[Batch]]) -> list[Tensor]:
        record.rows.append(tuple(tuple(len(batch.x) for batch in sequence) for sequence in sequences))
        found = apart(evaluator, sequences)
        return [[again(evaluator, batch) for batch in sequence][-1] for sequence in sequences] if found is None else found

    with mock.patch.multiple(
        Evaluator, __call__=of_a_round, evaluate_again=by_each, evaluate_dealt=by_all, evaluate_apart=by_one
    ):
        yield record


# -- measured: ranks on this machine -----------------------------------------------------------------------------------

SLEEP = (0.02, 0.015)
"""Seconds that a call sleeps, and for each of its rows: far longer than what the processors of this machine need."""

REPEATS = 3
"""Times of each run, of which the fastest counts: what else the machine does can only add."""

RUNS: dict[str, tuple[str, int, Method]] = {
    "parasolver, window 16": ("ddpm", 200, parasolver(16)),
    "parasolver, window 32": ("ddpm", 200, parasolver(32)),
    "quasi_newton, window 16": ("ddpm", 200, quasi_newton(16)),
    "paradigms, window 16": ("ddpm", 200, paradigms(16, 0.1)),
    "collocation, window 16": ("ddpm", 200, collocation(16)),
    "srds": ("ddim", 100, srds()),
    "parasolver, whole chain": ("ddim", 50, parasolver()),
}
QUICK = ("parasolver, window 16",)
FITTED: dict[str, tuple[str, int, Method]] = {
    "parasolver": ("ddpm", 200, parasolver(24)),
    "quasi_newton": ("ddpm", 200, quasi_newton(24)),
    "paradigms": ("ddpm", 200, paradigms(24, 0.1)),
    "collocation": ("ddpm", 200, collocation(24)),
    "srds": ("ddim", 64, srds()),
}
"""Of each method the run on which its overhead is measured."""


@dataclass
class Sleeping:
    """A network that takes as long as the curve says."""

    denoiser: Callable[[Tensor, Tensor], Tensor]
    curve: LatencyCurve

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's output."""
        begin = time.perf_counter()
        output = self.denoiser(x, t)
        time.sleep(max(0.0, self.curve(len(x)) - (time.perf_counter() - begin)))
        return output


def run_once(sampler: str, steps: int, method: Method, seed: int, ranks: Any) -> tuple[Trace, float]:
    """A run with a sleeping network, and its whole clock."""
    problem = closed_form(sampler, steps)
    evaluator = Evaluator(Sleeping(problem.denoiser, linear(*SLEEP)), mesh=ranks)
    noise = Recorded(problem.shape, [torch.Generator().manual_seed(seed)])
    with recording() as record:
        begin = time.perf_counter()
        sample(evaluator, problem.table, noise, method)
        return record.taken(), time.perf_counter() - begin


def fastest(repeats: int, *given: Any) -> tuple[Trace, float]:
    """The fastest of several equal runs."""
    return min((run_once(*given) for _ in range(repeats)), key=lambda run: run[1])


def rank_runs(rank: int, devices: int, port: int, names: Sequence[str], repeats: int, found: Any) -> None:
    """What each rank runs: the fitted runs, and those that are compared."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from paradiff.solver.ranks import Ranks

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(devices), LOCAL_RANK=str(rank), MASTER_ADDR="localhost")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    ranks = None
    if devices > 1:
        dist.init_process_group("gloo")
        ranks = Ranks(init_device_mesh("cpu", (devices,), mesh_dim_names=("time",)))
    run_once("ddpm", 20, parasolver(4), 0, ranks)
    fitted = {
        name: fastest(repeats, *FITTED[name], 1000, ranks) for name in dict.fromkeys(RUNS[name][2].name for name in names)
    }
    runs = [fastest(repeats, *RUNS[name], 0, ranks) for name in names]
    if rank == 0:
        found.put((fitted, runs))
    if ranks is not None:
        ranks.agree({})
        ranks.close()
        dist.destroy_process_group()


def measured(devices: int, names: Sequence[str], repeats: int) -> list[Row]:
    """The clocks of ranks on this machine beside the simulation."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = processes.get_context("spawn")
    found = context.Queue()
    ranks = [context.Process(target=rank_runs, args=(rank, devices, port, names, repeats, found)) for rank in range(devices)]
    for rank in ranks:
        rank.start()
    fitted, runs = found.get()
    for rank in ranks:
        rank.join()
    curve = linear(*SLEEP)
    overheads = {
        method: max(0.0, seconds - simulated(trace, devices, curve, (0.0, 0.0))) / trace.rounds
        for method, (trace, seconds) in fitted.items()
    }
    rows = []
    for name, (trace, seconds) in zip(names, runs, strict=True):
        sampler, steps, method = RUNS[name]
        overhead = overheads[method.name]
        expected = simulated(trace, devices, curve, (overhead, 0.0))
        rows.append(
            {
                "part": "measured",
                "chain": sampler.upper(),
                "steps": steps,
                "run": name,
                "method": method.name,
                "devices": devices,
                "rounds": trace.rounds,
                "evaluations": trace.evaluations,
                "seconds": seconds,
                "simulated_seconds": expected,
                "off": expected / seconds - 1,
                "overhead": overhead,
            }
        )
    return rows


# -- simulated: devices that are not here ------------------------------------------------------------------------------

Make = Callable[[int | None], Method]
METHODS: dict[str, Make] = {
    "parasolver": lambda window: parasolver(window),
    "quasi_newton": lambda window: quasi_newton(window),
    "paradigms": lambda window: paradigms(window, 0.1),
    "collocation": lambda window: collocation(window) if window else collocation(),
    "srds": lambda window: srds(),
}
ONCE = ("srds",)
"""Methods whose window is the whole chain."""

CHAINS: dict[str, tuple[str, int, tuple[int | None, ...], tuple[str, ...]]] = {
    "DDPM 1000": ("ddpm", 1000, (8, 16, 32, 64, 128), ("parasolver", "quasi_newton", "paradigms", "collocation", "srds")),
    "DDIM 50": ("ddim", 50, (8, 16, None), ("parasolver", "quasi_newton", "paradigms", "srds")),
    "DDIM 100": ("ddim", 100, (8, 16, 32, None), ("parasolver", "quasi_newton", "paradigms", "srds")),
    "flow 28": ("flow", 28, (8, 16, None), ("parasolver", "quasi_newton", "paradigms", "srds")),
}


@functools.cache
def flow() -> Any:
    """The bundled flow model's pipeline."""
    pipe: Any = load_pipeline("shapes-flow")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def trace_of(report: Report, steps: int) -> Trace:
    """The rounds of a pipeline's call; a row is a state, which guidance doubles."""
    if report.executor == "sequential":
        return Trace((1,) * steps)
    rows = [len(one.rows) if isinstance(one, PararealRecord) else len(cast(Any, one).change) for one in report.history]
    return Trace((*[1] * (report.passes - len(rows)), *rows, *[-1] * report.checks))


def flow_run(steps: int, method: Method | None, image: int) -> tuple[Trace, Tensor]:
    """A call of the flow model, and its latents; the plain call without a method."""
    pipe = flow()
    given: dict[str, Any] = {"guidance_scale": 4.0, "num_inference_steps": steps, "output_type": "latent"}
    given["generator"] = torch.Generator().manual_seed(image)
    prompt = "a red circle left of a blue square"
    if method is None:
        return Trace((1,) * steps), pipe(prompt, **given)[0]
    with warnings.catch_warnings(), parallelize(pipe, method) as run:
        warnings.simplefilter("ignore")
        latents = pipe(prompt, **given)[0]
    return trace_of(run.report, steps), latents


def chain_run(sampler: str, steps: int, method: Method, seed: int) -> tuple[Trace, Trace, Tensor]:
    """The first run of the digits network, a later one, and the sample."""
    if sampler == "flow":
        trace, latents = flow_run(steps, None if method == sequential() else method, seed)
        return trace, trace, latents
    problem = trained(sampler, steps)
    MODELS.forget()
    with recording() as record:
        runs = [(sample(problem.denoiser, problem.table, problem.noise([seed]), method), record.taken()) for _ in range(2)]
    (_, first), (solution, later) = runs
    return first, later, solution.sample


Traces = tuple[list[Trace], list[Trace], float]
"""Of each seed the first run and a later one, and the largest error of the samples."""


def traced(chain: str, seeds: int) -> tuple[list[Trace], dict[tuple[str, int | None], Traces]]:
    """The traces of the sequential chain, and those of every method and window."""
    sampler, steps, windows, names = CHAINS[chain]
    plain = [chain_run(sampler, steps, sequential(), seed) for seed in range(seeds)]
    found: dict[tuple[str, int | None], Traces] = {}
    for name in names:
        for window in (None,) if name in ONCE else windows:
            runs = [chain_run(sampler, steps, METHODS[name](window), seed) for seed in range(seeds)]
            errors = [rms(own - reference)[0] for (*_, own), (*_, reference) in zip(runs, plain, strict=True)]
            found[name, window] = [first for first, *_ in runs], [later for _, later, _ in runs], max(errors)
    return [Trace((1,) * steps)] * len(plain), found


def rows_of(chain: str, seeds: int, curves: dict[str, LatencyCurve]) -> list[Row]:
    """Each method on a chain, for every curve and number of devices at its fastest window."""
    plain, found = traced(chain, seeds)
    rows = []
    for label, curve in curves.items():
        for devices in DEVICES:
            single = sum(simulated(trace, 1, curve) for trace in plain)
            for name in dict.fromkeys(name for name, _ in found):
                settings = [(window, *value) for (own, window), value in found.items() if own == name]
                gains = [single / sum(simulated(trace, devices, curve) for trace in later) for _, _, later, _ in settings]
                best = max(range(len(settings)), key=lambda k: gains[k])
                window, first, traces, error = settings[best]
                rows.append(
                    {
                        "part": "simulated",
                        "curve": label,
                        "chain": chain.split()[0],
                        "steps": CHAINS[chain][1],
                        "method": name,
                        "window": window,
                        "devices": devices,
                        "rounds": statistics.mean(trace.rounds for trace in traces),
                        "evaluations": statistics.mean(trace.evaluations for trace in traces),
                        "error_max": error,
                        "speedup": gains[best],
                        "speedup_first": single / sum(simulated(trace, devices, curve) for trace in first),
                        "speedup_unchecked": single / sum(simulated(trace.unchecked, devices, curve) for trace in traces),
                    }
                )
    return rows


def best_of(rows: Sequence[Row]) -> list[Row]:
    """The fastest method and window for each curve, chain and number of devices."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        cell = row["chain"], row["steps"], row["curve"], row["devices"]
        if cell not in found or row["speedup"] > found[cell]["speedup"]:
            found[cell] = row
    return list(found.values())


def curves_of(path: Path | None) -> dict[str, LatencyCurve]:
    """The measured latency curves of a file of gpu.py, by shape; without a file the stated ones."""
    if path is None:
        return STATED
    import json

    contents = json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, dict[int, float]] = {}
    for row in contents["rows"]:
        if row.get("part") == "latency" and row.get("mode") == "eager" and row.get("seconds"):
            found.setdefault(row["shape"], {})[row["rows"]] = row["seconds"]
    device = contents["environment"]["device"]
    return {f"{shape}, measured on {device}": LatencyCurve(points) for shape, points in found.items() if len(points) > 1}


def draw(rows: list[Row], path: Path) -> None:
    """Speed-up against devices, a panel a chain, for the first curve."""
    own = [row for row in rows if row["part"] == "simulated"]
    label = own[0]["curve"]
    own = [row for row in own if row["curve"] == label]
    chains = list(dict.fromkeys((row["chain"], row["steps"]) for row in own))
    colours = dict(zip(METHODS, (BLUE, VERMILION, GREEN, PURPLE, ORANGE), strict=True))
    figure, found = panels(f"Simulated, not measured: {label}", 7.0, 2, 2)
    for axes, chain in zip(found.flat, chains, strict=False):
        heading(axes, f"{chain[0]}, {chain[1]} steps")
        for name, colour in colours.items():
            points = [(r["devices"], r["speedup"]) for r in own if (r["chain"], r["steps"]) == chain and r["method"] == name]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", ms=3)
        for speedup in PUBLISHED.get(chain, {}).values():
            axes.plot([8], [speedup], color=BLACK, marker="*", ms=9, ls="")
        axes.axhline(1, color="#888888", lw=0.8)
        plain_log(axes, "x", DEVICES)
        axes.set(xlabel="devices", ylabel="speed-up over the sequential chain")
    marks: dict[str, dict[str, Any]] = {name: {"color": colour} for name, colour in colours.items()}
    legend(figure, {**marks, "published, other networks": {"color": BLACK, "marker": "*"}})
    save(figure, path)


def main() -> None:
    given = options(__doc__, ("measured", *CHAINS), draws=True, extra=("--curves", "latency curves of benchmarks/gpu.py"))
    results = Results(given.json, given.keep)
    if not given.draw_only:
        for part in given.only:
            if part == "measured":
                results.drop(row for row in results.rows if row["part"] != "measured")
                for devices in (2,) if given.quick else (2, 4):
                    for row in measured(devices, QUICK if given.quick else tuple(RUNS), 1 if given.quick else REPEATS):
                        results.add(row)
            elif not given.quick or part == "DDIM 50":
                chain = part.split()[0], CHAINS[part][1]
                results.drop(row for row in results.rows if row["part"] == "measured" or (row["chain"], row["steps"]) != chain)
                for row in rows_of(part, min(1 if given.quick else 3, given.seeds), curves_of(given.curves)):
                    results.add(row)
            results.save()
        results.save(
            published={f"{chain} {steps}": gains for (chain, steps), gains in PUBLISHED.items()},
            stated={"call": CALL, "overhead": OVERHEAD, "sleep": SLEEP},
        )
    if given.json and any(row["part"] == "simulated" for row in results.rows):
        draw(results.rows, given.json.with_suffix(".png"))
    show([row for row in results.rows if row["part"] == "measured"], ("run", "devices", "seconds", "simulated_seconds", "off"))
    simulations = [row for row in results.rows if row["part"] == "simulated" and row["devices"] in (8, 64)]
    show(simulations, COLUMNS)
    show(best_of(simulations), BEST, "The best choice for each chain, curve and number of devices")


if __name__ == "__main__":
    main()

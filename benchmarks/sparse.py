# SPDX-License-Identifier: Apache-2.0
"""`collocation`: rounds, evaluations, errors and seconds, and how often its error estimate holds.

Claim measured: `collocation` gives the sample of a chain of 1000 steps within half a grey level from fewer network evaluations
than the chain has steps, in tens of rounds. Errors are root mean square differences to the sequential sample of the same
noises. Parts:

- digits: the trained network, DDPM and DDIM of 1000 steps, one seed at a time, beside the window methods.
- many: the same network and DDPM, 64 further seeds in one batch, for the spread of costs and of errors over estimates.
- clock: seconds of the whole call beside the sequential chain of the same run, one sample and a batch, on two threads.
- rivals: network calls in turn of sequential solvers of higher order at the same error (rivals.py).
- closed: mixtures of Gaussians in 2, 64 and 1024 dimensions and empirical digits, whose denoisers are exact.
- pipelines: the bundled text pipelines with guidance; errors in units of the latents' standard deviation.
- fixed: the interpolation error alone, by the number of nodes, the order and the shift.
- scatter: every estimate of the file beside the true error; the share of samples whose error is above twice the estimate.

    python benchmarks/sparse.py --quick
    python benchmarks/sparse.py --json benchmarks/results/sparse.json       (pictures: sparse_scatter.png, sparse_nodes.png)
    python benchmarks/sparse.py --only rivals scatter --json FILE               (rows of other parts in the file stay)
    python benchmarks/sparse.py --json benchmarks/results/sparse.json --draw-only
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, heading, panels, plain_log, save
from harness import Results, Row, console, number, options
from harness import show as show_columns
from pipelines import GUIDANCE, Bench
from problem import DIMENSIONS, EQUAL, IMAGE, STEPS, WINDOWS, Problem, mixture, nodes_of, rms, row, trained
from rich.console import Console
from rich.table import Table as Sheet
from rivals import part_rivals, smallest

from paradiff import Schedule, parallelize, sequential
from paradiff.methods.collocation.control import ORDER_ZERO
from paradiff.methods.presets import collocation, parasolver, quasi_newton
from paradiff.models.exact import digits
from paradiff.models.pixel import load
from paradiff.samplers import ddim, ddpm
from paradiff.solver.protocol import Method

TOLERANCES = (4e-3, 1e-2, 2e-3)
BATCH, MOST_ROWS = 64, 256
MANY = range(8, 72)
NODES = (16, 24, 32, 48, 64, 96, 128)
SHIFTS = (0.05, 0.1, 0.25, 0.5, 1.0)
ORDERS = {"ddpm": (0, 1), "ddim": (1, 3, 5)}
TIGHT = 1e-4
FLOW = "flow Euler"
CHAINS = (("DDIM", 200), (FLOW, 200), ("DDIM, trailing", 1000), (FLOW, 500), ("DDPM, trailing", 1000))
IMAGES = 4
REMEMBERED = 6  # calls


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
    """Seeds that are in no other part."""
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
    """Batch 1, in turns, so that other load on the machine falls on all alike."""
    problem = trained("ddpm")
    methods: list[Method] = [collocation(window=window) for window in WINDOWS["ddpm"]]
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


# -- pipelines ----------------------------------------------------------------------------------------------------------------


def guided(bench: Bench, method: Any, **more: Any) -> Row:
    """The row of a pipeline's calls in parallel."""
    samples, seconds, executor = [], [], ""
    with parallelize(bench.pipe, method) as run:
        for image, latents in enumerate(bench.references):
            found, clock = bench.call(bench.pipe, image)
            seconds.append(clock)
            report = run.report
            executor, c = report.executor, report.error_estimate
            assert c is not None, f"the call ran sequentially: {report.warnings}"
            samples.append(
                {
                    "seed": image,
                    "rounds": report.passes,
                    "evaluations": report.rows - report.checks,
                    "error": rms(found - latents)[0] / bench.spread,
                    "estimated": c.estimated_error / bench.spread,
                    "interpolation_error": c.interpolation_error / bench.spread,
                    "iteration_error": c.iteration_error / bench.spread,
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
    """The same with a store of node counts and meshes, filled by `REMEMBERED` calls with other prompts and seeds."""
    method = collocation(window=16, warm_start=folder / f"{bench.chain}-{bench.steps}.json")
    with parallelize(bench.pipe, method):
        for image in range(100, 100 + REMEMBERED):
            bench.call(bench.pipe, image)
    return guided(bench, method, remembered=REMEMBERED)


def part_pipelines(seeds: Sequence[int]) -> Iterator[Row]:
    """Guided calls, one image each."""
    quick = len(seeds) < 8
    for chain, steps in CHAINS[:2] if quick else CHAINS:
        bench = Bench(chain, steps, len(seeds) if quick else IMAGES)
        stochastic = chain.startswith("DDPM")
        window, more = 32 if stochastic else 16, {FLOW: ()}.get(chain, (1e-2,) if stochastic else (1e-3,))
        for tolerance in (4e-3, *more):
            yield guided(bench, collocation(window=window, tolerance=tolerance))
        if not stochastic:
            with tempfile.TemporaryDirectory() as folder:
                yield remembered(bench, Path(folder))


# -- fixed --------------------------------------------------------------------------------------------------------------------


def part_fixed(seeds: Sequence[int]) -> Iterator[Row]:
    """A fixed number of nodes, swept to a small iteration error: the rest is the interpolation error."""
    for sampler, orders in ORDERS.items():
        problem = trained(sampler)
        reference = problem.references(seeds)
        usual = 0 if sampler == "ddpm" else 3
        settings = [(order, ORDER_ZERO.variance) for order in orders] + [
            (usual, shift) for shift in SHIFTS if shift != ORDER_ZERO.variance
        ]
        for order, shift in settings:
            for nodes in NODES:
                method = collocation(nodes, order=order, shift=shift, max_nodes=nodes, tolerance=TIGHT)
                try:
                    yield problem.measure(
                        "fixed", method, seeds, alone=False, reference=reference, nodes=nodes, order=order, shift=shift
                    )
                except ValueError as error:
                    label = f"{sampler}, {nodes} nodes, order {order}, shift {shift:g}"
                    console.print(f"{label}: {error}")


def draw_nodes(rows: list[Row], path: Path) -> None:
    """Error against nodes: above by order, below by shift; lines are medians, dotted lines the worst."""
    chosen = [r for r in rows if r["part"] == "fixed"]
    colours = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
    figure, found = panels("Trained digits: the interpolation error falls with the nodes", 7, 2, 2, sharey=True)
    for column, sampler in enumerate(ORDERS):
        usual = 0 if sampler == "ddpm" else 3
        for line, field in enumerate(("order", "shift")):
            axes = found[line][column]
            mine = [r for r in chosen if r["table"] == sampler]
            mine = [r for r in mine if (r["shift"] == ORDER_ZERO.variance if field == "order" else r["order"] == usual)]
            for k, value in enumerate(sorted({r[field] for r in mine})):
                curve = sorted((r["nodes"], r["error_median"], r["error_max"]) for r in mine if r[field] == value)
                x, middle, worst = zip(*curve, strict=True)
                label = f"{field} {value:g}" + (" (averaged states)" if field == "order" and value == 0 else "")
                axes.plot(x, middle, "o-", color=colours[k], label=label, ms=4)
                axes.plot(x, worst, ":", color=colours[k], lw=1)
            axes.axhline(EQUAL, color=BLACK, lw=0.8)
            shared = f"shift {ORDER_ZERO.variance:g}" if field == "order" else f"order {usual}"
            heading(axes, f"{sampler.upper()} {STEPS}, {shared}")
            axes.set(xlabel="nodes", yscale="log")
            plain_log(axes, "x", NODES)
            axes.legend(frameon=False)
    for line in found:
        line[0].set_ylabel("error; dotted: worst seed")
    save(figure, path)


# -- scatter ------------------------------------------------------------------------------------------------------------------


def pairs_of(rows: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """(estimated, true) of every sample of collocation, by part and kind of chain."""
    found: dict[str, list[tuple[float, float]]] = {}
    for r in rows:
        if r["method"] == "collocation" and "samples" in r:
            kind = "stochastic" if r["table"].lower().startswith("ddpm") else "deterministic"
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
    """True errors over estimated ones, a line for each part and kind of chain."""
    groups, counted = dict(sorted(pairs_of(rows).items())), {s["samples_of"]: s for s in shares(rows)}
    everything = counted["all"]
    kept = 100 * (1 - everything["share_above_twice"])
    figure, found = panels(
        f"{kept:.1f} % of {everything['samples']} samples err by less than twice their estimate", 0.48 * len(groups) + 1.4
    )
    axes, jitter = found[0, 0], np.random.default_rng(0)
    for place, (name, pairs) in enumerate(groups.items()):
        ratios = np.array([true / guess for guess, true in pairs if guess > 0])
        colours = np.select([ratios > 2, ratios > 1], [VERMILION, ORANGE], BLUE)
        axes.scatter(ratios.clip(1e-3), place + jitter.uniform(-0.3, 0.3, len(ratios)), s=11, c=colours, alpha=0.75, lw=0)
        count = counted[name]
        text = f"{count['above_estimate']} / {count['above_twice']} of {count['samples']}"
        axes.text(1.02, place, text, transform=axes.get_yaxis_transform(), va="center")
    axes.text(1.02, -0.75, "above 1 / above 2", transform=axes.get_yaxis_transform(), va="center", color=GREY)
    for ratio, colour in ((1, ORANGE), (2, VERMILION)):
        axes.axvline(ratio, color=colour, lw=1.2, zorder=0)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set(ylim=(len(groups) - 0.4, -0.6), xlabel="true error / estimated error (left edge: 0.001 or less)", xlim=(8e-4, 15))
    plain_log(axes, "x", (0.001, 0.01, 0.1, 0.5, 1, 2, 10))
    axes.grid(axis="y", visible=False)
    save(figure, path)


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
    for column in (
        "rounds (most)",
        "evaluations (most)",
        "error median (worst)",
        "estimated",
        "seconds",
        "sequential",
        "also",
    ):
        sheet.add_column(column, justify="right")
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
    """A table of all fields that are no lists."""
    if records:
        show_columns(records, [k for k, v in records[0].items() if not isinstance(v, list)], title)


def finite(value: Any) -> Any:
    """Infinities become null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    given = options(__doc__, (*PARTS, "scatter"), draws=True)
    results = Results(given.json, given.keep)
    if given.draw_only:
        return draw(results.rows, given.json)
    warnings.filterwarnings("ignore", module="diffusers")
    for part in (p for p in given.only if p in PARTS):
        mine, begin = [], time.perf_counter()
        results.drop(r for r in results.rows if r["part"] != part)
        for found in PARTS[part](range(min(2 if given.quick else 8, given.seeds))):
            mine.append(finite(found))
            results.add(mine[-1])
            if part != "rivals" or found["method"] == "collocation":
                label = f"{found['problem']} {found['table']} {found['steps']} {found['method']} {found['window']}"
                console.print(f"{part}: {label}: {found['rounds']:.1f} rounds, error {number(found['error_max'])}")
        seconds = time.perf_counter() - begin
        results.save(seconds_of_parts={**results.contents.get("seconds_of_parts", {}), part: seconds})
        show(f"{part}, {seconds:.0f} s", [r for r in mine if part != "rivals" or r["method"] == "collocation"])
        if part == "rivals":
            results.save(smallest=smallest(mine))
            title = f"fewest sequential network calls with every error below {EQUAL:g}"
            show_records(title, results.contents["smallest"])
    if "scatter" in given.only and pairs_of(results.rows):
        results.save(scatter=shares(results.rows))
        show_records("estimates and true errors", results.contents["scatter"])
    if given.json:
        draw(results.rows, given.json)


def draw(rows: list[Row], path: Path) -> None:
    """The pictures for which there are rows, beside the JSON file."""
    if any(r["part"] == "fixed" for r in rows):
        draw_nodes(rows, path.with_name(f"{path.stem}_nodes.png"))
    if pairs_of(rows):
        draw_scatter(rows, path.with_name(f"{path.stem}_scatter.png"))


if __name__ == "__main__":
    main()

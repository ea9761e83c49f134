"""Sparse nodes: rounds, evaluations, errors and seconds of `collocation`, and how far its estimate of the error holds.

Parts, each written to the JSON as it ends; root mean square errors to the sequential sample of the same noises:

- digits: the trained network, DDPM and DDIM of 1000 steps, one seed at a time, beside the window methods.
- many: the same network and DDPM, 64 more seeds in one batch: how often samples are dear, and how often estimates hold.
- clock: whole-clock seconds beside the sequential chain of the same run, one sample and a batch, two threads.
- rivals: how many calls in turn a sequential solver of higher order takes to be as near (rivals.py).
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import arguments, finish
from matplotlib.figure import Figure
from pipelines import GUIDANCE, Bench
from problem import DIMENSIONS, EQUAL, IMAGE, STEPS, WINDOWS, Problem, Row, mixture, nodes_of, rms, row, trained
from rich.console import Console
from rich.table import Table as Sheet
from rivals import part_rivals, smallest

from paradiff import Schedule, ddim, ddpm, parallelize, sequential
from paradiff.methods.collocation.control import ORDER_ZERO
from paradiff.methods.presets import collocation, parasolver, quasi_newton
from paradiff.models.exact import digits
from paradiff.models.pixel import load
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
                    "rounds": report.rounds,
                    "evaluations": report.rows,
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
    """The same, after as many other prompts and seeds as `REMEMBERED` have shown where nodes are needed."""
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
    """A fixed number of nodes, swept until the sweeps leave nothing: what is left is what interpolation leaves out."""
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
            mine = [r for r in mine if (r["shift"] == ORDER_ZERO.variance if field == "order" else r["order"] == usual)]
            for number, value in enumerate(sorted({r[field] for r in mine})):
                curve = sorted((r["nodes"], r["error_median"], r["error_max"]) for r in mine if r[field] == value)
                x, middle, worst = zip(*curve, strict=True)
                label = f"{field} {value:g}" + (" (averaged states)" if field == "order" and value == 0 else "")
                axes.plot(x, middle, "o-", color=f"C{number}", label=label, ms=4)
                axes.plot(x, worst, ":", color=f"C{number}", lw=1)
            axes.axhline(EQUAL, color="black", lw=0.8)
            shared = f"shift {ORDER_ZERO.variance:g}" if field == "order" else f"order {usual}"
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

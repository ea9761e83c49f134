"""SRDS beside the window methods: rounds, evaluations and whole-clock seconds at equal measured error.

For every problem (closed-form digits and trained digits; DDIM and DDPM; 25, 100, 961 and 1000 steps) each family of methods is
swept over its settings, all seeds in one batch (8, or 4 of the long chains): a sample's rounds do not depend on its neighbours.
Of the settings whose root mean square error to the sequential sample stays below 4e-3 for every seed, the one with the fewest
rounds is then timed one seed at a time (batch 1), in turns with the sequential chain.

Also measured: how the error falls with the iterations for each coarse propagator, and what the stop rules cost.

    python benchmarks/srds.py [--quick] [--json FILE] [--threads N] [--only NAME,SAMPLER,STEPS ...] [--clock]

With --only the other problems of the file are kept, so that the sweep can be made in parts; --clock then times them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Denoiser, arguments, finish
from matplotlib.figure import Figure
from rich.console import Console

from paradiff import Recorded, Schedule, Solution, Table, paradigms, parasolver, sample, sequential, srds
from paradiff.chain.slope import freeze_clean_data, identity
from paradiff.methods import PararealMethod, WindowMethod
from paradiff.models.exact import digits
from paradiff.models.pixel import load
from paradiff.samplers import ddim, ddpm
from paradiff.solver import PararealRecord

EQUAL = 4e-3  # half a grey level of data in -1 ... 1
SHAPE = (1, 8, 8)
CLOCKED = 4  # seeds that are timed
COLUMNS = ("problem", "sampler", "steps", "family", "setting", "seeds")
FIGURES = ("rounds", "rounds_max", "widest", "evaluations", "error_max", "estimated_error_max", "seconds", "speedup")


@dataclass(frozen=True)
class Candidate:
    """One setting of one family of methods."""

    family: str
    setting: str
    method: WindowMethod | PararealMethod


class Problem:
    """A network, a table and seeds, with the sequential samples."""

    def __init__(self, name: str, sampler: str, denoiser: Denoiser, table: Table, seeds: int) -> None:
        self.name, self.sampler, self.denoiser, self.table, self.seeds = name, sampler, denoiser, table, seeds
        self.reference = self.solve(sequential(), range(seeds))[0].sample

    def solve(self, method: WindowMethod | PararealMethod, seeds: Iterable[int]) -> tuple[Solution, float]:
        """The samples of some seeds in one batch, and the whole clock, noise included."""
        begin = time.perf_counter()
        noise = Recorded(SHAPE, [torch.Generator().manual_seed(seed) for seed in seeds])
        solution = sample(self.denoiser, self.table, noise, method)
        return solution, time.perf_counter() - begin

    def row(self, candidate: Candidate) -> dict[str, Any]:
        """All seeds in one batch: rounds, evaluations and errors."""
        solution, _ = self.solve(candidate.method, range(self.seeds))
        error = (solution.sample - self.reference).flatten(1).double().square().mean(1).sqrt()
        found = solution.error_estimates
        pairs = zip(found, error.tolist(), strict=True)
        return {
            "problem": self.name,
            "sampler": self.sampler,
            "steps": self.table.steps,
            "family": candidate.family,
            "setting": candidate.setting,
            "seeds": self.seeds,
            "rounds": sum(c.rounds for c in found) / self.seeds,
            "rounds_max": max(c.rounds for c in found),
            "widest": widest(solution),
            "evaluations": sum(c.evaluations for c in found) / self.seeds,
            "error_max": float(error.max()),
            "errors": [float(f"{e:.3g}") for e in error.tolist()],
            "estimated_error_max": solution.estimated_error,
            "estimate_holds": sum(c.estimated_error >= e or e < 1e-6 for c, e in pairs),
        }

    def clock(self, methods: Sequence[WindowMethod | PararealMethod]) -> list[float]:
        """Mean seconds of each method one seed at a time, in turns, so that what else the machine does falls on all alike."""
        totals = [0.0] * len(methods)
        for seed in range(min(self.seeds, CLOCKED)):
            for k, method in enumerate(methods):
                totals[k] += self.solve(method, [seed])[1]
        return [total / min(self.seeds, CLOCKED) for total in totals]


def widest(solution: Solution) -> int:
    """The most rows that one sample put in one round."""
    sizes = (len(entry.rows) if isinstance(entry, PararealRecord) else len(entry.change) for entry in solution.history)
    return max(sizes)


def candidates(problem: Problem) -> Iterator[Candidate]:
    """The settings that are swept; at 961 steps, which is 1000 but for being a square, only those of the main methods."""
    steps, smooth = problem.table.steps, problem.sampler == "ddim"
    windows = [w for w in (None, 32, 200) if (w is None and steps <= 100) or (w is not None and w < steps)]
    for window in windows:
        for tolerance in (0.02, 0.005) if smooth else (0.1, 0.02):
            yield Candidate("paradigms", f"window {window or steps}, tolerance {tolerance:g}", paradigms(window, tolerance))
        for tolerance in (4.8e-2, 2.4e-2, 1.2e-2):
            yield Candidate("parasolver", f"window {window or steps}, tolerance {tolerance:g}", parasolver(window, tolerance))
    root, long = math.sqrt(steps), steps > 100
    for blocks in sorted({round(root), round(1.42 * root), round(2 * root)}):
        for tolerance in (1.2e-2, 6e-3) if long else (1.2e-2, 6e-3, 3e-3):
            for coarse in ("one step", "two step") if smooth else ("one step",):
                method = srds(blocks, coarse, tolerance=tolerance)
                yield Candidate(f"srds, {coarse}", f"{blocks} blocks, tolerance {tolerance:g}", method)
        if steps == 961:
            continue
        method = srds(blocks, schedule="batched", tolerance=6e-3)
        yield Candidate("srds, batched", f"{blocks} blocks, tolerance 0.006", method)
        yield Candidate("srds, image rule", f"{blocks} blocks, 0.1 grey levels", srds(blocks, rule="image"))
        method = srds(blocks, 2, tolerance=6e-3)
        yield Candidate("srds, 2 coarse steps", f"{blocks} blocks, tolerance 0.006", method)
    for length in (2, 5):
        for name, slope in (("freeze clean data", freeze_clean_data), ("identity", identity)):
            blocks = steps // length
            if blocks > 200 or steps == 961:
                continue
            for tolerance in (6e-3,) if long else (6e-3, 1.5e-3):
                method = srds(blocks, slope, tolerance=tolerance)
                yield Candidate(f"srds, slope {name}", f"{blocks} blocks, tolerance {tolerance:g}", method)


def compare(problem: Problem, console: Console) -> list[dict[str, Any]]:
    """Every setting once; of every family the one of fewest rounds at equal error is marked."""
    rows = []
    for candidate in candidates(problem):
        rows.append(problem.row(candidate))
    for family in dict.fromkeys(row["family"] for row in rows):
        good = [row for row in rows if row["family"] == family and row["error_max"] < EQUAL]
        label = f"{problem.name} {problem.sampler} {problem.table.steps}: {family}"
        if not good:
            console.print(f"{label}: no setting reaches {EQUAL:g}")
            continue
        best = min(good, key=lambda r: (r["rounds"], r["evaluations"]))
        best["best"] = True
        console.print(f"{label}: {best['rounds']:.1f} rounds, {best['evaluations']:.0f} evaluations ({best['setting']})")
    return rows


def clock(problem: Problem, rows: list[dict[str, Any]]) -> None:
    """Times the best of every family, in turns with the sequential chain."""
    methods = {(c.family, c.setting): c.method for c in candidates(problem)}
    chosen = [row for row in rows if row.get("best")]
    sequence, *seconds = problem.clock([sequential(), *(methods[row["family"], row["setting"]] for row in chosen)])
    for row, found in zip(chosen, seconds, strict=True):
        row["seconds"], row["sequential_seconds"], row["speedup"] = found, sequence, sequence / found


def convergence(problem: Problem) -> list[dict[str, Any]]:
    """Error after each forced number of iterations, by coarse propagator and number of blocks."""
    root, smooth = math.sqrt(problem.table.steps), problem.sampler == "ddim"
    rows = []
    for blocks in sorted({round(root), round(1.42 * root)}):
        for coarse in ("one step", "two step", 2) if smooth else ("one step", 2):
            for iterations in range(4):
                setting = f"{blocks} blocks, {iterations} iterations"
                rows.append(problem.row(Candidate(f"srds, {coarse}", setting, srds(blocks, coarse, iterations=iterations))))
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Evaluations against rounds of every setting at equal error, one panel a problem."""
    keys = list(dict.fromkeys((r["problem"], r["sampler"], r["steps"]) for r in rows))
    families = list(dict.fromkeys(r["family"] for r in rows))
    lines = (len(keys) + 3) // 4
    figure = Figure(figsize=(16, 3.6 * lines), layout="constrained")
    panels = list(figure.subplots(lines, 4, squeeze=False).flat)
    for axes, key in zip(panels, keys, strict=False):
        for number, family in enumerate(families):
            chosen = [
                r
                for r in rows
                if (r["problem"], r["sampler"], r["steps"]) == key and r["family"] == family and r["error_max"] < EQUAL
            ]
            marker = "o" if family.startswith("srds") else "s"
            points = ([r["rounds"] for r in chosen], [r["evaluations"] for r in chosen])
            axes.scatter(*points, s=18, marker=marker, color=f"C{number % 10}", label=family)
        axes.axvline(key[2], color="black", lw=1)
        axes.axhline(key[2], color="black", lw=1)
        axes.set(xscale="log", yscale="log", title=f"{key[0]}, {key[1]} {key[2]}", xlabel="rounds", ylabel="evaluations")
    panels[0].legend(fontsize=6)
    for axes in panels[len(keys) :]:
        axes.set_axis_off()
    figure.suptitle(f"Settings with every seed's error below {EQUAL:g}; lines: the sequential chain")
    figure.savefig(path, dpi=100)


def make(name: str, sampler: str, steps: int, seeds: int) -> Problem:
    """A problem by name: `closed-form-digits` or `digits`."""
    if name == "digits":
        trained = load("digits")
        return Problem(name, sampler, trained, trained.table(sampler, steps), seeds)
    table = ddpm(Schedule.linear(), steps) if sampler == "ddpm" else ddim(Schedule.linear(), steps)
    return Problem(name, sampler, digits().denoiser(table), table, seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="NAME,SAMPLER,STEPS: this problem alone; may be given again")
    parser.add_argument("--clock", action="store_true", help="only time the best settings that the JSON file names")
    given = arguments(__doc__ or "", parser)
    console = Console(stderr=True, width=160)
    lengths = (25, 100) if given.quick else (25, 100, 961, 1000)
    keys = [(n, a, k) for n in ("closed-form-digits", "digits") for a in ("ddim", "ddpm") for k in lengths]
    if given.only:
        parts = [text.split(",") for text in given.only]
        keys = [(name, sampler, int(steps)) for name, sampler, steps in parts]
    known = json.loads(given.json.read_text(encoding="utf-8")) if given.json and given.json.exists() else {}
    rows, iterations = known.get("rows", []), known.get("iterations", [])
    for key in keys:
        problem = make(*key, 2 if given.quick else 8 if key[2] <= 100 else 4)
        if not given.clock:
            rows = [r for r in rows if identify(r) != key] + compare(problem, console)
            if key[2] != 961:
                iterations = [r for r in iterations if identify(r) != key] + convergence(problem)
        if given.clock or not given.only:
            clock(problem, [r for r in rows if identify(r) == key])
        finish(rows, given, {"iterations": iterations}, show=False)
    shown = [row for row in rows if "seconds" in row]
    finish(shown, argparse.Namespace(json=None), columns=COLUMNS, figures=FIGURES)
    if given.json:
        draw(rows, given.json.with_suffix(".png"))


def identify(row: dict[str, Any]) -> tuple[str, str, int]:
    """The problem that a row belongs to."""
    return row["problem"], row["sampler"], row["steps"]


if __name__ == "__main__":
    sys.exit(main())

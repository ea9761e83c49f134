"""Rounds, evaluations, errors and seconds of every method, on closed-form digits and on the trained digits.

Every row is measured one seed at a time (batch 1) on this machine, beside the sequential chain of the same run; `error_max`
is the root mean square difference to the sequential sample, worst seed. The last part profiles the solver's own bookkeeping.

    python benchmarks/rounds.py [--quick] [--json FILE] [--png FILE]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from harness import Problem, arguments, finish
from matplotlib.figure import Figure
from rich.console import Console

from paradiff import Evaluator, Recorded, Schedule, jacobi, paradigms, parasolver, sample, sequential
from paradiff.chain.slope import freeze_clean_data, freeze_epsilon, identity, shifted
from paradiff.methods import WindowMethod
from paradiff.models.exact import digits
from paradiff.models.pixel import load
from paradiff.samplers import ddim, ddpm

SLOPES = {
    "identity": identity,
    "freeze-epsilon": freeze_epsilon,
    "freeze-clean-data": freeze_clean_data,
    "shifted:0.4": shifted(0.4),
}


def methods(window: int | None, deterministic: bool) -> list[tuple[WindowMethod, str]]:
    """Every method at one window: the published rules at the papers' tolerances, ours at its default."""
    published = 0.02 if deterministic else 0.1
    rows = [(paradigms(window, published), "identity")]
    for name, slope in SLOPES.items():
        for warmup in (0, 1):
            rows.append((parasolver(window, published, slope=slope, rule="change", warmup=warmup), name))
        rows.append((parasolver(window, slope=slope), name))
    return rows


def bookkeeping(problem: Problem, window: int) -> dict[str, Any]:
    """Seconds a round outside the network, as a share of the round, for one sample."""
    noise = Recorded(problem.shape, torch.Generator().manual_seed(0))
    evaluator = Evaluator(problem.denoiser)
    begin = time.perf_counter()
    solution = sample(evaluator, problem.table, noise, parasolver(window))
    seconds = time.perf_counter() - begin
    outside = (seconds - evaluator.seconds) / solution.rounds
    share = 1 - evaluator.seconds / seconds
    return {"problem": problem.name, "window": window, "milliseconds_per_round": 1e3 * outside, "share": share}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Mean rounds of every method, one panel a problem."""
    keys = list(dict.fromkeys((r["problem"], r["sampler"], r["steps"], r["window"]) for r in rows))
    figure = Figure(figsize=(13, 3 * ((len(keys) + 1) // 2)), layout="constrained")
    panels = figure.subplots((len(keys) + 1) // 2, 2, squeeze=False).flat
    for axes, key in zip(panels, keys, strict=False):
        chosen = [
            r for r in rows if (r["problem"], r["sampler"], r["steps"], r["window"]) == key and r["method"] != "sequential"
        ]
        labels = [f"{r['method']} {r['slope']} {r['rule']} {r['tolerance']:g} warmup {r['warmup']}" for r in chosen]
        colours = ["tab:green" if r["error_max"] < 4e-3 else "tab:red" for r in chosen]
        axes.barh(labels, [r["rounds"] for r in chosen], color=colours)
        axes.axvline(key[2] / key[3], color="black", lw=1)
        axes.set_title(f"{key[0]}, {key[1]} {key[2]}, window {key[3]}", fontsize=9)
        axes.tick_params(labelsize=6)
        axes.set_xlabel("rounds, mean (green: worst error below 4e-3; line: steps/window)", fontsize=7)
        axes.set_xscale("log")
    figure.savefig(path, dpi=110)


def main() -> None:
    given = arguments(__doc__ or "")
    console = Console(stderr=True)
    schedule, target, trained = Schedule.linear(), digits(), load("digits")
    seeds = 2 if given.quick else 8
    chains = [("ddpm", 1000, (32, 200)), ("ddim", 50, (None,)), ("ddim", 200, (None,))]
    if given.quick:
        chains = [("ddpm", 200, (32,)), ("ddim", 50, (None,))]
    rows: list[dict[str, Any]] = []
    overhead: list[dict[str, Any]] = []
    for name in ("closed-form-digits", "digits"):
        for sampler, steps, windows in chains:
            if name == "digits":
                table, denoiser = trained.table(sampler, steps), trained
            else:
                table = ddpm(schedule, steps) if sampler == "ddpm" else ddim(schedule, steps)
                denoiser = target.denoiser(table)
            with torch.inference_mode():
                for _ in range(3):  # what a first call sets up is in nobody's clock
                    denoiser(torch.zeros(1, 1, 8, 8), table.t[:1].long())
            problem = Problem(name, sampler, denoiser, table, (1, 8, 8), seeds)
            rows.append(problem.row(sequential(), "zero"))
            for window in windows:
                slow = 2 if name == "digits" and steps == 1000 else seeds
                rows.append(problem.row(jacobi(window), "zero", slow))
                for method, slope in methods(window, sampler == "ddim"):
                    console.print(
                        f"{name} {sampler} {steps} window {window}: {method.name} {slope} {method.rule} {method.tolerance:g}"
                    )
                    rows.append(problem.row(method, slope))
            if sampler == "ddpm":
                overhead.append(bookkeeping(problem, 32))
    finish(rows, given, {"bookkeeping": overhead})
    for row in overhead:
        print(
            f"bookkeeping, {row['problem']}, window {row['window']}: {row['milliseconds_per_round']:.2f} ms a round, "
            f"{100 * row['share']:.1f} % of it"
        )
    if given.json:
        draw(rows, given.json.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())

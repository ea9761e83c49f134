# SPDX-License-Identifier: Apache-2.0
"""How many rounds every window method takes to the sequential sample, on closed-form digits and on the trained digits.

Claim measured: a window method takes far fewer rounds than the chain has steps; the slope decides which takes the fewest.
A row is a method on a chain at a window: mean and largest number of rounds, evaluations, seconds of the whole call at batch 1
beside the sequential chain's in the same run, and `error_max`, the root mean square difference to the sequential sample of the
worst seed. Published stop rules have their paper's tolerance, `parasolver` its default besides.

`bookkeeping` is the time of a round that the network does not take, for one sample.

    python benchmarks/rounds.py --quick
    python benchmarks/rounds.py --json benchmarks/results/rounds.json                (the picture goes to rounds.png)
    python benchmarks/rounds.py --json benchmarks/results/rounds.json --draw-only
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from drawing import BLACK, BLUE, VERMILION, beside, heading, legend, panels, plain_log, save
from harness import Results, Row, console, options, show
from problem import EQUAL, IMAGES, Problem

from paradiff import Evaluator, Recorded, jacobi, paradigms, parasolver, sample, sequential
from paradiff.chain.slope import freeze_clean_data, freeze_epsilon, identity, shifted
from paradiff.methods import WindowMethod

COLUMNS = ("problem", "sampler", "steps", "window", "method", "slope", "rule", "tolerance", "warmup")
COLUMNS += ("rounds", "rounds_max", "evaluations", "error_max", "estimated_error_max", "seconds", "sequential_seconds")
CHAINS = (("ddpm", 1000, (32, 200)), ("ddim", 50, (None,)), ("ddim", 200, (None,)))
QUICK = (("ddpm", 200, (32,)), ("ddim", 50, (None,)))
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


def measure(problem: Problem, method: WindowMethod, slope: str, seeds: int) -> Row:
    """The row of a method, one seed at a time."""
    reference = problem.references(range(seeds), alone=True)
    found = [problem.solve(method, [seed]) for seed in range(seeds)]
    errors = [problem.errors(s.sample, reference[k : k + 1])[0] for k, (s, _) in enumerate(found)]
    return {
        "problem": problem.name,
        "sampler": problem.sampler,
        "steps": problem.table.steps,
        "method": method.name,
        "slope": slope,
        "window": method.window or problem.table.steps,
        "rule": method.rule,
        "tolerance": method.tolerance,
        "warmup": method.warmup,
        "seeds": seeds,
        "rounds": sum(s.rounds for s, _ in found) / seeds,
        "rounds_max": max(s.rounds for s, _ in found),
        "evaluations": sum(s.evaluations for s, _ in found) / seeds,
        "error_max": max(errors),
        "estimated_error_max": max(s.estimated_error for s, _ in found),
        "estimate_holds": all(s.estimated_error >= e or e < 1e-6 for (s, _), e in zip(found, errors, strict=True)),
        "seconds": sum(t for _, t in found) / seeds,
        "sequential_seconds": sum(problem.sequential_seconds[seed] for seed in range(seeds)) / seeds,
    }


def bookkeeping(problem: Problem, window: int) -> Row:
    """Seconds a round outside the network, as a share of the round, for one sample."""
    noise = Recorded(problem.shape, torch.Generator().manual_seed(0))
    evaluator = Evaluator(problem.denoiser)
    begin = time.perf_counter()
    solution = sample(evaluator, problem.table, noise, parasolver(window))
    seconds = time.perf_counter() - begin
    outside = (seconds - evaluator.seconds) / solution.rounds
    share = 1 - evaluator.seconds / seconds
    return {"problem": problem.name, "window": window, "milliseconds_per_round": 1e3 * outside, "share": share}


def draw(rows: list[Row], path: Path) -> None:
    """Mean rounds of every method at its default, a panel for each chain and window, beside the number of steps."""
    keys = sorted({(r["sampler"] == "ddim", r["steps"], r["window"]) for r in rows if r["method"] == "parasolver"})
    names = {("paradigms", "identity"): "paradigms"} | {("parasolver", slope): f"parasolver, {slope}" for slope in SLOPES}
    figure, found = panels(
        "Every window method takes far fewer rounds than the chain has steps", 1.9 * len(keys) + 0.9, len(keys), 2, sharey=True
    )
    for line, (smooth, steps, window) in zip(found, keys, strict=True):
        for axes, problem in zip(line, IMAGES, strict=True):
            own = [r for r in rows if (r["problem"], r["sampler"] == "ddim", r["steps"]) == (problem, smooth, steps)]
            for place, (method, slope) in enumerate(names):
                rule = "change" if method == "paradigms" else "error"
                wanted = (method, slope, rule, window)
                row = next(r for r in own if (r["method"], r["slope"], r["rule"], r["window"]) == wanted)
                close = row["error_max"] < EQUAL
                colour = BLUE if close else VERMILION
                axes.plot(row["rounds"], place, "o", color=colour, mfc=colour if close else "white", ms=7, mew=1.6)
                beside(axes, row["rounds"], place, f"{row['rounds']:.0f}", colour, (8, 0))
            axes.axvline(steps, color=BLACK, lw=1.2)
            axes.text(steps * 0.94, 1.2, f"{steps} steps", rotation=90, ha="right", va="center")
            kind = "DDIM" if smooth else "DDPM"
            heading(axes, f"{problem.replace('form-', 'form ')}, {kind} {steps}, window {window}")
            axes.set_yticks(range(len(names)), list(names.values()))
            axes.set(xlim=(4, 1250), ylim=(len(names) - 0.5, -0.5))
            plain_log(axes, "x", (5, 10, 20, 50, 100, 200, 500, 1000))
    for axes in found[-1]:
        axes.set_xlabel("rounds, mean of the seeds")
    close = {f"error of the worst seed below {EQUAL:g}": {"mec": BLUE, "mfc": BLUE}}
    legend(figure, close | {"above": {"mec": VERMILION, "mfc": "white", "mew": 1.6}})
    save(figure, path)


def main() -> None:
    given = options(__doc__, draws=True)
    results = Results(given.json, given.keep)
    if given.draw_only:
        return draw(results.rows, given.json.with_suffix(".png"))
    seeds, overhead = min(2 if given.quick else 8, given.seeds), []
    for name, make in IMAGES.items():
        for sampler, steps, windows in QUICK if given.quick else CHAINS:
            problem = make(sampler, steps)
            results.add(measure(problem, sequential(), "zero", seeds))
            for window in windows:
                slow = 2 if name == "digits" and steps == 1000 else seeds
                results.add(measure(problem, jacobi(window), "zero", min(slow, seeds)))
                for method, slope in methods(window, sampler == "ddim"):
                    label = f"{method.name} {slope} {method.rule} {method.tolerance:g}"
                    console.print(f"{name} {sampler} {steps} window {window}: {label}")
                    results.add(measure(problem, method, slope, seeds))
            if sampler == "ddpm":
                overhead.append(bookkeeping(problem, 32))
    results.save(bookkeeping=overhead)
    show(results.rows, COLUMNS)
    show(overhead, tuple(overhead[0]), "bookkeeping")
    if given.json:
        draw(results.rows, given.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""SRDS beside the window methods: rounds, evaluations and seconds of the whole call at equal measured error.

Claim measured: a window method takes fewer rounds than SRDS; on short chains SRDS takes fewer evaluations. On every chain
(closed-form and trained digits; DDIM and DDPM; 25, 100, 961 and 1000 steps) each family of methods is swept over its settings,
all seeds in one batch (8, or 4 on long chains). Of the settings whose root mean square error to the sequential sample is below
4e-3 for every seed, the one of fewest rounds is then timed at batch 1, in turns with the chain.

`iterations` has the error after each forced number of iterations, by coarse propagator and number of blocks.

    python benchmarks/srds.py --quick
    python benchmarks/srds.py --json benchmarks/results/srds.json                    (the picture goes to srds.png)
    python benchmarks/srds.py --only 'digits-ddim-*' --json FILE                     (then --clock, to time the best settings)
    python benchmarks/srds.py --json benchmarks/results/srds.json --draw-only
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from drawing import BLACK, BLUE, ORANGE, PALE, PURPLE, VERMILION, heading, legend, panels, plain_log, save
from harness import Results, Row, console, options, show
from problem import EQUAL, IMAGES, Candidate, Problem, at_equal_error, clock, setting_row

from paradiff import paradigms, parasolver, sequential, srds
from paradiff.chain.slope import freeze_clean_data, identity

CLOCKED = 4  # seeds that are timed
COLUMNS = ("problem", "sampler", "steps", "family", "setting", "seeds", "rounds", "rounds_max", "widest", "evaluations")
COLUMNS += ("error_max", "estimated_error_max", "seconds", "speedup")
LENGTHS, QUICK = (25, 100, 961, 1000), (25, 100)
CHAINS = {f"{n}-{a}-{k}": (n, a, k) for n in IMAGES for a in ("ddim", "ddpm") for k in LENGTHS}


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
        method = srds(blocks, ordering="batched", tolerance=6e-3)
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


def compare(problem: Problem, seeds: int, results: Results) -> None:
    """Every setting once; of every family the one of fewest rounds at equal error is marked."""
    rows = []
    for candidate in candidates(problem):
        rows.append(setting_row(problem, candidate, seeds))
        results.add(rows[-1])
    for row in at_equal_error(rows):
        row["best"] = True
        label = f"{problem.name} {problem.sampler} {problem.table.steps}: {row['family']}"
        console.print(f"{label}: {row['rounds']:.1f} rounds, {row['evaluations']:.0f} evaluations ({row['setting']})")


def time_best(problem: Problem, rows: list[Row], seeds: int) -> None:
    """Times the best setting of every family, in turns with the sequential chain."""
    methods = {(c.family, c.setting): c.method for c in candidates(problem)}
    chosen = [row for row in rows if row.get("best")]
    timed = [sequential(), *(methods[row["family"], row["setting"]] for row in chosen)]
    plain, *seconds = clock(problem, timed, min(seeds, CLOCKED))
    for row, found in zip(chosen, seconds, strict=True):
        row |= {"seconds": found, "sequential_seconds": plain, "speedup": plain / found}


def convergence(problem: Problem, seeds: int) -> Iterator[Row]:
    """Error after each forced number of iterations, by coarse propagator and number of blocks."""
    root, smooth = math.sqrt(problem.table.steps), problem.sampler == "ddim"
    for blocks in sorted({round(root), round(1.42 * root)}):
        for coarse in ("one step", "two step", 2) if smooth else ("one step", 2):
            for iterations in range(4):
                setting = f"{blocks} blocks, {iterations} iterations"
                method = srds(blocks, coarse, iterations=iterations)
                yield setting_row(problem, Candidate(f"srds, {coarse}", setting, method), seeds)


GROUPS = {"paradigms": ORANGE, "parasolver": BLUE, "srds, one step": VERMILION, "srds, two step": PURPLE}


def draw(rows: list[Row], path: Path) -> None:
    """Evaluations against rounds of every setting at equal error, a panel for each chain of the trained digits."""
    lengths = sorted({r["steps"] for r in rows} - {961})
    figure, found = panels(
        "A window method takes fewer rounds than SRDS; on short chains SRDS takes fewer evaluations", 6.4, 2, len(lengths)
    )
    for line, sampler in zip(found, ("ddim", "ddpm"), strict=True):
        for axes, steps in zip(line, lengths, strict=True):
            own = [r for r in rows if chain_of(r) == ("digits", sampler, steps) and r["error_max"] < EQUAL]
            for r in sorted(own, key=lambda r: r["family"] in GROUPS):
                colour = GROUPS.get(r["family"], PALE)
                marker = "o" if r["family"].startswith("srds") else "s"
                axes.plot(r["rounds"], r["evaluations"], marker, color=colour, ms=5, alpha=0.85, mew=0)
            axes.axvline(steps, color=BLACK, lw=1)
            axes.axhline(steps, color=BLACK, lw=1)
            heading(axes, f"{sampler.upper()} {steps}")
            plain_log(axes, "x", ((8, 10, 15, 20, 25) if steps == 25 else (10, 20, 50, 100, 200, 500, 1000)))
            plain_log(axes, "y", (20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000))
            least = min((r["rounds"] for r in own), default=steps)
            most = max((r["evaluations"] for r in own), default=steps)
            axes.set(xlim=(0.8 * least, 1.2 * steps), ylim=(0.8 * steps, 1.2 * most))
    for axes in found[-1]:
        axes.set_xlabel("rounds")
    for line in found:
        line[0].set_ylabel("evaluations")
    marks = {name: {"color": c, "marker": "o" if name.startswith("srds") else "s"} for name, c in GROUPS.items()}
    legend(figure, marks | {"srds, other settings": {"color": PALE}, "sequential": {"color": BLACK, "marker": "", "ls": "-"}})
    save(figure, path)


def main() -> None:
    given = options(__doc__, tuple(CHAINS), draws=True, clocks=True)
    results = Results(given.json, given.keep)
    iterations: list[Row] = results.contents.setdefault("iterations", [])
    for key in () if given.draw_only else [CHAINS[name] for name in given.only]:
        name, sampler, steps = key
        if given.quick and steps not in QUICK and not given.keep:
            continue
        problem, seeds = IMAGES[name](sampler, steps), min(2 if given.quick else 8 if steps <= 100 else 4, given.seeds)
        if not given.clock:
            results.drop(r for r in results.rows if chain_of(r) != key)
            compare(problem, seeds, results)
            if steps != 961:
                iterations[:] = [r for r in iterations if chain_of(r) != key] + list(convergence(problem, seeds))
        if given.clock or not given.keep:
            time_best(problem, [r for r in results.rows if chain_of(r) == key], seeds)
        results.save()
    show([row for row in results.rows if "seconds" in row], COLUMNS)
    if given.json:
        draw(results.rows, given.json.with_suffix(".png"))


def chain_of(row: Row) -> tuple[str, str, int]:
    """Problem, sampler and steps of a row."""
    return row["problem"], row["sampler"], row["steps"]


if __name__ == "__main__":
    main()

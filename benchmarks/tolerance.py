# SPDX-License-Identifier: Apache-2.0
"""What one tolerance means and costs in every method, and the data variance that methods assume.

Claim measured: with the rule `error`, the tolerance is the root mean square error that a sample may have by estimate, and the
estimate is at least the true error for 95 of 100 samples, whatever the method. A row is a method on a chain at a tolerance:
rounds and evaluations, errors to the sequential samples of the same noises, `held`, the share of samples whose error is at
most the estimate, and `within`, the share of those whose error is at most the tolerance. Parts:

- digits: the trained network, DDIM of 50 and 1000 steps and DDPM of 100 and 1000, all seeds in one batch; chains of up to 200
  steps at two tolerances, longer ones at the default.
- mixture: eight Gaussians in 64 dimensions, DDPM of 200 steps and Euler steps along rectified flow, 50 of them.
- shapes: the bundled pipelines with guidance, one image each; errors in the latents' standard deviation.
- proportion, proportion-digits: the mixture on DDIM of 50 steps and flow, and digits on DDIM of 50, at tolerances that halve
  from 1.6e-2 on: whether halving the tolerance halves the error. Drawn into the PNG beside the JSON.
- variance: the short chains of digits again with other data variances (`VARIANCES`) in place of the library's.

    python benchmarks/tolerance.py --quick
    python benchmarks/tolerance.py --json benchmarks/results/tolerance.json
    python benchmarks/tolerance.py --only variance --json FILE                  (rows of other parts in the file stay)
    python benchmarks/tolerance.py --draw-only --json FILE
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from drawing import BLUE, GREEN, GREY, ORANGE, VERMILION, heading, legend, panels, plain_log, save
from harness import Results, Row, console, options, show
from pipelines import Bench
from problem import Problem, mixture, rms, row, trained

import paradiff.chain.slope
from paradiff import Schedule, collocation, jacobi, parallelize, parasolver, piadm_ode, piadm_sde, quasi_newton, srds
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.samplers import ddim, ddpm, flow_euler
from paradiff.solver.protocol import Method

TOLERANCES = (DEFAULT_TOLERANCE, 1.2e-2)
LONG = 200  # steps; longer chains are measured at the default alone
SEEDS = range(100, 132)  # apart from the seeds 0 ... 15 on which numbers were tuned
IMAGES = 4
VARIANCES = (0.25, 0.29, 0.5)  # of images in general, of the digits, of data that fill half of -1 ... 1
DIGITS = (("ddim", 50, None), ("ddim", 1000, 24), ("ddpm", 100, None), ("ddpm", 1000, 32))
PIPELINES = (("DDIM", 50, None), ("flow Euler", 28, None), ("DDPM", 100, 32))
HALVED = tuple(1.6e-2 / 2**k for k in range(6))  # of the part proportion
FEW = 16  # seeds of it
DRAWN = {"parasolver": BLUE, "quasi_newton": ORANGE, "srds": GREEN, "collocation": VERMILION}
COLUMNS = ("part", "problem", "table", "steps", "method", "variance", "tolerance", "rounds", "rounds_max", "evaluations")
COLUMNS += ("error_median", "error_max", "held", "within")

Make = Callable[[float], Method]


def presets(steps: int, window: int | None, stochastic: bool) -> dict[str, Make]:
    """Every preset that has the rule `error`, as a function of the tolerance. Jacobi's iteration moves one node a round: it is
    left out on long chains."""
    blocks = max(2, steps // 40)
    piadm = piadm_sde if stochastic else piadm_ode
    found: dict[str, Make] = {
        "jacobi": lambda tolerance: jacobi(window, tolerance),
        "parasolver": lambda tolerance: parasolver(window, tolerance),
        "quasi_newton": lambda tolerance: quasi_newton(window, tolerance),
        "piadm": lambda tolerance: piadm(blocks, tolerance=tolerance),
        "srds": lambda tolerance: srds(tolerance=tolerance),
        "collocation": lambda tolerance: collocation(window=window, tolerance=tolerance),
    }
    return {name: make for name, make in found.items() if name != "jacobi" or steps <= 50}


def judged(found: Row) -> Row:
    """The row with the shares of samples that keep to their estimate and to the tolerance. Where the error is rounding of
    states in float32, it is within."""
    samples, many = found["samples"], len(found["samples"])
    held = sum(s["error"] <= max(s["estimated"], 2e-6) for s in samples) / many
    return {**found, "held": held, "within": sum(s["error"] <= found["tolerance"] for s in samples) / many}


def measured(part: str, problem: Problem, window: int | None, seeds: Sequence[int]) -> Iterator[Row]:
    """All presets on one chain."""
    for make in presets(problem.table.steps, window, problem.table.stochastic).values():
        for tolerance in TOLERANCES if problem.table.steps <= LONG else TOLERANCES[:1]:
            yield judged(problem.measure(part, make(tolerance), seeds, alone=False))


def part_digits(seeds: Sequence[int]) -> Iterator[Row]:
    """The trained network."""
    for sampler, steps, window in DIGITS:
        yield from measured("digits", trained(sampler, steps), window, seeds)


def part_mixture(seeds: Sequence[int]) -> Iterator[Row]:
    """An exact network."""
    target = mixture(64)
    for table in (ddpm(Schedule.linear(), 200), flow_euler(50)):
        problem = Problem("mixture 64", target.denoiser(table), table, (64,))
        yield from measured("mixture", problem, None, seeds)


def part_shapes(seeds: Sequence[int]) -> Iterator[Row]:
    """Guided calls of pipelines, at the default tolerance."""
    for chain, steps, window in PIPELINES:
        bench = Bench(chain, steps, min(IMAGES, len(seeds)))
        made = presets(steps, window, chain.startswith("DDPM"))
        for name in ("parasolver", "quasi_newton", "srds", "collocation"):
            yield judged(guided(bench, made[name](TOLERANCES[0])))


def guided(bench: Bench, method: Method) -> Row:
    """The row of a pipeline's calls."""
    samples: list[Row] = []
    with parallelize(bench.pipe, method) as run:
        for image, wanted in enumerate(bench.references):
            latents, _ = bench.call(bench.pipe, image)
            found = run.report.error_estimate
            assert found is not None, f"the call ran sequentially: {run.report.warnings}"
            samples.append(
                {
                    "seed": image,
                    "rounds": run.report.passes,
                    "evaluations": run.report.rows - run.report.checks,
                    "error": rms(latents - wanted)[0] / bench.spread,
                    "estimated": found.estimated_error / bench.spread,
                    "nodes": None,
                }
            )
    return row("shapes", (bench.model, bench.chain, bench.steps), method, samples)


def part_proportion(seeds: Sequence[int]) -> Iterator[Row]:
    """The mixture at tolerances that halve."""
    target = mixture(64)
    for title, table in (("DDIM 50", ddim(Schedule.linear(), 50)), ("flow 50", flow_euler(50))):
        problem = Problem("mixture 64", target.denoiser(table), table, (64,))
        yield from halved("proportion", f"mixture, {title}", problem, seeds)


def part_proportion_digits(seeds: Sequence[int]) -> Iterator[Row]:
    """The trained network at tolerances that halve."""
    yield from halved("proportion-digits", "digits, DDIM 50", trained("ddim", 50), seeds)


def halved(part: str, title: str, problem: Problem, seeds: Sequence[int]) -> Iterator[Row]:
    """The methods that are drawn, at tolerances that halve."""
    made = presets(problem.table.steps, 8, problem.table.stochastic)
    for name in DRAWN:
        for tolerance in HALVED:
            yield {"title": title, **judged(problem.measure(part, made[name](tolerance), seeds[:FEW], alone=False))}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Median errors against tolerances, on each chain."""
    rows = [row for row in rows if row["part"].startswith("proportion")]
    titles = list(dict.fromkeys(row["title"] for row in rows))
    figure, found = panels("Errors fall with the tolerance, and lie below it", 3.6, 1, len(titles), sharex=True, sharey=True)
    for axes, title in zip(found.flat, titles, strict=False):
        heading(axes, title)
        axes.plot(HALVED, HALVED, color=GREY, ls="--", lw=1)
        for name, colour in DRAWN.items():
            own = [row for row in rows if row["title"] == title and row["method"] == name]
            x = [row["tolerance"] for row in own]
            axes.plot(x, [row["error_median"] for row in own], color=colour, marker="o", ms=4, lw=1.5)
            axes.plot(x, [row["error_max"] for row in own], color=colour, marker="v", ms=4, lw=0)
        plain_log(axes, "x", HALVED[::-2])
        plain_log(axes, "y")
    for axes in found[-1]:
        axes.set_xlabel("tolerance")
    for axes in found[:, 0]:
        axes.set_ylabel("error: median, worst")
    marks = {name: {"color": colour} for name, colour in DRAWN.items()}
    legend(
        figure,
        marks | {"worst": {"marker": "v", "color": GREY}, "error = tolerance": {"ls": "--", "marker": "", "color": GREY}},
    )
    save(figure, path)


@contextmanager
def assuming(variance: float) -> Iterator[None]:
    """The library with another data variance, wherever it reads the number."""
    usual = paradiff.chain.slope.DATA_VARIANCE
    readers = [m for name, m in sys.modules.items() if name.startswith("paradiff.") and hasattr(m, "DATA_VARIANCE")]
    try:
        for module in readers:
            module.DATA_VARIANCE = variance  # type: ignore[attr-defined]
        yield
    finally:
        for module in readers:
            module.DATA_VARIANCE = usual  # type: ignore[attr-defined]


def part_variance(seeds: Sequence[int]) -> Iterator[Row]:
    """Other data variances; fresh tables, since a table keeps what was computed of it."""
    for sampler, steps, window in (chain for chain in DIGITS if chain[1] <= LONG):
        for variance in VARIANCES:
            with assuming(variance):
                problem = trained(sampler, steps)
                made = presets(steps, window, problem.table.stochastic)
                made["collocation"] = lambda t, v=variance, w=window: collocation(window=w, tolerance=t, shift=v)
                for make in made.values():
                    found = problem.measure("variance", make(TOLERANCES[0]), seeds, alone=False, variance=variance)
                    yield judged(found)


PARTS: dict[str, Callable[[Sequence[int]], Iterator[Row]]] = {
    "digits": part_digits,
    "mixture": part_mixture,
    "shapes": part_shapes,
    "proportion": part_proportion,
    "proportion-digits": part_proportion_digits,
    "variance": part_variance,
}


def main() -> None:
    given = options(__doc__, tuple(PARTS), draws=True)
    results = Results(given.json, given.keep)
    if given.draw_only:
        return draw(results.rows, given.json.with_suffix(".png"))
    seeds = SEEDS[: min(4 if given.quick else len(SEEDS), given.seeds)]
    for part in given.only:
        results.drop(row for row in results.rows if row["part"] != part)
        for found in PARTS[part](seeds):
            results.add(found)
            console.print(" ".join(f"{found.get(c)}" for c in COLUMNS))
        results.save()
    show(results.rows, COLUMNS)
    if given.json and any(part.startswith("proportion") for part in given.only):
        draw(results.rows, given.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

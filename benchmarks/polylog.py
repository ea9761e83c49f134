# SPDX-License-Identifier: Apache-2.0
"""PIADM: does the number of rounds grow like a power of log d, and what does it take on a trained network?

Claim measured: PIADM's rounds grow like log^2 d where the sequential chain's steps grow like sqrt(d), d the dimension. Parts:

- gaussian: Gaussian data of dimension 2 ... 2^20, exactly (no sampling): the steps that bring the sequential chain to half of
  the tolerated Kullback-Leibler divergence, and the sweeps that bring PIADM to all of it, with blocks in turn and in flight
  together. `fits` are lines of rounds against log^2 d and log d, and of sequential steps against sqrt(d).
- horizon: the same for the SDE in turn from a level one higher, in every power of two.
- mixture: 8 Gaussians in 2048 dimensions: sweeps until the squared distance to the sequential sample is below 1e-2, for
  every linear part, and the largest mean square of an iterate on the way.
- digits-ode, digits-sde, digits-ddim, digits-ddpm: the bundled network: rounds and evaluations at equal error beside
  `parasolver` and `srds`.
- recognised: the share of samples to which two classifiers give the same label, and the error that the nearest whole times
  make beside the real ones.

    python benchmarks/polylog.py --quick
    python benchmarks/polylog.py --json benchmarks/results/polylog.json              (the picture goes to polylog.png)
    python benchmarks/polylog.py --clock --json FILE             (adds seconds to the best settings of the file)
    python benchmarks/polylog.py --json benchmarks/results/polylog.json --draw-only
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawing import BLACK, BLUE, GREEN, GREY, PALE, VERMILION, beside, heading, legend, panels, plain_log, save
from harness import Results, Row, console, measured_on, options, show
from problem import Candidate, at_equal_error, clock, setting_row, trained
from torch import Tensor

from paradiff import Keyed, Table, parasolver, piadm_ode, piadm_sde, sample, sequential, srds
from paradiff.chain.slope import Slope, freeze_clean_data, freeze_epsilon, identity, shifted
from paradiff.methods import WindowMethod
from paradiff.methods.window.setup import WindowSetup
from paradiff.methods.window.solver import WindowSolver
from paradiff.models.pixel import load
from paradiff.planning import gaussian_law as law
from paradiff.samplers import exponential_integrator, log_snr_grid, ornstein_uhlenbeck, paper_grid
from paradiff.samplers.exponential import Form

TOLERANCE, STOP = 1e-2, 1e-3


# -- Gaussian data -----------------------------------------------------------------------------------------------------


def gaussian_chain(
    dimension: int, stochastic: bool, grid: int, form: Form, margin: float = 2.0
) -> tuple[Callable[[Slope], law.LinearChain], tuple[int, ...], Callable[..., Any]]:
    """The longest steps 0.8^k whose sequential chain spends half the tolerance; the chain for a slope, its blocks, and what
    measures a law."""
    start = math.log(dimension / TOLERANCE) + margin
    blocks = math.ceil(start)
    eigenvalues, count = law.log_uniform_spectrum(dimension, grid=grid)
    target = law.ou_variance(STOP, eigenvalues)

    def distances(weights: np.ndarray) -> tuple[float, float]:
        variance = law.sample_variance(weights)
        return law.kl(target, variance, count), law.wasserstein(target, variance, count)

    for k in range(200):
        found = paper_grid(blocks, min(0.8**k, start / blocks), STOP, length=start / blocks)
        table = exponential_integrator(ornstein_uhlenbeck(), found, form=form, volatility=float(stochastic))
        chain_of = partial(law.table_chain, table, eigenvalues)
        if distances(law.sequential_weights(chain_of(freeze_epsilon)))[0] <= TOLERANCE / 2:
            return chain_of, tuple(found.edges), distances
    raise AssertionError("no step was short enough")


@dataclass(frozen=True)
class Timetable:
    """How blocks follow each other, and the linear part of the sweeps.

    Attributes:
        name: For the tables.
        stagger: Sweeps of a block before the next joins it; None in turn.
        carry: Whether changes cross block edges.
        slope: Of the sweeps; `shifted(1)` is right for data of variance 1.
        whole: Whether the chain is one block.
        form: What a step freezes; each form takes the steps that it needs.
    """

    name: str
    stagger: int | None = None
    carry: bool = True
    slope: Slope = freeze_epsilon
    whole: bool = False
    form: Form = "score"


def timetables(stochastic: bool) -> list[Timetable]:
    """Those that are measured: staggers are the best found for each."""
    ahead = 3 if stochastic else 1
    return [
        Timetable("score, in turn (the paper)"),
        Timetable(f"score, published diagonal, stagger {ahead + 1}", ahead + 1, carry=False),
        Timetable(f"score, in flight, stagger {ahead}", ahead),
        Timetable("shifted, in turn", slope=shifted(1.0)),
        Timetable("shifted, in flight, stagger 1", 1, slope=shifted(1.0)),
        Timetable("shifted, one block", slope=shifted(1.0), whole=True),
        Timetable("epsilon form, shifted, one block", slope=shifted(1.0), whole=True, form="epsilon"),
    ]


def gaussian(given: Namespace) -> Iterator[Row]:
    """One row a dimension, equation and schedule."""
    powers = (1, 2, 4, 6, 8) if given.quick else (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20)
    for power in powers:
        dimension = 2**power
        for stochastic in (True, False):
            chains = {
                form: gaussian_chain(dimension, stochastic, 256 if power <= 12 else 64, form) for form in ("score", "epsilon")
            }
            for plan in timetables(stochastic):
                chain_of, blocked, distances = chains[plan.form]
                steps = blocked[-1]
                discretisation = distances(law.sequential_weights(chain_of(plan.slope)))
                chain, edges = chain_of(plan.slope), (0, steps) if plan.whole else blocked
                reached: dict[int, tuple[float, float]] = {}
                first = None  # the fewest sweeps that will do; a few more tell whether more never spoil it
                while first is None or len(reached) < first + 3:
                    sweeps = len(reached) + 1
                    stagger = None if plan.stagger is None else min(plan.stagger, sweeps)
                    weights = law.picard_weights(chain, edges, sweeps, stagger=stagger, carry=plan.carry)
                    reached[sweeps] = distances(weights)
                    if first is None and reached[sweeps][0] <= TOLERANCE:
                        first = sweeps
                stay = [k for k in reached if all(v[0] <= TOLERANCE for j, v in reached.items() if j >= k)]
                flying = 1 if plan.stagger is None else math.ceil(first / plan.stagger)
                yield {
                    "dimension": dimension,
                    "equation": "SDE" if stochastic else "ODE",
                    "schedule": plan.name,
                    "blocks": len(edges) - 1,
                    "widest": flying * max(b - a for a, b in pairwise(edges)),
                    "steps": steps,
                    "sequential_kl": discretisation[0],
                    "sequential_w2": discretisation[1],
                    "sweeps": first,
                    "kl": reached[first][0],
                    "w2": reached[first][1],
                    "sweeps_for_good": min(stay) if stay else None,
                    "rounds": (rounds := law.rounds(edges, first, plan.stagger and min(plan.stagger, first))),
                    "rounds_over_blocks_squared": rounds / (len(blocked) - 1) ** 2,
                    "evaluations": first * steps,
                }


def horizon(given: Namespace) -> Iterator[Row]:
    """The SDE in turn from T = ln(d/tol) + 3, where rounds/N^2 stays within 0.4 and 0.7 in every dimension."""
    for power in range(1, 9 if given.quick else 21):
        chain_of, edges, distances = gaussian_chain(2**power, True, 64, "score", 3.0)
        chain, sweeps = chain_of(freeze_epsilon), 1
        while distances(law.picard_weights(chain, edges, sweeps))[0] > TOLERANCE:
            sweeps += 1
        blocks, steps = len(edges) - 1, edges[-1]
        counts = {"sweeps": sweeps, "rounds": blocks * sweeps, "evaluations": sweeps * steps}
        row = {"dimension": 2**power, "blocks": blocks, "steps": steps, "rounds_over_blocks_squared": sweeps / blocks}
        yield row | counts


def fits(rows: list[Row]) -> list[Row]:
    """Least-squares lines through each curve, and how much of its variance they explain."""
    found = []
    for equation in ("SDE", "ODE"):
        own = [r for r in rows if r["equation"] == equation]
        for schedule in dict.fromkeys(r["schedule"] for r in own):
            curve = [r for r in own if r["schedule"] == schedule]
            logs = np.log([r["dimension"] for r in curve])
            roots = np.sqrt([r["dimension"] for r in curve])
            rounds = np.array([r["rounds"] for r in curve], dtype=float)
            for label, x in (("log d", logs), ("log^2 d", logs**2), ("sqrt d", roots)):
                found.append({"equation": equation, "schedule": schedule, "of": "rounds", "against": label, **line(x, rounds)})
        curve = [r for r in own if r["schedule"] == own[0]["schedule"]]
        logs = np.log([r["dimension"] for r in curve])
        roots = np.sqrt([r["dimension"] for r in curve])
        steps = np.array([r["steps"] for r in curve], dtype=float)
        for label, x in (("sqrt d", roots), ("sqrt d log d", roots * (logs + 2)), ("log^2 d", logs**2)):
            found.append({"equation": equation, "schedule": "sequential", "of": "steps", "against": label, **line(x, steps)})
    return found


def line(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Slope, intercept and R^2."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - slope * x - intercept
    return {"slope": float(slope), "intercept": float(intercept), "r2": float(1 - rest.var() / y.var())}


HIGHLIGHTED = {"score, in turn (the paper)": VERMILION, "score, in flight": BLUE, "shifted, one block": GREEN}


def draw_gaussian(rows: list[Row], path: Path) -> None:
    """Network calls in turn against the dimension: the chain's steps beside the rounds of three schedules, the others pale."""
    figure, found = panels("Sequential steps grow like √d, PIADM's rounds like a power of log d", 4.6, 1, 2, sharey=True)
    for axes, equation in zip(found[0], ("SDE", "ODE"), strict=True):
        own = [r for r in rows if r["equation"] == equation]
        schedules = list(dict.fromkeys(r["schedule"] for r in own))
        for schedule in sorted(schedules, key=lambda name: name.startswith(tuple(HIGHLIGHTED))):
            curve = [r for r in own if r["schedule"] == schedule]
            colour = next((c for name, c in HIGHLIGHTED.items() if schedule.startswith(name)), PALE)
            x, y = [r["dimension"] for r in curve], [r["rounds"] for r in curve]
            axes.plot(x, y, "-" if colour == PALE else "o-", color=colour, ms=4, lw=1 if colour == PALE else 1.8)
            if colour != PALE:
                beside(
                    axes,
                    x[-1],
                    y[-1],
                    f"{schedule.replace(' (the paper)', '')}: {y[-1]}",
                    colour,
                    (0, 9 if y[-1] > 100 else -15),
                    ha="right",
                )
        chain = [r for r in own if r["schedule"] == schedules[0]]
        x, steps = np.array([r["dimension"] for r in chain]), np.array([r["steps"] for r in chain])
        axes.plot(x, steps, "o-", color=BLACK, ms=4, lw=1.8)
        beside(axes, x[-1], steps[-1], f"sequential steps: {steps[-1]:,}", BLACK, (-8, 4), ha="right")
        fit = np.exp(np.mean(np.log(steps / np.sqrt(x))))
        axes.plot(x, fit * np.sqrt(x), ":", color=GREY, lw=1.2)
        beside(axes, x[4], fit * np.sqrt(x[4]), f"{fit:.0f} √d", GREY, (8, -8))
        heading(axes, f"{equation}, Gaussian data")
        axes.set_xlabel("dimension d")
        plain_log(axes, "y", (1, 10, 100, 1000, 10_000, 100_000))
        axes.set_xscale("log", base=2)
        axes.set_xticks([2**k for k in (1, 5, 10, 15, 20)])
    found[0][0].set_ylabel("network calls in turn")
    legend(figure, {"the other four schedules of the JSON file": {"ls": "-", "color": PALE, "marker": ""}})
    save(figure, path)


# -- a mixture in 2048 dimensions --------------------------------------------------------------------------------------

DIMENSION, COMPONENT = 2048, 0.05


def mixture_means() -> Tensor:
    """`[8, 2048]` means with variance 1/2 a coordinate, centred."""
    means = torch.randn(8, DIMENSION, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5**0.5
    return means - means.mean(0)


def mixture_network(table: Table, means: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The optimal network for equal weights and variances; products of matrices, where targets.Mixture is general."""
    levels = dict(zip(table.t.tolist(), zip(table.alpha.tolist(), table.sigma.tolist(), strict=True), strict=True))

    def network(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = torch.tensor([levels[k] for k in t.tolist()], dtype=torch.float64).T[:, :, None]
        state, variance = x.double(), alpha**2 * COMPONENT + sigma**2
        weight = torch.softmax((state @ means.T * alpha - alpha**2 / 2 * means.square().sum(1)) / variance, 1)
        gain = alpha * COMPONENT / variance
        clean = gain * state + (1 - gain * alpha) * (weight @ means)
        return ((state - alpha * clean) / sigma).to(x.dtype)

    return network


def mixture(given: Namespace) -> Iterator[Row]:
    """One row an equation, number of blocks and linear part; two samples, the slower one counts."""
    means = mixture_means()
    spread = float(means.square().mean()) + COMPONENT
    parts = {
        "score (the paper)": ("score", freeze_epsilon, "copy"),
        "clean data": ("clean", freeze_clean_data, "copy"),
        f"shifted, data variance {spread:.2f}": ("clean", shifted(spread), "copy"),
        f"shifted, component variance {COMPONENT:g}": ("clean", shifted(COMPONENT), "copy"),
    }
    for stochastic, steps in ((True, 60 if given.quick else 240), (False, 40 if given.quick else 120)):
        for blocks in (1, 4):
            grid = log_snr_grid(10.0, STOP, blocks, steps // blocks)
            for name, (form, slope, start) in parts.items():
                table = exponential_integrator(ornstein_uhlenbeck(), grid, form=form, volatility=float(stochastic))  # type: ignore[arg-type]
                row = {"equation": "SDE" if stochastic else "ODE", "blocks": blocks, "steps": steps, "linear part": name}
                yield row | block_by_block(table, mixture_network(table, means), grid.edges, slope, start)


def block_by_block(table: Table, network: Callable[[Tensor, Tensor], Tensor], edges: Any, slope: Any, start: Any) -> Row:
    """Sweeps of each block until its end is within its share of the squared error 1e-2; the next starts from there."""
    noise = Keyed((DIMENSION,), 0, 2)
    sweeps, error, peak, evaluations = [0] * (len(edges) - 1), 0.0, 0.0, 0
    for k in range(2):
        wanted = chain(table, network, noise, k)
        state = wanted[0]
        for n in range(len(edges) - 1):
            block, own = cut(table, edges[n], edges[n + 1]), Shifted(noise, edges[n])
            setup = WindowSetup(
                block, WindowMethod("", slope, predictor=start, tolerance=0.0), torch.device("cpu"), torch.float64
            )
            window, done = WindowSolver(setup, own, k, state), 0
            while True:
                query = window.ask()
                window.tell(query, network(query.rows, setup.t[query.nodes]))
                done, evaluations = done + 1, evaluations + len(query.nodes)
                peak = max(peak, float(window.x.square().mean(1).max()))
                error = float((window.x[-1] - wanted[edges[n + 1]]).square().sum())
                if error <= 1e-2 or done == block.steps:
                    break
            sweeps[n], state = max(sweeps[n], done), window.x[-1]
    single = {"float32": float32_fate(table, network, edges, slope, start, max(sweeps))}
    return {"sweeps": sweeps, "rounds": sum(sweeps), "evaluations": evaluations / 2, "peak_mean_square": peak, **single}


def float32_fate(table: Table, network: Any, edges: Any, slope: Any, start: Any, sweeps: int) -> str:
    """What becomes of the same run with float32 states."""
    kind = piadm_sde if table.stochastic else piadm_ode
    try:
        solution = sample(network, table, Keyed((DIMENSION,), 0, 1), kind(edges, sweeps, slope=slope, predictor=start))
    except ValueError as error:
        return f"stopped: {error}"
    wanted = sample(network, table, Keyed((DIMENSION,), 0, 1), sequential(), dtype=torch.float64).sample
    gap = float((solution.sample.double() - wanted).square().sum())
    return f"finite, squared error {gap:.1e}"


class Shifted:
    """The noise of a chain as one of its blocks sees it."""

    def __init__(self, noise: Keyed, first: int) -> None:
        self.noise, self.first, self.shape, self.samples = noise, first, noise.shape, noise.samples

    def start(self, sample: int) -> Tensor:
        """The chain's start; a block is given its own."""
        return self.noise.start(sample)

    def draw(self, sample: int, nodes: range) -> Tensor:
        """z at nodes counted from the block's first."""
        return self.noise.draw(sample, range(nodes.start + self.first, nodes.stop + self.first))


def cut(table: Table, left: int, right: int) -> Table:
    """The steps from node `left` to node `right` as a table of their own."""
    inner, outer = slice(left, right), slice(left, right + 1)
    return Table(
        table.name, table.prediction, table.t[outer], table.alpha[outer], table.sigma[outer], table.a[inner], table.b[inner],
        table.c[inner], scale=table.scale[outer], exact_variance=table.exact_variance,
    )  # fmt: skip


def chain(table: Table, network: Callable[[Tensor, Tensor], Tensor], noise: Keyed, k: int) -> list[Tensor]:
    """All states of the sequential chain of sample k, float64."""
    states = [noise.start(k).double()]
    for i in range(table.steps):
        m = network(states[-1][None], table.t[i : i + 1])[0]
        new = table.a[i, 0] * states[-1] + table.b[i, 0] * m
        states.append(new + table.c[i] * noise.draw(k, range(i, i + 1))[0])
    return states


# -- trained digits ----------------------------------------------------------------------------------------------------


def digit_candidates(table: Table) -> Iterator[Candidate]:
    """The settings that are swept."""
    smooth, long = not table.stochastic, table.steps > 500
    kind = piadm_ode if smooth else piadm_sde
    name = "piadm_ode" if smooth else "piadm_sde"
    for label, slope in (("shifted 0.5", shifted(0.5)), ("identity", identity)):
        for blocks in (16, 24) if long else (1, 2, 4, 8):
            for tolerance in (1e-1, 5e-2, 2.4e-2) if long else (1e-1, 2.4e-2, 6e-3, 1.5e-3):
                setting = f"{label}, {blocks} blocks, tolerance {tolerance:g}"
                yield Candidate(f"{name}, in turn", setting, kind(blocks, slope=slope, tolerance=tolerance))
                for stagger in (1, 2) if blocks >= 8 else ():
                    method = kind(blocks, slope=slope, tolerance=tolerance, stagger=stagger)
                    yield Candidate(f"{name}, in flight", f"{setting}, stagger {stagger}", method)
        for window in (32, 100, 200) if long else (None, 32):
            for tolerance in (1e-1, 5e-2, 2.4e-2) if long else (1e-1, 2.4e-2, 6e-3, 1.5e-3):
                setting = f"{label}, window {window or table.steps}, tolerance {tolerance:g}"
                yield Candidate("parasolver", setting, parasolver(window, tolerance, slope=slope))
    for blocks in (16, 24) if long else (2, 4, 8):
        for sweeps in (8, 12) if long else (6, 8, 12, 16):
            yield Candidate(f"{name}, paper mode", f"{blocks} blocks, {sweeps} sweeps", kind(blocks, sweeps))
    for coarse in ("one step", "two step") if smooth else ("one step",):
        for tolerance in (1.2e-2, 6e-3, 1.5e-3):
            yield Candidate("srds", f"{coarse}, tolerance {tolerance:g}", srds(coarse=coarse, tolerance=tolerance))


def digits(given: Namespace, chain: str) -> Iterator[Row]:
    """One row a setting, for one chain on the bundled network."""
    problem = trained(*CHAINS[chain])
    for candidate in digit_candidates(problem.table):
        yield setting_row(problem, candidate, min(2 if given.quick else 8, given.seeds))
        if given.quick:
            break


def recognised(given: Namespace) -> Iterator[Row]:
    """How often two classifiers, trained on real digits, agree on the samples of a table, and on held-out digits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    model, count = load("digits"), 16 if given.quick else 128
    pixels, labels = (np.asarray(v) for v in load_digits(return_X_y=True))
    train, held, labels, _ = train_test_split(pixels / 8 - 1, labels, test_size=360, random_state=0)
    judges = [SVC(C=10).fit(train, labels), KNeighborsClassifier(3).fit(train, labels)]

    def agreement(images: np.ndarray) -> float:
        return float(np.mean(judges[0].predict(images) == judges[1].predict(images)))

    yield {
        "sampler": "held-out digits",
        "steps": 0,
        "method": "",
        "times": "",
        "agree": agreement(np.asarray(held)),
        "error_to_real": 0.0,
    }
    for sampler, steps in (("exponential_ode", 50), ("exponential_sde", 200)):
        real = model.exponential(sampler, steps)
        levels = log_snr_grid(model.process().highest, model.process().lowest, 1, steps - 1, clean=True)
        volatility = float(real.stochastic)
        nearest = exponential_integrator(
            model.process(),
            levels,
            form="clean",
            volatility=volatility,
            prediction=real.prediction,
            times="nearest",
            clip=real.clip,
        )
        kind = piadm_sde if real.stochastic else piadm_ode
        drawn = {}
        for times, table in (("real", real), ("nearest", nearest)):
            drawn[times] = sample(model, table, Keyed(model.shape, 0, count), kind(4)).sample
            gap = (drawn[times] - drawn["real"]).square().flatten(1).mean(1).sqrt()
            yield {
                "sampler": sampler,
                "steps": steps,
                "method": kind(4).name,
                "times": times,
                "agree": agreement(drawn[times].flatten(1).clamp(-1, 1).numpy()),
                "error_to_real": float(gap.median()),
            }


CHAINS = {
    "digits-ode": ("exponential_ode", 50),
    "digits-sde": ("exponential_sde", 200),
    "digits-ddim": ("ddim", 100),
    "digits-ddpm": ("ddpm", 1000),
}


def time_best(results: Results, chains: Sequence[str], seeds: int) -> None:
    """Adds seconds of the whole call at batch 1, and the gain over the sequential chain, to the best settings of the file."""
    for chain in (c for c in chains if c in results.contents):
        problem, contents = trained(*CHAINS[chain]), results.contents[chain]
        known = {(c.family, c.setting): c.method for c in digit_candidates(problem.table)}
        methods = [known[r["family"], r["setting"]] for r in contents["best"]]
        plain, *seconds = clock(problem, [sequential(), *methods], min(4, seeds))
        for row, value in zip(contents["best"], seconds, strict=True):
            row |= {"seconds": value, "sequential_seconds": plain, "gain": plain / value}
        contents["clocked"] = measured_on()
        results.save()
        show(contents["best"], (*SHOWN[chain], "seconds", "gain"))


# -- the script --------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Namespace], Iterator[Row]]] = {
    "gaussian": gaussian,
    "horizon": horizon,
    "mixture": mixture,
    **{name: partial(digits, chain=name) for name in CHAINS},
    "recognised": recognised,
}
SHOWN = {
    "gaussian": (
        "equation",
        "dimension",
        "schedule",
        "blocks",
        "steps",
        "widest",
        "sweeps",
        "rounds",
        "evaluations",
        "kl",
    ),
    "horizon": ("dimension", "blocks", "steps", "sweeps", "rounds", "rounds_over_blocks_squared", "evaluations"),
    "mixture": ("equation", "blocks", "steps", "linear part", "rounds", "evaluations", "peak_mean_square", "float32"),
    **dict.fromkeys(CHAINS, ("sampler", "steps", "family", "setting", "rounds", "evaluations", "error_max")),
    "recognised": ("sampler", "steps", "method", "times", "agree", "error_to_real"),
}


def main() -> None:
    given = options(__doc__, tuple(PARTS), draws=True, clocks=True)
    results = Results(given.json, given.keep, stamp=False)
    if given.clock:
        return time_best(results, given.only, given.seeds)
    for part in () if given.draw_only else given.only:
        rows: list[Row] = []
        results.contents[part] = {"environment": measured_on(), "rows": rows}
        for row in PARTS[part](given):
            rows.append(row)
            results.tick()
            console.print(f"{part}: " + ", ".join(f"{row[c]}" for c in SHOWN[part]))
        if part == "gaussian":
            results.contents[part]["fits"] = fits(rows)
            show(results.contents[part]["fits"], ("equation", "schedule", "of", "against", "slope", "intercept", "r2"))
        if part in CHAINS:
            results.contents[part]["best"] = at_equal_error(rows)
        show(results.contents[part].get("best", rows), SHOWN[part])
        results.save()
    if given.json and "gaussian" in results.contents:
        draw_gaussian(results.contents["gaussian"]["rows"], given.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Warm starts: rounds of a run that begins from an earlier one's trajectory, beside those of a cold one.

Claim measured: at an error below 4e-3 of the data's standard deviation to the sequential sample, a warm run needs at most half
the rounds of a cold one after a one-word edit of the prompt, after guidance 4 -> 5 and for a slowly changing frame, and a third
for a control loop's next step. The rows say where that holds. Kinds:

- prompt: one word of the prompt is another (the bundled text network).
- guidance: the guidance scale is 5 where it was 4 (the same).
- frame: x[0] keeps 99.5 % of its variance and has 0.5 % of another draw (text network; digits network on 1000 steps).
- control: plans of 16 points of the plane around obstacles, of one of four ways, in closed form, given the place where they
  begin. With `points` 1 each control step's plan begins where the last one's second point was, the noise moves along with it
  by a point, and the last run's trajectory is shifted by a point. With a smaller number the place moves by that share of the
  way to the second point, and the noise stays.

Guidance and control also begin from the last two runs, extrapolated (`Trajectory.extrapolated`): guidance 3, 4 and then 5, and
two control steps.

`rounds` are means over seeds; `ratio` is the fewer rounds of quasi_newton and collocation, cold at the same window,
over those of the warm run; `own_ratio` the same method's, cold.
Parts are seeds: `tuning` 2000 to 2015, by which numbers were chosen, and `held-out` 5000 to 5063.

    python benchmarks/warm.py --only held-out:* --json benchmarks/results/warm.json
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from harness import Results, Row, options, show
from torch import Tensor

from paradiff import Keyed, Schedule, Solution, Table, Trajectory, sample
from paradiff.chain.noise import Noise
from paradiff.methods.presets import collocation, quasi_newton, sequential
from paradiff.models.pipeline import load_pipeline
from paradiff.planning.harness import PROMPTS, family
from paradiff.samplers import ddpm
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.protocol import Method

SEEDS = {"tuning": range(2000, 2016), "held-out": range(5000, 5064)}
EDITS = (
    "a red circle left of a green square",
    "a green triangle above a red circle",
    "a blue square right of a yellow triangle",
    "a yellow circle below a blue square",
    "a green triangle above a blue circle",
    "a green circle right of a red triangle",
    "a blue circle left of a yellow square",
    "a yellow square below a green circle",
)
"""Each of the harness's prompts with one word changed."""

FRAME = 0.005  # share of the variance of x[0] that a frame renews
HORIZON, CONTROLS = 16, 24  # points of a plan, and steps of an episode
POINTS = (1.0, 0.1)  # of a control step
LEVEL = 4e-3
TOLERANCES = {"digits": 2.5e-3}  # where cold collocation errs by more than the level at 4e-3
METHODS: dict[str, Callable[[int | None, float], Method]] = {
    "quasi_newton": lambda window, tolerance: quasi_newton(window, tolerance),
    "collocation": lambda window, tolerance: collocation(window=window, tolerance=tolerance),
}


@dataclass(frozen=True, eq=False)
class Given:
    """A noise whose x[0] is given.

    Attributes:
        noise: What it is otherwise.
        starts: `[B, ...]` the draws behind x[0].
    """

    noise: Noise
    starts: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.noise.shape

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.noise.samples

    def start(self, sample: int) -> Tensor:
        """The draw behind x[0]."""
        return self.starts[sample]

    def draw(self, sample: int, nodes: range) -> Tensor:
        """z at consecutive nodes."""
        return self.noise.draw(sample, nodes)


@dataclass(frozen=True, eq=False)
class Strip:
    """The noise of a plan: a stretch of a longer one along the plan's axis.

    Attributes:
        noise: The longer one's.
        first: Its first point.
    """

    noise: Noise
    first: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (*self.noise.shape[:-1], HORIZON)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.noise.samples

    def start(self, sample: int) -> Tensor:
        """The draw behind x[0]."""
        return self.noise.start(sample)[..., self.first : self.first + HORIZON]

    def draw(self, sample: int, nodes: range) -> Tensor:
        """z at consecutive nodes."""
        return self.noise.draw(sample, nodes)[..., self.first : self.first + HORIZON]


def rms(found: Tensor, wanted: Tensor) -> Tensor:
    """`[B]` root mean square differences."""
    return (found - wanted).double().square().flatten(1).mean(1).sqrt()


@dataclass(frozen=True, eq=False)
class Problem:
    """What is run: a model on a chain, before and after the change, and one change earlier where changes go on."""

    table: Table
    before: tuple[Evaluator, Noise]
    after: tuple[Evaluator, Noise]
    earlier: tuple[Evaluator, Noise] | None = None


def evaluator(
    name: str, table: Table, seeds: Sequence[int], prompts: Sequence[str] = PROMPTS, guidance: float = 4.0
) -> Evaluator:
    """A network of the harness with other prompts, or another guidance."""
    if name != "shapes":
        return family(name).evaluator(table, seeds)
    pipe: Any = load_pipeline("shapes")
    with torch.inference_mode():
        wanted, empty = pipe.encode_prompt([prompts[seed % len(prompts)] for seed in seeds], "cpu", 1, True)

    def guided(x: Tensor, t: Tensor, wanted: Tensor, empty: Tensor) -> Tensor:
        both = pipe.unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([empty, wanted]), return_dict=False)[0]
        without, within = both.chunk(2)
        return without + guidance * (within - without)

    return Evaluator(guided, conditioning={"wanted": wanted, "empty": empty.expand_as(wanted)})


def problem(kind: str, name: str, chain: str, steps: int, seeds: Sequence[int]) -> Problem:
    """The problem of a kind."""
    of = family(name)
    table, noise = of.table(chain, steps), of.noise(seeds)
    own = noise.along(table.draws)
    before = evaluator(name, table, seeds), own
    if kind == "prompt":
        return Problem(table, before, (evaluator(name, table, seeds, EDITS), own))
    if kind == "guidance":
        after, earlier = (evaluator(name, table, seeds, guidance=scale) for scale in (5.0, 3.0))
        return Problem(table, before, (after, own), (earlier, own))
    starts = torch.stack([own.start(k) for k in range(len(seeds))])
    other = torch.stack([torch.randn(own.shape, generator=torch.Generator().manual_seed(seed + 10**6)) for seed in seeds])
    return Problem(table, before, (before[0], Given(own, math.sqrt(1 - FRAME) * starts + math.sqrt(FRAME) * other)))


def figures(found: Solution, plain: Tensor, unit: float) -> Row:
    """What a run took, and how far it was off."""
    errors = rms(found.sample, plain) / unit
    told = torch.tensor([estimate.estimated_error for estimate in found.error_estimates]) / unit
    return {
        "rounds": sum(e.rounds for e in found.error_estimates) / len(errors),
        "rounds_max": max(e.rounds for e in found.error_estimates),
        "evaluations": found.evaluations / len(errors),
        "error_max": float(errors.max()),
        "above_estimate": int((errors > told).sum()),
        "samples": len(errors),
    }


def measure(kind: str, name: str, chain: str, steps: int, window: int | None, seeds: Sequence[int]) -> list[Row]:
    """The rows of one problem at one window."""
    task = problem(kind, name, chain, steps, seeds)
    plain = sample(task.after[0], task.table, task.after[1], sequential(), check="off").sample
    unit = float(plain.std()) if name == "shapes" else 1.0
    heading = {"kind": kind, "data": name, "chain": f"{chain} {steps}", "window": window}
    rows, before = list[Row](), dict[str, Solution]()
    for label, make in METHODS.items():
        cold = sample(task.after[0], task.table, task.after[1], make(window, TOLERANCES.get(name, LEVEL)), check="off")
        rows.append({**heading, "start": "cold", "method": label, **figures(cold, plain, unit)})
    for label in ("quasi_newton", "collocation"):
        before[label] = sample(
            task.before[0],
            task.table,
            task.before[1],
            METHODS[label](window, TOLERANCES.get(name, LEVEL)),
            check="off",
            keep_trajectory=True,
        )
    for label, old in (("quasi_newton", "quasi_newton"), ("collocation", "quasi_newton"), ("collocation", "collocation")):
        warm = sample(
            task.after[0],
            task.table,
            task.after[1],
            METHODS[label](window, TOLERANCES.get(name, LEVEL)),
            check="off",
            start=before[old],
        )
        change = float((rms(before[old].sample, plain) / unit).mean())
        row = {**heading, "start": f"warm, from {old}", "method": label, **figures(warm, plain, unit), "change": change}
        rows.append(row)
    if task.earlier is not None:
        earlier = sample(
            task.earlier[0],
            task.table,
            task.earlier[1],
            METHODS["quasi_newton"](window, LEVEL),
            check="off",
            keep_trajectory=True,
        )
        begin = trajectory_of(before["quasi_newton"]).extrapolated(trajectory_of(earlier))
        for label, make in METHODS.items():
            warm = sample(task.after[0], task.table, task.after[1], make(window, LEVEL), check="off", start=begin)
            rows.append({**heading, "start": "warm, from the last two", "method": label, **figures(warm, plain, unit)})
    return compared(rows)


def trajectory_of(found: Solution) -> Trajectory:
    """The trajectory of a run that kept it."""
    assert found.trajectory is not None
    return found.trajectory


def compared(rows: list[Row]) -> list[Row]:
    """With the ratios of warm rows to cold ones."""
    cold = {row["method"]: row["rounds"] for row in rows if row["start"] == "cold"}
    for row in rows:
        if row["start"] != "cold":
            row |= {"ratio": min(cold.values()) / row["rounds"], "own_ratio": cold[row["method"]] / row["rounds"]}
    return rows


def middle(points: Tensor) -> Tensor:
    """`[R, 4, 2, H]` the middles of the four ways after so many points, `[R, H]`."""
    along = points / (CONTROLS + HORIZON)
    bend = torch.tensor([-0.9, -0.3, 0.3, 0.9], dtype=torch.float64)[:, None, None]
    return torch.stack([(2 * along - 1).expand(4, *along.shape), bend * torch.sin(math.pi * along)], 2).transpose(0, 1)


def ways(place: Tensor, progress: Tensor) -> Tensor:
    """`[R, 4, 2, H]` the means of plans by each of the ways from places `[R, 2]`, after `progress` `[R]` points: a plan begins
    at its place and comes back to the way's middle."""
    ahead = torch.arange(HORIZON, dtype=torch.float64)
    means = middle(progress[:, None] + ahead)
    return means + (place[:, None, :, None] - means[..., :1]) * torch.exp(-ahead / 4)


def planner(table: Table) -> Callable[..., Tensor]:
    """The network of a policy: the noise in a plan of one of four ways, each with deviations of 0.1, of which a place tells as
    much as it is near to its middle."""
    nodes = {float(t): n for n, t in enumerate(table.t[:-1].tolist())}

    def network(x: Tensor, t: Tensor, place: Tensor, progress: Tensor) -> Tensor:
        at = torch.tensor([nodes[float(v)] for v in t])
        alpha, sigma = (v[at][:, None, None] for v in (table.alpha, table.sigma))
        means, total = ways(place.double(), progress.double()), alpha**2 * 0.01 + sigma**2
        off = x.double()[:, None] - alpha[:, None] * means
        way = -(place.double()[:, None] - middle(progress.double()[:, None])[..., 0]).square().sum(2) / (2 * 0.01)
        share = torch.softmax(way - off.square().sum((2, 3)) / (2 * total[:, :, 0]), 1)[:, :, None, None]
        clean = (share * (means + (alpha * 0.01 / total)[:, None] * off)).sum(1)
        return ((x - alpha * clean) / sigma).to(x.dtype)

    return network


def shifted(x: Tensor) -> Tensor:
    """A plan without its first point; the last one stays."""
    return torch.cat([x[..., 1:], x[..., -1:]], -1)


def control(window: int | None, seeds: Sequence[int], points: float) -> list[Row]:
    """The rows of control loops, an episode a seed; rounds and errors of all control steps but the first. A step moves by so
    many `points`, at most one."""
    table = ddpm(Schedule.cosine(), 100)
    strip, network = Keyed((2, HORIZON + CONTROLS), list(seeds)), planner(table)
    place = torch.tensor([[-1.0, 0.0]]).repeat(len(seeds), 1)
    rows: dict[tuple[str, str], list[Row]] = {}
    last: dict[str, Solution] = {}
    earlier: dict[str, Solution] = {}
    for step in range(CONTROLS):
        noise = Strip(strip, step if points == 1 else 0)
        model = Evaluator(network, conditioning={"place": place, "progress": torch.full((len(seeds),), step * points)})
        plain = sample(model, table, noise, sequential(), check="off").sample
        for label, make in METHODS.items():
            found = sample(model, table, noise, make(window, LEVEL), check="off", keep_trajectory=True)
            if step:
                rows.setdefault(("cold", label), []).append(figures(found, plain, 1.0))
            if label in last:
                begin = moved(trajectory_of(last[label]), points)
                found = sample(model, table, noise, make(window, LEVEL), check="off", start=begin, keep_trajectory=True)
                rows.setdefault(("warm, from its last step", label), []).append(figures(found, plain, 1.0))
                if label in earlier:
                    begin = begin.extrapolated(moved(moved(trajectory_of(earlier[label]), points), points))
                    ahead = sample(model, table, noise, make(window, LEVEL), check="off", start=begin, keep_trajectory=True)
                    rows.setdefault(("warm, from its last two", label), []).append(figures(ahead, plain, 1.0))
                earlier[label] = last[label]
            last[label] = found
        place = place + points * (plain[:, :, 1] - place)
    heading = {"kind": "control", "data": "plans", "chain": "ddpm 100", "window": window, "points": points}
    return compared([{**heading, "start": start, "method": label, **merged(own)} for (start, label), own in rows.items()])


def moved(found: Trajectory, points: float) -> Trajectory:
    """The trajectory of a plan for the next control step."""
    return found.map(shifted) if points == 1 else found


def merged(rows: Sequence[Mapping[str, Any]]) -> Row:
    """The figures of several runs together."""
    means, worst = ("rounds", "evaluations"), ("rounds_max", "error_max")
    found: Row = {name: sum(row[name] for row in rows) / len(rows) for name in means}
    found |= {name: max(row[name] for row in rows) for name in worst}
    return found | {name: sum(row[name] for row in rows) for name in ("above_estimate", "samples")}


CASES: dict[str, list[tuple[str, str, int, int | None]]] = {
    "control": [("plans", "ddpm", 100, None)],
    "frame": [("digits", "ddpm", 1000, 32), ("digits", "ddim", 100, 16), ("shapes", "ddim", 100, 32)],
    "guidance": [("shapes", "ddim", 100, 32), ("shapes", "ddim", 50, None)],
    "prompt": [("shapes", "ddim", 100, 32)],
}
COLUMNS = (
    "kind",
    "data",
    "chain",
    "window",
    "points",
    "start",
    "method",
    "rounds",
    "rounds_max",
    "evaluations",
    "ratio",
    "own_ratio",
)
COLUMNS += ("error_max", "above_estimate", "samples", "change")


def main() -> None:
    """See the module."""
    given = options(__doc__, [f"{part}:{kind}" for part in SEEDS for kind in CASES])
    results = Results(given.json, given.keep)
    fresh: list[Row] = []
    for part, every in SEEDS.items():
        for kind, cases in CASES.items():
            if f"{part}:{kind}" not in given.only:
                continue
            results.drop(row for row in results.rows if (row["part"], row["kind"]) != (part, kind))
            for name, chain, steps, window in cases:
                seeds = every[: min(given.seeds, 4 if kind == "control" else 16)]
                if kind == "control":
                    found = [row for points in POINTS for row in control(window, seeds, points)]
                else:
                    found = measure(kind, name, chain, steps, window, seeds)
                for row in found:
                    results.add({"part": part, **row})
                    fresh.append(row)
    results.save(summary=best(results.rows))
    show(fresh, COLUMNS)


def best(rows: Sequence[Row]) -> list[Row]:
    """The best warm row of each problem among those with every error below the level."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("part", "kind", "data", "chain", "window", "points"))
        if "ratio" in row and row["error_max"] < LEVEL and row["ratio"] > found.get(key, {"ratio": 0})["ratio"]:
            found[key] = row
    return [{name: row[name] for name in ("part", *COLUMNS) if name in row} for row in found.values()]


if __name__ == "__main__":
    main()

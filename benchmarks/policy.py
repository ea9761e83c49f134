# SPDX-License-Identifier: Apache-2.0
"""A diffusion policy in closed loop: episodes that succeed, rounds of a control step, and what its action is off by.

Claim measured: of the bundled `points-policy`, DDPM 100, a cold plan takes at most 8 rounds and a warm one at most 4, actions
are off by less than a thousandth of their range, 2, and as many of 200 episodes succeed as by the sequential chain. Rows are
ways to make a plan. An episode is a plane of its own (models/plane.py), in which each step pushes the mass at random; it
succeeds where the goal is reached within 72 steps and no disc is hit.

- sequential: the chain of 100 steps, with the noise of the episode held; `fresh` has other noise at each control step.
- warm: `Policy` as it is, from plan to plan; `shifted` with noise that moves along with the plan; `every action` and `every
  fourth` with other numbers of actions between two plans.
- cold: the same, begun anew with other noise at each control step.
- ddim 10: the sampler of 10 steps that is used instead.
- noised: the last plan, without the actions that were executed, noised to node 70 of 100 and denoised from there: 30 steps, and
  another sample.

`executed` are the actions between two control steps. Errors are those of the plans of the first episodes against the
sequential chain's with the same noise, at the states that the episode came to: root mean square over a plan, and its largest,
over the range. `clock` has the seconds of a control step, batch 1: those of this process on one core, and by replay of the
rows of its rounds at the stated curves of benchmarks/plan.py and benchmarks/cluster.py, with the time beside the network
added.
`tried` has the rounds of other methods and beginnings on 12 control steps of 8 tuning episodes, each at its own tolerance.
Parts are seeds of planes: `tuning`, by which tolerances and variances were chosen, and `held-out`.

    python benchmarks/policy.py --only held-out:* tuning:tried --json benchmarks/results/policy.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cluster import STATED
from drawing import BLUE, ORANGE, PALE, VERMILION, heading, panels, save
from harness import Results, Row, options, show
from matplotlib.patches import Circle
from plan import CURVES
from torch import Tensor

from paradiff import Evaluator, Keyed, Method, Policy, Table, Trajectory, collocation, quasi_newton, sample, sequential
from paradiff.chain.slope import shifted
from paradiff.models import Plane, PolicyModel, load_policy
from paradiff.models.plane import DISCS, RADIUS
from paradiff.planning.policy import VARIANCE, foretold, later
from paradiff.solver.trajectory import joined

SEEDS = {"tuning": 1000, "held-out": 2000}
EPISODES, STEPS = 200, 72
PUSH = 0.003  # deviation of what is added to the velocity in each step
RANGE = 2.0  # of an action, -1 ... 1
COMPARED = 20  # episodes whose plans are compared
BATCH = 50  # episodes at once
MIDDLE = 70  # the node to which the last plan is noised
CLOCKED = 12  # control steps that are timed

Plan = Callable[[Plane, Tensor], Tensor]
"""Plans `[b, H, 2]` for the planes of some episodes `[b]`, which never grow more."""


@dataclass(frozen=True)
class Way:
    """A way to make plans.

    Attributes:
        executed: Actions between two control steps.
        episodes: How many.
        noise: `held`, `shifted` or `fresh`.
    """

    executed: int = 2
    episodes: int = EPISODES
    noise: str = "held"


WAYS = {
    "warm": Way(),
    "sequential": Way(),
    "ddim 10": Way(),
    "noised": Way(noise="fresh"),
    "cold": Way(executed=4, noise="fresh"),
    "sequential, fresh": Way(executed=4, noise="fresh"),
    "warm, shifted": Way(episodes=50, noise="shifted"),
    "warm, every action": Way(executed=1, episodes=50),
    "warm, every fourth": Way(executed=4, episodes=50),
}


def chain(model: PolicyModel, table: Table, seen: Tensor, keys: Sequence[int], start: Tensor | None = None) -> Tensor:
    """Sequential plans."""
    evaluator = Evaluator(model, conditioning={"observation": seen})
    return sample(evaluator, table, Keyed(model.shape, list(keys)), sequential(), check="off", start=start).sample


def policy_of(model: PolicyModel, way: Way, seeds: Sequence[int]) -> Policy:
    """The helper, with a seed an episode."""
    noise = "shifted" if way.noise == "shifted" else "held"
    table = model.table("ddpm", 100)
    return Policy(model, table, model.shape, seed=list(seeds), executed=way.executed, noise=noise, check="off")


def episodes(name: str, way: Way, model: PolicyModel, seed: int, first: int) -> Row:
    """A batch of episodes."""
    count = min(BATCH, way.episodes - first)
    plane, table = Plane.drawn(seed + first, count), model.table("ddpm", 100)
    short, keys = model.table("ddim", 10), [seed + first + k for k in range(count)]
    pushes = torch.Generator().manual_seed(seed + first)
    policy, last = policy_of(model, way, keys), torch.empty(0)
    done, rounds, errors = torch.zeros(count, dtype=torch.bool), list[int](), list[tuple[float, float, float]]()
    for step in range(0, STEPS, way.executed):
        seen = plane.observation
        fresh = [key + 10**6 * (step + 1) for key in keys]
        match name.partition(",")[0]:
            case "warm" | "cold":
                if name == "cold":
                    policy.reset()
                plans, report = policy.act(seen), policy.report
                assert report is not None
                if step or name == "cold":
                    rounds += [n for n, over in zip(report.rounds, done.tolist(), strict=True) if not over]
                if first == 0 and (step or name == "cold"):
                    errors += compared(model, table, policy, seen, plans, done, way.executed)
            case "sequential":
                plans = chain(model, table, seen, keys if way.noise == "held" else fresh)
            case "ddim 10":
                plans = chain(model, short, seen, keys)
            case _ if step == 0:
                plans = chain(model, table, seen, fresh)
            case _:
                z = torch.stack([Keyed(model.shape, key).start(0) for key in fresh])
                tail = table[MIDDLE:]
                noised = tail.alpha[0] * later(last, way.executed) + tail.sigma[0] * z
                plans = chain(model, tail, seen, fresh, noised.float())
        last = plans
        for k in range(way.executed):
            push = PUSH * torch.randn(count, 2, generator=pushes)
            still = done[:, None]
            after = plane.after(plans[:, k], push)
            plane = replace(
                after, place=torch.where(still, plane.place, after.place), hit=torch.where(done, plane.hit, after.hit)
            )
            done = done | plane.reached | plane.hit
        if bool(done.all()):
            break
    found: Row = {"way": name, "noise": way.noise, "executed": way.executed, "first": first, "episodes": count}
    found |= {"succeeded": int(plane.reached.sum()), "hit": int(plane.hit.sum())}
    if rounds:
        found["rounds"] = {str(n): rounds.count(n) for n in sorted(set(rounds))}
    if errors:
        found["errors"] = [[float(f"{v:.3g}") for v in each] for each in errors]
    return found


def compared(
    model: PolicyModel, table: Table, policy: Policy, seen: Tensor, plans: Tensor, done: Tensor, executed: int
) -> list[tuple[float, float, float]]:
    """Of plans of the first episodes: root mean square errors, largest ones, and largest ones of the actions executed, over the
    range of actions."""
    wanted = sample(
        Evaluator(model, conditioning={"observation": seen[:COMPARED]}), table, First(policy), sequential(), check="off"
    ).sample
    off = (plans[:COMPARED] - wanted).abs() / RANGE
    every = zip(off.square().mean((1, 2)).sqrt(), off.amax((1, 2)), off[:, :executed].amax((1, 2)), strict=True)
    return [(float(a), float(b), float(c)) for (a, b, c), over in zip(every, done[:COMPARED].tolist(), strict=True) if not over]


class First:
    """The noise of a policy's first environments."""

    def __init__(self, policy: Policy) -> None:
        self._noise = policy.noise
        self.shape, self.samples = self._noise.shape, min(COMPARED, self._noise.samples)

    def start(self, sample: int) -> Tensor:
        """The draw behind x[0]."""
        return self._noise.start(sample)

    def draw(self, sample: int, nodes: range) -> Tensor:
        """z at consecutive nodes."""
        return self._noise.draw(sample, nodes)


LINE, LAST, NOTHING = "a line through two trajectories", "the last trajectory", "nothing"
TRIED: dict[str, tuple[Method, str]] = {
    "collocation": (collocation(tolerance=1e-3, shift=VARIANCE, secants=6), LINE),
    "collocation from the last": (collocation(tolerance=1e-3, shift=VARIANCE, secants=6), LAST),
    "collocation, 3 secants": (collocation(tolerance=1e-3, shift=VARIANCE, secants=3), LINE),
    "collocation, variance 1/4": (collocation(tolerance=1e-3), LAST),
    "quasi_newton": (quasi_newton(tolerance=2e-2, slope=shifted(VARIANCE)), LAST),
    "collocation cold": (collocation(tolerance=1e-3, shift=VARIANCE), NOTHING),
    "quasi_newton cold": (quasi_newton(tolerance=2e-2, slope=shifted(VARIANCE)), NOTHING),
    "quasi_newton cold, variance 1/4": (quasi_newton(tolerance=2e-2), NOTHING),
}
"""Methods, and what they begin from."""


def tried(model: PolicyModel, seed: int, count: int = 8, steps: int = 12) -> list[Row]:
    """Rounds and errors of each of TRIED, at the states that the sequential chain leads to; of the control steps after two."""
    plane, table, noise = Plane.drawn(seed, count), model.table("ddpm", 100), Keyed(model.shape, range(seed, seed + count))
    found: dict[str, list[tuple[list[int], Tensor]]] = {name: [] for name in TRIED}
    known: dict[str, list[Trajectory]] = {name: [] for name in TRIED}
    for _ in range(steps + 2):
        evaluator = Evaluator(model, conditioning={"observation": plane.observation})
        plain = sample(evaluator, table, noise, sequential(), check="off").sample
        for name, (method, begin) in TRIED.items():
            before, start = known[name], None
            if before and begin != NOTHING:
                start = before[-1]
                if begin == LINE and len(before) == 2:
                    start = joined([foretold(*(one.only(k) for one in before)) for k in range(count)])
            run = sample(evaluator, table, noise, method, check="off", start=start, keep_trajectory=True)
            assert run.trajectory is not None
            known[name] = [*before, run.trajectory][-2:]
            off = (run.sample - plain).abs() / RANGE
            found[name].append(([e.rounds for e in run.error_estimates], off.square().mean((1, 2)).sqrt()))
        plane = plane.after(plain[:, 0]).after(plain[:, 1])
    rows = list[Row]()
    for name, own in found.items():
        rounds, errors = [n for each, _ in own[2:] for n in each], torch.cat([off for _, off in own[2:]])
        row: Row = {"method": name, "begins_from": TRIED[name][1], "rounds_mean": statistics.mean(rounds)}
        row |= {"rounds_max": max(rounds), "within_4": sum(n <= 4 for n in rounds) / len(rounds)}
        rows.append(row | {"within_8": sum(n <= 8 for n in rounds) / len(rounds), "error_rms_max": float(errors.max())})
    return rows


class Rows:
    """A model that counts the rows of its calls, and their seconds."""

    def __init__(self, model: PolicyModel) -> None:
        self.model, self.calls, self.seconds = model, list[int](), 0.0

    def __call__(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        begin = time.process_time()
        found = self.model(x, t, observation)
        self.seconds += time.process_time() - begin
        self.calls.append(len(x))
        return found


def clock(model: PolicyModel, seed: int) -> list[Row]:
    """Seconds of a control step, batch 1; medians over control steps of one episode."""
    table, short = model.table("ddpm", 100), model.table("ddim", 10)
    counted = Rows(model)
    policy = Policy(counted, table, model.shape, seed=seed, check="off")
    plane = Plane.drawn(seed, 1)
    timed: dict[str, list[tuple[float, float, list[int]]]] = {}

    def run(name: str, call: Callable[[], Tensor]) -> Tensor:
        counted.calls, counted.seconds = [], 0.0
        begin = time.process_time()
        plans = call()
        whole = time.process_time() - begin
        timed.setdefault(name, []).append((whole, whole - counted.seconds, counted.calls))
        return plans

    for step in range(CLOCKED + 2):
        seen = plane.observation
        given = {"conditioning": {"observation": seen}}
        noise = Keyed(model.shape, seed + step)
        first = quasi_newton(tolerance=2e-2, slope=shifted(VARIANCE))
        plans = run("warm", lambda seen=seen: policy.act(seen))
        evaluator = Evaluator(counted, **given)
        run("cold", lambda e=evaluator, n=noise, m=first: sample(e, table, n, m, check="off").sample)
        run("sequential", lambda e=evaluator, n=noise: sample(e, table, n, sequential(), check="off").sample)
        run("ddim 10", lambda e=evaluator, n=noise: sample(e, short, n, sequential(), check="off").sample)
        plane = plane.after(plans[:, 0])
    rows = list[Row]()
    curves = {**CURVES, **{f"{name}, 25 ms": curve for name, curve in STATED.items()}}
    for name, own in timed.items():
        own = own[2:]
        beside = statistics.median(rest for _, rest, _ in own)
        row: Row = {"way": name, "seconds": statistics.median(whole for whole, _, _ in own), "beside": beside}
        row["calls"] = statistics.mean(len(calls) for _, _, calls in own)
        for label, curve in curves.items():
            row[label] = statistics.mean(sum(curve(n) for n in calls) for _, _, calls in own) + beside
        rows.append(row)
    return rows


def draw(rows: Sequence[Row], model: PolicyModel, path: Path) -> None:
    """Plans from one place, whole episodes, and the rounds of their control steps."""
    figure, ((fan, ways, counts),) = panels("A policy's plans by DDPM 100, solved in parallel", 4.0, columns=3)
    plane = Plane.drawn(3, 1)
    plane = replace(plane, place=torch.tensor([[0.02, -0.85]]))
    plans = chain(model, model.table("ddpm", 100), plane.observation.repeat(40, 1), range(40))
    for plan in plans:
        fan.plot(*torch.cat([plane.place, plan]).T, color=BLUE, linewidth=0.8, alpha=0.6)
    heading(fan, "40 plans from one place")
    plane = Plane.drawn(SEEDS["held-out"], 16)
    policy = policy_of(model, Way(executed=4), range(16))
    places = [plane.place]
    for _ in range(STEPS // 4):
        plans = policy.act(plane.observation)
        for k in range(4):
            plane = plane.after(plans[:, k])
            places.append(plane.place)
    for way in torch.stack(places, 1):
        ways.plot(*way.T, color=BLUE, linewidth=0.8)
    ways.plot(*plane.goal.T, "*", color=VERMILION, linestyle="none")
    heading(ways, "16 episodes, and their goals")
    for axes in (fan, ways):
        for disc in DISCS:
            axes.add_patch(Circle(disc, RADIUS, color=PALE))
        axes.set(xlim=(-0.8, 0.8), ylim=(-1, 1), aspect="equal")
    for name, color in (("cold", ORANGE), ("warm", BLUE)):
        own = [row for row in rows if (row["part"], row["way"]) == ("held-out", name)]
        found = {n: sum(row["rounds"].get(str(n), 0) for row in own) for n in range(1, 13)}
        total = sum(found.values()) or 1
        counts.bar(
            [n + (0.2 if name == "cold" else -0.2) for n in found],
            [v / total for v in found.values()],
            0.4,
            color=color,
            label=name,
        )
    counts.set(xlabel="rounds of a control step, of 100 in turn", ylabel="share of control steps")
    counts.legend(frameon=False)
    heading(counts, "rounds")
    save(figure, path)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a share of all lie at or below."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def merged(rows: Sequence[Row]) -> list[Row]:
    """The rows of all batches of a way together."""
    found = list[Row]()
    for part, name in dict.fromkeys((row["part"], row["way"]) for row in rows):
        own = [row for row in rows if (row["part"], row["way"]) == (part, name)]
        row: Row = {k: own[0][k] for k in ("part", "way", "noise", "executed")}
        row |= {k: sum(one[k] for one in own) for k in ("episodes", "succeeded", "hit")}
        counts: dict[int, int] = {}
        for one in own:
            for n, times in one.get("rounds", {}).items():
                counts[int(n)] = counts.get(int(n), 0) + times
        if counts:
            total = sum(counts.values())
            every = [n for n, times in counts.items() for _ in range(times)]
            row |= {"rounds_mean": sum(every) / total, "rounds_median": statistics.median(every), "rounds_max": max(every)}
            row |= {"rounds_95": quantile(every, 0.95)}
            row |= {f"within_{n}": sum(times for m, times in counts.items() if m <= n) / total for n in (4, 8)}
        errors = [each for one in own for each in one.get("errors", [])]
        for k, label in enumerate(("rms", "largest", "executed_largest")):
            if errors:
                values = [each[k] for each in errors]
                row |= {f"error_{label}_median": statistics.median(values), f"error_{label}_95": quantile(values, 0.95)}
                row |= {f"error_{label}_max": max(values), f"error_{label}_below": sum(v < 1e-3 for v in values) / len(values)}
        found.append(row)
    return found


COLUMNS = ("part", "way", "executed", "episodes", "succeeded", "hit", "rounds_mean", "rounds_95", "rounds_max", "within_4")
COLUMNS += ("within_8", "error_rms_median", "error_rms_max", "error_rms_below", "error_largest_below")


def main() -> None:
    """See the module."""
    given = options(
        __doc__, [f"{part}:{name}" for part in SEEDS for name in (*WAYS, "clock", "tried")], resumes=True, draws=True
    )
    results = Results(given.json, given.keep or given.resume)
    model = load_policy("points-policy")
    if given.draw_only:
        draw(results.rows, model, given.json.with_suffix(".png"))
        return
    for part, seed in SEEDS.items():
        for name, way in WAYS.items():
            if f"{part}:{name}" not in given.only:
                continue
            if not given.resume:
                results.drop(row for row in results.rows if (row["part"], row["way"]) != (part, name))
            made = {row["first"] for row in results.rows if (row["part"], row["way"]) == (part, name)}
            for first in range(0, min(way.episodes, given.seeds), BATCH):
                if first not in made:
                    results.add({"part": part, **episodes(name, way, model, seed, first)})
                    results.save()
        if f"{part}:clock" in given.only:
            results.contents["clock"] = clock(model, seed)
        if f"{part}:tried" in given.only:
            results.contents["tried"] = tried(model, seed)
    summary = merged(results.rows)
    results.save(summary=summary)
    show(summary, COLUMNS)
    if given.json:
        draw(results.rows, model, given.json.with_suffix(".png"))


if __name__ == "__main__":
    main()

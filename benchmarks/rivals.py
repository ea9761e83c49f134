# SPDX-License-Identifier: Apache-2.0
"""Sequential solvers of higher order beside `collocation`. A part of sparse.py.

Claim measured: to come within half a grey level of a long chain's sample, a sequential solver of higher order takes more
network calls in turn than `collocation` takes rounds, on every problem but one (empirical digits, DDIM: 10 calls, 10.4
rounds). Deterministic chains: diffusers' solvers, at the times that they round to and at the real ones of their levels.
Stochastic chains: long steps on the chain's own Brownian path. Problems: the trained digits, the closed forms, and the trained
text networks with guidance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
from harness import Row
from pipelines import GUIDANCE
from problem import DIMENSIONS, EQUAL, IMAGE, STEPS, WINDOWS, Problem, mixture, rms, trained
from shift import Chain
from torch import Tensor

from paradiff import Recorded, Schedule, Table
from paradiff.methods.collocation.control import ORDER_ZERO
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.noises import MeshNoises
from paradiff.methods.collocation.options import mesh_on
from paradiff.methods.collocation.system import CollocationSystem, noise_states
from paradiff.methods.parareal.coarse import Coarse, of_table, one_step, two_step
from paradiff.methods.presets import collocation
from paradiff.models.exact import digits
from paradiff.models.pixel import load
from paradiff.samplers import ddim, ddpm
from paradiff.samplers.continuum import continuum
from paradiff.samplers.exponential import exponential_integrator
from paradiff.samplers.grid import Grid
from paradiff.solver import Denoiser

RIVAL_STEPS = (10, 15, 20, 25, 30, 40, 50)
LONG_STEPS = (20, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500)
SPACINGS = ("linspace", "leading", "trailing")
SIGMAS = ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")
GUIDED = (("shapes", "DDIM, trailing"), ("shapes-flow", "flow Euler"), ("shapes", "DDPM, trailing"))
BEST_SOLVERS = ("one step", "averaged states, explicit")  # on digits, and where
BEST_MESHES = ("even in log-SNR", "collocation's")
BEST_STEPS = (50, 100, 200, 300, 400, 500, 700)
QUICK_STEPS = 100
LOOSER: dict[str, tuple[float, ...]] = {"ddpm": (1e-2,), "ddim": ()}


def part_rivals(seeds: Sequence[int]) -> Iterator[Row]:
    """Sequential solvers of higher order, in calls; and collocation, in rounds."""
    yield from on_digits(seeds)
    yield from on_closed_forms(seeds)
    yield from on_guided_networks(seeds)


def on_digits(seeds: Sequence[int]) -> Iterator[Row]:
    """The trained digits network; its chain, and the equation that the chain discretizes."""
    problem, config = trained("ddim"), dict(load("digits").config)
    equation = Problem("digits", problem.denoiser, continuum(problem.table, "ode"))
    references = {"chain": problem.references(seeds), "ode": equation.references(seeds)}
    yield {
        **rival_row(problem, "ddim", STEPS, rms(references["chain"] - references["ode"]), "ode"),
        "spacing": "leading",
    }
    for target in ("chain", "ode"):
        for window in (*WINDOWS["ddim"], None):
            method = collocation(window=window, target=target)
            yield problem.measure("rivals", method, seeds, reference=references[target])
    yield from deterministic(problem, references, seeds, diffusion_solvers(config))
    problem = trained("ddpm")
    reference = problem.references(seeds)
    for window in (*WINDOWS["ddpm"], None):
        yield problem.measure("rivals", collocation(window=window), seeds, reference=reference)
    yield from stochastic(problem, reference, seeds)


def on_closed_forms(seeds: Sequence[int]) -> Iterator[Row]:
    """Networks that are exact."""
    schedule = Schedule.linear()
    config = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": STEPS}
    targets: dict[str, tuple[Any, tuple[int, ...]]] = {f"mixture {d}": (mixture(d), (d,)) for d in DIMENSIONS}
    targets["empirical digits"] = (digits(), IMAGE)
    for name, (target, shape) in targets.items():
        table = ddim(schedule, STEPS)
        problem = Problem(name, at_any_time(target, table), table, shape)
        reference = problem.references(seeds)
        yield problem.measure("rivals", collocation(window=WINDOWS["ddim"][0]), seeds, reference=reference)
        yield from deterministic(problem, {"chain": reference}, seeds, diffusion_solvers(config))
        table = ddpm(schedule, STEPS)
        problem = Problem(name, at_any_time(target, table), table, shape)
        reference = problem.references(seeds)
        yield problem.measure("rivals", collocation(window=WINDOWS["ddpm"][-1]), seeds, reference=reference)
        yield from stochastic(problem, reference, seeds, BEST_SOLVERS, BEST_MESHES, BEST_STEPS)


def at_any_time(target: Any, table: Table) -> Denoiser:
    """The network that is optimal for a target, in the prediction of the noise, at times between the table's too, whose levels
    are those that diffusers' solvers give them."""
    times, known = table.t[:-1].flip(0).numpy(), (table.sigma / table.alpha)[:-1].log().flip(0).numpy()

    def network(x: Tensor, t: Tensor) -> Tensor:
        ratio = torch.from_numpy(np.exp(np.interp(t.double().numpy(), times, known)))
        alpha = (1 + ratio**2).rsqrt()
        sigma = alpha * ratio
        clean = target.clean(x.double(), alpha, sigma)
        level = [v.view(-1, *[1] * (x.ndim - 1)) for v in (alpha, sigma)]
        return ((x.double() - level[0] * clean) / level[1]).to(x.dtype)

    return network


def on_guided_networks(seeds: Sequence[int]) -> Iterator[Row]:
    """The trained text networks with guidance, a prompt a seed; errors in units of the samples' standard deviation."""
    for model, sampler in GUIDED:
        chain = Chain(model, sampler, STEPS if len(seeds) >= 8 else QUICK_STEPS)
        problem = Problem(
            f"{model}, guidance {GUIDANCE:g}", chain.network, chain.table, chain.shape, conditioning=chain.of_seeds, unit=None
        )
        reference, kind = problem.references(seeds), "ddpm" if chain.table.stochastic else "ddim"
        for window in WINDOWS[kind]:
            for tolerance in (EQUAL, *LOOSER[kind]):
                method = collocation(window=window, tolerance=tolerance)
                yield problem.measure("rivals", method, seeds, reference=reference)
        if chain.table.stochastic:
            yield from stochastic(problem, reference, seeds, BEST_SOLVERS, BEST_MESHES, BEST_STEPS)
        else:
            make = flow_solvers if model == "shapes-flow" else diffusion_solvers
            yield from deterministic(problem, {"chain": reference}, seeds, make(chain.config))


def rival_row(problem: Problem, solver: str, steps: int, errors: list[float], target: str = "chain", **more: Any) -> Row:
    """The row of a sequential solver: `steps` network calls in turn."""
    counts = dict.fromkeys(("rounds", "rounds_max", "evaluations", "evaluations_max"), steps)
    return {
        "part": "rivals",
        "problem": problem.name,
        "table": problem.table.name,
        "steps": problem.table.steps,
        "method": solver,
        "window": 1,
        "tolerance": None,
        "target": target,
        "seeds": len(errors),
        **counts,
        "error_median": statistics.median(errors),
        "error_max": max(errors),
        "estimated": None,
        **more,
    }


def deterministic(
    problem: Problem, references: dict[str, Tensor], seeds: Sequence[int], solvers: Iterable[Solver]
) -> Iterator[Row]:
    """diffusers' solvers on the network's own config, from the same start."""
    noise = problem.noise(seeds)
    start = torch.stack([noise.start(k) for k in range(len(seeds))])
    for solver in solvers:
        for steps in counts_for(RIVAL_STEPS, seeds):
            scheduler = solver.make(steps)
            found = walk(problem.network(seeds), scheduler, start, solver.real)
            for target, reference in references.items():
                errors = problem.errors(found, reference)
                calls = len(scheduler.timesteps)
                yield rival_row(problem, solver.name, calls, errors, target, spacing=solver.spacing, real_times=solver.real)


@dataclass(frozen=True)
class Solver:
    """A sequential solver.

    Attributes:
        name: Its name.
        spacing: Of its levels.
        make: Its scheduler for a number of steps.
        real: Whether the network is given the times of the levels, not the whole times that they round to.
    """

    name: str
    spacing: str
    make: Callable[[int], Any]
    real: bool = False


def diffusion_solvers(config: dict[str, Any]) -> Iterator[Solver]:
    """Multistep solvers of diffusion models at every spacing that they offer."""
    kinds = {"UniPC": diffusers.UniPCMultistepScheduler, "DPM-Solver++": diffusers.DPMSolverMultistepScheduler}
    for name, kind in kinds.items():
        for order in (2, 3):
            for spacing in (*SPACINGS, *SIGMAS):
                option = {"timestep_spacing": spacing} if spacing in SPACINGS else {f"use_{spacing}": True}
                if spacing in SIGMAS and f"use_{spacing}" not in kind().config:
                    continue

                def make(steps: int, kind: Any = kind, order: int = order, option: dict[str, Any] = option) -> Any:
                    scheduler = kind.from_config(config, solver_order=order, **option)
                    scheduler.set_timesteps(steps)
                    return scheduler

                for real in (False,) if spacing in SPACINGS else (False, True):
                    yield Solver(f"{name}, order {order}", spacing, make, real)


def flow_solvers(config: dict[str, Any]) -> Iterator[Solver]:
    """Solvers of flow models, at their own levels and at such that are even in log-SNR; and Heun's method."""
    kinds = {"UniPC": diffusers.UniPCMultistepScheduler, "DPM-Solver++": diffusers.DPMSolverMultistepScheduler}
    more = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": config["shift"]}
    for name, kind in kinds.items():
        for order in (2, 3):
            for spacing in ("its own", "even in log-SNR"):

                def make(steps: int, kind: Any = kind, order: int = order, spacing: str = spacing) -> Any:
                    scheduler = kind(solver_order=order, **more)
                    scheduler.set_timesteps(steps)
                    if spacing != "its own":
                        ratio = torch.linspace(math.log(999), -math.log(999), steps, dtype=torch.float64)
                        scheduler.sigmas = torch.cat([ratio.sigmoid(), torch.zeros(1)]).float()
                        scheduler.timesteps = 1000 * scheduler.sigmas[:-1]
                    return scheduler

                yield Solver(f"{name}, order {order}", spacing, make)

    def heun(steps: int) -> Any:
        scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=config["shift"])
        scheduler.set_timesteps((steps + 1) // 2)
        return scheduler

    yield Solver("Heun", "its own", heun)


@torch.inference_mode()
def walk(network: Denoiser, scheduler: Any, x: Tensor, real: bool) -> Tensor:
    """A scheduler's own loop; with `real`, the network is given the times of the levels, not those that they round to."""
    scheduler.set_begin_index(0)
    x, times = x * getattr(scheduler, "init_noise_sigma", 1.0), scheduler.timesteps
    if real:
        known = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().sqrt().log().numpy()
        levels = scheduler.sigmas[: len(scheduler.timesteps)].double().log().numpy()
        times = torch.from_numpy(np.interp(levels, known, np.arange(len(known)))).float()
    for given, t in zip(times, scheduler.timesteps, strict=True):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(seen, given.expand(len(x))), t, x).prev_sample
    return x


def stochastic(
    problem: Problem,
    reference: Tensor,
    seeds: Sequence[int],
    chosen: Sequence[str] = (),
    meshes: Sequence[str] = (),
    counts: Sequence[int] = (),
) -> Iterator[Row]:
    """Long steps whose noises are the exact aggregates of the chain's: of several kinds, on several meshes, and of ever
    more steps until the error is small enough; or some of these only."""
    noise, table = problem.noise(seeds), problem.table
    z = torch.stack([noise.draw(k, range(table.steps)) for k in range(len(seeds))]).double()
    start = torch.stack([noise.start(k) for k in range(len(seeds))]) * table.start_scale
    path, recurrence = Brownian(problem, seeds, z, start), Recurrence(table, ORDER_ZERO.variance)
    solvers: dict[str, Callable[[list[int]], Tensor]] = {
        "one step": lambda nodes: path.walk(one_step(table, nodes)),
        "two step": lambda nodes: path.walk(two_step(table, nodes)),
        "exponential SDE, score": lambda nodes: path.walk(of_table(table, exponential(table, nodes, "score"))),
        "averaged states, explicit": lambda nodes: path.averaged(CollocationSystem(recurrence, nodes, 0), noise, 1),
        "averaged states, corrected": lambda nodes: path.averaged(CollocationSystem(recurrence, nodes, 0), noise, 2),
    }
    for spacing in meshes or MESHES:
        for solver in chosen or solvers:
            if solver.startswith("exponential") and spacing == "collocation's":
                continue  # no better there than the other one-step solver
            tried = [n for n in counts_for(counts or LONG_STEPS, seeds) if n <= table.steps]
            sizes = {len(nodes) - 1: nodes for nodes in (MESHES[spacing](table, n) for n in tried)}
            for steps, nodes in sizes.items():
                errors = problem.errors(solvers[solver](nodes), reference)
                calls = 2 * steps if solver.endswith("corrected") else steps
                yield rival_row(problem, solver, calls, errors, spacing=spacing)
                if max(errors) < EQUAL:
                    break


def counts_for(counts: Sequence[int], seeds: Sequence[int]) -> Sequence[int]:
    """Numbers of steps that are tried: of a quick run every third, and the last."""
    return counts if len(seeds) >= 8 else counts[-1::-3][::-1]


def _even(place: Tensor, count: int) -> list[int]:
    """Nodes 0 ... N, `count` intervals or fewer, as even as can be in a rising coordinate of nodes 0 ... N - 1."""
    wanted = np.linspace(float(place[0]), float(place[-1]), count)
    return [*np.unique(np.interp(wanted, place.numpy(), np.arange(len(place))).round().astype(int)).tolist(), len(place)]


MESHES: dict[str, Callable[[Table, int], list[int]]] = {
    "even in time": lambda table, count: _even(-table.t[:-1].double(), count),
    "even in log-SNR": lambda table, count: _even((table.alpha / table.sigma)[:-1].log(), count),
    "collocation's": lambda table, count: mesh_on(table, collocation().control_on(table)).points(count),
}


def exponential(table: Table, nodes: Sequence[int], form: Any) -> Table:
    """An exponential integrator of the SDE between nodes of a chain; its last step lands on the clean-data estimate."""
    u = -2 * table.alpha[list(nodes)].log()
    u[-1] = 0
    return exponential_integrator(load("digits").process(), Grid(u, [0, len(nodes) - 1]), form=form)


class Brownian:
    """Sequential walks on the Brownian path of some seeds.

    Args:
        problem: The problem, of a one-step table.
        seeds: The seeds.
        z: `[B, N, ...]` the chain's noises.
        start: `[B, ...]` x[0].
    """

    def __init__(self, problem: Problem, seeds: Sequence[int], z: Tensor, start: Tensor) -> None:
        self.problem, self.z, self.start, self._network = problem, z, start, problem.network(seeds)

    @torch.inference_mode()
    def network(self, x: Tensor, node: int) -> Tensor:
        """The network's output at a node, float64."""
        seen, t = x * float(self.problem.table.scale[node]), self.problem.table.t[node]
        return self._network(seen.float(), t.float().expand(len(x))).double()

    def walk(self, coarse: Coarse) -> Tensor:
        """One call of the network a coarse step."""
        table, x, before = self.problem.table, self.start.double(), None
        for interval, (left, right) in enumerate(zip(coarse.nodes, coarse.nodes[1:], strict=False)):
            clean = float(table.p[left]) * x + float(table.q[left]) * self.network(x, left)
            ahead = clean if before is None else clean + float(coarse.extrapolation[interval]) * (clean - before)
            noise = torch.einsum("n,bn...->b...", coarse.weights[0, left:right], self.z[:, left:right])
            x, before = float(coarse.state[interval, 0]) * x + float(coarse.clean[interval, 0]) * ahead + noise, clean
        return x

    def averaged(self, system: CollocationSystem, noise: Recorded, passes: int) -> Tensor:
        """The collocation system's integrator, one interval after another: the first pass over an interval takes the forcing of
        the one before, further passes evaluate the network again."""
        table, rec, seeds = self.problem.table, system.recurrence, range(len(self.z))
        x0 = self.start.double()
        drawn = [MeshNoises.of(system, None, noise, k, x0[k].reshape(1, -1)) for k in seeds]
        shares = [noise_states(system.noise_weights, d.ends) for d in drawn]
        for share, d in zip(shares, drawn, strict=True):
            share[:-1] += d.averaged
        share = torch.cat(shares, 1).view(-1, *x0.shape)
        forcings = torch.zeros(len(system.intervals), *x0.shape, dtype=torch.float64)
        for k, node in enumerate(system.nodes.tolist()):
            if k:
                forcings[k] = forcings[k - 1]
            for _ in range(passes):
                y = (
                    float(system.initial[k]) * x0
                    + share[k]
                    + torch.tensordot(system.influence[k, : k + 1], forcings[: k + 1], 1)
                )
                m = self.network(y, node)
                forcings[k] = float(rec.nu[node]) * (
                    float(table.p[node] - rec.g[node]) * y
                    + float(table.q[node]) * m  # the forcing: methods/collocation/interval.py
                )
        return float(system.initial[-1]) * x0 + share[-1] + torch.tensordot(system.influence[-1], forcings, 1)


def smallest(rows: list[Row]) -> list[Row]:
    """Of every solver the fewest network calls with every seed's error below `EQUAL`, beside collocation's rounds."""
    fields = ("problem", "table", "target")
    keys = list(dict.fromkeys((*(r[k] for k in fields), r["method"]) for r in rows if r["method"] != "collocation"))
    found = []
    for *place, method in keys:
        here = [r for r in rows if [r[k] for k in fields] == place]
        chosen = [r for r in here if r["method"] == method]
        good = [r for r in chosen if r["error_max"] < EQUAL]
        best = min(good, key=lambda r: r["rounds"]) if good else None
        near = min(chosen, key=lambda r: r["error_max"])
        ours = [r for r in here if r["method"] == "collocation"]
        found.append(
            {
                **dict(zip(fields, place, strict=True)),
                "solver": method,
                "steps": best["rounds"] if best else None,
                "how": how(best) if best else None,
                "smallest_error": near["error_max"],
                "smallest_error_steps": near["rounds"],
                "smallest_error_how": how(near),
                "collocation": [
                    {k: r[k] for k in ("window", "tolerance", "rounds", "rounds_max", "evaluations", "error_max")} for r in ours
                ],
            }
        )
    return found


def how(row: Row) -> str:
    """Spacing and times of a rival."""
    return row["spacing"] + (", real times" if row.get("real_times") else "")

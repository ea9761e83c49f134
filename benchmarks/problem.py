# SPDX-License-Identifier: Apache-2.0
"""The problems that methods are measured on: a network, a table and seeds.

- `trained`: the bundled digits network.
- `closed_form`: empirical digits, whose denoiser is known in closed form.
- `mixture`: eight Gaussians in any number of dimensions.

`Candidate`, `at_equal_error` and `clock` are what srds.py and polylog.py share: settings that are swept, and the fastest of
those whose error is small enough.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from harness import Row
from torch import Tensor

from paradiff import Evaluator, Recorded, Schedule, Solution, Table, sample, sequential
from paradiff.models.exact import digits
from paradiff.models.pixel import load
from paradiff.planning.harness import mixture as mixture
from paradiff.samplers import ddim, ddpm
from paradiff.solver import CollocationRecord, Denoiser, PararealRecord
from paradiff.solver.protocol import Method

EQUAL = 4e-3  # half a grey level of data in -1 ... 1
STEPS = 1000
IMAGE = (1, 8, 8)
MOST_ROUNDS = 1500  # at which a method that does not come to rest is given up
DIMENSIONS = (2, 64, 1024)
WINDOWS = {"ddpm": (16, 32), "ddim": (24,)}


def rms(gap: Tensor) -> list[float]:
    """Root mean square of every row."""
    return gap.double().square().flatten(1).mean(1).sqrt().tolist()


class Problem:
    """A network, a table and seeds; sequential samples are computed once.

    Args:
        name: What the data are.
        denoiser: The network.
        table: The table.
        shape: Shape of one sample.
        conditioning: Further arguments of the network for some seeds: values by name, one a seed.
        unit: Errors are divided by it; None for the standard deviation of the sequential samples.
        sampler: The sampler's name in the rows; the table's by default.
    """

    def __init__(
        self,
        name: str,
        denoiser: Callable[..., Tensor],
        table: Table,
        shape: tuple[int, ...] = IMAGE,
        conditioning: Callable[[Sequence[int]], dict[str, Tensor]] | None = None,
        unit: float | None = 1.0,
        sampler: str | None = None,
    ) -> None:
        self.name, self.denoiser, self.table, self.shape = name, denoiser, table, shape
        self.sampler = sampler or table.name
        self._conditioning, self._unit = conditioning, unit
        self._references: dict[int, Tensor] = {}
        self.sequential_seconds: dict[int, float] = {}  # of seeds that were sampled alone

    def conditioning(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Further arguments of the network for some seeds."""
        return {} if self._conditioning is None else self._conditioning(seeds)

    def network(self, seeds: Sequence[int]) -> Denoiser:
        """The network on one row a seed."""
        conditioning = self.conditioning(seeds)
        return lambda x, t: self.denoiser(x, t, **conditioning)

    @property
    def unit(self) -> float:
        """Errors are divided by it."""
        if self._unit is None:
            self._unit = float(torch.stack([*self._references.values()]).std())
        return self._unit

    def errors(self, found: Tensor, reference: Tensor) -> list[float]:
        """Root mean square errors of samples, in `unit`s."""
        return [e / self.unit for e in rms(found - reference)]

    def noise(self, seeds: Iterable[int]) -> Recorded:
        """The draws of plain pipeline calls with these seeds."""
        return Recorded(self.shape, [torch.Generator().manual_seed(seed) for seed in seeds])

    def solve(
        self, method: Method, seeds: Sequence[int], *, most_rows: int | None = None, table: Table | None = None
    ) -> tuple[Solution, float]:
        """Samples, and the whole clock, noise included."""
        rounds = 0

        def count(_: Any) -> None:
            nonlocal rounds
            rounds += 1
            if rounds > MOST_ROUNDS:
                raise ValueError(f"not at rest after {MOST_ROUNDS} rounds")

        table = self.table if table is None else table
        begin = time.perf_counter()
        evaluator = Evaluator(self.denoiser, max_rows=most_rows, conditioning=self.conditioning(seeds))
        solution = sample(evaluator, table, self.noise(seeds), method, observer=count if method.name != "sequential" else None)
        return solution, time.perf_counter() - begin

    def references(self, seeds: Sequence[int], alone: bool = False) -> Tensor:
        """Sequential samples, each computed once: one seed at a time, and timed, or in one batch."""
        if alone:
            for seed in seeds:
                if seed not in self.sequential_seconds:
                    solution, self.sequential_seconds[seed] = self.solve(sequential(), [seed])
                    self._references[seed] = solution.sample[0]
        elif missing := [seed for seed in seeds if seed not in self._references]:
            self._references.update(zip(missing, self.solve(sequential(), missing)[0].sample, strict=True))
        return torch.stack([self._references[seed] for seed in seeds])

    def measure(
        self,
        part: str,
        method: Method,
        seeds: Sequence[int],
        *,
        alone: bool = True,
        reference: Tensor | None = None,
        **more: Any,
    ) -> Row:
        """A method's row: each seed alone, or all in one batch."""
        reference = self.references(seeds) if reference is None else reference
        found, seconds = [], []
        for group in [[seed] for seed in seeds] if alone else [seeds]:
            solution, clock = self.solve(method, group)
            found += self.samples(solution, reference[len(found) : len(found) + len(group)], group)
            seconds.append(clock)
        known = [self.sequential_seconds[seed] for seed in seeds if seed in self.sequential_seconds]
        return row(
            part,
            self,
            method,
            found,
            seconds=sum(seconds) / len(seeds) if alone else None,
            sequential_seconds=sum(known) / len(known) if alone and len(known) == len(seeds) else None,
            **more,
        )

    def samples(self, solution: Solution, reference: Tensor, seeds: Sequence[int]) -> list[Row]:
        """What a row keeps of every sample."""
        nodes = nodes_of(solution.history)
        errors = self.errors(solution.sample, reference)
        return [
            {
                "seed": seed,
                "rounds": c.rounds,
                "evaluations": c.evaluations,
                "error": error,
                "estimated": c.estimated_error / self.unit,
                "interpolation_error": c.interpolation_error / self.unit,
                "iteration_error": c.iteration_error / self.unit,
                "nodes": nodes.get(k),
            }
            for k, (seed, c, error) in enumerate(zip(seeds, solution.error_estimates, errors, strict=True))
        ]


def nodes_of(history: Iterable[Any]) -> dict[int, int]:
    """How many nodes every sample came to."""
    return {entry.sample: entry.of for entry in history if isinstance(entry, CollocationRecord)}


def row(part: str, problem: Any, method: Any, samples: list[Row], **more: Any) -> Row:
    """The row of a method; `problem` has a name and a table, or is (problem, table, steps)."""
    name, table, steps = problem if isinstance(problem, tuple) else (problem.name, problem.table.name, problem.table.steps)
    rounds, rows, errors = ([s[k] for s in samples] for k in ("rounds", "evaluations", "error"))
    nodes = [s["nodes"] for s in samples if s["nodes"] is not None]
    return {
        "part": part,
        "problem": name,
        "table": table,
        "steps": steps,
        "method": method.name,
        "window": getattr(method, "window", None),
        "tolerance": method.tolerance,
        "target": getattr(method, "target", "chain"),
        "seeds": len(samples),
        "rounds": statistics.mean(rounds),
        "rounds_max": max(rounds),
        "evaluations": statistics.mean(rows),
        "evaluations_max": max(rows),
        "error_median": statistics.median(errors),
        "error_max": max(errors),
        "estimated": max(s["estimated"] for s in samples),
        "nodes_max": max(nodes) if nodes else None,
        **more,
        "samples": samples,
    }


def warmed(denoiser: Denoiser, table: Table) -> Denoiser:
    """The network, called three times, so that no clock has what a first call sets up."""
    with torch.inference_mode():
        for _ in range(3):
            denoiser(torch.zeros(1, *IMAGE), table.t[:1].long())
    return denoiser


@cache
def trained(sampler: str, steps: int = STEPS) -> Problem:
    """The bundled digits network; also with its exponential integrators, as `exponential_ode` or `exponential_sde`."""
    model = load("digits")
    table = model.exponential(sampler, steps) if sampler.startswith("exponential") else model.table(sampler, steps)
    return Problem("digits", warmed(model, table), table, sampler=sampler)


@cache
def closed_form(sampler: str, steps: int = STEPS) -> Problem:
    """Empirical digits, whose denoiser is a softmax over all data."""
    table = (ddpm if sampler == "ddpm" else ddim)(Schedule.linear(), steps)
    return Problem("closed-form-digits", warmed(digits().denoiser(table), table), table, sampler=sampler)


IMAGES: dict[str, Callable[[str, int], Problem]] = {"closed-form-digits": closed_form, "digits": trained}


@dataclass(frozen=True)
class Candidate:
    """One setting of one family of methods.

    Attributes:
        family: For the tables.
        setting: Its numbers, for the tables.
        method: The method.
    """

    family: str
    setting: str
    method: Method


def setting_row(problem: Problem, candidate: Candidate, seeds: int) -> Row:
    """The row of one setting, all seeds in one batch: a sample's rounds do not depend on its neighbours."""
    reference = problem.references(range(seeds))
    solution, _ = problem.solve(candidate.method, range(seeds))
    errors = problem.errors(solution.sample, reference)
    found = solution.error_estimates
    return {
        "problem": problem.name,
        "sampler": problem.sampler,
        "steps": problem.table.steps,
        "family": candidate.family,
        "setting": candidate.setting,
        "seeds": seeds,
        "rounds": sum(c.rounds for c in found) / seeds,
        "rounds_max": max(c.rounds for c in found),
        "widest": max(len(e.rows) if isinstance(e, PararealRecord) else len(e.change) for e in solution.history),
        "evaluations": sum(c.evaluations for c in found) / seeds,
        "error_max": max(errors),
        "errors": [float(f"{e:.3g}") for e in errors],
        "estimated_error_max": solution.estimated_error,
        "estimate_holds": sum(c.estimated_error >= e or e < 1e-6 for c, e in zip(found, errors, strict=True)),
    }


def at_equal_error(rows: Iterable[Row]) -> list[Row]:
    """Of every family on every chain, the setting of fewest rounds whose error is below `EQUAL` for every seed."""
    families: dict[tuple[Any, ...], list[Row]] = {}
    for r in rows:
        good = families.setdefault((r["problem"], r["sampler"], r["steps"], r["family"]), [])
        good += [r] if r["error_max"] < EQUAL else []
    return [min(good, key=lambda r: (r["rounds"], r["evaluations"])) for good in families.values() if good]


def clock(problem: Problem, methods: Sequence[Method], seeds: int) -> list[float]:
    """Mean seconds of each method at batch 1, in turns, so that other load on the machine falls on all alike."""
    totals = [0.0] * len(methods)
    for seed in range(seeds):
        for k, method in enumerate(methods):
            totals[k] += problem.solve(method, [seed])[1]
    return [total / seeds for total in totals]

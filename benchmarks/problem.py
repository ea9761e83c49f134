"""A network, a table and seeds; what the benchmarks of sparse nodes measure of a method, row by row."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from harness import Denoiser
from torch import Tensor

from paradiff import Evaluator, Recorded, Solution, Table, sample, sequential
from paradiff.models.exact import Mixture
from paradiff.models.pixel import load
from paradiff.solver import CollocationRecord
from paradiff.solver.protocol import Method

EQUAL = 4e-3  # half a grey level of data in -1 ... 1
STEPS = 1000
IMAGE = (1, 8, 8)
MOST_ROUNDS = 1500  # at which a method that does not come to rest is given up
DIMENSIONS = (2, 64, 1024)
WINDOWS = {"ddpm": (16, 32), "ddim": (24,)}

Row = dict[str, Any]


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
        told: What the network is told beside states and times, for some seeds: values by name, one a seed.
        unit: In which errors are counted; None for the standard deviation of the sequential samples.
    """

    def __init__(
        self,
        name: str,
        denoiser: Callable[..., Tensor],
        table: Table,
        shape: tuple[int, ...] = IMAGE,
        told: Callable[[Sequence[int]], dict[str, Tensor]] | None = None,
        unit: float | None = 1.0,
    ) -> None:
        self.name, self.denoiser, self.table, self.shape = name, denoiser, table, shape
        self._told, self._unit = told, unit
        self._references: dict[int, Tensor] = {}
        self.sequential_seconds: dict[int, float] = {}  # of seeds that were sampled alone

    def told(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """What the network is told for some seeds."""
        return {} if self._told is None else self._told(seeds)

    def network(self, seeds: Sequence[int]) -> Denoiser:
        """The network on one row a seed."""
        told = self.told(seeds)
        return lambda x, t: self.denoiser(x, t, **told)

    @property
    def unit(self) -> float:
        """In which errors are counted."""
        if self._unit is None:
            self._unit = float(torch.stack([*self._references.values()]).std())
        return self._unit

    def errors(self, found: Tensor, reference: Tensor) -> list[float]:
        """Of samples."""
        return [e / self.unit for e in rms(found - reference)]

    def noise(self, seeds: Iterable[int]) -> Recorded:
        """What plain pipeline calls with these seeds draw."""
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
        evaluator = Evaluator(self.denoiser, max_rows=most_rows, conditioning=self.told(seeds))
        solution = sample(evaluator, table, self.noise(seeds), method, observer=count if method.name != "sequential" else None)
        return solution, time.perf_counter() - begin

    def references(self, seeds: Sequence[int], alone: bool = False) -> Tensor:
        """Sequential samples; one seed at a time, and timed, or those that are missing in one batch."""
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


@cache
def trained(sampler: str) -> Problem:
    """The bundled digits network on a chain of 1000 steps, called once so that what a first call sets up is in no clock."""
    model = load("digits")
    table = model.table(sampler, STEPS)
    with torch.inference_mode():
        for _ in range(3):
            model(torch.zeros(1, *IMAGE), table.t[:1].long())
    return Problem("digits", model, table)


def mixture(size: int) -> Mixture:
    """Eight Gaussians in a box of -1 ... 1."""
    generator = torch.Generator().manual_seed(size)
    means = 2 * torch.rand(8, size, generator=generator, dtype=torch.float64) - 1
    weights = torch.rand(8, generator=generator, dtype=torch.float64) + 0.5
    variances = 0.01 + 0.04 * torch.rand(8, generator=generator, dtype=torch.float64)
    return Mixture(weights / weights.sum(), means, variances)

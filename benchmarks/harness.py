"""What the benchmark scripts share: the command line, the clock, the rows of their JSON."""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Sheet

from paradiff import Evaluator, Recorded, Solution, Table, sample, sequential
from paradiff.app.environment import environment
from paradiff.methods import WindowMethod

ROOT = Path(__file__).resolve().parent.parent
Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def arguments(description: str, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """`--quick`, `--json FILE` and `--threads N`, added to those of `parser`."""
    if parser is None:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version, within a minute on two cores")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given


def commit() -> str:
    """The commit of this checkout, marked if files differ from it."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


class Problem:
    """A network, a table and seeds; its sequential samples are computed once, by the same rules.

    Args:
        name: `closed-form-digits`, `digits`.
        sampler: The sampler's name.
        denoiser: The network.
        table: The table.
        shape: Shape of one sample.
        seeds: How many seeds, from 0; noise as a plain pipeline call with that seed draws it.
    """

    def __init__(self, name: str, sampler: str, denoiser: Denoiser, table: Table, shape: tuple[int, ...], seeds: int) -> None:
        self.name, self.sampler, self.table = name, sampler, table
        self.denoiser, self.shape, self.seeds = denoiser, shape, seeds
        self._references: dict[int, torch.Tensor] = {}
        self.sequential_seconds: list[float] = []
        for seed in range(seeds):
            solution, seconds = self.solve(seed, sequential())
            self._references[seed] = solution.sample
            self.sequential_seconds.append(seconds)

    def solve(self, seed: int, method: WindowMethod) -> tuple[Solution, float]:
        """One sample and its whole clock, noise included."""
        begin = time.perf_counter()
        noise = Recorded(self.shape, torch.Generator().manual_seed(seed))
        solution = sample(Evaluator(self.denoiser), self.table, noise, method)
        return solution, time.perf_counter() - begin

    def row(self, method: WindowMethod, slope: str, seeds: int | None = None) -> dict[str, Any]:
        """Measures a method, one seed at a time (batch 1)."""
        count = min(seeds or self.seeds, self.seeds)
        found = [self.solve(seed, method) for seed in range(count)]
        errors = [
            (solution.sample - self._references[seed]).double().square().mean().sqrt().item()
            for seed, (solution, _) in enumerate(found)
        ]
        return {
            "problem": self.name,
            "sampler": self.sampler,
            "steps": self.table.steps,
            "method": method.name,
            "slope": slope,
            "window": method.window or self.table.steps,
            "rule": method.rule,
            "tolerance": method.tolerance,
            "warmup": method.warmup,
            "seeds": count,
            "rounds": sum(s.rounds for s, _ in found) / count,
            "rounds_max": max(s.rounds for s, _ in found),
            "evaluations": sum(s.evaluations for s, _ in found) / count,
            "error_max": max(errors),
            "estimated_error_max": max(s.estimated_error for s, _ in found),
            "estimate_holds": all(s.estimated_error >= e or e < 1e-6 for (s, _), e in zip(found, errors, strict=True)),
            "seconds": sum(t for _, t in found) / count,
            "sequential_seconds": sum(self.sequential_seconds[:count]) / count,
        }


COLUMNS = ("problem", "sampler", "steps", "window", "method", "slope", "rule", "tolerance", "warmup")
FIGURES = ("rounds", "rounds_max", "evaluations", "error_max", "estimated_error_max", "seconds", "sequential_seconds")


def finish(
    rows: list[dict[str, Any]],
    given: argparse.Namespace,
    extra: dict[str, Any] | None = None,
    *,
    columns: Sequence[str] = COLUMNS,
    figures: Sequence[str] = FIGURES,
    show: bool = True,
) -> None:
    """Prints the rows (unless not to be shown) and writes them and `extra` as JSON."""
    if show:
        sheet = Sheet(*columns, *figures)
        for row in rows:
            sheet.add_row(*(str(row[c]) for c in columns), *(f"{row[f]:.4g}" for f in figures))
        Console(width=220).print(sheet)
    if given.json:
        contents = {"environment": {**environment(), "commit": commit()}, "rows": rows, **(extra or {})}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")

# SPDX-License-Identifier: Apache-2.0
"""`paradiff bench`: every method on every problem and chain, at equal measured error.

A cell is a problem, a chain and a window. In each, a method's tolerance is the largest of `LADDER` at which every sample of
the tuning seeds errs by less than `TUNED`. Its row is then measured on other seeds; `equal` says whether all of these err by
less than `EQUAL`.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from paradiff.app.environment import environment
from paradiff.app.folder import made_folder
from paradiff.chain.table import Table
from paradiff.errors import is_whole, shown
from paradiff.methods.presets import sequential
from paradiff.planning.comparison import EQUAL, Compared, Comparison
from paradiff.planning.harness import FAMILIES, RIVALS, WINDOWS, chains, contestants, family
from paradiff.planning.latency import LatencyCurve
from paradiff.planning.side_by_side import compare
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.loop import sample
from paradiff.solver.protocol import Method
from paradiff.whole_file import write_whole

LADDER = (1.2e-2, 4e-3, 1.2e-3, 4e-4)
"""Tolerances, the largest first."""

TUNED = EQUAL / 2
"""What tuning seeds may err by: a margin for seeds that decide more narrowly than any of them."""

TUNING, MEASURED = range(2000, 2008), range(1000, 1008)
"""Seeds on which tolerances are chosen, and those of the rows."""

RIVAL_STEPS = (10, 15, 20, 30)
"""Steps of the sequential chains of other solvers."""

JACOBI = 50
"""Longest chain on which Jacobi's iteration, one node a round, is measured."""

VERSION = 1
"""Of the file's form."""

CELL = ("problem", "chain", "steps", "window")
"""What names a row's cell."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is measured.

    Attributes:
        problems: Patterns of names of problems.
        chains: Patterns of chains, such as `ddim:50` or `ddpm:*`.
        windows: Most rows of a sample in a round; None for the whole chain.
        methods: Patterns of names of methods.
        seeds: How many seeds tolerances are chosen on, and as many others rows are measured on; 1 to 8.
        curve: The latency curve of the gains, as text; None for rounds, a call costing the same on any number of rows.
    """

    problems: Sequence[str] = ("*",)
    chains: Sequence[str] = ("*",)
    windows: Sequence[int | None] = WINDOWS
    methods: Sequence[str] = ("*",)
    seeds: int = 8
    curve: str | None = None

    def __post_init__(self) -> None:
        if not is_whole(self.seeds) or not 1 <= self.seeds <= len(TUNING):
            raise ValueError(f"--seeds is {shown(self.seeds)}; give 1 to {len(TUNING)}")

    def cells(self) -> list[tuple[str, str, int, int | None]]:
        """Problem, chain, steps and window of every cell.

        Raises:
            ValueError: If no cell has such names.
        """
        found = [
            (problem, kind, steps, window)
            for problem in FAMILIES
            if _fits(problem, self.problems)
            for kind, steps in chains(problem)
            if _fits(f"{kind}:{steps}", self.chains)
            for window in self.windows
            if window is None or window < steps
        ]
        if not found:
            raise ValueError(
                f"no cell fits the problems {', '.join(self.problems)} and chains {', '.join(self.chains)}; problems are "
                f"{', '.join(FAMILIES)}, chains such as ddim:50, ddpm:1000, flow:28"
            )
        return found


def windows_of(text: str) -> tuple[int | None, ...]:
    """Windows from a text such as `2,4,all`.

    Raises:
        ValueError: If it is no such list.
    """
    found: list[int | None] = []
    for part in text.split(","):
        word = part.strip()
        if word != "all" and not (word.isascii() and word.isdigit() and 0 < int(word) < 10**6):
            raise ValueError(
                f"--windows is {shown(text)}, of which {shown(word)} is none; give whole numbers, or all, such as 2,4,all"
            )
        found.append(None if word == "all" else int(word))
    return tuple(dict.fromkeys(found))


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


class BenchFile:
    """The rows that were measured, in a JSON file that is written after each cell and gone on with.

    Args:
        path: The file.
        settings: What rows depend on; a file of other settings is refused.

    Raises:
        ValueError: If the file is none of this command's, or of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.rows: list[dict[str, Any]] = []
        if path.exists() or path.is_symlink():
            try:
                self.rows, own = _known(path)
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(f"{path} is no file of paradiff bench; give another folder, or remove it") from error
            if own != self.settings:
                raise ValueError(f"{path} was measured with {own}, and this run has {self.settings}; give another folder")

    def has(self, cell: Sequence[Any], method: str) -> bool:
        """Whether a method was measured on a cell."""
        return any([row[key] for key in CELL] == [*cell] and row["method"] == method for row in self.rows)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows, and writes the file whole."""
        self.rows += [dict(row) for row in rows]
        text = json.dumps(
            {"version": VERSION, "environment": environment(), "settings": self.settings, "rows": self.rows}, indent=1
        )
        write_whole(self.path, f"{text}\n".encode())


def _known(path: Path) -> tuple[list[dict[str, Any]], Any]:
    """The rows and the settings of a file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is none of this command's.
        RecursionError: If it is nested too deep.
    """
    if not path.is_file():
        raise ValueError("it is no regular file")
    known = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(known, dict) or known.get("version", VERSION) != VERSION or not isinstance(known.get("rows"), list):
        raise ValueError("it has no rows of this version")
    rows = known["rows"]
    if not all(isinstance(row, dict) and {*CELL, "method"} <= row.keys() for row in rows):
        raise ValueError("a row names no cell or no method")
    return rows, known.get("settings")


def bench(wanted: Wanted, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Measures what is wanted and not yet in the folder's `bench.json`; a table of each cell is printed as it is measured.

    Args:
        wanted: What is measured.
        folder: Where `bench.json` goes.
        console: Where tables are printed.

    Returns:
        All rows of the file.

    Raises:
        ValueError: If an option is of another kind, no problem, chain or method fits, or the folder cannot be written.
    """
    curve = LatencyCurve({1: 1.0, 2: 1.0}) if wanted.curve is None else LatencyCurve.of_text(wanted.curve)
    settings = {"seeds": wanted.seeds, "curve": {str(rows): seconds for rows, seconds in curve.points.items()}}
    file = BenchFile(folder / "bench.json", settings)
    with made_folder(folder, "the output folder"):
        _fill(file, wanted, curve, console)
    return file.rows


def _fill(file: BenchFile, wanted: Wanted, curve: LatencyCurve, console: Console) -> None:
    """Measures what is not yet in the file.

    Raises:
        ValueError: If no problem, chain or method fits, or the file cannot be written.
    """
    cells = wanted.cells()
    for cell in cells:
        found = measured(cell, wanted, curve, file)
        if found is not None:
            comparison, tolerances = found
            file.add([*rows_of(cell, comparison, tolerances)])
            problem, kind, steps, window = cell
            console.print(f"\n{problem}, {kind} of {steps} steps, window {window or 'whole'}\n{comparison}", highlight=False)
    if not any(file.has(cell, row["method"]) and _fits(row["method"], wanted.methods) for cell in cells for row in file.rows):
        table = family(cells[0][0]).table(*cells[0][1:3])
        raise ValueError(
            f"no method fits {', '.join(map(shown, wanted.methods))}; methods are {', '.join(contestants(table, None))}"
        )


def measured(
    cell: tuple[str, str, int, int | None], wanted: Wanted, curve: LatencyCurve, file: BenchFile
) -> tuple[Comparison, dict[str, float]] | None:
    """The comparison of a cell's methods that were not measured yet, and their tolerances; None where there is none left."""
    problem, kind, steps, window = cell
    own = family(problem)
    table = own.table(kind, steps)
    makers = {
        name: make
        for name, make in contestants(table, window).items()
        if _fits(name, wanted.methods) and (name != "jacobi" or steps <= JACOBI) and not file.has(cell, name)
    }
    if not makers:
        return None
    tolerances = {name: tolerance_of(problem, kind, steps, make, wanted.seeds) for name, make in makers.items()}
    methods = {name: make(tolerances[name]) for name, make in makers.items()}
    seeds = MEASURED[: wanted.seeds]
    rivals: dict[str, tuple[Table, Evaluator]] = {}
    for name, calls in itertools.product(RIVALS, RIVAL_STEPS):
        if window is None and kind == "ddim" and calls < steps and not file.has(cell, f"{name} {calls}"):
            other = own.table(name, calls)
            rivals[f"{name} {calls}"] = other, own.evaluator(other, seeds)
    evaluator = own.evaluator(table, seeds)
    return compare(evaluator, table, own.noise(seeds), methods, rivals=rivals, curve=curve, unit=own.unit), tolerances


def tolerance_of(problem: str, kind: str, steps: int, make: Callable[[float], Method], seeds: int) -> float:
    """The largest tolerance of the ladder at which every tuning seed errs by less than `TUNED`, else the smallest."""
    own = family(problem)
    table, reference = _reference(problem, kind, steps, seeds)
    unit = own.unit or float(reference.double().std())
    for tolerance in LADDER[:-1]:
        try:
            found = sample(own.evaluator(table, TUNING[:seeds]), table, own.noise(TUNING[:seeds]), make(tolerance), check="off")
        except ValueError:  # the method does not fit; its row will say why
            break
        errors = (found.sample - reference).double().square().flatten(1).mean(1).sqrt() / unit
        if float(errors.max()) < TUNED:
            return tolerance
    return LADDER[-1]


@functools.cache
def _reference(problem: str, kind: str, steps: int, seeds: int) -> tuple[Table, Tensor]:
    """A chain, and its sequential samples of the tuning seeds."""
    own = family(problem)
    table = own.table(kind, steps)
    found = sample(own.evaluator(table, TUNING[:seeds]), table, own.noise(TUNING[:seeds]), sequential(), check="off")
    return table, found.sample


def rows_of(cell: Sequence[Any], comparison: Comparison, tolerances: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """The rows of a cell as the file has them."""
    head = dict(zip(CELL, cell, strict=True))
    for row in comparison.rows[1:]:
        yield {**head, "method": row.label, "tolerance": tolerances.get(row.label), **_numbers(row, comparison)}
    for label, reason in comparison.refused.items():
        yield {**head, "method": label, "tolerance": tolerances.get(label), "refused": reason}


def _numbers(row: Compared, comparison: Comparison) -> dict[str, Any]:
    return {
        "rival": row.rival,
        "rounds": row.rounds,
        "rounds_max": row.rounds_max,
        "evaluations": row.evaluations,
        "error_median": row.error_median,
        "error_max": row.error_max,
        "equal": row.error_max < EQUAL,
        "decibels": None if row.error_max == 0 else comparison.decibels(row.error_max),
        "gain": comparison.gain(row),
        "seconds": row.seconds,
        "effectivity": None if row.effectivity is None else row.effectivity.to_json(),
        "samples": [
            {
                "rounds": s.rounds,
                "evaluations": s.evaluations,
                "error": s.error,
                "estimated_error": None if row.rival else s.estimated_error,
            }
            for s in row.samples
        ],
    }

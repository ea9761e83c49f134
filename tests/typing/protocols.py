# SPDX-License-Identifier: Apache-2.0
"""Solvers, runs and methods, whole ones and broken ones, handed to the loop; read by pyright alone (test_protocols.py).

A line that ends in `wrong: TEXT` is to be reported with that text, and no other line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paradiff import Keyed, Method, Table, solve
from paradiff.solver import ErrorEstimate, Problem, Query, Record, Run, Solver, Status


class AskingSolver:
    """What all solvers here have."""

    sample: int = 0
    done: bool = False
    final: Tensor = torch.zeros(1)
    newest: Tensor = torch.zeros(1)
    error_estimate: ErrorEstimate

    def ask(self) -> Query: ...  # pyright: ignore[reportReturnType]


class WholeSolver(AskingSolver):
    def tell(self, query: Query, outputs: Tensor, states: Tensor | None = None) -> Tensor | None: ...
    def advance(self, norms: list[float], round: int) -> Record: ...  # pyright: ignore[reportReturnType]


class SolverWithoutAdvance(AskingSolver):
    def tell(self, query: Query, outputs: Tensor, states: Tensor | None = None) -> Tensor | None: ...


class SolverOfOtherTell(AskingSolver):
    def tell(self, outputs: Tensor) -> Tensor | None: ...
    def advance(self, norms: list[float], round: int) -> Record: ...  # pyright: ignore[reportReturnType]


class SolverOfOtherRecord(AskingSolver):
    def tell(self, query: Query, outputs: Tensor, states: Tensor | None = None) -> Tensor | None: ...
    def advance(self, norms: list[float], round: int) -> str: ...  # pyright: ignore[reportReturnType]


class EndingRun:
    """What all runs here have."""

    t: Tensor = torch.zeros(1)

    def status(self, estimates: Sequence[ErrorEstimate]) -> tuple[Status, str]: ...  # pyright: ignore[reportReturnType]
    def close(self) -> None: ...


class WholeRun(EndingRun):
    def solver(self, sample: int) -> WholeSolver: ...  # pyright: ignore[reportReturnType]


class RunOfBrokenSolvers(EndingRun):
    def solver(self, sample: int) -> SolverWithoutAdvance: ...  # pyright: ignore[reportReturnType]


class NamedMethod:
    """What all methods here have."""

    name: str = "named"
    tolerance: float = 0.0
    dense_output: bool = False
    solves_chain: bool = True
    follows_edits: bool = False

    def edges(self, table: Table) -> list[int]: ...  # pyright: ignore[reportReturnType]
    def reference(self) -> Method: ...  # pyright: ignore[reportReturnType]
    def width(self, table: Table) -> int: ...  # pyright: ignore[reportReturnType]
    def progress(self, table: Table) -> tuple[int, str]: ...  # pyright: ignore[reportReturnType]
    def in_loop(self, table: Table, least: float) -> Method: ...  # pyright: ignore[reportReturnType]


class WholeMethod(NamedMethod):
    def prepare(self, problem: Problem) -> WholeRun: ...  # pyright: ignore[reportReturnType]


class MethodOfBrokenRuns(NamedMethod):
    def prepare(self, problem: Problem) -> RunOfBrokenSolvers: ...  # pyright: ignore[reportReturnType]


class MethodOfOtherPrepare(NamedMethod):
    def prepare(self, problem: Problem, twice: bool) -> WholeRun: ...  # pyright: ignore[reportReturnType]


def takes(solver: Solver[Any]) -> None: ...


def runs(run: Run) -> None: ...


def handed(table: Table, noise: Keyed) -> None:
    takes(WholeSolver())
    takes(SolverWithoutAdvance())  # wrong: "advance" is not present
    takes(SolverOfOtherTell())  # wrong: "tell" is an incompatible type
    takes(SolverOfOtherRecord())  # wrong: "advance" is an incompatible type
    runs(WholeRun())
    runs(RunOfBrokenSolvers())  # wrong: "solver" is an incompatible type
    runs(EndingRun())  # wrong: "solver" is not present
    solve(table, noise, WholeMethod())
    solve(table, noise, MethodOfBrokenRuns())  # wrong: "prepare" is an incompatible type
    solve(table, noise, MethodOfOtherPrepare())  # wrong: "prepare" is an incompatible type
    solve(table, noise, NamedMethod())  # wrong: "prepare" is not present

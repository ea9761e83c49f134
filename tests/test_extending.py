# SPDX-License-Identifier: Apache-2.0
"""Extending, shown by doing it: a slope, a sampler, an evaluator, an observer and a method, each in one place, without a change
of the library, and each reaching the sequential sample. docs/extending.md shows the same code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from problems import SHAPE, TABLES, network
from torch import Tensor

import paradiff
from paradiff.chain.step import Step
from paradiff.solver import Batch, ErrorEstimate, Problem, Query, Round, Status, WindowRecord

TABLE = TABLES["ddpm"]


def walked(table: paradiff.Table = TABLE, samples: int = 2) -> Tensor:
    """The samples of the plain chain."""
    return solved(paradiff.sequential(), table, samples).sample


def solved(method: paradiff.Method, table: paradiff.Table = TABLE, samples: int = 2) -> paradiff.Solution:
    noise = paradiff.Keyed(SHAPE, seed=0, samples=samples)
    return paradiff.sample(network, table, noise, method, dtype=torch.float64)


# -- a slope: a function of the table ----------------------------------------------------------------------------------


def damped(table: paradiff.Table) -> Tensor:
    """The identity, a tenth smaller."""
    return 0.9 * paradiff.slopes.identity(table)


def test_a_slope_is_a_function() -> None:
    found = solved(paradiff.parasolver(slope=damped, tolerance=1e-9))
    assert found.status is Status.CONVERGED
    # The rule passes nodes at an estimated error of 1e-9; rounding in float64 is far below.
    torch.testing.assert_close(found.sample, walked(), rtol=0, atol=1e-8)


# -- a sampler: a function that returns a table ------------------------------------------------------------------------


def on_a_circle(steps: int) -> paradiff.Table:
    """DDIM on levels that lie on a circle; the network is asked for angles."""
    angle = torch.linspace(1.5, 0.05, steps + 1, dtype=torch.float64)
    alpha, sigma = angle.cos(), angle.sin()
    a = alpha[1:] / alpha[:-1]
    b = sigma[1:] - a * sigma[:-1]
    c = torch.zeros(steps, dtype=torch.float64)
    return paradiff.Table("circle", "epsilon", t=angle, alpha=alpha, sigma=sigma, a=a[:, None], b=b[:, None], c=c)


def test_a_sampler_is_a_function_that_returns_a_table() -> None:
    table = on_a_circle(16)
    found = solved(paradiff.quasi_newton(tolerance=1e-9), table)
    torch.testing.assert_close(found.sample, walked(table), rtol=0, atol=1e-8)


# -- an evaluator: an object with a device, a dtype and a call ---------------------------------------------------------


@dataclass
class Logged:
    """Evaluates rows with a model, and writes down what it cost.

    Attributes:
        model: A function of states and times.
        widths: Rows of each round so far.
    """

    model: object
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype | None = None
    widths: list[int] = field(default_factory=list)

    def __call__(self, batch: Batch) -> Tensor:
        """Outputs `[R, ...]` of a batch."""
        self.widths.append(len(batch.x))
        return self.model(batch.x, batch.t)  # pyright: ignore[reportCallIssue]


def test_an_evaluator_is_an_object_with_a_device_a_dtype_and_a_call() -> None:
    evaluator = Logged(network)
    noise = paradiff.Keyed(SHAPE, seed=0, samples=2)
    found = paradiff.sample(evaluator, TABLE, noise, paradiff.parasolver(tolerance=1e-9), dtype=torch.float64, check="off")
    assert (len(evaluator.widths), sum(evaluator.widths)) == (found.rounds, found.evaluations)
    torch.testing.assert_close(found.sample, walked(), rtol=0, atol=1e-8)


# -- an observer: a function of a round --------------------------------------------------------------------------------


@dataclass
class Progress:
    """Counts the nodes that became final, of all samples."""

    passed: int = 0

    def __call__(self, round: Round) -> None:
        """Adds what this round passed."""
        self.passed += sum(record.passed for record in round.records)


@dataclass
class AtMost:
    """Ends a run after a number of rounds."""

    rounds: int

    def __call__(self, round: Round) -> bool:
        """Whether that is reached."""
        return round.number >= self.rounds


def test_an_observer_shows_progress() -> None:
    progress = Progress()
    noise = paradiff.Keyed(SHAPE, seed=0, samples=2)
    method = paradiff.parasolver()
    found = paradiff.sample(network, TABLE, noise, method, observer=progress)
    nodes, unit = method.progress(TABLE)
    assert (progress.passed, unit) == (2 * nodes, "nodes")
    torch.testing.assert_close(found.sample, walked().float(), rtol=0, atol=4e-3)


def test_an_observer_ends_a_run() -> None:
    noise = paradiff.Keyed(SHAPE, seed=0, samples=2)
    found = paradiff.sample(network, TABLE, noise, paradiff.parasolver(), observer=AtMost(2))
    assert (found.status, found.rounds) == (Status.STOPPED, 2)
    assert all(math.isinf(e.estimated_error) for e in found.error_estimates)
    found = paradiff.sample(network, TABLE, noise, paradiff.parasolver(tolerance=0), observer=AtMost(1000))
    assert found.status is Status.EXACT
    torch.testing.assert_close(found.sample, walked().float(), rtol=0, atol=1e-5)  # rounding in float32


# -- a method: hyper-parameters, what samples share, one sample's iteration --------------------------------------------


@dataclass(frozen=True)
class Anderson:
    """Picard iteration over the whole chain, whose iterates are mixed.

    A sweep takes every node's step from the last states, r = Phi(x) - x. With the differences dX and dR of the last iterates
    and their residuals, the next iterate is

        x + r - (dX + dR) gamma,      gamma = argmin |r - dR gamma|                                                (1)

    The first node that is not final has a final predecessor. It takes its step as it is, so that each sweep makes at least one
    node final.

    Attributes:
        tolerance: Root mean square change at which a node passes, in the data's units.
        depth: Differences that are mixed; 0 for plain Picard iteration.
    """

    tolerance: float = 1e-3
    depth: int = 3
    name: str = "anderson"
    dense_output: bool = False
    solves_chain: bool = True
    follows_edits: bool = False

    def edges(self, table: paradiff.Table) -> list[int]:
        """Every node; for chains that read one step back."""
        if table.band > 1:
            raise ValueError(f"table {table.name!r} reads {table.band} steps back; anderson follows one")
        return list(range(table.steps + 1))

    def prepare(self, problem: Problem) -> AndersonRun:
        """The run on a problem."""
        self.edges(problem.table)
        return AndersonRun(self, problem)

    def reference(self) -> paradiff.Method:
        """The plain chain."""
        return paradiff.sequential()

    def width(self, table: paradiff.Table) -> int:
        """The whole chain."""
        return table.steps

    def progress(self, table: paradiff.Table) -> tuple[int, str]:
        """Nodes."""
        return table.steps, "nodes"

    def in_loop(self, table: paradiff.Table, least: float) -> Anderson:
        """A pipeline's first pass is at x[0] alone, which this does not do."""
        raise ValueError("anderson evaluates the whole chain in its first round; take parasolver for a pipeline")


class AndersonRun:
    """What all samples share: the steps of the chain."""

    def __init__(self, method: Anderson, problem: Problem) -> None:
        self.method, self.problem = method, problem
        self.step = Step(problem.table, problem.device, problem.dtype)
        self.t = self.step.t

    def solver(self, sample: int) -> AndersonSolver:
        """One sample's iteration."""
        return AndersonSolver(self, sample)

    def status(self, estimates: Sequence[ErrorEstimate]) -> tuple[Status, str]:
        """How the run ended."""
        status = Status.CONVERGED if self.method.tolerance else Status.EXACT
        return status, status.message(f"every node passed with a change of at most {self.method.tolerance:g}")

    def close(self) -> None:
        """Nothing is kept."""


class AndersonSolver:
    """One sample's iteration: asked for rows, told their outputs, advanced past the nodes that are final."""

    def __init__(self, run: AndersonRun, sample: int) -> None:
        problem, step = run.problem, run.step
        start, steps = problem.start_of(sample), problem.table.steps
        if start is None:
            start = problem.table.start_scale * problem.noise.start(sample)
        start = start.to(problem.device, problem.dtype)
        self.run, self.sample, self.first = run, sample, 0
        self.states = start.repeat(steps + 1, *[1] * start.ndim)
        self.noise = step.move(problem.noise.draw(sample, range(steps))) if problem.table.stochastic else None
        self.last: list[tuple[Tensor, Tensor]] = []  # iterates and residuals, [N, D], the newest last
        self.residual, self.rounds, self.rows = 0.0, 0, 0

    @property
    def done(self) -> bool:
        """Whether all nodes are final."""
        return self.first == len(self.states) - 1

    @property
    def final(self) -> Tensor:
        """The last node's state."""
        return self.states[-1]

    newest = final

    @property
    def error_estimate(self) -> ErrorEstimate:
        """The largest change that was passed stands for the error."""
        return ErrorEstimate(self.residual, self.residual, self.rounds, self.rows)

    def ask(self) -> Query:
        """All nodes from the first that is not final."""
        nodes = torch.arange(self.first, len(self.states) - 1)
        return Query(nodes, self.run.step.seen(nodes, self.states[nodes]))

    def tell(self, query: Query, outputs: Tensor, states: Tensor | None = None) -> Tensor:
        """The next iterate, equation (1); root mean square residuals."""
        at, before = query.nodes, self.states[self.first + 1 :]
        noise = None if self.noise is None else self.noise[at]
        outputs = self.run.problem.table.convert(at, self.states[at], outputs)
        after = self.run.step(at, [self.states[at]], [outputs], noise)
        residual = after - before
        # Nodes that became final since have left the front: of older iterates the rest is compared.
        self.last = [(x[-len(at) :], r[-len(at) :]) for x, r in self.last]
        self.last.append((before.clone(), residual))
        self.last = self.last[-self.run.method.depth - 1 :]
        mixed = after.clone()
        if len(self.last) > 1:
            x, r = (torch.stack(parts).flatten(1) for parts in zip(*self.last, strict=True))
            gamma = torch.linalg.lstsq(r.diff(dim=0).T, r[-1]).solution
            mixed -= ((x + r).diff(dim=0).T @ gamma).view_as(mixed)
        self.states[self.first + 1] = after[0]
        self.states[self.first + 2 :] = mixed[1:]
        return residual.flatten(1).square().mean(1).sqrt()

    def advance(self, norms: list[float], round: int) -> WindowRecord:
        """Passes the leading nodes that changed by the tolerance or less, and the one after the last final node."""
        passed = 1
        while passed < len(norms) and norms[passed] <= self.run.method.tolerance:
            passed += 1
        record = WindowRecord(round, self.sample, self.first, norms, passed)
        self.first += passed
        self.rounds, self.rows = self.rounds + 1, self.rows + len(norms)
        self.residual = max(self.residual, *norms[1:passed], 0.0)
        return record


@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim clipped", "flow_euler"])
@pytest.mark.parametrize("depth", [0, 3])
def test_a_method_of_ones_own_reaches_the_sequential_sample(name: str, depth: int) -> None:
    table = TABLES[name]
    exact = solved(Anderson(tolerance=0, depth=depth), table)
    assert exact.status is Status.EXACT
    assert exact.rounds <= table.steps
    # Every node took its step from a final state, and a sum of two products rounds as in the plain chain.
    torch.testing.assert_close(exact.sample, walked(table), rtol=0, atol=1e-12)
    found = solved(Anderson(tolerance=1e-4, depth=depth), table)
    assert isinstance(Anderson(), paradiff.Method)
    assert found.status is Status.CONVERGED
    # A node's change is no bound of the sample's error; on this chain it is within ten times.
    torch.testing.assert_close(found.sample, walked(table), rtol=0, atol=1e-3)


def test_mixing_saves_rounds() -> None:
    table = paradiff.samplers.ddim(paradiff.Schedule.linear(), 60)
    picard, mixed = (solved(Anderson(depth=depth), table, samples=1).rounds for depth in (0, 5))
    assert mixed < picard


def test_a_method_refuses_a_table_that_it_cannot_follow() -> None:
    with pytest.raises(ValueError, match="reads 2 steps back; anderson follows one"):
        solved(Anderson(), TABLES["dpmpp_2m"])

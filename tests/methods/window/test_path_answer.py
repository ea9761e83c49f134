# SPDX-License-Identifier: Apache-2.0
"""How nodes answer to errors is read off the path in narrow windows, and errors of undecided samples are counted by it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from problems import TABLES
from torch import Tensor

from paradiff import Method, Schedule, parasolver, quasi_newton, sample, sequential
from paradiff.chain.slope import gaussian_gain
from paradiff.chain.step import Step
from paradiff.methods import WindowMethod
from paradiff.methods.window.budget import ErrorBudget
from paradiff.methods.window.control import WindowControl
from paradiff.methods.window.path_answer import PathAnswer, on_a_path
from paradiff.methods.window.setup import WindowSetup
from paradiff.planning.harness import family
from paradiff.samplers import ddpm

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
TABLE = ddpm(Schedule.linear(), 50)


def path(members: tuple[int, ...], count: int, variance: float, lo: int) -> tuple[Tensor, Tensor]:
    """`[count, *members, 64]` states of some nodes that have nothing to do with each other, and outputs for Gaussian data."""
    x = torch.randn(count, *members, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = slice(lo, lo + count)
    gain, p, q = (
        v[at].view(-1, *[1] * (x.ndim - 1)) for v in (gaussian_gain(TABLE.alpha, TABLE.sigma, variance), TABLE.p, TABLE.q)
    )
    return x, (gain - p) * x / q


@pytest.mark.parametrize(("members", "shared"), [((), False), ((3,), True), ((3,), False)])
def test_a_node_answers_as_gaussian_data_do(members: tuple[int, ...], shared: bool) -> None:
    """The clean-data estimate changes by C w, C = v/(1 + v tau) of the later node, whatever the states. Sums over three nodes
    are between the smallest and the largest of them."""
    lo, count, v = 20, 6, 0.3
    answers = PathAnswer(Step(TABLE, torch.device("cpu"), torch.float64, shared), 100.0)(lo, *path(members, count, v, lo))
    assert answers.shape == (count, 3 if shared else 1)
    nodes = torch.arange(lo + 1, lo + count)
    alpha, sigma = TABLE.alpha[nodes], TABLE.sigma[nodes]
    covariance, evidence = v / (1 + v * (alpha / sigma) ** 2), alpha / sigma**2
    for k in range(count - 1):
        about = covariance[max(k - 1, 0) : k + 2]
        assert (
            float(about.min() * evidence[k]) * (1 - 1e-9)
            <= answers[k].min()
            <= answers[k].max()
            <= float(about.max() * evidence[k]) * (1 + 1e-9)
        )
    assert torch.equal(answers[-1], answers[-2])


@pytest.mark.parametrize(("bound", "expected"), [(1.0, 8 * math.sqrt(1.01)), (10.0, 10.1)])
def test_the_bound_holds_what_chance_says(bound: float, expected: float) -> None:
    """The noise lies almost across the change of the clean-data estimate, whose square is ten times their product."""
    lo, (one, two) = 20, torch.eye(64, dtype=torch.float64)[:2]
    evidence = (TABLE.alpha / TABLE.sigma**2)[lo : lo + 2, None]
    clean, x = torch.stack([torch.zeros_like(one), 0.1 * one + two]), torch.stack([torch.zeros_like(one), one]) / evidence
    p, q = (v[lo : lo + 2, None] for v in (TABLE.p, TABLE.q))
    found = PathAnswer(Step(TABLE, torch.device("cpu"), torch.float64), bound)(lo, x, (clean - p * x) / q)
    assert found.flatten().tolist() == pytest.approx([expected * float(evidence[1])] * 2)


def test_a_single_node_and_outputs_that_overflow() -> None:
    answer = PathAnswer(Step(TABLE, torch.device("cpu"), torch.float64), 2.0)
    x, m = path((), 2, 0.3, 20)
    assert answer(20, x[:1], m[:1]).tolist() == [[0.0]]
    budget = ErrorBudget([1.0] * 4, [1.0] * 5, WindowControl())
    budget.observe(0, [0.1] * 4)
    before = budget.cost_of(2)
    budget.observe(0, [0.1] * 4, [math.inf, math.nan, 0.5, 3.0])
    assert budget.cost_of(2) == before
    assert budget.cost_of(3) == before * 2
    assert budget.cost_of(4) == pytest.approx(before * 9)


@pytest.mark.parametrize("name", TABLES)
def test_it_is_looked_at_in_narrow_windows_of_paths(name: str) -> None:
    table = TABLES[name]
    found = [WindowSetup(table, parasolver(window=w), torch.device("cpu"), torch.float64).path for w in (4, None)]
    assert found[1] is None
    assert (found[0] is not None) == on_a_path(table)
    if not table.stochastic:
        assert not on_a_path(table)


def beyond_twice(name: str, chain: str, steps: int, seeds: list[int], method: Method) -> int:
    """How many samples of a family err by more than twice their estimate."""
    own = family(name)
    table = own.table(chain, steps)
    network = own.evaluator(table, seeds)
    found = sample(network, table, own.noise(seeds), method)
    off = found.sample - sample(network, table, own.noise(seeds), sequential()).sample
    errors = off.flatten(1).square().mean(1).sqrt().tolist()
    return sum(e > 2 * t.estimated_error for e, t in zip(errors, found.error_estimates, strict=True))


@pytest.mark.parametrize(
    ("name", "chain", "steps", "seeds", "method"),
    [
        ("mixture-512", "ddpm", 100, [4002, 20083, 20119], parasolver(window=4)),
        ("digits", "euler_ancestral", 50, [4001, 23180, 23185], quasi_newton(window=4)),
    ],
    ids=["undecided", "decided later"],
)
def test_early_errors_are_counted_in_narrow_windows(
    name: str, chain: str, steps: int, seeds: list[int], method: WindowMethod
) -> None:
    """Samples that are undecided for long, nearly all of whose first ten windows pass as a whole, and samples of a trained
    network that answer to errors of early nodes twenty- to sixtyfold. Where the levels are believed, all are silently wrong."""
    blind = dataclasses.replace(method, control=WindowControl(narrow=0))
    assert beyond_twice(name, chain, steps, seeds, method) == 0
    assert beyond_twice(name, chain, steps, seeds, blind) == 3

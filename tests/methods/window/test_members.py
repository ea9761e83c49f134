# SPDX-License-Identifier: Apache-2.0
"""Members of a shared window have budgets of their own: a node passes once those of all let it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from problems import Stacked, gap, network
from torch import Tensor

from paradiff import Keyed, Schedule, Table, parasolver, quasi_newton, sample, solve
from paradiff.chain import Noise
from paradiff.methods import WindowMethod
from paradiff.methods.window.control import WindowControl
from paradiff.methods.window.members import Members
from paradiff.methods.window.setup import WindowSetup
from paradiff.planning.harness import family
from paradiff.samplers import ddim, ddpm
from paradiff.solver import Solution, drive

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
TABLE, SHAPE = ddim(Schedule.linear(), 40), (3, 2)
METHODS = [parasolver(tolerance=1e-3), parasolver(8, 1e-3), quasi_newton(tolerance=1e-3)]


def stiff(x: Tensor, t: Tensor) -> Tensor:
    """A network that needs many rounds, and for some samples more than for others."""
    return 2 * network(3 * x, t)


def together(model: Callable[[Tensor, Tensor], Tensor], noise: Noise, method: WindowMethod, table: Table = TABLE) -> Solution:
    """Two samples in one window."""
    solver = solve(table, noise, method, dtype=torch.float64, shared_window=True)
    return drive(solver, lambda batch: torch.stack([model(batch.x[:, k], batch.t) for k in range(2)], dim=1))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_shared_window_takes_no_fewer_rounds_than_the_slower_sample_alone(method: WindowMethod) -> None:
    """Some of these are seen to have small data, and are held to less: by the scale of the larger ones, windows of both take up
    to three rounds fewer."""
    for seed in range(6):
        alone = sample(stiff, TABLE, Keyed(SHAPE, seed, 2), method, dtype=torch.float64)
        found = together(stiff, Stacked(Keyed(SHAPE, seed, 2)), method)
        slowest = max(estimate.rounds for estimate in alone.error_estimates)
        assert slowest <= found.rounds <= slowest + 1


class Twice(Stacked):
    """One sample's noises, for two members."""

    def start(self, sample: int) -> Tensor:
        return torch.stack([self.noise.start(0)] * 2)

    def draw(self, sample: int, nodes: range) -> Tensor:
        return torch.stack([self.noise.draw(0, nodes)] * 2, dim=1)


@pytest.mark.parametrize("name", ["mixture-2", "mixture-64"])
@pytest.mark.parametrize("method", [parasolver(), parasolver(6), quasi_newton(), quasi_newton(6)], ids=str)
def test_members_that_are_alike_are_told_what_one_alone_is(method: WindowMethod, name: str) -> None:
    for table in (TABLE, ddpm(Schedule.linear(), 40)):
        own = family(name)
        model, noise = own.denoiser(table), Keyed(own.shape, 5, 1)
        alone = sample(model, table, noise, method, dtype=torch.float64, check="off")
        found = together(model, Twice(Keyed(own.shape, 5, 2)), method, table)
        assert (found.rounds, found.error_estimates[0].rounds) == (alone.rounds, alone.rounds)
        # Products of other sizes are summed in other orders.
        assert found.estimated_error == pytest.approx(alone.estimated_error, rel=1e-6)
        assert gap(found.sample[0, 0], alone.sample[0]) < 1e-6


def swept(members: Members, rows: list[list[float]], lo: int) -> int:
    """How many nodes pass after changes of each member, none of which was seen to answer."""
    return members.judge(lo, rows, rows, [[] for _ in rows], [1] * len(rows[0]), [[] for _ in rows])


def test_a_node_passes_once_all_budgets_let_it_and_the_worst_is_told() -> None:
    """The first member changes most, and its sweeps contract by 1/50; the second's do not contract at all. One contraction, of
    the largest changes at each node, would be 1/10."""
    method = dataclasses.replace(parasolver(tolerance=1e-2), control=WindowControl(forgetting=0.0))
    setup, lo = WindowSetup(TABLE, method, torch.device("cpu"), torch.float64), 20
    first = [[1.0] * 4, [0.1] * 4]
    errors = [sum(setup.slope_error[lo + 1 : lo + 1 + k]) for k in (1, 2, 3)]
    second = [[0.02 * e for e in errors], [0.1 * e for e in errors]]
    both, each, one = Members(setup, 2), [Members(setup, 1), Members(setup, 1)], Members(setup, 1)
    for rows, expected in ((first, [1, 1, 1, 1]), (second, [1, 3, 1, 2])):
        largest = [max(pair) for pair in zip(*rows, strict=True)]
        found = [
            swept(both, rows, lo),
            *(swept(m, [row], lo) for m, row in zip(each, rows, strict=True)),
            swept(one, [largest], lo),
        ]
        assert found == expected
        lo += 1
    assert both.last_errors[1] == each[1].last_errors[0]

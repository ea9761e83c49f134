# SPDX-License-Identifier: Apache-2.0
"""Nodes pass by the contraction that was seen at the window's front, which that of its far end says too little of."""

from __future__ import annotations

import itertools

import pytest

from paradiff import parasolver, sample, sequential
from paradiff.methods.window.budget import ErrorBudget
from paradiff.methods.window.control import WindowControl
from paradiff.planning.harness import family

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
ERRORS = [1.0, 0.5, 0.5, 0.25, 0.25, 0.25]


def observed() -> ErrorBudget:
    """A budget after two sweeps, whose first node passed in the first."""
    budget = ErrorBudget(ERRORS, [1.0] * 7, WindowControl())
    budget.observe(0, [0.4, 0.2, 0.1, 10.0, 1.0])
    budget.accept(1)
    assert budget._predicted == pytest.approx([0.2, 0.3, 0.325, 2.825])
    budget.observe(1, [0.18, 0.12, 0.08, 0.1, 0.4])
    return budget


def test_a_node_counts_by_the_contraction_of_those_up_to_it() -> None:
    budget = observed()
    assert budget.theta == pytest.approx(0.7 * 0.5)
    second = ((0.18**2 + 0.12**2) / (0.2**2 + 0.3**2)) ** 0.5
    third = ((0.18**2 + 0.12**2 + 0.08**2) / (0.2**2 + 0.3**2 + 0.325**2)) ** 0.5
    sums = list(itertools.accumulate(h * d for h, d in zip(ERRORS[2:], (0.18, 0.12, 0.08, 0.1), strict=True)))
    # Up to the fourth node it is 0.09, where 0.35 is remembered of all; the fifth has entered since, and counts by that of all.
    factors = [second, third, 0.35, 0.35]
    assert [budget.cost_of(k) for k in (2, 3, 4, 5)] == pytest.approx([f * s for f, s in zip(factors, sums, strict=True)])


def test_what_a_node_passed_with_is_kept_by_the_same_contraction() -> None:
    budget = observed()
    cost = budget.cost_of(2)
    budget.accept(2)
    assert budget.used == budget.last_error == cost
    budget.recount([3.0] * 7, 0.0, 1.0)
    assert budget.used == pytest.approx(3 * cost)


@pytest.mark.parametrize(("size", "chain", "steps"), [(2, "euler_ancestral", 10), (64, "ddpm", 10)])
def test_samples_of_short_chains_keep_to_their_estimates(size: int, chain: str, steps: int) -> None:
    """By the contraction of all nodes alone 16 and 15 of these 24 samples err by more than is told."""
    own, seeds = family(f"mixture-{size}"), range(31000, 31024)
    table = own.table(chain, steps)
    network = own.evaluator(table, seeds)
    wanted = sample(network, table, own.noise(seeds), sequential(), check="off").sample
    found = sample(network, table, own.noise(seeds), parasolver(), check="off")
    errors = (found.sample - wanted).square().mean(1).sqrt().tolist()
    told = [estimate.estimated_error for estimate in found.error_estimates]
    # Cautions are made for 95 of 100.
    assert sum(error > estimate for error, estimate in zip(errors, told, strict=True)) <= 1
    assert found.rounds <= steps

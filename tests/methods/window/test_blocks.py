# SPDX-License-Identifier: Apache-2.0
"""methods/window/blocks.py: edges of blocks balanced in log(alpha/sigma) on tables that are not, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import STEPS, TABLES

from paradiff import Schedule, Table
from paradiff.methods import Blocks
from paradiff.samplers import ddim, exponential_integrator, log_snr_grid, ornstein_uhlenbeck

each_table = pytest.mark.parametrize("name", TABLES)


def log_snr(table: Table) -> np.ndarray:
    """log(alpha/sigma) of the nodes, infinite at the ends where one of them is 0."""
    with np.errstate(divide="ignore"):
        return np.log(table.alpha.numpy()) - np.log(table.sigma.numpy())


def is_balanced(table: Table, edges: list[int]) -> bool:
    """Whether each inner edge is as near to its equal share of the finite log(alpha/sigma) as any node that leaves a step to
    every block: beyond the edge before, and with enough nodes after it."""
    level, count = log_snr(table), len(edges) - 1
    finite = level[np.isfinite(level)]
    for k in range(1, count):
        wanted = finite[0] + (finite[-1] - finite[0]) * k / count
        allowed = range(edges[k - 1] + 1, table.steps - (count - k) + 1)
        if not abs(level[edges[k]] - wanted) <= min(abs(level[node] - wanted) for node in allowed) + 1e-12:
            return False
    return True


@each_table
@pytest.mark.parametrize("count", range(1, STEPS))
def test_blocks_are_balanced_on_every_table(name: str, count: int) -> None:
    table = TABLES[name]
    count = min(count, table.steps)
    edges = Blocks(count).edges(table)
    assert (edges[0], edges[-1], len(edges)) == (0, table.steps, count + 1)
    assert all(a < b for a, b in itertools.pairwise(edges))
    assert is_balanced(table, edges)


@each_table
def test_as_many_blocks_as_steps_are_single_steps(name: str) -> None:
    table = TABLES[name]
    assert Blocks(table.steps).edges(table) == list(range(table.steps + 1))
    with pytest.raises(ValueError, match=rf"{table.steps + 1} blocks were asked of .* {table.steps} steps; .* give at most"):
        Blocks(table.steps + 1).edges(table)


def test_balance_is_not_that_of_node_counts() -> None:
    # Equal numbers of nodes, or one edge moved by a node, fail the check above.
    table = ddim(Schedule.linear(), 60)
    edges = Blocks(4).edges(table)
    assert is_balanced(table, edges)
    assert not is_balanced(table, [0, 15, 30, 45, 60])
    for place in (1, 2, 3):
        for shift in (-1, 1):
            moved = list(edges)
            moved[place] += shift
            assert not is_balanced(table, moved)
    level = log_snr(table)[[edges[0], *edges[1:-1], -2]]  # the last node has no finite level
    largest = np.diff(log_snr(table)[:-1]).max()
    assert np.diff(level) == pytest.approx(np.full(4, (level[-1] - level[0]) / 4), abs=largest)


def test_equal_log_snr_steps_give_equal_blocks() -> None:
    table = exponential_integrator(ornstein_uhlenbeck(), log_snr_grid(6.0, 1e-3, 3, 8))
    assert Blocks(3).edges(table) == [0, 8, 16, 24]
    assert Blocks(8).edges(table) == list(range(0, 25, 3))


def test_a_table_from_pure_noise_to_clean_data_in_one_step() -> None:
    # Neither of its nodes has a finite log(alpha/sigma).
    table = ddim(Schedule.linear(rescale_zero_snr=True), 1, spacing="trailing", prediction="v")
    assert (float(table.alpha[0]), float(table.sigma[1])) == (0, 0)
    assert Blocks(1).edges(table) == [0, 1]
    two = ddim(Schedule.linear(rescale_zero_snr=True), 2, spacing="trailing", prediction="v")
    assert Blocks(2).edges(two) == [0, 1, 2]


@pytest.mark.parametrize("edges", [[0, STEPS], [0, 5, STEPS], (0, 1, 2, STEPS), list(range(STEPS + 1))])
def test_given_edges_are_kept(edges: list[int]) -> None:
    found = Blocks(edges, stagger=2, carry=False).edges(TABLES["ddim"])
    assert found == list(edges)
    assert isinstance(found, list)


def test_a_block_needs_only_the_levels_of_a_table() -> None:
    table, other = TABLES["ddim"], ddim(Schedule.linear(), STEPS, prediction="v")
    assert torch.equal(table.alpha, other.alpha)
    for count in (2, 3, 5):
        assert Blocks(count).edges(table) == Blocks(count).edges(other)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Blocks(0), "0 blocks were asked for; give at least 1, or the nodes of their edges"),
        (lambda: Blocks(-3), "-3 blocks were asked for; give at least 1"),
        (lambda: Blocks([0]), r"the block edges are \[0\]; they must rise from 0 to the last node"),
        (lambda: Blocks([]), r"the block edges are \[\]; they must rise from 0 to the last node"),
        (lambda: Blocks([1, 4, 12]), r"the block edges are \[1, 4, 12\]; they must rise from 0"),
        (lambda: Blocks([0, 4, 4, 12]), r"the block edges are \[0, 4, 4, 12\]; .* so that no block is shorter than a step"),
        (lambda: Blocks([0, 7, 4, 12]), r"the block edges are \[0, 7, 4, 12\]; they must rise from 0"),
        (
            lambda: Blocks(3, stagger=0),
            "the stagger is 0; it must be a whole number, at least 1 sweep, or None for blocks in turn",
        ),
        (lambda: Blocks(3, stagger=-1), "the stagger is -1; it must be a whole number, at least 1"),
        (lambda: Blocks(3, carry=False), "carry is False without a stagger; blocks in turn have no neighbour to carry to"),
        (lambda: Blocks([0, 4, 11]).edges(TABLES["ddim"]), "the last block edge is 11; the chain ends at node 12"),
        (lambda: Blocks([0, 4, 13]).edges(TABLES["ddim"]), "the last block edge is 13; the chain ends at node 12"),
        (lambda: Blocks(13).edges(TABLES["ddim"]), "13 blocks were asked of a chain of 12 steps; .* give at most 12"),
    ],
)
def test_every_error_says_what_was_given_and_what_was_expected(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)

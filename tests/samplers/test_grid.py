# SPDX-License-Identifier: Apache-2.0
"""samplers/grid.py against the rules written out here: which levels, which edges, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from paradiff.samplers import Grid, log_snr_grid, paper_grid, uniform_grid

MAKERS: dict[str, Callable[..., Grid]] = {"uniform": uniform_grid, "log_snr": log_snr_grid}


def lengths(grid: Grid) -> list[int]:
    return [b - a for a, b in itertools.pairwise(grid.edges)]


def log_snr(u: float) -> float:
    """log(alpha/sigma) with alpha^2 = e^(-u)."""
    return math.log(math.exp(-u / 2) / math.sqrt(1 - math.exp(-u)))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize(("blocks", "steps"), [(1, 1), (1, 7), (5, 1), (4, 6)])
def test_equal_blocks_of_equal_steps(name: str, clean: bool, blocks: int, steps: int) -> None:
    grid = MAKERS[name](6.0, 0.01, blocks, steps, clean=clean)
    assert (float(grid.u[0]), float(grid.u[blocks * steps])) == (6.0, 0.01)
    assert (grid.steps, grid.blocks, grid.u.dtype) == (blocks * steps + clean, blocks, torch.float64)
    assert lengths(grid) == [steps] * (blocks - 1) + [steps + clean]
    assert grid.longest == steps + clean
    assert not clean or grid.u[-1] == 0
    measure = float if name == "uniform" else log_snr
    places = [measure(level) for level in grid.u[: blocks * steps + 1].tolist()]
    wanted = (places[-1] - places[0]) / (blocks * steps)
    # Float64; the logarithm of a difference from 1 of 1e-2 loses two digits.
    assert [b - a for a, b in itertools.pairwise(places)] == pytest.approx([wanted] * (blocks * steps), rel=1e-11)


def test_the_two_spacings_differ() -> None:
    assert (uniform_grid(6.0, 0.01, 2, 4).u - log_snr_grid(6.0, 0.01, 2, 4).u).abs().max() > 1


@pytest.mark.parametrize("blocks", [1, 2, 5])
@pytest.mark.parametrize(
    ("step", "length"),
    [(0.3, 1.0), (0.07, 1.0), (0.02, 1.0), (1.0, 1.0), (0.1, 0.4), (0.07, 0.4), (0.4, 0.4), (0.3, 2.5), (1.0, 2.5)],
)
@pytest.mark.parametrize("stop", [0.1, 1e-3])
@pytest.mark.parametrize("clean", [False, True])
def test_paper_grid(blocks: int, step: float, length: float, stop: float, clean: bool) -> None:
    grid = paper_grid(blocks, step, stop, length=length, clean=clean)
    inner = math.ceil(length / step - 1e-9)
    u = grid.u[: grid.steps + 1 - clean]
    assert (grid.blocks, float(u[-1]), bool(grid.u[-1] == 0)) == (blocks, stop, clean)
    assert float(u[0]) == pytest.approx(blocks * length, rel=1e-15)
    assert grid.longest == max(lengths(grid))

    early = u[: (blocks - 1) * inner + 1]
    assert lengths(grid)[:-1] == [inner] * (blocks - 1)
    assert (early[:-1] - early[1:]).tolist() == pytest.approx([length / inner] * ((blocks - 1) * inner), rel=1e-12)
    assert length / inner <= step * (1 + 1e-12)

    last = u[grid.edges[-2] :].tolist()
    assert last[0] == pytest.approx(length, rel=1e-12)
    bounds = [step * min(1.0, after) for after in last[1:]]
    taken = [before - after for before, after in itertools.pairwise(last)]
    assert all(got <= bound * (1 + 1e-9) for got, bound in zip(taken, bounds, strict=True))
    # No step but the one that ends at eta, and the one that crosses level 1, is shorter than it must be.
    slack = [n for n, (got, bound) in enumerate(zip(taken, bounds, strict=True)) if got < bound * (1 - 1e-9)]
    assert all(n == len(taken) - 1 or last[n] > 1 > last[n + 1] for n in slack)
    if length <= 1:
        assert len(taken) == math.ceil(math.log(length / stop) / math.log1p(step) - 1e-9)
        levels = [length / (1 + step) ** n for n in range(len(taken))]
        assert last[:-1] == pytest.approx(levels, rel=1e-12)


def test_paper_grid_by_hand() -> None:
    grid = paper_grid(2, 0.5, 0.25, clean=True)
    assert grid.u.tolist() == pytest.approx([2, 1.5, 1, 1 / 1.5, 1 / 2.25, 1 / 3.375, 0.25, 0], rel=1e-15)
    assert grid.edges == [0, 2, 7]
    assert (grid.steps, grid.blocks, grid.longest) == (7, 2, 5)


@pytest.mark.parametrize("step", [0.5, 0.3, 0.1, 0.07])
def test_a_stop_that_is_a_level_is_not_reached_twice(step: float) -> None:
    """Levels found by repeated division miss the power by a rounding, on either side; no step makes that up."""
    for n in range(1, 30):
        grid = paper_grid(1, step, 1 / (1 + step) ** n)
        assert grid.u.tolist() == pytest.approx([(1 + step) ** -k for k in range(n + 1)], rel=1e-13)
        assert (float(grid.u[-1]), grid.longest) == (1 / (1 + step) ** n, n)


def test_a_grid_of_ones_own() -> None:
    grid = Grid(torch.tensor([torch.inf, 3.0, 1.0, 0.5, 0.0], dtype=torch.float32), (0, 3, 4))
    assert (grid.steps, grid.blocks, grid.longest, grid.edges) == (4, 2, 3, [0, 3, 4])
    assert grid.u.dtype == torch.float64


# -- errors ------------------------------------------------------------------------------------------------------------

U = torch.tensor([3.0, 2.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uniform_grid(2, 0, 1, 4), "the early stop eta is 0; it must lie above 0 and below T = 2"),
        (lambda: uniform_grid(2, -0.1, 1, 4), "the early stop eta is -0.1; it must lie above 0"),
        (lambda: uniform_grid(2, 2, 1, 4), "the early stop eta is 2; it must lie above 0 and below T = 2"),
        (lambda: uniform_grid(2, math.nan, 1, 4), "the early stop eta is nan; it must lie above 0"),
        (lambda: uniform_grid(2, 0.1, 0, 4), "blocks is 0; a grid needs at least 1"),
        (lambda: uniform_grid(2, 0.1, 1, 0), "steps is 0; a grid needs at least 1"),
        (lambda: uniform_grid(math.inf, 0.1, 1, 4), "the grid begins at u = T = inf; it must be positive and finite"),
        (lambda: uniform_grid(-1, 0.1, 1, 4), "the grid begins at u = T = -1; it must be positive and finite"),
        (lambda: log_snr_grid(2, 0, 1, 4), "the early stop eta is 0; it must lie above 0 and below T = 2"),
        (lambda: log_snr_grid(2, 3, 1, 4), "the early stop eta is 3; it must lie above 0 and below T = 2"),
        (lambda: log_snr_grid(2, 0.1, 0, 4), "blocks is 0; a grid needs at least 1"),
        (lambda: log_snr_grid(2, 0.1, 3, -2), "steps is -2; a grid needs at least 1"),
        (lambda: paper_grid(0, 0.1, 0.01), "blocks is 0; a grid needs at least 1"),
        (lambda: paper_grid(2, 0.1, 0), "the early stop eta is 0; it must lie above 0"),
        (lambda: paper_grid(2, 0.1, 2.0), "the early stop eta is 2.0; it must lie above 0 and below T = 2"),
        (lambda: paper_grid(2, 0.1, 1.0), r"the early stop eta is 1.0; it must lie below the length h = 1.0 of the last"),
        (lambda: paper_grid(2, 0.5, 0.01, length=0.4), "the step epsilon is 0.5 and a block's length h is 0.4; a block must"),
        (lambda: paper_grid(2, 0.0, 0.01), "the step epsilon is 0.0 .* a block must hold at least one step"),
        (lambda: paper_grid(2, -0.1, 0.01), "the step epsilon is -0.1 .* a block must hold at least one step"),
        (lambda: paper_grid(2, 0.1, 0.01, length=-1), "the grid begins at u = T = -2; it must be positive and finite"),
        (lambda: Grid(torch.tensor([1.0]), [0]), r"the grid has levels of shape \(1,\); it needs a row of at least two"),
        (lambda: Grid(U[None], [0, 3]), r"the grid has levels of shape \(1, 4\); it needs a row of at least two that fall"),
        (lambda: Grid(U.flip(0), [0, 3]), r"levels of shape \(4,\); it needs a row of at least two that fall from T to 0"),
        (lambda: Grid(U[[0, 1, 1, 2]], [0, 3]), "at least two that fall from T to 0 or more"),
        (lambda: Grid(U - 0.6, [0, 3]), "at least two that fall from T to 0 or more"),
        (lambda: Grid(torch.tensor([2.0, torch.nan, 1.0]), [0, 2]), "at least two that fall from T to 0 or more"),
        (lambda: Grid(U, [0, 2]), r"the block edges are \[0, 2\]; they must rise from 0 to the last node, 3"),
        (lambda: Grid(U, [1, 3]), r"the block edges are \[1, 3\]; they must rise from 0 to the last node, 3"),
        (lambda: Grid(U, [0, 2, 2, 3]), r"the block edges are \[0, 2, 2, 3\]; they must rise from 0 to the last node, 3"),
        (lambda: Grid(U, [0, 2, 1, 3]), r"the block edges are \[0, 2, 1, 3\]; they must rise from 0 to the last node, 3"),
        (lambda: Grid(U, [0]), r"the block edges are \[0\]; they must rise from 0 to the last node, 3"),
    ],
)
def test_every_error_says_what_was_given_and_what_was_expected(make: Callable[[], Grid], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)

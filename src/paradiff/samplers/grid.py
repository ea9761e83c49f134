# SPDX-License-Identifier: Apache-2.0
"""Grids: the noise levels u that a chain in Ornstein-Uhlenbeck coordinates visits, and the blocks that they fall into.

Levels fall from T to the early stop eta > 0 (process.py defines u). Three ways to space them:

- `uniform_grid`: equal steps in u, the process's own time.
- `paper_grid`: blocks of length h and steps epsilon; in the last block, which ends at eta, steps shrink in proportion to the
  level that they reach (Chen, Ren, Ying and Rotskoff, arXiv 2405.15986, assumptions of theorems 3.3 and 3.5).
- `log_snr_grid`: equal steps in log(alpha/sigma), which balances the work of blocks.

A chain that stops at eta returns a sample with noise of variance 1 - e^(-eta), squared Wasserstein error about d eta;
`clean=True` appends the level 0, reached by a last step on to the clean-data estimate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.errors import are_whole, is_real, is_whole, number_of, require_truth, shown

MOST_STEPS = 10**6
"""Steps that a grid may have."""

HIGHEST = 700.0
"""Largest level u: there e^(-u/2) is 1e-152, and e^u is still a number."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Levels and blocks. Grids are compared by identity.

    Attributes:
        u: `[N+1]` levels, falling, float64; the first may be infinite (pure noise), the last is above 0 or 0.
        edges: The nodes at which blocks begin and end, 0 and N included.

    Raises:
        ValueError: If the levels do not fall from above 0 to 0 or more, or the edges do not rise from 0 to N.
    """

    u: Tensor
    edges: Sequence[int]

    def __post_init__(self) -> None:
        try:
            u = torch.as_tensor(self.u, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"the grid's levels are {shown(self.u)}; give a row of at least two numbers") from error
        object.__setattr__(self, "u", u)
        edges = self.edges.tolist() if isinstance(self.edges, Tensor) else self.edges
        if not are_whole(edges):
            raise ValueError(f"the block edges are {shown(self.edges)}; give a sequence of whole numbers that rise from 0")
        object.__setattr__(self, "edges", [int(edge) for edge in edges])
        if u.ndim != 1 or len(u) < 2 or not (u[1:] < u[:-1]).all() or u[-1] < 0:
            raise ValueError(
                f"the grid has levels of shape {tuple(u.shape)}; it needs a row of at least two that fall from T to 0 or more"
            )
        edges = self.edges
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != len(u) - 1 or any(b <= a for a, b in itertools.pairwise(edges)):
            raise ValueError(f"the block edges are {edges}; they must rise from 0 to the last node, {len(u) - 1}")

    @property
    def steps(self) -> int:
        """N, the number of steps."""
        return len(self.u) - 1

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return len(self.edges) - 1

    @property
    def longest(self) -> int:
        """M, the number of steps in the longest block: the states that a solver holds."""
        return max(b - a for a, b in itertools.pairwise(self.edges))


def _check_range(start: float, stop: float, clean: bool, **counts: int) -> None:
    for name, count in counts.items():
        if not is_whole(count):
            raise ValueError(f"{name} is {shown(count)}; it must be a whole number")
        if not 1 <= count <= MOST_STEPS:
            raise ValueError(f"{name} is {shown(count)}; a grid needs at least 1, and has {MOST_STEPS} at most")
    _check_size(math.prod(map(int, counts.values())))
    require_truth("clean", clean)
    if not 0 < number_of(start) < math.inf:
        raise ValueError(f"the grid begins at u = T = {shown(start)}; it must be positive and finite")
    if start > HIGHEST:
        raise ValueError(f"the grid begins at u = T = {shown(start)}; give at most {HIGHEST:g}, where a state holds no data")
    if not 0 < number_of(stop) < float(start):
        raise ValueError(
            f"the early stop eta is {shown(stop)}; it must lie above 0 and below T = {start}, as the score has no bound at 0 "
            "(for a clean end ask for clean=True)"
        )


def _check_size(steps: float) -> None:
    if steps > MOST_STEPS:
        raise ValueError(f"the grid would have {steps:g} steps; it may have {MOST_STEPS} at most")


def _ended(u: Tensor, edges: list[int], clean: bool) -> Grid:
    if not clean:
        return Grid(u, edges)
    return Grid(torch.cat([u, torch.zeros(1, dtype=torch.float64)]), [*edges[:-1], edges[-1] + 1])


@made_at_home
def uniform_grid(start: float, stop: float, blocks: int, steps: int, *, clean: bool = False) -> Grid:
    """Equal steps in u from `start` to `stop`.

    Args:
        start: T.
        stop: eta.
        blocks: Number of blocks.
        steps: Steps in a block.
        clean: Whether a last step lands on the clean-data estimate.

    Raises:
        ValueError: If eta is not in (0, T), or a count is below 1.
    """
    _check_range(start, stop, clean, blocks=blocks, steps=steps)
    u = torch.linspace(float(start), float(stop), blocks * steps + 1, dtype=torch.float64)
    return _ended(u, list(range(0, blocks * steps + 1, steps)), clean)


@made_at_home
def log_snr_grid(start: float, stop: float, blocks: int, steps: int, *, clean: bool = False) -> Grid:
    """Equal steps in log(alpha/sigma) from `start` to `stop`; arguments and errors as of `uniform_grid`."""
    _check_range(start, stop, clean, blocks=blocks, steps=steps)
    first, last = (math.log(math.expm1(level)) for level in (start, stop))
    u = torch.linspace(first, last, blocks * steps + 1, dtype=torch.float64).exp().log1p()
    u[0], u[-1] = float(start), float(stop)
    return _ended(u, list(range(0, blocks * steps + 1, steps)), clean)


@made_at_home
def paper_grid(blocks: int, step: float, stop: float, *, length: float = 1.0, clean: bool = False) -> Grid:
    """Blocks of length h and equal steps epsilon, from u = T = N h; in the last block the step from the level r to r' is at
    most epsilon min(1, r') (arXiv 2405.15986, section 3.1), so that with h <= 1 it has about ln(h/eta)/ln(1 + epsilon) steps.

    Args:
        blocks: N.
        step: epsilon; made a little smaller where it does not divide h.
        stop: eta.
        length: h.
        clean: Whether a last step lands on the clean-data estimate.

    Raises:
        ValueError: If eta is not in (0, h), a block is shorter than a step, or a number is out of range.
    """
    if not math.isfinite(number_of(length)):
        raise ValueError(f"the length h of a block is {shown(length)}; it must be a number, positive, and finite")
    _check_range(blocks * length if is_whole(blocks) and 1 <= blocks <= MOST_STEPS else length, stop, clean, blocks=blocks)
    if not is_real(step) or not 0 < step <= length:
        raise ValueError(
            f"the step epsilon is {shown(step)} and a block's length h is {length}; a block must hold at least one step"
        )
    if stop >= length:
        raise ValueError(f"the early stop eta is {stop}; it must lie below the length h = {length} of the last block")
    _check_size(blocks * length / step + math.log(length / stop) / math.log1p(step))
    count = math.ceil(length / step - 1e-9)
    u = torch.linspace(float(blocks * length), float(length), (blocks - 1) * count + 1, dtype=torch.float64)
    levels = [length]
    while levels[-1] > stop:
        r = levels[-1]
        levels.append(max(r - step if r - step >= 1 else r / (1 + step), stop))
    if len(levels) > 2 and levels[-2] - stop < 1e-9 * stop:
        del levels[-2]
    u = torch.cat([u, torch.tensor(levels[1:], dtype=torch.float64)])
    edges = [*range(0, (blocks - 1) * count + 1, count), len(u) - 1]
    return _ended(u, edges, clean)

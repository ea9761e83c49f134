# SPDX-License-Identifier: Apache-2.0
"""The update of all nodes of a window after a sweep: equation (2) of solver.py, by the slope alone or corrected by secants."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from paradiff.methods.secant import LastPair, Reach, Secants
from paradiff.methods.window.setup import WindowSetup

STRETCH = 64  # nodes updated by one matrix product
PAIRED = 96  # nodes updated by one solution of the pairs' triangular system, whose cost grows with its square


class Update(Protocol):
    """One sample's update."""

    def observe(self, states: Tensor, outputs: Tensor) -> None:
        """Takes a sweep's states `[W, ...]` and outputs, from the window's first node on."""
        ...

    def __call__(self, lo: int, hi: int, phi: Tensor, old: Tensor) -> Tensor:
        """`[W, ...]` the new states of the nodes after the first.

        Args:
            lo: The window's first sub-interval.
            hi: The sub-interval after its last.
            phi: `[W, ...]` the steps from the nodes of the window.
            old: `[W, ...]` the states of the nodes after the first.
        """
        ...

    def distance(self, new: Tensor, phi: Tensor, old: Tensor) -> Tensor:
        """`[W, ...]` how far each node was from the solution, by the estimate that its change is judged by."""
        ...

    def advance(self, passed: int) -> None:
        """The window slides by `passed` nodes."""
        ...

    def keep(self, count: int) -> None:
        """The window keeps its first `count` nodes; the others are filled afresh."""
        ...

    def forget(self) -> None:
        """A state overflowed: what was observed is not used."""
        ...


class NewtonUpdate:
    """Equation (2) with the slope alone."""

    def __init__(self, setup: WindowSetup) -> None:
        self._setup = setup

    def observe(self, states: Tensor, outputs: Tensor) -> None:
        """Nothing is learnt."""

    def __call__(self, lo: int, hi: int, phi: Tensor, old: Tensor) -> Tensor:
        """Equation (2); a single node takes its step."""
        if len(phi) == 1:
            return phi
        return self.carried(lo, hi, phi.flatten(1), (phi - old).flatten(1)).view_as(phi)

    def distance(self, new: Tensor, phi: Tensor, old: Tensor) -> Tensor:
        """The change, which is the preconditioned residual. Without a slope (Jacobi) updates stay small far from the
        solution, and the residuals are added up instead."""
        return new - old if self._setup.sloped else (phi - old).flatten(1).cumsum(0).view_as(phi)

    def advance(self, passed: int) -> None:
        """Nothing was learnt."""

    def keep(self, count: int) -> None:
        """Nothing was learnt."""

    def forget(self) -> None:
        """Nothing was learnt."""

    def carried(self, lo: int, hi: int, phi: Tensor, residual: Tensor) -> Tensor:
        """Phi plus the changes carried from the nodes before, `[W, d]`: stretch by stretch, so that a wide window needs no
        matrix of its width squared."""
        setup, parts = self._setup, []
        if setup.renewed is not None:
            several = residual.view(len(residual), -1, setup.renewed.numel())
            residual = several.masked_fill(setup.renewed.flatten(), 0.0).view_as(residual)
        for begin in range(0, len(phi), STRETCH):
            rows = slice(lo + begin, min(lo + begin + STRETCH, hi))
            steps = setup.slope[rows]
            part = slice(begin, begin + len(steps))
            carried = setup.carry.strict(rows.start, rows.stop)
            if not parts:
                parts.append(torch.addmm(phi[part], carried, residual[part]))
                continue
            before = slice(begin - STRETCH, begin)
            change = parts[-1] - phi[before] + residual[before]
            entering = torch.zeros_like(residual[part][: steps.shape[1]])  # changes carried in from the stretch before
            for i in range(len(entering)):
                for j in range(i, steps.shape[1]):
                    entering[i].add_(change[i - j - 1], alpha=steps[i, j].item())
            forced = residual[part].clone()
            forced[: len(entering)] += entering
            parts.append(torch.addmm(phi[part], carried, forced))
            parts[-1][: len(entering)] += entering
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Carried(NamedTuple):
    """Some changes of nodes in a row, w at once, and what the pairs add to their steps.

    Attributes:
        change: `[n, w, ...]` changes of the nodes.
        states: `[n, w, ...]` DX y of the nodes before each, as `Secants.correction` returns it.
        outputs: `[n, w, ...]` DM y, likewise.
    """

    change: Tensor
    states: Tensor
    outputs: Tensor


class SecantUpdate:
    """Equation (2) with a slope that pairs of earlier sweeps correct (methods/secant.py).

    Attributes:
        secants: The pairs; None before the first sweep, and after an overflow.
    """

    def __init__(self, setup: WindowSetup) -> None:
        self._setup, self._newton = setup, NewtonUpdate(setup)
        self.secants: Secants | None = None

    def observe(self, states: Tensor, outputs: Tensor) -> None:
        """Makes pairs of this sweep and the last."""
        if self.secants is None:
            self.secants = self._begin()
        self.secants.observe(states, outputs)

    def _begin(self) -> Secants:
        setup = self._setup
        method, shared = setup.method, setup.step.shared_window
        near = method.neighbours, method.neighbour_damping
        return Secants(method.secants, setup.resolution, shared, setup.symmetry, *near, lends=setup.lends)

    def __call__(self, lo: int, hi: int, phi: Tensor, old: Tensor) -> Tensor:
        """Equation (2) of methods/secant.py, stretch by stretch; a single node takes its step."""
        if len(phi) == 1:
            return phi
        assert self.secants is not None
        found: list[Tensor] = []
        entering, first = None, None
        stretch = max(PAIRED, self._setup.table.band)  # so that a step looks back into the stretch before, and no further
        for begin in range(0, len(phi), stretch):
            part = slice(begin, min(begin + stretch, len(phi)))
            rows = lo + part.start, lo + part.stop
            steps, residual = phi[part], phi[part] - old[part]
            if entering is not None:
                steps, residual = (torch.cat([v[: len(entering)] + entering, v[len(entering) :]]) for v in (steps, residual))
            new = self._newton.carried(*rows, steps.flatten(1), residual.flatten(1)).view_as(steps)
            added, *followed = self.secants.correction(new - old[part], self._reach_of_pairs(*rows), begin=begin, first=first)
            found.append(new + added)
            change = found[-1] - old[part]
            first = change[-1]
            entering = self._entering(rows[1], min(self._setup.table.band, hi - rows[1]), change, *followed)
        return found[0] if len(found) == 1 else torch.cat(found)

    def tangent(self, lo: int, hi: int, before: Carried) -> Carried:
        """What changes of the nodes up to `lo`, the window's first, make of the nodes up to `hi`: the derivative of the steps
        between, as the slope and the pairs have it.

        Args:
            lo: The window's first sub-interval.
            hi: The sub-interval after the last.
            before: The changes up to node `lo`.
        """
        stretch, band = max(PAIRED, self._setup.table.band), self._setup.table.band
        change, states, outputs = before
        found: list[Carried] = []
        for begin in range(0, hi - lo, stretch):
            rows = lo + begin, min(lo + begin + stretch, hi)
            entering = self._entering(rows[0], min(band, rows[1] - rows[0]), change, states, outputs)
            steps = torch.zeros_like(entering[:1]).repeat(rows[1] - rows[0], *[1] * (entering.ndim - 1))
            steps[: len(entering)] = entering
            found.append(self._answered(*rows, begin, steps, change[-1]))
            change, states, outputs = found[-1]
        return found[0] if len(found) == 1 else Carried(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _answered(self, lo: int, hi: int, begin: int, steps: Tensor, first: Tensor) -> Carried:
        """One stretch of `tangent`: what comes of `steps` `[W, ...]` added to residuals, and of a change `first` of `lo`."""
        change = self._newton.carried(lo, hi, steps.flatten(1), steps.flatten(1)).view_as(steps)
        if self.secants is None:
            return Carried(change, torch.zeros_like(change), torch.zeros_like(change))
        added, *followed = self.secants.corrections(change, self._reach_of_pairs(lo, hi), begin=begin, first=first)
        return Carried(change + added, *followed)

    def _entering(self, node: int, count: int, change: Tensor, states: Tensor, outputs: Tensor) -> Tensor:
        """`[count, ...]` what a stretch that ends at `node` adds to the residuals of the next `count` nodes.

        Args:
            node: The sub-interval after its last.
            count: How many nodes look back into it, at most.
            change: `[W, ...]` changes of the nodes after its first.
            states: `[W, ...]` what the pairs add to the states of its nodes, DX y.
            outputs: `[W, ...]` the same for their outputs, DM y.
        """
        slope, table = self._setup.slope[node : node + count], self._setup.table
        beyond = (table.a[node : node + count] - slope, table.b[node : node + count])
        entering = torch.zeros_like(change[:count])
        if self._setup.renewed is not None:  # where G is 0, so that of a node's change only what the pairs say goes on
            change = torch.where(self._setup.renewed, torch.cat([states[1:], torch.zeros_like(states[:1])]), change)
        for i in range(len(entering)):
            for j in range(i, min(table.band, i + len(change))):
                entering[i].add_(change[i - j - 1], alpha=slope[i, j].item())
                if j > i:
                    for values, weights in zip((states, outputs), beyond, strict=True):
                        entering[i].add_(values[i - j], alpha=weights[i, j].item())
        return entering

    def distance(self, new: Tensor, phi: Tensor, old: Tensor) -> Tensor:
        """The change."""
        return new - old

    def advance(self, passed: int) -> None:
        """Drops the pairs of the nodes that passed."""
        if self.secants is not None:
            self.secants.advance(passed)

    def keep(self, count: int) -> None:
        """Drops the pairs of the nodes that are filled afresh."""
        if self.secants is not None:
            self.secants.keep(count)

    def forget(self) -> None:
        """Drops all pairs."""
        self.secants = None

    def _reach_of_pairs(self, lo: int, hi: int) -> list[Reach]:
        """L (a - G) and L b of equation (2) of methods/secant.py; L = I and G = 0 for elements that steps make anew."""
        setup, rows = self._setup, slice(lo, hi)
        slope, table = setup.slope[rows], setup.table
        carry, outputs = setup.carry(lo, hi), _banded(table.b[rows])
        along = Reach(setup.move(carry @ _banded(table.a[rows] - slope)), setup.move(carry @ outputs))
        if setup.renewed is None:
            return [along]
        renewed = setup.renewed.flatten().to(setup.dtype)
        alone = Reach(setup.move(_banded(table.a[rows])), setup.move(outputs), renewed)
        return [along._replace(elements=1 - renewed), alone]


def _banded(values: Tensor) -> Tensor:
    """`[W, W]` the lower band whose diagonals are the columns of `[W, P]`."""
    width = len(values)
    found = torch.zeros(width, width, dtype=torch.float64)
    for j in range(min(values.shape[1], width)):
        found.diagonal(-j).copy_(values[j:, j])
    return found


class PairUpdate(SecantUpdate):
    """The same with the slope of Gaussian data and one pair a node, for the `tangent` of methods that keep no pairs."""

    def __init__(self, setup: WindowSetup) -> None:
        super().__init__(setup.answering)

    def _begin(self) -> Secants:
        return LastPair(self._setup.resolution, self._setup.step.shared_window, self._setup.lends)

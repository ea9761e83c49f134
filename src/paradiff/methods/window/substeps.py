# SPDX-License-Identifier: Apache-2.0
"""The rounds of a sweep: one where every sub-interval is a single step, S where sub-intervals have up to S steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from paradiff.chain.step import uploaded
from paradiff.methods.window.setup import WindowSetup
from paradiff.solver.protocol import Query


@dataclass(frozen=True, eq=False)
class WindowQuery(Query):
    """The rows of one round of a sweep.

    Attributes:
        at: The nodes, as an index on the device.
        places: Where the states at the nodes, and those j steps before them, stand in the window's states, for j < P.
        noise_place: Where the noises of the steps from the nodes stand in the window's noises.
        running: The numbers of the sub-intervals that the rows belong to.
        states: `[R, ...]` the states at the nodes, not scaled.
    """

    at: slice | Tensor
    places: list[slice | Tensor]
    noise_place: slice | Tensor
    running: list[int]
    states: Tensor


class Rounds(Protocol):
    """The rounds of one sample's sweeps."""

    def ask(self, lo: int, hi: int, x: Tensor) -> WindowQuery:
        """The rows of the next round.

        Args:
            lo: The window's first sub-interval.
            hi: The sub-interval after its last.
            x: `[.., ...]` the window's fine states.
        """
        ...

    def tell(self, query: WindowQuery, phi: Tensor, x: Tensor) -> Tensor | None:
        """Takes the fine steps `[R, ...]` of the rows; `[W, ...]` those to the ends of all sub-intervals once they are known,
        and None before. States in the midst of sub-intervals are written to `x`."""
        ...

    def ends(self, lo: int, hi: int) -> slice | Tensor:
        """Where the nodes after the window's first stand in its states."""
        ...


class SingleSteps:
    """Sub-intervals of one step: every round is a sweep."""

    def __init__(self, setup: WindowSetup) -> None:
        self._setup = setup

    def ask(self, lo: int, hi: int, x: Tensor) -> WindowQuery:
        """All nodes of the window."""
        setup, h = self._setup, self._setup.history
        nodes, at = torch.arange(lo, hi), slice(lo, hi)
        places: list[slice | Tensor] = [slice(h - j, h - j + len(nodes)) for j in range(setup.table.band)]
        states = x[places[0]]
        return WindowQuery(nodes, setup.step.seen(at, states), at, places, slice(0, len(nodes)), [*range(lo, hi)], states)

    def tell(self, query: WindowQuery, phi: Tensor, x: Tensor) -> Tensor | None:
        """The steps themselves."""
        return phi

    def ends(self, lo: int, hi: int) -> slice | Tensor:
        """One after the other."""
        h = self._setup.history
        return slice(h + 1, h + 1 + hi - lo)


class Substeps:
    """Sub-intervals of several steps, walked side by side: a round is one fine step of each that is not at its end."""

    def __init__(self, setup: WindowSetup) -> None:
        self._setup = setup
        self._taken = 0  # fine steps of every sub-interval in this sweep
        self._first = 0  # the window's first sub-interval in this sweep
        self._phi = torch.empty(0)  # ends of sub-intervals, as far as they are reached

    def ask(self, lo: int, hi: int, x: Tensor) -> WindowQuery:
        """The nodes that the sub-intervals have come to."""
        setup, edges = self._setup, self._setup.edges
        if self._taken == 0:
            self._first, self._phi = lo, torch.empty_like(x[: hi - lo])
        running = [n for n in range(lo, hi) if edges[n] + self._taken < edges[n + 1]]
        nodes = torch.tensor([edges[n] + self._taken for n in running])
        at = nodes.to(setup.device, non_blocking=True)
        noise_place = at - edges[lo]
        places: list[slice | Tensor] = [noise_place + setup.history - j for j in range(setup.table.band)]
        states = x[places[0]]
        return WindowQuery(nodes, setup.step.seen(at, states), at, places, noise_place, running, states)

    def tell(self, query: WindowQuery, phi: Tensor, x: Tensor) -> Tensor | None:
        """Puts one fine step of every running sub-interval in its place."""
        edges, running, place = self._setup.edges, query.running, query.places[0]
        self._taken += 1
        going = [k for k, n in enumerate(running) if edges[n] + self._taken < edges[n + 1]]
        ended = [k for k, n in enumerate(running) if edges[n] + self._taken == edges[n + 1]]
        if ended:
            device = phi.device
            self._phi[uploaded([running[k] - self._first for k in ended], device)] = phi[uploaded(ended, device)]
        if going:
            assert isinstance(place, Tensor)
            rows = uploaded(going, phi.device)
            x[place[rows] + 1] = phi[rows]
            return None
        self._taken = 0
        return self._phi

    def ends(self, lo: int, hi: int) -> slice | Tensor:
        """At the sub-intervals' right edges."""
        edges = torch.tensor(self._setup.edges[lo : hi + 1])
        return (edges[1:] - edges[0] + self._setup.history).to(self._setup.device, non_blocking=True)

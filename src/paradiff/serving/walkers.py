# SPDX-License-Identifier: Apache-2.0
"""Requests that take single steps, in step: one product for all that walk the same chain, whatever nodes they have come to.

So a server under full load does beside the network what a loop over a batch does, and not what so many solvers do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paradiff.chain.step import uploaded
from paradiff.serving.chains import Chain
from paradiff.serving.state import RequestState
from paradiff.solver.protocol import Place

AHEAD = 16
"""Steps whose noises are drawn together."""


class Walkers:
    """Those of one chain.

    Args:
        chain: The chain.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._members: list[RequestState] = []
        self._rows: dict[RequestState, int] = {}  # of each
        self._nodes: list[int] = []
        self._at = self._here = self._slots = torch.zeros(0, dtype=torch.int64)  # the nodes, here and on the device; the slots
        self._states: list[Tensor] = []  # x[i], x[i-1], ..., each [R, ...]
        self._outputs: list[Tensor] = []  # m[i-1], ..., each [R, ...]
        self._noise = torch.zeros(0)  # z of the steps to come that were drawn, [steps, R, ...]

    def rows(self, members: Sequence[RequestState]) -> tuple[Tensor, Tensor, Tensor]:
        """The states `[R, ...]` of these requests as the network sees them, their times `[R]`, and slots of the conditioning.

        Args:
            members: Requests at a place.
        """
        if len(members) != len(self._members) or any(one.walk is not self for one in members):
            self._join(members)
        step = self._chain.step
        return step.seen(self._here if step.scaled else slice(0, 0), self._states[0]), step.t[self._at], self._slots

    @property
    def members(self) -> Sequence[RequestState]:
        """The requests, in the order of the rows."""
        return self._members

    def node_of(self, state: RequestState) -> int:
        """The node to which the single steps of a request have come."""
        return self._nodes[self._rows[state]]

    def place_of(self, state: RequestState) -> Place:
        """The same with what the next step reads: views of the states of all."""
        k = self._rows[state]
        node = self._nodes[k]
        valid = min(self._chain.past, node)
        states = [values[k] for values in self._states[: valid + 1]]
        return Place(node, states, [values[k] for values in self._outputs[:valid]])

    def _join(self, members: Sequence[RequestState]) -> None:
        """Leaves those that went, and takes up those that came, each from its place; what one has not yet come past is zero."""
        wanted = set(members)
        for one in self._members:
            if one not in wanted:
                one.stand()
        kept, came = [one for one in members if one.walk is self], [one for one in members if one.walk is not self]
        rows = [self._rows[one] for one in kept]
        here = uploaded(rows, self._chain.step.device)
        places = [place for one in came if (place := one.stand()) is not None]
        nodes, past = [self._nodes[k] for k in rows] + [place.node for place in places], self._chain.past

        def column(old: Sequence[Tensor], new: list[Sequence[Tensor]], j: int) -> Tensor:
            parts = [old[j][here]] if kept else []
            if new:
                zero = torch.zeros_like(places[0].states[0])
                parts.append(torch.stack([values[j] if j < len(values) else zero for values in new]))
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        before, begun = [place.states for place in places], [place.outputs for place in places]
        states = [column(self._states, before, j) for j in range(past + 1)]
        self._outputs = [column(self._outputs, begun, j) for j in range(past)]
        self._states = states
        if ahead := len(self._noise):
            drawn = [self._noise[:, here]] if kept else []
            drawn += [self._drawn(one, place.node, ahead)[:, None] for one, place in zip(came, places, strict=True)]
            self._noise = torch.cat(drawn, dim=1)
        self._members, self._nodes = [*kept, *came], nodes
        self._at, self._here = torch.tensor(nodes), uploaded(nodes, self._chain.step.device)
        self._rows = {one: k for k, one in enumerate(self._members)}
        self._slots = torch.tensor([one.slot for one in self._members])
        for one in came:
            one.walk = self

    def _drawn(self, state: RequestState, node: int, count: int) -> Tensor:
        """z of a request's steps from a node on, `[count, ...]`; 0 beyond the chain's end."""
        drawn = self._chain.step.move(state.noise.draw(0, range(node, min(node + count, self._chain.table.steps))))
        beyond = count - len(drawn)
        return torch.cat([drawn, drawn.new_zeros(beyond, *drawn.shape[1:])]) if beyond else drawn

    def _next_noise(self) -> Tensor:
        """z of the step of every request, `[R, ...]`."""
        if not len(self._noise):
            count = min(AHEAD, self._chain.table.steps - min(self._nodes))
            drawn = [self._drawn(one, node, count) for one, node in zip(self._members, self._nodes, strict=True)]
            self._noise = torch.stack(drawn, dim=1)
        noise, self._noise = self._noise[0], self._noise[1:]
        return noise

    def step(self, outputs: Tensor) -> list[RequestState]:
        """Takes the step of every request by the network's outputs `[R, ...]`; those that this brought to the chain's end."""
        table, step = self._chain.table, self._chain.step
        m = table.convert(self._at, self._states[0], outputs)
        noise = self._next_noise() if table.stochastic else None
        read, past = [m, *self._outputs], self._chain.past
        new = step(self._here, self._states, read, noise)
        self._states, self._outputs = [new, *self._states][: past + 1], read[:past]
        self._nodes, last = [node + 1 for node in self._nodes], table.steps
        self._at, self._here = self._at + 1, self._here + 1
        if last not in self._nodes:
            return []
        arrived = [one for one, node in zip(self._members, self._nodes, strict=True) if node == last]
        for one in arrived:
            one.arrived = True
        return arrived

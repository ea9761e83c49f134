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

    def rows(self, members: Sequence[RequestState]) -> tuple[Tensor, Tensor, Tensor]:
        """The states `[R, ...]` of these requests as the network sees them, their times `[R]`, and slots of the conditioning.

        Args:
            members: Requests at a place.
        """
        if len(members) != len(self._members) or any(one.walk is not self for one in members):
            self._join(members)
        step = self._chain.step
        self._at = torch.tensor(self._nodes)
        self._here = uploaded(self._nodes, step.device)
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
        """Takes requests up, each from its place; what it has not yet come past is zero."""
        places = [one.stand() for one in members]
        for one in self._members:
            one.stand()
        zero = torch.zeros_like(next(place.states[0] for place in places if place is not None))

        def column(part: str, j: int) -> Tensor:
            found = [getattr(place, part) for place in places]
            return torch.stack([values[j] if j < len(values) else zero for values in found])

        past = self._chain.past
        states, outputs = [column("states", j) for j in range(past + 1)], [column("outputs", j) for j in range(past)]
        self._members, self._nodes = [*members], [place.node for place in places if place is not None]
        self._rows = {one: k for k, one in enumerate(members)}
        self._slots = torch.tensor([one.slot for one in members])
        self._states, self._outputs = states, outputs
        for one in members:
            one.walk = self

    def step(self, outputs: Tensor) -> list[RequestState]:
        """Takes the step of every request by the network's outputs `[R, ...]`; those that this brought to the chain's end."""
        table, step = self._chain.table, self._chain.step
        m = table.convert(self._at, self._states[0], outputs)
        noise = None
        if table.stochastic:
            noise = torch.stack([one.noise_at(node) for one, node in zip(self._members, self._nodes, strict=True)])
        read, past = [m, *self._outputs], self._chain.past
        new = step(self._here, self._states, read, noise)
        self._states, self._outputs = [new, *self._states][: past + 1], read[:past]
        self._nodes, last = [node + 1 for node in self._nodes], table.steps
        if last not in self._nodes:
            return []
        return [one for one, node in zip(self._members, self._nodes, strict=True) if node == last]

# SPDX-License-Identifier: Apache-2.0
"""Secant pairs of the nodes of a mesh: as many as were seen, in no room of their own where there are none.

A node that is evaluated again shows how its forcing answers to its state: the changes of both are a pair (methods/secant.py).
Most nodes have fewer pairs than they may have, and some have none, so pairs are rows of one store. They are kept in the dtype
in which the network is given its states: its outputs are known no better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.step import uploaded


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """S pairs of n nodes, k at most of each; b members, d numbers each.

    Attributes:
        dx: `[S+1, b, d]` changes of states; the first row is zero, and so is one whose state changed by rounding alone.
        du: `[S+1, b, d]` the changes of the forcings.
        nodes: The numbers of the n nodes.
        rows: The k rows of each; 0 where it has fewer.
    """

    dx: Tensor
    du: Tensor
    nodes: list[int]
    rows: list[list[int]]


class PairStore:
    """The newest pairs of each of M nodes.

    Args:
        count: M.
        most: Pairs kept for each node.
        like: `[b, d]` a state in the pairs' dtype, for shape and device.
    """

    def __init__(self, count: int, most: int, like: Tensor) -> None:
        self.most = most
        self._dx, self._du = (like.new_zeros(1, *like.shape) for _ in range(2))
        self._rows: list[list[int]] = [[] for _ in range(count)]  # of each node, the newest first
        self._free: list[int] = []  # rows that no node has yet

    def reserve(self, nodes: Sequence[int]) -> None:
        """Makes room for a further pair of each of some nodes, at once: it is the size of all pairs that is copied."""
        fresh = sum(len(self._rows[n]) < self.most for n in nodes) - len(self._free)
        if fresh > 0:
            self._free += range(len(self._dx), len(self._dx) + fresh)
            room = self._dx.new_zeros(fresh, *self._dx.shape[1:])
            self._dx = torch.cat([self._dx, room])
            self._du = torch.cat([self._du, room])

    def observe(self, nodes: Sequence[int], dx: Tensor, du: Tensor, large: Tensor) -> None:
        """Takes a pair of each of R nodes; where a node has all that are kept, it replaces the oldest.

        Args:
            nodes: The nodes.
            dx: `[R, b, d]`.
            du: `[R, b, d]`.
            large: `[R, b]` whether the change is one.
        """
        self.reserve(nodes)
        for rows in (self._rows[node] for node in nodes):
            rows.insert(0, self._free.pop(0) if len(rows) < self.most else rows.pop())
        at = uploaded([self._rows[node][0] for node in nodes], dx.device)
        for kept, new in ((self._dx, dx), (self._du, du)):
            kept[at] = torch.where(large[..., None], new.to(kept.dtype), kept[at])

    def newest(self, most: int) -> Pairs:
        """At most so many pairs of each node. They share memory with the store, which the next `observe` writes to."""
        nodes = [n for n, rows in enumerate(self._rows) if rows]
        k = max((min(len(self._rows[n]), most) for n in nodes), default=0)
        rows = [[*self._rows[n][:k], *[0] * (k - len(self._rows[n]))] for n in nodes]
        return Pairs(dx=self._dx, du=self._du, nodes=nodes, rows=rows)

    def emptied(self) -> PairStore:
        """A store for the same nodes, without pairs."""
        return PairStore(len(self._rows), self.most, self._dx[0])

    def remesh(self, nearest: Sequence[int], ratios: Tensor) -> PairStore:
        """A store for other nodes, each of which takes the pairs of the node `nearest` to it, with its states' changes scaled
        by `ratios` `[M']`."""
        new = PairStore(len(nearest), self.most, self._dx[0])
        source, owner = [0], [0]
        for n, k in enumerate(nearest):
            new._rows[n] = [*range(len(source), len(source) + len(self._rows[k]))]
            source += self._rows[k]
            owner += [n] * len(self._rows[k])
        at, of = uploaded(source, self._dx.device), uploaded(owner, self._dx.device)
        new._dx, new._du = self._dx[at].mul_(ratios.to(self._dx)[of][:, None, None]), self._du[at]
        return new

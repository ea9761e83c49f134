# SPDX-License-Identifier: Apache-2.0
"""Secant pairs of the nodes of a mesh: as many as were seen, in no room of their own where there are none.

A node that is evaluated again shows how its forcing answers to its state: the changes of both are a pair (methods/secant.py).
They are kept as exactly as the network is given its states: its outputs are known no better. Most nodes have fewer pairs than
they may have, and some have none, so pairs of long states are rows of one store; those of short states have a place for each
that there may be.

A round's linear system (linearization.py) needs the inner products of all pairs, and a round brings pairs of a few nodes. So
products are kept, too, each pair's in a **slot** of its node, and only those with the newest pairs are made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.step import uploaded
from paradiff.methods.stretch import DENSE, stretches, total


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """S pairs of the first n nodes, in k slots of each; b members, d numbers each.

    Attributes:
        dx: `[S+1, b, d]` changes of states; the first row is zero, and so is one whose state changed by rounding alone.
        du: `[S+1, b, d]` the changes of the forcings.
        rows: `[n k]` the row in each slot; 0 where there is none. None where row n k is that of slot n k, without a first one.
        own: `[b, n, k, k]` products of the dx of each node's pairs.
        cross: `[b, n k, n k]` products of the dx (rows) with the du (columns) of all pairs.
        room: Two tensors of the shape of `cross`, to be written to: memory that is taken anew in each round costs more than the
            arithmetic on it.
    """

    dx: Tensor
    du: Tensor
    rows: Tensor | None
    own: Tensor
    cross: Tensor
    room: tuple[Tensor, Tensor]


def in_slots(values: Tensor, rows: Tensor | None, part: slice) -> Tensor:
    """`[b, n k, w]` a stretch of the values `[S+1, b, d]` in some rows, or in all."""
    return (values[:, :, part] if rows is None else values[rows, :, part]).transpose(0, 1)


class PairStore:
    """The newest pairs of each of M nodes.

    Args:
        count: M.
        most: Pairs kept for each node.
        like: `[b, d]` a state in the pairs' dtype, for shape and device.
        kind: Dtype of the products.
    """

    def __init__(self, count: int, most: int, like: Tensor, kind: torch.dtype) -> None:
        self.most, self._like, members, size = most, like, len(like), count * most
        self._dense = size * like.numel() <= DENSE
        kept = like.new_zeros(size if self._dense else 1, *like.shape)
        self._dx, self._du = kept, kept.clone()
        self._rows: list[list[int]] = [[] for _ in range(count)]  # of each node, by their slots
        self._in_slots = None if self._dense else torch.zeros(size, dtype=torch.int64, device=like.device)  # the same
        self._turn = [0] * count  # the slot of each full node that is written to next: the one of its oldest pair
        self._waiting: set[int] = set()  # nodes for whose next pair room was made
        self._own = like.new_zeros(members, count, most, most, dtype=kind)
        self._cross = like.new_zeros(members, count * most, count * most, dtype=kind)
        self._room: tuple[Tensor, Tensor] | None = None

    def reserve(self, nodes: Sequence[int]) -> None:
        """Makes room for a further pair of each of some nodes, at once: it is the size of all pairs that is copied."""
        fresh = [n for n in nodes if len(self._rows[n]) < self.most and n not in self._waiting]
        if not fresh:
            return
        slots = [n * self.most + len(self._rows[n]) for n in fresh]
        rows = slots if self._in_slots is None else range(len(self._dx), len(self._dx) + len(fresh))
        for row, node in zip(rows, fresh, strict=True):
            self._rows[node].append(row)
        self._waiting.update(fresh)
        if self._in_slots is None:
            return
        at, new = uploaded([slots, [*rows]], self._dx.device)
        self._in_slots[at] = new
        room = self._dx.new_zeros(len(fresh), *self._dx.shape[1:])
        self._dx, self._du = torch.cat([self._dx, room]), torch.cat([self._du, room])

    def observe(self, nodes: Sequence[int], dx: Tensor, du: Tensor, large: Tensor) -> None:
        """Takes a pair of each of R nodes; where a node has all that are kept, it replaces the oldest.

        Args:
            nodes: The nodes.
            dx: `[R, b, d]`.
            du: `[R, b, d]`.
            large: `[R, b]` whether the change is one.
        """
        self.reserve(nodes)
        slots = []
        for node in nodes:
            if node in self._waiting:
                self._waiting.remove(node)
                slots.append(node * self.most + len(self._rows[node]) - 1)
            else:
                slots.append(node * self.most + self._turn[node])
                self._turn[node] = (self._turn[node] + 1) % self.most
        at = uploaded(slots, dx.device)
        rows = at if self._in_slots is None else self._in_slots[at]
        for kept, new in ((self._dx, dx), (self._du, du)):
            kept[rows] = torch.where(large[..., None], new.to(kept.dtype), kept[rows])
        self._multiply(at)

    def newest(self) -> Pairs | None:
        """The pairs; None where there are none. They share memory with the store, which the next `observe` writes to."""
        count = self._reached
        if count == 0:
            return None
        size = count * self.most
        if self._room is None:
            self._room = torch.empty_like(self._cross), torch.empty_like(self._cross)
        cross = self._cross[:, :size, :size]
        first, second = (v.flatten()[: cross.numel()].view(cross.shape) for v in self._room)
        return Pairs(
            dx=self._dx[:size] if self._in_slots is None else self._dx,
            du=self._du[:size] if self._in_slots is None else self._du,
            rows=None if self._in_slots is None else self._in_slots[:size],
            own=self._own[:, :count],
            cross=cross,
            room=(first, second),
        )

    def padded(self, nodes: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """`[R, k, b, d]` the changes of states and forcings of R nodes, the newest last, zero where there are fewer; None where
        there are none."""
        rows = [self._in_order(n) for n in nodes]
        if not any(rows):
            return None
        most = max(map(len, rows))
        found = self._dx.new_zeros(2, len(rows), most, *self._dx.shape[1:])
        for n, own in enumerate(rows):
            for k, row in enumerate(own, most - len(own)):
                found[0, n, k], found[1, n, k] = self._dx[row], self._du[row]
        return found[0], found[1]

    def emptied(self) -> PairStore:
        """A store for the same nodes, without pairs."""
        return PairStore(len(self._rows), self.most, self._like, self._own.dtype)

    def spread(self, reach: int, levels: Sequence[float], enough: int = 0) -> PairStore:
        """A store in which every node with `enough` pairs has its own, the newest 2 `reach` + 1 of them, and any other the
        newest pair of each node up to `reach` places away, its own last, with states' changes scaled by the ratios of their
        `levels` `[M]`, alpha/sigma^2. 0 is never enough."""
        count, most, newest = len(self._rows), 2 * reach + 1, list[int]()
        for rows, turn in zip(self._rows, self._turn, strict=True):
            newest.append(rows[turn - 1] if rows else -1)
        sources, ratios = list[list[int]](), list[float]()
        for k in range(count):
            if 0 < enough <= len(self._rows[k]):
                sources.append(self._in_order(k)[-most:])
                ratios += [1.0] * len(sources[-1])
                continue
            sources.append([])
            for j in sorted(range(max(k - reach, 0), min(k + reach + 1, count)), key=lambda j, k=k: (-abs(j - k), j)):
                ratio = levels[j] / levels[k] if levels[k] else 1.0
                if newest[j] >= 0 and 0 < ratio < float("inf"):
                    sources[-1].append(newest[j])
                    ratios.append(ratio)
        return self._filled(sources, most, lambda slots: torch.tensor(ratios).to(slots.device, non_blocking=True))

    def remesh(self, nearest: Sequence[int], ratios: Tensor, most: int) -> PairStore:
        """A store for other nodes. Each takes the pairs of the node `nearest` to it, the newest if fewer are kept, and its
        states' changes are scaled by `ratios` `[M']`."""
        sources = list[list[int]]()
        for k in nearest:
            rows = self._in_order(k)
            sources.append(rows[max(len(rows) - most, 0) :])
        return self._filled(sources, most, lambda slots: ratios[slots // most])

    def _filled(self, sources: Sequence[Sequence[int]], most: int, scales: Callable[[Tensor], Tensor]) -> PairStore:
        """A store for other nodes, each with the pairs of some rows of this one, states' changes scaled by `scales(slots)`."""
        new = PairStore(len(sources), most, self._like, self._own.dtype)
        taken, slots = list[int](), list[int]()
        for n, rows in enumerate(sources):
            begin = n * most if new._in_slots is None else len(taken) + 1
            taken += rows
            slots += range(n * most, n * most + len(rows))
            new._rows[n] = [*range(begin, begin + len(rows))]
        if not taken:
            return new
        at, places = uploaded([taken, slots], self._dx.device)  # in one copy
        dx, du = self._dx[at] * scales(places).to(self._like)[:, None, None], self._du[at]
        if new._in_slots is None:
            new._dx[places], new._du[places] = dx, du
        else:
            new._dx, new._du = (torch.cat([zero, v]) for zero, v in ((new._dx, dx), (new._du, du)))
            new._in_slots[places] = torch.arange(1, len(at) + 1, device=at.device)
        new._multiply_all()
        return new

    def _in_order(self, node: int) -> list[int]:
        """The rows of a node's pairs, the newest last."""
        return self._rows[node][self._turn[node] :] + self._rows[node][: self._turn[node]]

    @property
    def _reached(self) -> int:
        """Nodes up to the last one with a pair."""
        return max((n + 1 for n, rows in enumerate(self._rows) if rows), default=0)

    def _first_slots(self, size: int, part: slice) -> tuple[Tensor, Tensor]:
        """`[b, size, w]` X and U of the first slots on a stretch."""
        if self._in_slots is None:
            rows, values = None, (self._dx[:size], self._du[:size])
        else:
            rows, values = self._in_slots[:size], (self._dx, self._du)
        x, u = (in_slots(v, rows, part).to(self._cross.dtype) for v in values)
        return x, u

    def _multiply(self, slots: Tensor) -> None:
        """Makes the products with the pairs in some slots."""
        count, node = len(slots), slots // self.most
        mates = node[:, None] * self.most + torch.arange(self.most, device=slots.device)
        size = self._reached * self.most

        def products(part: slice) -> Tensor:
            """With the du of all pairs, with the dx of all, and with the dx of the same node's."""
            x, u = self._first_slots(size, part)
            new = x[:, slots]
            found = new @ u.mT, u[:, slots] @ x.mT, (x[:, mates] @ new[..., None])[..., 0]
            return torch.cat(found, 2)

        rows = count * (self.most + 2) + (2 * size if self._dx.dtype != self._cross.dtype or not self._dense else 0)
        found = total(products(part) for part in stretches(self._dx.shape, rows))
        on_forcings, on_states, own = found.split([size, size, self.most], 2)
        self._cross[:, slots, :size], self._cross.mT[:, slots, :size] = on_forcings, on_states
        slot = slots % self.most
        self._own.flatten(1, 2)[:, slots], self._own.mT[:, node, slot] = own, own

    def _multiply_all(self) -> None:
        """Makes all products."""
        for part in stretches(self._dx.shape, 2 * self._cross.shape[1]):
            x, u = self._first_slots(self._cross.shape[1], part)
            self._cross.baddbmm_(x, u.mT)
            of_nodes = x.unflatten(1, (-1, self.most))
            self._own += of_nodes @ of_nodes.mT

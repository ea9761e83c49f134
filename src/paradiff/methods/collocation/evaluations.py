# SPDX-License-Identifier: Apache-2.0
"""The evaluations of one sample's nodes: forcings, the states at which they were evaluated, and what changed between them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

import torch
from torch import Tensor

from paradiff.chain.step import uploaded
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.pairs import PairStore
from paradiff.methods.collocation.system import CollocationSystem, weighted


class Evaluations:
    """The newest evaluation of each of M nodes, and secant pairs of earlier ones; b members, d numbers each.

    Args:
        count: M.
        pairs: Secant pairs kept for each node.
        x0: `[b, d]` a state, for shape, dtype and device.
        dtype: That in which pairs are kept.

    Attributes:
        states: `[M, b, d]` y, at which the forcings were evaluated or for which they were guessed.
        forcings: `[M, b, d]` u.
        pairs: The secant pairs of earlier evaluations (pairs.py).
        quotients: `[M]` largest Lipschitz quotient |du|/|dx| observed at each node; 0 where it was evaluated once.
        evaluated: Whether the forcing is that of the node's own network output.
        assigned: Whether the node has a forcing at all, evaluated or guessed.
    """

    def __init__(self, count: int, pairs: int, x0: Tensor, dtype: torch.dtype) -> None:
        self.forcings = x0.new_zeros(count, *x0.shape)
        self.states = self.forcings.clone()
        self.pairs = PairStore(count, pairs, x0.to(dtype), x0.dtype)
        self.quotients = x0.new_zeros(count)
        self.evaluated, self.assigned = [False] * count, [False] * count

    def observe(self, chosen: list[int], states: Tensor, forcings: Tensor, least: float) -> None:
        """Takes the evaluations of the nodes `chosen`.

        Args:
            chosen: Numbers of R nodes.
            states: `[R, b, d]`.
            forcings: `[R, b, d]`.
            least: Relative size below which a state change makes no secant pair.
        """
        again, all_at = self._again(chosen), uploaded(chosen, states.device)
        if again:
            nodes, at, x, u = chosen, all_at, states, forcings
            if len(again) < len(chosen):
                nodes = [chosen[k] for k in again]
                at, rows = uploaded([nodes, again], states.device)
                x, u = states[rows], forcings[rows]
            dx, du = x - self.states[at], u - self.forcings[at]
            moved, told, size = (torch.linalg.vector_norm(v, dim=2) for v in (dx, du, x))
            large = moved > least * size
            observed = torch.where(large, told / moved.clamp(min=1e-300), 0.0).amax(1)
            self.quotients[at] = torch.maximum(self.quotients[at], observed)
            self.pairs.observe(nodes, dx, du, large)
        self.states[all_at], self.forcings[all_at] = states, forcings
        for n in chosen:
            self.evaluated[n] = self.assigned[n] = True

    def learn(self, chosen: list[int], dx: Tensor, du: Tensor, least: float) -> None:
        """Takes changes of the states and forcings of the nodes `chosen`, `[R, b, d]`, that an earlier run saw.

        Args:
            chosen: Numbers of R nodes.
            dx: The changes of states.
            du: Those of the forcings.
            least: Relative size below which a state change makes no secant pair.
        """
        if not self.pairs.most:
            return
        moved, told = (torch.linalg.vector_norm(v, dim=2) for v in (dx, du))
        at = uploaded(chosen, dx.device)
        large = moved > least * torch.linalg.vector_norm(self.states[at], dim=2)
        observed = torch.where(large, told / moved.clamp(min=1e-300), 0.0).amax(1)
        self.quotients[at] = torch.maximum(self.quotients[at], observed)
        self.pairs.observe(chosen, dx, du, large)

    def reserve(self, chosen: list[int]) -> None:
        """Makes room for what evaluations of the nodes `chosen` will show, which `observe` may take a few at a time."""
        self.pairs.reserve([chosen[k] for k in self._again(chosen)])

    def _again(self, chosen: list[int]) -> list[int]:
        """Places of the nodes that make a pair: they were evaluated before."""
        return [k for k, n in enumerate(chosen) if self.evaluated[n]] if self.pairs.most else []

    def fill(self, first: int, states: Tensor, system: CollocationSystem, most: float) -> None:
        """Gives nodes without a forcing one by the last two evaluated nodes before them, or that of node `first`; their states
        are taken from `states` `[M, b, d]`.

        Args:
            first: The first node that was evaluated in this round.
            states: The states.
            system: The collocation system, along whose log(alpha^2/sigma^2) is extrapolated.
            most: How far forcings are extrapolated, as a multiple of the distance of the two nodes.
        """
        if all(self.assigned):
            return
        unassigned, last, before, ratio = [], [], [], []
        place = system.recurrence.log_snr[system.nodes].tolist()
        known = [first, first]
        for n, (evaluated, assigned) in enumerate(zip(self.evaluated, self.assigned, strict=True)):
            if evaluated:
                known = [known[1], n]
            if not assigned:
                k, j = known[1], known[0]
                away = 0.0 if j >= k else (place[n] - place[k]) / (place[k] - place[j])
                unassigned.append(n)
                last.append(k)
                before.append(j)
                ratio.append(min(max(away, 0.0), most))
        at, now = uploaded(unassigned, states.device), self.forcings[uploaded(last, states.device)]
        if any(ratio):
            factor = torch.tensor(ratio, dtype=now.dtype).to(now.device, non_blocking=True)
            now += factor[:, None, None] * (now - self.forcings[uploaded(before, states.device)])
        self.forcings[at], self.states[at] = now, states[at]

    @property
    def missing(self) -> list[int]:
        """Numbers of the nodes that were not evaluated."""
        return [n for n, evaluated in enumerate(self.evaluated) if not evaluated]

    def remesh(self, old: CollocationSystem, new: CollocationSystem, pairs: int, move: Callable[[Tensor], Tensor]) -> None:
        """Goes over to a refined mesh, with so many pairs a node. Nodes of both keep all; a new node takes the pairs of the
        nearest old one, its state and quotient scaled to the new level, and at order 0 its forcing, from order 1 the
        interpolated one. An old one without a forcing stays without."""
        recurrence = old.recurrence
        if new.averaged:
            nearest = [bisect_right(old.points, interval.left) - 1 for interval in new.intervals]
            both = zip(nearest, new.intervals, strict=True)
            same = [old.points[k : k + 2] == [interval.left, interval.right] for k, interval in both]
        else:
            place = recurrence.log_snr
            nearest = (place[new.nodes, None] - place[old.nodes]).abs().argmin(1).tolist()
            same = (old.nodes[nearest] == new.nodes).tolist()
        levels = (recurrence.evidence[old.nodes[nearest]] / recurrence.evidence[new.nodes]).tolist()
        ratios = [1.0 if of_both or not 0 < v < math.inf else v for of_both, v in zip(same, levels, strict=True)]
        kept = [of_both and self.evaluated[k] for of_both, k in zip(same, nearest, strict=True)]
        at, factor = uploaded(nearest, self.states.device), move(torch.tensor(ratios))[:, None, None]
        self.states = self.states[at].mul_(factor)
        self.pairs = self.pairs.remesh(nearest, factor[:, 0, 0], pairs)
        self.quotients = self.quotients[at] / factor[:, 0, 0]
        if new.averaged:
            self.forcings = self.forcings[at]
        else:
            self.forcings = weighted(move(old.interpolation[new.nodes]), self.forcings)
        assigned = [not of_both or self.assigned[k] for of_both, k in zip(same, nearest, strict=True)]
        self.evaluated, self.assigned = kept, assigned

    def rescale(self, nodes: Tensor, before: Recurrence, after: Recurrence, move: Callable[[Tensor], Tensor]) -> None:
        """Goes over to the forcing of another data variance, at M fine nodes; pairs and quotients are dropped."""
        nu, g = (move(v[nodes])[:, None, None] for v in (before.nu, before.g))
        clean = self.forcings / nu + g * self.states
        nu, g = (move(v[nodes])[:, None, None] for v in (after.nu, after.g))
        self.forcings = nu * (clean - g * self.states)
        self.pairs = self.pairs.emptied()
        self.quotients = torch.zeros_like(self.quotients)

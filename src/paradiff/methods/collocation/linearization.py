# SPDX-License-Identifier: Apache-2.0
"""The linearized collocation system: how its states and the sample change with its forcings.

With the secant pairs of node n as rows of X[n] and U[n], its forcing follows a change d of its state by

    U[n]^T w[n],      (X[n] X[n]^T + lambda diag(X[n] X[n]^T)) w[n] = X[n] d[n]                                     (1)

(methods/secant.py, equation (1), without a slope). States follow the forcings by R of system.py. So if states change by d0
before any forcing follows, the weights w of all nodes together solve

    (X[n] X[n]^T + lambda diag(X[n] X[n]^T)) w[n] = X[n] d0[n] + sum_q R[n,q] X[n] U[q]^T w[q].                     (2)

The products of all pairs are at hand (pairs.py). At order 0 no state looks ahead, and (2) is triangular but for its blocks on
the diagonal, which are eliminated first. What is multiplied with pairs is in their dtype: they are known no better, and float32
is twice as fast as float64; the small systems are solved in float64. Long states are worked on in stretches (stretch.py), so
that nothing of the size of all pairs is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from paradiff.methods.collocation.pairs import Pairs, in_slots
from paradiff.methods.secant import DAMPING
from paradiff.methods.stretch import DENSE, NUMBERS, stretches, total


class Moves:
    """Changes of M states, found where they are needed: beside long states there is no room for them.

    Args:
        states: `[M, b, d]`.
        known: `[M, b, d]` what they were.
    """

    def __init__(self, states: Tensor, known: Tensor) -> None:
        self.states, self.known = states, known
        self._whole = None if states.numel() > NUMBERS else (states - known).transpose(0, 1)

    @property
    def squares(self) -> Tensor:
        """`[M, b]` their sums of squares."""
        parts = stretches(self.states.shape, len(self.states))
        return total(self(part).square().sum(2) for part in parts).mT

    def __call__(self, part: slice) -> Tensor:
        """`[b, M, w]` a stretch of them."""
        if self._whole is not None:
            return self._whole[..., part]
        return (self.states[:, :, part] - self.known[:, :, part]).transpose(0, 1)


class Linearization:
    """Equation (1) of system.py, linearized at the current forcings; b members, d numbers each.

    Args:
        influence: `[M+1, M]` weights of the forcings in the states and, last, in the sample.
        reach: `[M k, M k]` those in the states, negative, once for each two slots of pairs.
        nodes: `[M]` fine nodes of the forcings.
        pairs: Secant pairs in k slots of each of the first n nodes; None for none.
        uncertainty: Share of a change that stays uncertain along directions that the pairs cover, 0 to 1.
        causal: Whether no state depends on a forcing of a later node.
    """

    def __init__(
        self, influence: Tensor, reach: Tensor, nodes: Tensor, pairs: Pairs | None, uncertainty: float, *, causal: bool
    ) -> None:
        self.nodes, self._influence, self._pairs, self._uncertainty = nodes, influence, pairs, uncertainty
        if pairs is None:
            return
        _, self._count, self._slots, _ = pairs.own.shape
        size = self._count * self._slots
        self._kept = (pairs.dx, pairs.du) if pairs.rows is None else None
        diagonal = pairs.own.diagonal(dim1=2, dim2=3)
        damped = pairs.own.clone()
        damped.diagonal(dim1=2, dim2=3).mul_(1 + DAMPING).add_(diagonal == 0)
        self._inverse = torch.linalg.inv_ex(damped).inverse  # unlike `inv`, without a look at it from the host
        first, second = pairs.room
        system = torch.mul(pairs.cross, reach[:size, :size], out=first)
        blocks = system.view(-1, self._count, self._slots, self._count, self._slots).diagonal(dim1=1, dim2=3)
        blocks += damped.permute(0, 2, 3, 1)
        self._corner = self._pivots = None
        if causal:
            self._corner = torch.linalg.inv_ex(blocks.permute(0, 3, 1, 2)).inverse
            rows = first.view(-1, self._slots, first.shape[2])
            torch.bmm(self._corner.flatten(0, 1), rows, out=second.view_as(rows))
            self._system = second
        else:
            self._system, self._pivots = torch.linalg.lu_factor_ex(system)[:2]

    def kept(self) -> Linearization:
        """The same in memory of its own, where it is small: the next one is made in the same room."""
        found = copy.copy(self)
        if self._pairs is None:
            return found
        if self._corner is not None:
            found._system = self._system.clone()
        if self._kept is not None:
            found._kept = self._kept[0].clone(), self._kept[1].clone()
        return found

    def follow(self, states: Tensor, known: Tensor) -> Tensor:
        """One Newton step: `[M+1, b, d]` states and sample with forcings that follow their states, in place of `states`.

        Args:
            states: `[M+1, b, d]` states and sample with the forcings as evaluated.
            known: `[M, b, d]` the states at which these were evaluated.
        """
        if self._pairs is None:
            return states
        kind = self._pairs.dx.dtype
        weights = self._solve(self._onto_own(Moves(states[:-1], known))).to(kind)
        influence = self._influence[:, : self._count].to(kind)
        for part in self._parts(states, len(states)):
            states[:, :, part] += (influence @ self._of_nodes(weights, self._u(part))).transpose(0, 1)
        return states

    def staleness(self, moves: Moves, constants: Tensor) -> tuple[Tensor, Tensor]:
        """How far the sample may be off since the states of nodes changed: `[M]` mean squares by each node, and `[1]` that by
        all together. The part of a change along directions of the pairs is known but for `uncertainty`.

        Args:
            moves: The changes.
            constants: `[M, b]` Lipschitz constants of the forcings.
        """
        count, members, size = moves.states.shape
        kind = self._influence.dtype if self._pairs is None else self._pairs.dx.dtype
        last, factors, known, weights = self._influence[-1].to(kind), constants.mT[:, :, None].to(kind), None, None
        if self._pairs is not None:
            onto = self._onto_own(moves).view(members, self._count, self._slots, 1)
            known = ((1 - self._uncertainty) * (self._inverse @ onto).flatten(1, 2)).to(kind)

        def stale(part: slice) -> Tensor:
            if known is None:
                return factors * moves(part)
            found = moves(part).to(kind, copy=True)
            found[:, : self._count] -= self._of_nodes(known, self._x(part))
            return found.mul_(factors)

        parts = [*self._parts(moves.states, count)]
        kept = [stale(part) for part in parts] if moves.states.numel() <= DENSE else None
        if self._pairs is not None:
            found = map(stale, parts) if kept is None else kept
            onto = total(self._x(part) @ one.mT for part, one in zip(parts, found, strict=True)).to(self._influence.dtype)
            onto.unflatten(1, (self._count, self._slots)).mul_(self._influence[: self._count, None])
            weights = self._on_sample(self._eliminated_in_turn(self._cornered(onto))).to(kind)
        each, together = factors.new_zeros(members, count), factors.new_zeros(members)
        for part, one in zip(parts, map(stale, parts) if kept is None else kept, strict=True):
            effect = last[:, None] * one
            if weights is not None:
                effect = effect.baddbmm_(weights, self._u(part))
            each += effect.square().sum(2)
            together += effect.sum(1).square().sum(1)
        each, together = (each / size).amax(0), (together / size).amax(0, keepdim=True)
        return each.to(self._influence.dtype), together.to(self._influence.dtype)

    def effects(self, defects: Tensor, influence: Tensor, neighbours: int = 0) -> Tensor:
        """`[J]` mean square changes of the sample by each of J changes of forcings: the mean over its own direction and, at the
        same size, those of its `neighbours` on either side.

        Args:
            defects: `[J, b, d]` the changes.
            influence: `[M+1, J]` weights of each in the states and, last, in the sample, before other forcings follow.
            neighbours: How many.
        """
        count, members, size = defects.shape
        steps = torch.arange(-neighbours, neighbours + 1, device=defects.device)
        source = (torch.arange(count, device=defects.device) + steps[:, None]).clamp(0, count - 1)  # [D, J]
        sizes = torch.linalg.vector_norm(defects, dim=2).mT  # [b, J]
        theirs = sizes[:, source]
        ratio = torch.where(theirs > 0, sizes[:, None] / theirs.clamp(min=1e-300), 0.0).flatten(1)  # [b, D J]
        reach, source, weights, kind = influence.repeat(1, len(steps)), source.flatten(), None, defects.dtype
        if self._pairs is not None:
            parts = self._parts(defects, count)
            kind = self._pairs.dx.dtype
            onto = total(self._x(part) @ defects[:, :, part].permute(1, 2, 0).to(kind) for part in parts)
            onto = self._cornered(onto.to(self._influence.dtype))[:, :, source] * ratio[:, None]
            onto.unflatten(1, (self._count, self._slots)).mul_(reach[: self._count, None])
            weights = self._on_sample(self._eliminated(onto)).to(kind)
        sums, reached = defects.new_zeros(members, len(source), dtype=kind), (reach[-1] * ratio)[:, :, None].to(kind)
        for part in self._parts(defects, len(source)):
            effect = defects[:, :, part].transpose(0, 1).to(kind)[:, source] * reached
            if weights is not None:
                effect = effect.baddbmm_(weights, self._u(part))
            sums += effect.square().sum(2)
        return (sums / size).amax(0).view(len(steps), count).mean(0).to(self._influence.dtype)

    def state_effects(self, defects: Tensor, influence: Tensor, at: Tensor) -> Tensor:
        """`[K, J]` mean square changes of the states of K nodes by each of J changes of forcings.

        Args:
            defects: `[J, b, d]` the changes.
            influence: `[M+1, J]` weights of each in the states and, last, in the sample, before other forcings follow.
            at: `[K]` the numbers of the nodes.
        """
        count, _, size = defects.shape
        own = influence[at][:, None]  # [K, 1, J]
        squares = own.square() * torch.linalg.vector_norm(defects, dim=2).square().mT  # [K, b, J]
        if self._pairs is not None:
            kind = self._pairs.dx.dtype
            moved = ((part, defects[:, :, part].permute(1, 2, 0).to(kind)) for part in self._parts(defects, count))
            found = [(self._x(p) @ d, (u := self._u(p)) @ d, u @ u.mT) for p, d in moved]
            onto, cross, gram = (total(terms).to(influence.dtype) for terms in zip(*found, strict=True))
            onto.unflatten(1, (self._count, self._slots)).mul_(influence[: self._count, None])
            reached = self._influence[at, : self._count].repeat_interleave(self._slots, 1)
            follow = self._solve(onto) * reached[:, None, :, None]  # [K, b, n k, J]
            squares = squares + (follow * (gram @ follow + 2 * own[:, :, None] * cross)).sum(2)
        return (squares.clamp(min=0) / size).amax(1)

    def _onto_own(self, moves: Moves) -> Tensor:
        """`[b, n k, 1]` products of the pairs with the change of their own node."""
        assert self._pairs is not None
        shape, kind = (self._count, self._slots), self._pairs.dx.dtype
        own = ((part, moves(part)[:, : self._count, :, None].to(kind)) for part in self._parts(moves.states))
        found = total(self._x(part).unflatten(1, shape) @ move for part, move in own)
        return found.flatten(1, 2).to(self._influence.dtype)

    def _of_nodes(self, weights: Tensor, values: Tensor) -> Tensor:
        """`[b, n, w]` the sums over each node's pairs of values `[b, n k, w]`, by weights `[b, n k, 1]`."""
        shape = self._count, self._slots
        return (weights.unflatten(1, shape).mT @ values.unflatten(1, shape))[:, :, 0]

    def _solve(self, onto: Tensor) -> Tensor:
        """`[b, n k, J]` w of equation (2), for J changes, given by X d0."""
        return self._eliminated(self._cornered(onto))

    def _eliminated(self, onto: Tensor) -> Tensor:
        """The same, given by X d0 with the blocks on the diagonal eliminated, where that is done."""
        if self._corner is None:
            assert self._pivots is not None
            return torch.linalg.lu_solve(self._system, self._pivots, onto)
        return torch.linalg.solve_triangular(self._system, onto, upper=False, unitriangular=True)

    def _eliminated_in_turn(self, onto: Tensor) -> Tensor:
        """The same for a change of each forcing in turn. Where no state looks ahead, a change leaves the nodes before it alone,
        and large systems are solved for some changes at a time, without those nodes."""
        if self._corner is None or onto.numel() <= NUMBERS // 2:
            return self._eliminated(onto)
        found, width = torch.zeros_like(onto), -(-onto.shape[2] // 3)
        for first in range(0, min(self._count, onto.shape[2]), width):
            left, block = slice(first * self._slots, None), slice(first, first + width)
            system = self._system[:, left, left]
            found[:, left, block] = torch.linalg.solve_triangular(system, onto[:, left, block], upper=False, unitriangular=True)
        return found

    def _cornered(self, onto: Tensor) -> Tensor:
        """Products with X `[b, n k, J]`, with the blocks on the diagonal eliminated, where that is done."""
        if self._corner is None:
            return onto
        return (self._corner @ onto.unflatten(1, (self._count, self._slots))).flatten(1, 2)

    def _on_sample(self, weights: Tensor) -> Tensor:
        """`[b, J, n k]` weights of U in the sample, by those w `[b, n k, J]` of equation (2)."""
        reached = self._influence[-1, : self._count].repeat_interleave(self._slots, output_size=self._count * self._slots)
        return (weights * reached[:, None]).mT

    def _parts(self, states: Tensor, rows: int = 0) -> Iterator[slice]:
        """Stretches of states `[.., b, d]`, short enough for so many rows, and for the pairs where they have to be gathered."""
        gathered = 0 if self._pairs is None or self._pairs.rows is None else self._pairs.cross.shape[1]
        return stretches(states.shape, max(gathered, rows, 1))

    def _x(self, part: slice) -> Tensor:
        """X `[b, n k, w]` on a stretch."""
        assert self._pairs is not None
        return in_slots(self._pairs.dx if self._kept is None else self._kept[0], self._pairs.rows, part)

    def _u(self, part: slice) -> Tensor:
        """U `[b, n k, w]` on a stretch."""
        assert self._pairs is not None
        return in_slots(self._pairs.du if self._kept is None else self._kept[1], self._pairs.rows, part)

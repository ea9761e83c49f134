# SPDX-License-Identifier: Apache-2.0
"""The linearized collocation system: how its states and the sample change with its forcings.

With the secant pairs of node n as rows of X[n] and U[n], its forcing follows a change d of its state by

    W[n]^T X[n] d,      W[n] = K[n] U[n],      K[n] = (X[n] X[n]^T + lambda diag(X[n] X[n]^T))^-1                   (1)

(methods/secant.py, equation (1), without a slope). States follow the forcings by R of system.py. So if states change by d0
before any forcing follows, the products c[n] = X[n] d[n] of all nodes together solve

    c[n] = X[n] d0[n] + sum_q R[n,q] X[n] W[q]^T c[q].                                                             (2)

At order 0 no state looks ahead, and (2) is triangular but for the blocks of R[n,n], which are eliminated first. Long states are
worked on in stretches (stretch.py), so that nothing of the size of all pairs is copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from paradiff.chain.step import uploaded
from paradiff.methods.collocation.pairs import Pairs
from paradiff.methods.secant import DAMPING
from paradiff.methods.stretch import NUMBERS, stretches, total


class Moves:
    """Changes of M states, found where they are needed: beside long states there is no room for them.

    Args:
        states: `[M, b, d]`.
        known: `[M, b, d]` what they were.

    Attributes:
        squares: `[M, b]` their sums of squares.
    """

    def __init__(self, states: Tensor, known: Tensor) -> None:
        self.states, self.known = states, known
        self._whole = None if states.numel() > NUMBERS else (states - known).transpose(0, 1)
        parts = stretches(states.shape, len(states))
        self.squares = total(torch.linalg.vector_norm(self(part), dim=2).square() for part in parts).mT

    def __call__(self, part: slice) -> Tensor:
        """`[b, M, w]` a stretch of them."""
        if self._whole is not None:
            return self._whole[..., part]
        return (self.states[:, :, part] - self.known[:, :, part]).transpose(0, 1)


class Linearization:
    """Equation (1) of system.py, linearized at the current forcings; b members, d numbers each.

    Args:
        influence: `[M+1, M]` weights of the forcings in the states and, last, in the sample.
        nodes: `[M]` fine nodes of the forcings.
        pairs: Secant pairs of n of them, k at most of each.
        uncertainty: Share of a change that stays uncertain along directions that the pairs cover, 0 to 1.
        causal: Whether no state depends on a forcing of a later node.
    """

    def __init__(self, influence: Tensor, nodes: Tensor, pairs: Pairs, uncertainty: float, *, causal: bool) -> None:
        self.nodes, self._influence, self._pairs, self._uncertainty = nodes, influence, pairs, uncertainty
        count = len(pairs.nodes)
        both = uploaded([*pairs.nodes, *itertools.chain.from_iterable(pairs.rows)], influence.device)  # in one copy
        self._at, self._rows = both[:count], both[count:].view(count, -1 if count else 0)
        self._short = pairs.dx[0].numel() * self._rows.numel() <= NUMBERS
        self._kept_x = self._kept_w = self._inverse = self._corner = None
        if not pairs.nodes:
            return
        own = total((x := self._x(part)) @ x.mT for part in self._parts())  # [b, n, k, k]
        diagonal = own.diagonal(dim1=2, dim2=3)
        damping = torch.diag_embed(DAMPING * diagonal + torch.where(diagonal > 0, 0.0, 1.0))
        self._inverse = torch.linalg.inv_ex(own + damping).inverse  # unlike `inv`, without a look at it from the host
        members, count, k = diagonal.shape
        cross = total(self._x(part).flatten(1, 2) @ self._w(part).mT for part in self._parts())
        cross = cross.view(members, count, k, count, k)
        reach = influence[self._at][:, self._at]
        if causal:
            corners = cross.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2) * reach.diagonal()[:, None, None]
            self._corner = torch.linalg.inv_ex(torch.eye(k, dtype=own.dtype, device=own.device) - corners).inverse
            cross, reach = (self._corner @ cross.flatten(3)).view_as(cross), reach.tril(-1)
        system = (cross * -reach[:, None, :, None]).view(members, count * k, count * k)
        if causal:
            self._system, self._pivots = system, None
        else:
            system.diagonal(dim1=1, dim2=2).add_(1)
            self._system, self._pivots = torch.linalg.lu_factor_ex(system)[:2]

    def follow(self, states: Tensor, known: Tensor) -> Tensor:
        """One Newton step: `[M+1, b, d]` states and sample with forcings that follow their states, in place of `states`.

        Args:
            states: `[M+1, b, d]` states and sample with the forcings as evaluated.
            known: `[M, b, d]` the states at which these were evaluated.
        """
        if self._inverse is None:
            return states
        onto = self._onto_own(Moves(states[:-1], known))
        weights = (self._influence[:, self._at, None] * self._solve(onto)[:, None, :, :, 0]).flatten(2)  # [b, M+1, n k]
        for part in self._parts(len(states)):
            states[:, :, part] += (weights @ self._w(part)).transpose(0, 1)
        return states

    def staleness(self, moves: Moves, constants: Tensor) -> tuple[Tensor, Tensor]:
        """How far the sample may be off since the states of nodes changed: `[M]` mean squares by each node, and `[1]` that by
        all together. The part of a change along directions of the pairs is known but for `uncertainty`.

        Args:
            moves: The changes.
            constants: `[M, b]` Lipschitz constants of the forcings.
        """
        count, members, size = moves.states.shape
        last, factors, z, c = self._influence[-1], constants.mT[:, :, None], None, None
        if self._inverse is not None:
            z = (1 - self._uncertainty) * (self._inverse @ self._onto_own(moves)).mT  # [b, n, 1, k]

        def stale(part: slice) -> Tensor:
            if z is None:
                return factors * moves(part)
            found = moves(part).clone()
            found[:, self._at] -= (z @ self._x(part))[:, :, 0]
            return found.mul_(factors)

        if self._inverse is not None:
            onto = total(self._x(part).flatten(1, 2) @ stale(part).mT for part in self._parts(count))
            c = self._sample_weights(onto * self._influence[self._at].repeat_interleave(self._inverse.shape[2], 0))
        each, together = factors.new_zeros(members, count), factors.new_zeros(members)
        for part in self._parts(count):
            effect = last[:, None] * stale(part)
            if c is not None:
                effect += c @ self._w(part)
            each += effect.square().sum(2)
            together += effect.sum(1).square().sum(1)
        return (each / size).amax(0), (together / size).amax(0, keepdim=True)

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
        reach, source, c = influence.repeat(1, len(steps)), source.flatten(), None
        if self._inverse is not None:
            onto = total(self._x(part).flatten(1, 2) @ defects[:, :, part].permute(1, 2, 0) for part in self._parts(count))
            rows = reach[self._at].repeat_interleave(self._inverse.shape[2], 0)
            c = self._sample_weights(onto[:, :, source] * ratio[:, None] * rows)
        sums = defects.new_zeros(members, len(source))
        for part in self._parts(len(source)):
            effect = defects[:, :, part].transpose(0, 1)[:, source] * (reach[-1] * ratio)[:, :, None]
            if c is not None:
                effect += c @ self._w(part)
            sums += effect.square().sum(2)
        return (sums / size).amax(0).view(len(steps), count).mean(0)

    def _onto_own(self, moves: Moves) -> Tensor:
        """`[b, n, k, 1]` products of the pairs with the change of their own node."""
        return total(self._x(part) @ moves(part)[:, self._at, :, None] for part in self._parts())

    def _sample_weights(self, onto: Tensor) -> Tensor:
        """`[b, J, n k]` weights of the rows of W in the sample, for products `[b, n k, J]` of all pairs with J changes."""
        assert self._inverse is not None
        members, count, k, _ = self._inverse.shape
        c = self._solve(onto.view(members, count, k, -1))
        return (c * self._influence[-1][self._at, None, None]).flatten(1, 2).mT

    def _solve(self, onto: Tensor) -> Tensor:
        """`[b, n, k, J]` c of equation (2), for J changes, given by X d0."""
        if self._corner is None:
            assert self._pivots is not None
            return torch.linalg.lu_solve(self._system, self._pivots, onto.flatten(1, 2)).view_as(onto)
        onto = (self._corner @ onto).flatten(1, 2)
        c = torch.linalg.solve_triangular(self._system, onto, upper=False, unitriangular=True)
        return c.view(*self._corner.shape[:3], -1)

    def _parts(self, rows: int = 0) -> Iterator[slice]:
        """Stretches short enough for the pairs and so many other rows."""
        return stretches(self._pairs.dx.shape, max(self._rows.numel(), rows, 1))

    def _x(self, part: slice) -> Tensor:
        """X `[b, n, k, w]` on a stretch; kept where states are short."""
        if self._short and self._kept_x is None:
            self._kept_x = self._gathered(self._pairs.dx)
        return self._gathered(self._pairs.dx[:, :, part]) if self._kept_x is None else self._kept_x[..., part]

    def _w(self, part: slice) -> Tensor:
        """W `[b, n k, w]` on a stretch; kept where states are short."""
        assert self._inverse is not None
        if self._short and self._kept_w is None:
            self._kept_w = (self._inverse @ self._gathered(self._pairs.du)).flatten(1, 2)
        if self._kept_w is not None:
            return self._kept_w[..., part]
        return (self._inverse @ self._gathered(self._pairs.du[:, :, part])).flatten(1, 2)

    def _gathered(self, rows: Tensor) -> Tensor:
        """Rows `[S+1, b, w]` of pairs as `[b, n, k, w]`, in the dtype of the coefficients."""
        return rows[self._rows].to(self._influence.dtype).permute(2, 0, 1, 3)

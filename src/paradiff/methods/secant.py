# SPDX-License-Identifier: Apache-2.0
"""Secant pairs: a low-rank correction of the network's Jacobian from earlier sweeps.

A sweep evaluates the network again at nodes that it evaluated before, at other states. Between two sweeps the state of node n
changed by dx[n] and its output by dm[n], so the output's true derivative J[n] satisfies J dx = dm. The slope G (chain/slope.py)
is one number a node; a few such pairs correct it where the states have really been moving. With the pairs of node n as columns
of DX[n] and DM[n], the model of its output is

    dm = s d + (DM - s DX) K DX^T d,      K = (DX^T DX + lambda diag(DX^T DX))^-1,                             (1)

a multisecant quasi-Newton model (Broyden's second method on k pairs, damped), with s the slope implied by G. Put into equation
(1) of chain/slope.py, and with L = (I - G)^-1, the changes d of the window's states satisfy

    d = L r + L (a - G) DX y + L b DM y,      y[n] = K[n] DX[n]^T d[n].                                         (2)

Since y[n] acts on later nodes only, the inner products c[n] = DX[n]^T d[n] solve a triangular system of W k unknowns,

    c[n] = DX[n]^T (L r)[n] + sum_{q<n} ( (L(a-G))[n,q] DX[n]^T DX[q] + (Lb)[n,q] DX[n]^T DM[q] ) K[q] c[q],    (3)

whose matrix is one batched product of all pairs with each other. Nothing here loops over nodes or waits for the device. A wide
window is solved stretch by stretch (methods/window/update.py), so that the matrix does not grow with it: equation (3) is
triangular, and what an earlier stretch found enters the next one as known changes.

A node whose predecessors do not change gets exactly its step, as with a slope alone. Images that share a window have pairs of
their own. Memory: 2 k + 2 states a node of the window.

Of a network that answers alike under a known group of transformations, as one of molecules does that are turned, the derivative
is known in the group's directions without another sweep: with generators E, J E x = E m. These make further pairs of each node,
dx = E x and dm = E m (`Symmetry`), which cost as much memory as others. They need not hold exactly, as no pair has to. Nor do
those of the nodes before, which a node may use beside its own (`neighbours`): near each other, outputs answer alike. As
they are of other noise levels, lambda may be larger for these (`damping`), so that a node trusts its own more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DAMPING = 1e-2  # lambda of equation (1): bounds the inverse where pairs are nearly parallel
MOST_PAIRS = 1000  # that a method may ask for: states have no more directions in which they move than sweeps are made


Symmetry = Callable[[Tensor], Tensor]
"""`symmetry(values) -> changes`: what the g generators of a group make of states, or outputs, `[W, ...]`: `[W, g, ...]`."""


class Reach(NamedTuple):
    """How changes of a node of a stretch reach the nodes after its first.

    Attributes:
        states: `[W, W]` L (a - G), for a change of the state beyond what the slope says.
        outputs: `[W, W]` L b, for one of the output.
        elements: `[d]` 1 for the elements of a state of which this is so, else 0; None for all.
    """

    states: Tensor
    outputs: Tensor
    elements: Tensor | None = None


class Secants:
    """The pairs of one sample's window.

    Args:
        pairs: Pairs kept for each node, k; the newest.
        resolution: Relative precision of the network's outputs; a pair is kept if its state changed by 64 times that or more.
        shared_window: Whether a state is a batch `[b, ...]` of members with pairs of their own.
        symmetry: A group under which the network answers alike; None for none.
        neighbours: From how many nodes before it a node has the pairs, too.
        damping: Lambda of those.
        lends: Whether `corrections` takes the pairs of the last node before that has some for those of a node without, as in
            narrow windows nodes are that pass after one sweep. It may have left the window in the last sweep.
    """

    def __init__(
        self,
        pairs: int,
        resolution: float,
        shared_window: bool,
        symmetry: Symmetry | None = None,
        neighbours: int = 0,
        damping: float = DAMPING,
        lends: bool = False,
    ) -> None:
        self._symmetry, self._neighbours, self._damping = symmetry, neighbours, damping
        self._pairs, self._least, self._shared = pairs, 64 * resolution, shared_window
        self._seen: tuple[Tensor, Tensor] | None = None  # states and outputs of the last sweep, [n, b, d]
        self._dx = self._dm = torch.empty(0)  # [n, k, b, d] differences of states and of outputs, the newest first
        self._known: tuple[Tensor, Tensor] | None = None  # [n, g, b, d] those that the symmetry knows of
        self._lends = lends
        self._beside: tuple[Tensor, Tensor] | None = None  # those of the window with the lent ones, where they were asked for
        self._left: tuple[Tensor, Tensor] | None = None  # [1, k, b, d] the last pairs of the nodes that left in the last sweep

    def observe(self, states: Tensor, outputs: Tensor) -> None:
        """Takes a sweep's states `[W, ...]` and outputs, from the window's first node on."""
        x, m = self._split(states), self._split(outputs)
        width, b, d = x.shape
        if self._seen is None:
            self._seen = x[:0], m[:0]
            self._dx = self._dm = x.new_zeros(0, self._pairs, b, d)
        known = min(len(self._seen[0]), width)
        missing = x.new_zeros(width - len(self._dx), self._pairs, b, d) if width > len(self._dx) else self._dx[:0]
        dx, dm = (torch.cat([v[:width], missing]) for v in (self._dx, self._dm))
        moved = x[:known] - self._seen[0][:known]
        told = m[:known] - self._seen[1][:known]
        large = moved.square().sum(2) > self._least**2 * x[:known].square().sum(2)
        for kept, fresh in ((dx, moved), (dm, told)):
            pushed = torch.cat([fresh[:, None], kept[:known, :-1]], dim=1)
            kept[:known] = torch.where(large[:, None, :, None], pushed, kept[:known])
        self._keep((x.clone(), m.clone()), dx, dm)
        if self._symmetry is not None:
            self._known = self._changes(self._symmetry, states), self._changes(self._symmetry, outputs)

    def _changes(self, symmetry: Symmetry, values: Tensor) -> Tensor:
        """`[W, g, b, d]` what the generators make of values."""
        found = symmetry(values)
        return self._ways(found).permute(0, 3, 1, 2)

    def _pairs_of(self, begin: int, count: int, lent: bool = False) -> tuple[Tensor, Tensor]:
        """All pairs of some nodes of the window, `[count, k, b, d]` each; with those that are lent, if so."""
        part, found = slice(begin, begin + count), [self._lent() if lent else (self._dx, self._dm)]
        if self._known is not None:
            found.insert(0, self._known)
        for back in range(1, self._neighbours + 1):
            found.append((_after(self._dx, back), _after(self._dm, back)))
        if len(found) == 1:
            return found[0][0][part], found[0][1][part]
        dx, dm = (torch.cat([values[part] for values in kind], 1) for kind in zip(*found, strict=True))
        return dx, dm

    def _jacobian(self, dx: Tensor, dm: Tensor, reach: Sequence[Reach]) -> SecantJacobian:
        """That of all pairs of some nodes, of which the last ones are those of the nodes before."""
        return SecantJacobian(dx, _terms(reach, dx, dm), self._neighbours * self._pairs, self._damping)

    def _keep(self, seen: tuple[Tensor, Tensor], dx: Tensor, dm: Tensor) -> None:
        """Replaces what is kept."""
        self._seen, self._dx, self._dm = seen, dx, dm
        self._beside = None

    def correction(
        self, change: Tensor, reach: Sequence[Reach], *, begin: int = 0, first: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the pairs add to the changes of the nodes after the first of a stretch of the window, `[W, ...]`; and the
        states DX y and outputs DM y of its nodes from the first on that do so, `[W, ...]` each.

        Args:
            change: `[W, ...]` their changes by the slope alone, L r.
            reach: How changes at a node of the stretch reach the nodes after the first, for each kind of elements.
            begin: Number of the stretch's first node in the window.
            first: `[...]` change of that node; None for none.
        """
        d, (dx, dm) = self._split(change), self._pairs_of(begin, len(change))
        known = torch.zeros_like(d[:1]) if first is None else self._split(first[None])
        before = torch.cat([known, d[:-1]])  # [W, b, d] changes of the nodes from the first
        y = self._jacobian(dx, dm, reach)(before)
        of_states, of_outputs = ((v * y).sum(1).flatten(1) for v in (dx, dm))  # [W, b d]
        added = _added(reach, of_states, of_outputs)
        return added.view_as(change), of_states.view_as(change), of_outputs.view_as(change)

    def corrections(
        self, change: Tensor, reach: Sequence[Reach], *, begin: int, first: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same for several changes at once, `[W, w, ...]`; `first` is `[w, ...]`."""
        count = len(change)
        d = self._ways(change)
        dx, dm = self._pairs_of(begin, count, self._lends)
        y = self._jacobian(dx, dm, reach)(torch.cat([self._ways(first[None]), d[:-1]]))
        of_states, of_outputs = (v.permute(0, 2, 3, 1) @ y.transpose(1, 2) for v in (dx, dm))  # [W, b, d, w]
        ways = change.shape[1]
        added = _added(reach, of_states.flatten(1), of_outputs.flatten(1), ways)
        found = (added.view_as(d), of_states, of_outputs)
        one, two, three = (v.permute(0, 3, 1, 2).reshape(change.shape) for v in found)
        return one, two, three

    def _ways(self, values: Tensor) -> Tensor:
        """`[W, b, d, w]` of `[W, w, ...]`."""
        flat = values.flatten(3) if self._shared and values.ndim > 3 else values.flatten(2)[:, :, None]
        return flat.permute(0, 2, 3, 1)

    def _lent(self) -> tuple[Tensor, Tensor]:
        """`[n, k, b, d]` the pairs of the window's nodes, with those of the last node before for one that has none."""
        if self._beside is not None:
            return self._beside
        own, none = (self._dx, self._dm), self._dx.new_zeros(1, *self._dx.shape[1:])
        dx, dm = (torch.cat([a, b]) for a, b in zip(self._left or (none, none), own, strict=True))
        places = torch.arange(len(dx), device=dx.device)[:, None]
        last = torch.where(dx[:, 0].square().sum(2) > 0, places, 0).cummax(0).values[1:]  # [n, b]
        members = torch.arange(dx.shape[2], device=dx.device)
        self._beside = dx[last, :, members].transpose(1, 2), dm[last, :, members].transpose(1, 2)
        return self._beside

    def _let_go(self, passed: int) -> None:
        """Keeps the last pairs of `passed` nodes, which are to leave the window, where pairs are lent."""
        if self._lends and self._seen is not None:
            dx, dm = self._lent()
            self._left = dx[passed - 1 : passed].clone(), dm[passed - 1 : passed].clone()

    def advance(self, passed: int) -> None:
        """Drops the pairs of `passed` nodes, which left the window."""
        self._let_go(passed)
        self._leave(slice(passed, None))

    def keep(self, count: int) -> None:
        """Drops the pairs of all nodes but the first `count`."""
        self._leave(slice(count))

    def _leave(self, part: slice) -> None:
        """Leaves the pairs of a part of the nodes."""
        if self._seen is not None:
            self._keep((self._seen[0][part], self._seen[1][part]), self._dx[part], self._dm[part])
        if self._known is not None:
            self._known = self._known[0][part], self._known[1][part]

    def _split(self, values: Tensor) -> Tensor:
        """`[W, b, d]`."""
        return values.flatten(2) if self._shared and values.ndim > 2 else values.flatten(1)[:, None]


def _after(values: Tensor, back: int) -> Tensor:
    """`[n, ...]` the values of the nodes `back` before each, zeros where there are none."""
    back = min(back, len(values))
    return torch.cat([torch.zeros_like(values[:back]), values[: len(values) - back]])


def _terms(reach: Sequence[Reach], dx: Tensor, dm: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What a change of a node reaches, for `SecantJacobian`: from node q to node n, both counted from the first."""
    found = []
    for kind in reach:
        for part, values in ((kind.states, dx), (kind.outputs, dm)):
            below = torch.cat([torch.zeros_like(part[:1]), part[:-1]])
            found.append((below, values if kind.elements is None else values * kind.elements))
    return found


def _added(reach: Sequence[Reach], states: Tensor, outputs: Tensor, ways: int = 1) -> Tensor:
    """`[W, d w]` what changes of states and outputs `[W, d w]` make of the nodes after, w at once."""
    added = [kind.states @ states + kind.outputs @ outputs for kind in reach]
    if len(reach) == 1:
        return added[0]
    parts = [
        one if kind.elements is None else one * kind.elements.repeat_interleave(ways)
        for kind, one in zip(reach, added, strict=True)
    ]
    return torch.stack(parts).sum(0)


class LastPair(Secants):
    """The pair of the last two sweeps alone, which is let go of where nodes pass: 2 states a node between sweeps.

    Args:
        resolution: As of `Secants`.
        shared_window: As of `Secants`.
        lends: As of `Secants`.
    """

    def __init__(self, resolution: float, shared_window: bool, lends: bool = False) -> None:
        super().__init__(1, resolution, shared_window, lends=lends)

    def observe(self, states: Tensor, outputs: Tensor) -> None:
        """Takes a sweep's states `[W, ...]` and outputs, from the window's first node on."""
        x, m = self._split(states), self._split(outputs)
        before = (x[:0], m[:0]) if self._seen is None else self._seen
        known = min(len(before[0]), len(x))
        moved, told = torch.zeros_like(x), torch.zeros_like(m)
        torch.sub(x[:known], before[0][:known], out=moved[:known])
        torch.sub(m[:known], before[1][:known], out=told[:known])
        large = (moved.square().sum(2) > self._least**2 * x.square().sum(2))[..., None]
        self._keep((x.clone(), m.clone()), *((large * v)[:, None] for v in (moved, told)))

    def advance(self, passed: int) -> None:
        """Keeps the last sweep's states and outputs of the nodes that stay."""
        assert self._seen is not None
        self._let_go(passed)
        nothing = self._dx.new_empty(0)
        self._keep((self._seen[0][passed:], self._seen[1][passed:]), nothing, nothing)


class SecantJacobian:
    """The low-rank part of the Jacobian of a set of states, from secant pairs: equation (2), for any reach.

    Args:
        dx: `[n, k, b, d]` differences of states, k pairs at each of n nodes; zeros where there is none.
        terms: Reach `[n, n]`, strictly lower triangular, and values `[n, k, b, d]`: node i's state changes by
            sum_j reach[i,j] sum_k values[j,k] y[j,k], y[j,k] being the coefficient of pair k in the change of state j.
        near: How many of the k pairs, the last ones, are those of nodes before.
        near_damping: Lambda of those.
    """

    def __init__(
        self, dx: Tensor, terms: Sequence[tuple[Tensor, Tensor]], near: int = 0, near_damping: float = DAMPING
    ) -> None:
        n, k, b, size = dx.shape
        self._x = dx.permute(2, 0, 1, 3)  # [b, n, k, d]
        own = self._x @ self._x.mT
        diagonal = own.diagonal(dim1=2, dim2=3)
        damping = DAMPING * diagonal
        damping[..., k - near :] = near_damping * diagonal[..., k - near :]
        damped = own + torch.diag_embed(damping + (~(diagonal > 0)).to(diagonal.dtype))
        self._inverse = torch.linalg.inv_ex(damped).inverse  # unlike `inv`, without a look at it from the host
        flat, system = self._x.reshape(b, n * k, size), dx.new_zeros(b, n, k, n, k)
        for reach, values in terms:
            answers = (self._inverse @ values.permute(2, 0, 1, 3)).view(b, n * k, size)
            system.addcmul_((flat @ answers.mT).view_as(system), reach[:, None, :, None], value=-1)
        self._system = system.view(b, n * k, n * k)  # its unit diagonal is not looked at

    def __call__(self, before: Tensor) -> Tensor:
        """`[n, k, b, w]` y for w changes of the states `[n, b, d, w]` as far as no pair has a part in them; w is 1 for
        `[n, b, d]`."""
        onto = self._x @ (before if before.ndim == 4 else before[..., None]).transpose(0, 1)
        c = torch.linalg.solve_triangular(self._system, onto.flatten(1, 2), upper=False, unitriangular=True)
        return (self._inverse @ c.view_as(onto)).permute(1, 2, 0, 3)

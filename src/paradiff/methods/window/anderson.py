# SPDX-License-Identifier: Apache-2.0
"""Triangular Anderson acceleration: the update of ParaTAA (methods/parataa.py says what for).

Let r[n] be the residuals of a sweep (equation (1) of solver.py) and x[n+1] the states before it. The order-k equations carry a
residual over k nodes: with L = (I - G)^-1 of the window cut to its first k diagonals, the plain sweep is

    x[n+1] <- x[n+1] + R[n],        R = L_k r,                                                                    (1)

for G = `freeze_epsilon` and tables of one step the fixed point of the k-fold unrolled recurrence. From the last m sweeps each
node knows differences DX of its states and DR of its R, one column a pair of sweeps in turn, and takes

    x[n+1] <- x[n+1] + R[n] - (DX[n] + DR[n]) g[n],                                                               (2)
    g[n] = ( sum_{p<=n} DR[p]^T DR[p] + lambda I )^-1 sum_{p<=n} DR[p]^T R[p].                                     (3)

The sums run over the nodes of the window up to n only, since no node depends on later ones: that is what "triangular" means,
and one cumulative sum makes all of them. The safeguard leaves out (2) up to the first node whose residual is above its bound:
these nodes take (1), so that the window's first k nodes are exact after k sweeps, whatever was mixed.

Nothing here loops over nodes or waits for the device. Memory: 2 (m - 1) + 2 states a node of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.slope import inverse
from paradiff.methods.window.mixing import HISTORY
from paradiff.methods.window.setup import WindowSetup


class AndersonUpdate:
    """Equations (1) to (3) for one sample.

    Args:
        setup: What all samples share; its method has an `anderson`.
    """

    def __init__(self, setup: WindowSetup) -> None:
        mixing = setup.method.anderson
        assert mixing is not None
        assert setup.residual_bound is not None
        self._setup, self._mixing = setup, mixing
        self._bound = setup.move(torch.tensor(setup.residual_bound, dtype=torch.float64)).square()
        self._order = setup.width if mixing.order is None else mixing.order
        self._pairs = (min(HISTORY, setup.width) if mixing.history is None else mixing.history) - 1
        self._last: tuple[Tensor, Tensor] | None = None  # states [n, b, d] before the last sweep, and R there
        self._dx = self._dr = torch.empty(0)  # [n, m - 1, b, d] their differences, the newest first
        self._carried = torch.empty(0)  # [n, ...] the residuals of the last sweep, carried along the window
        self._limit: Tensor | None = None  # the largest mean square residual that is taken for no divergence
        self._mixes = torch.ones((), dtype=torch.bool, device=setup.device)

    @property
    def fell_back(self) -> bool:
        """Whether the mixing was given up; waits for the device."""
        return not bool(self._mixes)

    def observe(self, states: Tensor, outputs: Tensor) -> None:
        """Nothing is learnt from the network's outputs."""

    def __call__(self, lo: int, hi: int, phi: Tensor, old: Tensor) -> Tensor:
        """`[W, ...]` the new states of the nodes after the first; a single node takes its step."""
        residual = phi - old
        self._carried = residual
        if len(phi) == 1:
            return phi
        plain = self._plain(lo, hi, phi, residual)
        if self._pairs == 0:
            return plain
        x, r, change = (self._setup.step.members(v) for v in (old, residual, plain - old))
        self._watch(residual)
        self._remember(x, change)
        mixed = self._setup.step.members(plain) - (self._coefficients(change)[..., None] * (self._dx + self._dr)).sum(1)
        settled = (r.square().mean(2) <= self._bound[lo:hi, None]).to(torch.int64).cumprod(0)  # 1 up to the first that is not
        before = torch.cat([torch.ones_like(settled[:1]), settled[:-1]])
        takes = (before == 0) & self._mixes & torch.isfinite(mixed).all(2)
        return torch.where(takes[..., None], mixed, self._setup.step.members(plain)).view_as(phi)

    def distance(self, new: Tensor, phi: Tensor, old: Tensor) -> Tensor:
        """The residuals carried along the whole window, whatever the order: what lies beyond k nodes is an error, too."""
        return self._carried

    def advance(self, passed: int) -> None:
        """Drops the history of the nodes that passed."""
        if self._last is not None:
            self._last = self._last[0][passed:], self._last[1][passed:]
            self._dx, self._dr = self._dx[passed:], self._dr[passed:]

    def keep(self, count: int) -> None:
        """Its history is of all nodes of the window."""
        self.forget()

    def forget(self) -> None:
        """A state overflowed: plain sweeps go on."""
        self._last = None
        self._mixes = torch.zeros_like(self._mixes)

    def _plain(self, lo: int, hi: int, phi: Tensor, residual: Tensor) -> Tensor:
        """Equation (1), `[W, ...]`; keeps the residuals carried along the whole window."""
        whole = inverse(self._setup.slope[lo:hi])
        flat = residual.flatten(1)
        self._carried = (self._setup.move(whole) @ flat).view_as(phi)
        reached = self._setup.move(whole.tril(-1).triu(1 - self._order))
        return torch.addmm(phi.flatten(1), reached, flat).view_as(phi)

    def _watch(self, residual: Tensor) -> None:
        """Gives the mixing up once the residuals are far above those of the first sweep, or are not finite."""
        size = residual.square().mean()
        if self._limit is None:
            self._limit = self._mixing.divergence**2 * size
        self._mixes = self._mixes & (size <= self._limit)

    def _remember(self, x: Tensor, change: Tensor) -> None:
        """Puts the newest differences before those of the nodes that were swept before; nodes that are new have none."""
        width, members, size = x.shape
        if self._last is None:
            self._last = x[:0], x[:0]
            self._dx = self._dr = x.new_zeros(0, self._pairs, members, size)
        known = min(len(self._last[0]), width)
        kept = []
        for pairs, now, last in zip((self._dx, self._dr), (x, change), self._last, strict=True):
            fresh = torch.cat([(now[:known] - last[:known])[:, None], pairs[:known, :-1]], 1)
            kept.append(torch.cat([fresh, x.new_zeros(width - known, self._pairs, members, size)]))
        self._dx, self._dr = kept
        self._last = x.clone(), change

    def _coefficients(self, change: Tensor) -> Tensor:
        """`[W, m - 1, b]` g of equation (3), for R `[W, b, d]`; 0 where a node has no difference."""
        pairs = self._dr.permute(0, 2, 1, 3)  # [W, b, m - 1, d]
        gram = (pairs @ pairs.mT).cumsum(0)
        right = (pairs @ change[..., None]).cumsum(0)
        known = self._dx.square().sum(3).permute(0, 2, 1) > 0  # [W, b, m - 1]
        gram = gram * (known[..., None] & known[..., None, :]) + self._mixing.ridge * torch.eye(
            self._pairs, dtype=gram.dtype, device=gram.device
        )
        found = torch.linalg.solve_ex(gram, right * known[..., None]).result
        return found[..., 0].permute(0, 2, 1) * known.permute(0, 2, 1)

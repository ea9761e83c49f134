# SPDX-License-Identifier: Apache-2.0
"""The update of quasi-DEER: Newton's step with the diagonal of the steps' own derivatives.

With J[n] an estimate of the diagonal of the output's derivative at node n, elementwise,

    G[n,j] = a[n,j] + b[n,j] J[n-j],        delta[n+1] = r[n] + sum_j G[n,j] delta[n-j],        x <- x + delta.          (1)

For tables of one step (1) is an elementwise linear recurrence, which a scan solves in log2(W) products of the window; for
others it is solved node by node.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.table import column
from paradiff.methods.window.setup import WindowSetup
from paradiff.methods.window.update import NewtonUpdate


class DiagonalUpdate:
    """Equation (1) for one sample.

    Args:
        setup: What all samples share.
        divergence: Ratio of a sweep's root mean square residual to the first one's at which the diagonal is given up.

    Attributes:
        jacobian: `[W, ...]` J of the window's nodes; set before each sweep.
    """

    def __init__(self, setup: WindowSetup, divergence: float) -> None:
        self._divergence = divergence
        self._setup, self._plain = setup, NewtonUpdate(setup)
        self._a, self._b = setup.step.a, setup.step.b
        self._limit: Tensor | None = None
        self._trusted = torch.ones((), dtype=torch.bool, device=setup.device)
        self.jacobian: Tensor | None = None

    @property
    def fell_back(self) -> bool:
        """Whether the diagonal was given up; waits for the device."""
        return not bool(self._trusted)

    def observe(self, states: Tensor, outputs: Tensor) -> None:
        """Nothing is learnt but the diagonal, which is set."""

    def __call__(self, lo: int, hi: int, phi: Tensor, old: Tensor) -> Tensor:
        """`[W, ...]` the new states of the nodes after the first; a single node takes its step."""
        if len(phi) == 1 or self.jacobian is None:
            return self._plain(lo, hi, phi, old)
        residual = phi - old
        size = residual.square().mean()
        if self._limit is None:
            self._limit = self._divergence**2 * size
        carried = self._carried(lo, hi, residual)
        self._trusted = self._trusted & (size <= self._limit) & torch.isfinite(carried).all()
        return torch.where(self._trusted, phi + carried, self._plain(lo, hi, phi, old))

    def _carried(self, lo: int, hi: int, residual: Tensor) -> Tensor:
        """sum_j G[n,j] delta[n-j] of equation (1), `[W, ...]`; the window's first state does not change."""
        assert self.jacobian is not None
        band, jacobian = self._setup.table.band, self.jacobian
        lags = []
        for j in range(min(band, len(residual))):
            a, b = (column(v[lo + j : hi, j], residual) for v in (self._a, self._b))
            lags.append(a + b * jacobian[: hi - lo - j])  # [W - j, ...] of the steps from node lo + j on
        if band == 1:
            factor, delta, reach = lags[0].clone(), residual.clone(), 1
            factor[0] = 0
            while reach < len(delta):
                delta = torch.cat([delta[:reach], delta[reach:] + factor[reach:] * delta[:-reach]])
                factor = torch.cat([torch.zeros_like(factor[:reach]), factor[reach:] * factor[:-reach]])
                reach *= 2
            before = torch.cat([torch.zeros_like(delta[:1]), delta[:-1]])
            return lags[0] * before
        deltas, parts = [torch.zeros_like(residual[0])], []
        for n in range(len(residual)):
            parts.append(sum((lags[j][n - j] * deltas[n - j] for j in range(min(band, n + 1))), torch.zeros_like(residual[0])))
            deltas.append(residual[n] + parts[-1])
        return torch.stack(parts)

    def distance(self, new: Tensor, phi: Tensor, old: Tensor) -> Tensor:
        """The change."""
        return new - old

    def advance(self, passed: int) -> None:
        """Nothing is kept."""

    def keep(self, count: int) -> None:
        """Nothing is kept."""

    def forget(self) -> None:
        """A state overflowed: sweeps with the plain slope go on."""
        self._trusted = torch.zeros_like(self._trusted)

# SPDX-License-Identifier: Apache-2.0
"""Clouds of atoms in one of a few conformations, turned in any way: a distribution whose denoiser is known.

A cloud is R c[k] and normal deviations, with k drawn with equal weights and R uniformly from the rotations. Given x at noise
level sigma, with v = sigma^2 + deviation^2 and F[k] = x^T c[k]/v, R has the matrix Fisher distribution of F[k], and

    E[x0 | x] = ( deviation^2 x + sigma^2 sum_k w[k] E[R | F[k]] c[k] )/v,      w[k] ~ Z(F[k]) exp(-|c[k]|^2/(2 v)).       (1)

Z, the constant of that distribution, and its mean are integrals over one variable of the proper singular values s of F (Lee,
"Bayesian attitude estimation with the matrix Fisher distribution on SO(3)", IEEE Transactions on Automatic Control 2018, arXiv
1710.03746, theorem 2.1), which a sum over a grid that is even in its logarithm takes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POINTS = 400
"""Of the grid, from 1e-13 to 2."""

STEP = 3.8  # angstrom between atoms of a chain
STIFF = 0.7  # of a step's direction that the next one keeps


def walks(count: int, atoms: int, deviation: float, seed: int) -> Tensor:
    """`[count, atoms, 3]` random walks of steps that go on as they went, about their means, with a root mean square of
    `deviation` in each coordinate."""
    drawn = torch.randn(count, atoms, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    steps = drawn.clone()
    for k in range(1, atoms):
        steps[:, k] = STIFF * steps[:, k - 1] + math.sqrt(1 - STIFF**2) * drawn[:, k]
    places = (STEP * steps / steps.norm(dim=2, keepdim=True)).cumsum(1)
    places = places - places.mean(1, keepdim=True)
    return places * deviation / places.square().mean((1, 2), keepdim=True).sqrt()


class Conformations:
    """Equation (1).

    Args:
        deviation: Of each coordinate of an atom, angstrom.
    """

    def __init__(self, deviation: float) -> None:
        self._square = deviation**2
        grid = torch.linspace(math.log(1e-13), math.log(2.0), POINTS, dtype=torch.float64)
        self._below = grid.exp()  # v = 1 - u of the integrals
        self._weight = self._below * (grid[1] - grid[0])
        self._weight[-1] /= 2

    def __call__(self, x: Tensor, t: Tensor, conformations: Tensor) -> Tensor:
        """`[R, A, 3]` the clean estimate of clouds `[R, A, 3]` about their means at the noise levels t `[R]`; conformations
        are `[R, K, A, 3]`."""
        own, c = x.double() - x.double().mean(1, keepdim=True), conformations.double()
        noise = t.double().square()
        total = noise + self._square
        mean, log_z = self._turned(torch.einsum("rai,rkaj->rkij", own, c) / total[:, None, None, None])
        shares = torch.softmax(log_z - c.square().sum((2, 3)) / (2 * total[:, None]), 1)
        placed = torch.einsum("rk,rkij,rkaj->rai", shares, mean, c)
        return ((self._square * own + noise[:, None, None] * placed) / total[:, None, None]).to(x)

    def _turned(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., 3, 3]` E[R | F], and `[...]` log Z(F)."""
        u, s, vt = torch.linalg.svd(f)
        proper = torch.ones_like(s)
        proper[..., 2] = (torch.linalg.det(u) * torch.linalg.det(vt)).sign()
        u, s = u * proper[..., None, :], s * proper
        means, log_z, whole = list[Tensor](), s.sum(-1), s.sum(-1)
        for k, (i, j) in enumerate(((1, 2), (0, 2), (0, 1))):
            less, more = ((s[..., i] - s[..., j]) / 2)[..., None], ((s[..., i] + s[..., j]) / 2)[..., None]
            near, far = less * self._below, more * (2 - self._below)
            exponent = near.abs() + far.abs() + s[..., k, None] * (1 - self._below) - whole[..., None]
            density = torch.special.i0e(near) * torch.special.i0e(far) * exponent.exp() * self._weight / 2
            z = density.sum(-1)
            means.append(1 - (density * self._below).sum(-1) / z)
            log_z = whole + z.log()
        return u @ torch.diag_embed(torch.stack(means, -1)) @ vt, log_z

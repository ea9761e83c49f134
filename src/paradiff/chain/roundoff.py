# SPDX-License-Identifier: Apache-2.0
"""How much of the rounding of a chain's states and outputs reaches its sample.

A step's sum is rounded at the largest of its terms, however small it is itself. With L the root mean square of a state, M that
of an output and eps the spacing of the dtype, step i leaves

    r[i] = eps max( L[i+1], |a[i,j]| L[i-j], |b[i,j]| M[i-j] )/2    over the j that it reads,                    (1)

or what a scheduler's own step was seen to leave (`Table.rounding`), if that is more: most add to a state as it is, so that one
from noise level 20,000 to 2 leaves an error of eps 20,000. Later steps carry it to the sample with
a factor w, that of Gaussian data of mean square V, whose network answers to a change of its state with the slope k:

    w[N] = 1,      w[n] = sum_j ( a[n+j,j] + b[n+j,j] k[n] ) w[n+j+1].                                           (2)

Roundings are independent, and a call in parallel and one in turn round both, so that about

    R = 4 ( sum_i ( w[i+1] r[i] )^2 )^(1/2)                                                                      (3)

is what the samples of both may differ by, with a caution of 2 for networks that answer more strongly. R is a few eps on nearly
all chains, and far above that where a few steps pass from levels of thousands to those of the data, or from signal levels of
1/1000.
"""

from __future__ import annotations

import math

from paradiff.chain.table import Table

CAUTION = 4.0  # tiny Stable Diffusion of random weights, 188 chains with R above 1e-5: in 28 samples differed by more than R

TOLD = 1e-5
"""R in the data's units from which on it is part of the estimates. It is below 2e-6 on chains of float32 whose levels change a
few times in a step."""


def roundoff(table: Table, eps: float, size: float = 1.0) -> float:
    """R of equation (3), in the data's units: for data of mean square 1, or of another one if that is more.

    Args:
        table: The chain.
        eps: Spacing of the states' dtype at 1.
        size: The data's mean square V.
    """
    return eps * max(table.cached(("roundoff", v), lambda v=v: _roundoff(table, v)) for v in (1.0, size))


def _roundoff(table: Table, size: float) -> float:
    """R of equation (3) at eps = 1."""
    steps, data = table.steps, math.sqrt(size)
    alpha, sigma, p, q = (v.tolist() for v in (table.alpha, table.sigma, table.p, table.q))
    level = [math.hypot(s * data, n) for s, n in zip(alpha, sigma, strict=True)]
    output = [math.hypot((1 - u * s) * data / v, u * n / v) for s, n, u, v in zip(alpha, sigma, p, q, strict=False)]
    slope = [(s * size / of**2 - u) / v if of > 0 else 0.0 for s, of, u, v in zip(alpha, level, p, q, strict=False)]
    a, b = table.a.tolist(), table.b.tolist()
    weight = [0.0] * steps + [1.0]
    for n in reversed(range(steps)):
        reads = range(min(table.band, steps - n))
        weight[n] = sum((a[n + j][j] + b[n + j][j] * slope[n]) * weight[n + j + 1] for j in reads)
    seen = [0.0] * steps if table.rounding is None else table.rounding.tolist()
    total = 0.0
    for i in range(steps):
        terms = [level[i + 1]]
        for j in range(min(table.band, i + 1)):
            terms += [abs(a[i][j]) * level[i - j], abs(b[i][j]) * output[i - j]]
        total += (weight[i + 1] * max(max(terms) / 2, seen[i])) ** 2
    return CAUTION * math.sqrt(total)

# SPDX-License-Identifier: Apache-2.0
"""How much of the rounding of a chain's states and outputs reaches its sample.

A step's sum is rounded at the largest of its terms, however small it is itself. With L the root mean square of a state, M that
of an output and eps the spacing of the dtype, step i leaves

    r[i] = eps max( L[i+1], |a[i,j]| L[i-j], |b[i,j]| M[i-j] )/2    over the j that it reads,                    (1)

or what a scheduler's own step was seen to leave of data of mean square 1 (`Table.rounding`), if that is more, times how much
larger the states and outputs of others are: most add to a state as it is, so that one from noise level 20,000 to 2 leaves an
error of eps 20,000. Later steps carry it to the sample with a factor w, that of Gaussian data of mean square V, whose network
answers to a change of its state with the slope k:

    w[N] = 1,      w[n] = sum_j ( a[n+j,j] + b[n+j,j] k[n] ) w[n+j+1].                                           (2)

Roundings are independent, and a call in parallel and one in turn round both, so that about

    R = 4 ( sum_i ( w[i+1] r[i] )^2 )^(1/2)                                                                      (3)

is what the samples of both may differ by, with a caution of 2 for networks that answer more strongly. Where guidance makes M
more, that counts; and where it makes slopes others by a share G of M/L, at one node of each error's way,

    w[n]^2 + ( G M/L sum_j b[n+j,j] w[n+j+1] )^2                                                                  (4)

takes the place of w[n]^2. R is a few eps on nearly all chains, and far above that where a few steps pass from levels of
thousands to those of the data, or from signal levels of 1/1000.
"""

from __future__ import annotations

import math

from paradiff.chain.table import Table

CAUTION = 4.0  # tiny Stable Diffusion of random weights, 188 chains with R above 1e-5: in 28 samples differed by more than R

TOLD = 1e-5
"""R in the data's units from which on it is part of the estimates. It is below 2e-6 on chains of float32 whose levels change a
few times in a step."""


def roundoff(
    table: Table, eps: float, size: float = 1.0, output: float = 0.0, apart: float = 0.0, *, states: bool = True
) -> float:
    """R of equation (3), in the data's units: for data of mean square 1, or of another one if that is more.

    Args:
        table: The chain.
        eps: Spacing of the states' dtype at 1.
        size: The data's mean square V.
        output: M where it is seen to be more than that of such data, as where guidance magnifies a network's rounding.
        apart: G of equation (4).
        states: Whether states are rounded so, too; else outputs alone.
    """
    seen = _power(output), _power(apart), states
    return eps * max(table.cached(("roundoff", v, *seen), lambda v=v: _roundoff(table, v, *seen)) for v in (1.0, size))


def _power(value: float) -> float:
    """The power of 2 from a number on; 0 for none."""
    return 2.0 ** math.ceil(math.log2(value)) if 0 < value < math.inf else 0.0


def _roundoff(table: Table, size: float, least: float, apart: float, states: bool) -> float:
    """R of equation (3) at eps = 1."""
    weight = _weights(table, size, apart)
    seen = [0.0] * table.steps if table.rounding is None or not states else table.rounding.tolist()
    terms, more = _largest_terms(table, size, least, states), _more(table, size)
    left = [max(term / 2, own * times) for term, own, times in zip(terms, seen, more, strict=True)]
    return CAUTION * math.sqrt(sum((w * r) * (w * r) for w, r in zip(weight[1:], left, strict=True)))


def _weights(table: Table, size: float, apart: float) -> list[float]:
    """`[N + 1]` w of equation (2), or what takes its place by equation (4)."""
    steps, level = table.steps, _levels(table, size)
    alpha, p, q = table.alpha.tolist(), table.p.tolist(), table.q.tolist()
    slope = [(s * size / of**2 - u) / v if of > 0 else 0.0 for s, of, u, v in zip(alpha, level, p, q, strict=False)]
    size_of = [m / of if of > 0 else 0.0 for m, of in zip(_outputs(table, size), level, strict=False)]
    a, b = table.a.tolist(), table.b.tolist()
    weight, found = [0.0] * steps + [1.0], [0.0] * steps + [1.0]
    for n in reversed(range(steps)):
        reads = range(min(table.band, steps - n))
        known = sum((a[n + j][j] + b[n + j][j] * slope[n]) * weight[n + j + 1] for j in reads)
        other = sum(b[n + j][j] * weight[n + j + 1] for j in reads) * apart * size_of[n]
        weight[n], found[n] = known, math.hypot(known, other)
    return found


def _largest_terms(table: Table, size: float, least: float, states: bool) -> list[float]:
    """`[N]` the largest term of each step, of outputs alone or of states too, twice r of equation (1) at eps = 1, for outputs
    of `least` or more."""
    level, output = _levels(table, size), _outputs(table, size)
    a, b = table.a.tolist(), table.b.tolist()
    found: list[float] = []
    for i in range(table.steps):
        terms = [level[i + 1] * states]
        for j in range(min(table.band, i + 1)):
            terms += [abs(a[i][j]) * level[i - j] * states, abs(b[i][j]) * max(output[i - j], least)]
        found.append(max(terms))
    return found


def _more(table: Table, size: float) -> list[float]:
    """`[N]` how many times as large as of data of mean square 1 the states are that a step reads and returns, or outputs."""
    level, output = (
        [now / one if one > 0 else 1.0 for now, one in zip(sizes(table, size), sizes(table, 1.0), strict=True)]
        for sizes in (_levels, _outputs)
    )
    return [max(level[i], level[i + 1], output[i], 1.0) for i in range(table.steps)]


def _levels(table: Table, size: float) -> list[float]:
    """`[N + 1]` L of each node, for data of mean square `size`."""
    data = math.sqrt(size)
    return [math.hypot(s * data, n) for s, n in zip(table.alpha.tolist(), table.sigma.tolist(), strict=True)]


def _outputs(table: Table, size: float) -> list[float]:
    """`[N]` M of each node, for data of mean square `size`."""
    data, levels = math.sqrt(size), (v.tolist() for v in (table.alpha, table.sigma, table.p, table.q))
    return [math.hypot((1 - u * s) * data / v, u * n / v) for s, n, u, v in zip(*levels, strict=False)]

# SPDX-License-Identifier: Apache-2.0
"""The shortfall of a chain: how much less noise its states hold than their levels say.

With the clean datum known, a state's noise after step i is

    n[i+1]^2 = g[i]^2 n[i]^2 + c[i]^2,      n[0] = sigma[0],                                                   (1)

g[i] being the noise that the step makes of one of its state. It is sigma[i+1] for chains that follow their levels; those whose
noise is scaled down (samplers/temperature.py) hold less, and the network is shown states that it takes for noisier ones.
"""

from __future__ import annotations

from paradiff.chain.table import Table


def shortfall(table: Table) -> float:
    """1 less the smallest n/sigma of (1), 0 to 1; 0 for deterministic chains, and for those of several stages or steps."""
    if not table.stochastic or table.exact_variance or table.band != 1:
        return 0.0
    return table.cached(("shortfall",), lambda: _shortfall(table))


def _shortfall(table: Table) -> float:
    gains = (table.a[:, 0] - table.b[:, 0] * table.p / table.q).tolist()
    noise, least = float(table.sigma[0]), 1.0
    for gain, added, level in zip(gains, table.c.tolist(), table.sigma[1:].tolist(), strict=True):
        noise = ((gain * noise) ** 2 + added**2) ** 0.5
        if level > 0:
            least = min(least, noise / level)
    return 1 - least

# SPDX-License-Identifier: Apache-2.0
"""The volatility of a chain: how much noise it adds on its way, beside the noise that it takes away in all.

Step i lands at the noise ratio r[i] = sigma/alpha before its noise and at s[i] >= r[i] after it; where less noise is added than
the level says (`s_noise` below 1), s[i] is that of the level, to which the network answers. Over the steps that add noise,

    volatility = sum_i log(s[i]/r[i]) / sum_i log(s[i-1]/s[i]).

It is 0 for deterministic chains, 1 for ancestral ones (`ddpm`, `euler_ancestral`), whatever their length, and above 1 where
noise is added that later steps have to take away again, as by churn (arXiv 2206.00364).
"""

from __future__ import annotations

import math

import torch

from paradiff.chain.table import Table, landed


def volatility(table: Table) -> float:
    """The volatility of a chain; infinite where a chain adds noise without taking any away.

    Args:
        table: The chain.
    """
    return table.cached(("volatility",), lambda: _volatility(table))


def _volatility(table: Table) -> float:
    ray, noise = landed(table.a, table.b, torch.zeros_like(table.c), table.alpha, table.sigma, table.p, table.q).abs().T
    ratio = table.sigma / table.alpha
    counted = (table.c > 0) & (noise > 0) & (ray > 0) & torch.isfinite(ratio[:-1]) & (ratio[1:] > 0)
    if not bool(counted.any()):
        return 0.0
    after = torch.maximum(torch.hypot(noise, table.c) / ray, ratio[1:])
    added = (after * ray / noise).log()[counted].sum()
    taken = (ratio[:-1] / ratio[1:]).log()[counted].sum()
    return float(added / taken) if float(taken) > 0 else math.inf

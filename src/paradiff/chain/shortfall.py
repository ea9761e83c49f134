# SPDX-License-Identifier: Apache-2.0
"""The shortfall of a chain: how much less noise its states hold than their levels say.

With the clean datum known, a state's noise after step i is

    n[i+1]^2 = g[i]^2 n[i]^2 + c[i]^2,      n[0] = sigma[0],                                                   (1)

g[i] being the noise that the step makes of one of its state. It is sigma[i+1] for chains that follow their levels; those whose
noise is scaled down (samplers/temperature.py) hold less, and the network is shown states that it takes for noisier ones.
"""

from __future__ import annotations

import torch

from paradiff.chain.table import Table

KEPT = 1e-6
"""How far a step may be from one that keeps the evidence, as a share of the noise's variance."""

ROUNDING = 1e-6
"""Shortfalls up to this are rounding, and count as none."""


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
    return 1 - least if 1 - least > ROUNDING else 0.0


def steps_of_ancestral(table: Table) -> bool:
    """Whether a one-step chain's steps are those of ancestral sampling but for the noise that they add: with the clean datum
    known, they keep the evidence alpha x/sigma^2 of a state's noise, as DDPM's do."""
    if table.band != 1:
        return False
    kept = (table.a - table.b * (table.p / table.q)[:, None])[:, 0] * table.alpha[1:] / table.alpha[:-1]
    wanted = (table.sigma[1:] / table.sigma[:-1]) ** 2
    counted = torch.isfinite(kept) & (table.alpha[:-1] > 0)
    return bool(((kept - wanted)[counted].abs() <= KEPT).all())


def coldness(table: Table) -> float:
    """The shortfall of a chain of ancestral steps, and 0 for others."""
    found = shortfall(table)
    return found if found and steps_of_ancestral(table) else 0.0

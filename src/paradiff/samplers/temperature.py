# SPDX-License-Identifier: Apache-2.0
"""Less noise, or more, in every step: the temperature of samplers of proteins and molecules."""

from __future__ import annotations

import dataclasses

from paradiff.chain.table import Table
from paradiff.errors import require_real, shown


def with_noise_scale(table: Table, noise_scale: float) -> Table:
    """A sampler whose steps add `noise_scale` times the noise: x[i+1] = ... + noise_scale · c[i] · z[i].

    Below 1 samples are less varied and closer to where the data are dense, as Genie (Lin & AlQuraishi 2023) and others sample
    their proteins. The start, and the levels that the network is told, stay what they are.

    Args:
        table: The sampler.
        noise_scale: The factor, 0 or more; at 0 the chain is deterministic.

    Raises:
        ValueError: If the table adds no noise, or the factor is no such number.
    """
    if not isinstance(table, Table) or not table.stochastic:
        raise ValueError(f"the noise of {shown(table)} cannot be scaled; give the table of a sampler that adds noise")
    require_real("noise_scale", noise_scale)
    if noise_scale == 1:
        return table
    name = f"{table.name}, noise times {float(noise_scale):g}"
    return dataclasses.replace(table, name=name, c=float(noise_scale) * table.c, exact_variance=False)

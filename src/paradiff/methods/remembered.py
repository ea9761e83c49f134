# SPDX-License-Identifier: Apache-2.0
"""The forcings of an earlier run at all nodes of a chain, from its trajectory (solver/trajectory.py).

The forcing is the remainder of the clean-data estimate D,

    u = nu (D - g x),      g = alpha v/(alpha^2 v + sigma^2),      nu = (alpha^2 v + sigma^2)/sigma^2,             (1)

as in collocation/interval.py. A run that evaluated some nodes alone gives them there, and straight lines in
log(alpha^2/sigma^2) in between; where it began from a run that evaluated all, these are lines of the difference to that one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paradiff.chain.slope import gaussian_gain
from paradiff.chain.table import Table, column
from paradiff.solver.trajectory import Part

Move = Callable[[Tensor], Tensor]


def coefficients(table: Table, variance: float) -> tuple[Tensor, Tensor]:
    """`[N]` g and nu of equation (1)."""
    alpha, sigma = table.alpha[:-1], table.sigma[:-1]
    return gaussian_gain(alpha, sigma, variance), (alpha**2 * variance + sigma**2) / (sigma**2).clamp(min=1e-24)


def forcings_of(part: Part, g: Tensor, nu: Tensor, move: Move) -> Tensor:
    """`[K, ...]` the forcings at the nodes of a trajectory."""
    states, clean = move(part.states), move(part.clean)
    return column(move(nu[part.nodes]), states) * (clean - column(move(g[part.nodes]), states) * states)


def remembered(part: Part, table: Table, variance: float, move: Move) -> Tensor:
    """`[N, ...]` the forcings at all nodes.

    Args:
        part: The trajectory.
        table: The chain.
        variance: v.
        move: Moves values to the states' device and dtype.
    """
    g, nu = coefficients(table, variance)
    found = forcings_of(part, g, nu, move)
    if len(part.nodes) == table.steps:
        return found
    base = None if part.base is None else remembered(part.base, table, variance, move)
    at = part.nodes.to(found.device, non_blocking=True)
    lines = move(_lines(part.nodes, table)) @ (found if base is None else found - base[at]).flatten(1)
    found = lines.view(-1, *found.shape[1:])
    return found if base is None else found + base


def _lines(nodes: Tensor, table: Table) -> Tensor:
    """`[N, K]` weights of straight lines in log(alpha^2/sigma^2) through K nodes, level beyond the outer ones."""
    place = 2 * (table.alpha[:-1].clamp(min=1e-12).log() - table.sigma[:-1].clamp(min=1e-12).log())
    every, nodes = torch.arange(table.steps), nodes.contiguous()
    after = torch.searchsorted(nodes, every).clamp(max=len(nodes) - 1)
    before = (torch.searchsorted(nodes, every, right=True) - 1).clamp(min=0)
    length = place[nodes[after]] - place[nodes[before]]
    share = torch.where(length.abs() > 1e-12, (place - place[nodes[before]]) / length, 0.0).clamp(0, 1)
    weights = torch.zeros(table.steps, len(nodes), dtype=torch.float64)
    weights[every, before] += 1 - share
    weights[every, after] += share
    return weights

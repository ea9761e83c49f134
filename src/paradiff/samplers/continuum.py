# SPDX-License-Identifier: Apache-2.0
"""The chain of so many steps that it is the equation itself.

A table discretizes the probability-flow ODE, or the reverse-time SDE, of its levels. Sparse nodes make the number of fine
steps a matter of a few numbers: here are the same levels, walked in thousands of steps that are even in log(alpha/sigma), each
with the clean-data estimate D held fixed (Song et al., arXiv 2010.02502, eq. 12, with eta = 0 and 1):

    ode    x' = alpha' D + sigma' (x - alpha D)/sigma
    sde    x' = alpha' D + sqrt(sigma'^2 - c^2) (x - alpha D)/sigma + c z,      c = sigma' sqrt(1 - snr/snr')         (1)

Times between those of the table are interpolated: in sigma where alpha + sigma = 1, where that is exact for flow matching,
else in log(alpha/sigma). The last step, from the table's last level above its end, is one step, as it is in the chain.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.chain.table import Table
from paradiff.errors import require_kind, require_one_of, require_whole
from paradiff.samplers.forms import in_outputs

STEPS = {"ode": 8000, "sde": 4000}
MOST_STEPS = 10**6
CLOSE = 1e-5


@made_at_home
def continuum(table: Table, target: Literal["ode", "sde"], steps: int | None = None) -> Table:
    """The chain of (1) over the range of levels of a table, for its network.

    Args:
        table: The sampler, of any number of steps; its times between nodes are the better known the more it has.
        target: `ode` or `sde`.
        steps: Fine steps; 8000 for the ODE and 4000 for the SDE by default.

    Raises:
        ValueError: If an argument is of another kind, the levels are of no kind whose coordinates are known, or the network's
            inputs are scaled otherwise, or the chain goes back up.
    """
    require_kind("the table", table, Table)
    require_one_of("the target", target, tuple(STEPS))
    if steps is not None:
        require_whole("the number of fine steps", steps, 2, f", or None for {STEPS[target]}", most=MOST_STEPS)
    count = STEPS[target] if steps is None else steps
    afresh = table.restarts[:-1]
    risen = ((table.sigma / table.alpha)[afresh].diff() > 0).nonzero()
    if len(risen):
        node = afresh[int(risen[0]) + 1]
        raise ValueError(
            f"table {table.name!r} goes back up to more noise at node {node}, which no equation does; use target='chain'"
        )
    first = 1 if table.alpha[0] == 0 else 0
    coordinate, nodes = _coordinate(table), _nodes(table, first)
    known = (table.alpha[nodes] / table.sigma[nodes]).log()
    line = torch.linspace(float(known[0]), float(known[-1]), count, dtype=torch.float64)
    ratio = line.exp()
    new_alpha, new_sigma = _levels(coordinate, ratio)
    place = (new_sigma, table.sigma[nodes]) if coordinate == "flow" else (line, known)
    t = _interpolated(*place, table.t[nodes])
    if first:  # pure noise, before the first level that has any signal
        new_alpha, new_sigma, t = (
            torch.cat([v[:1], w]) for v, w in ((table.alpha, new_alpha), (table.sigma, new_sigma), (table.t, t))
        )
    ends = (table.alpha[-1:], table.sigma[-1:], table.t[-1:])
    new_alpha, new_sigma, t = (torch.cat([v, end]) for v, end in zip((new_alpha, new_sigma, t), ends, strict=True))
    scale = (new_sigma**2 + 1).rsqrt() if coordinate == "exploding" else torch.ones_like(new_sigma)
    wanted = (table.sigma**2 + 1).rsqrt() if coordinate == "exploding" else torch.ones_like(table.sigma)
    if (table.scale - wanted)[:-1].abs().max() > CLOSE or table.clean is not None:
        raise ValueError(
            f"table {table.name!r} scales its network's inputs or outputs in a way of its own, which is known at its nodes "
            "only; use target='chain'"
        )
    a, sigma = new_alpha[:-1], new_sigma[:-1]
    a_next, s_next = new_alpha[1:], new_sigma[1:]
    c = torch.zeros_like(a)
    if target == "sde":
        gone = torch.where(s_next > 0, (a * s_next / (sigma * a_next)) ** 2, 0.0)
        c = s_next * (1 - gone).clamp(min=0).sqrt()
    left = (s_next**2 - c**2).clamp(min=0).sqrt()
    of_state, of_clean = left / sigma, a_next - left * a / sigma
    in_state, in_output = in_outputs(table.prediction, new_alpha, new_sigma, of_state[:, None], of_clean[:, None])
    return Table(
        name=f"{table.name} ({target})",
        prediction=table.prediction,
        t=t,
        alpha=new_alpha,
        sigma=new_sigma,
        a=in_state,
        b=in_output,
        c=c,
        scale=scale,
        start_scale=table.start_scale,
        clip=table.clip,
    )


def _nodes(table: Table, first: int) -> Tensor:
    """Nodes from `first` on, of several at one level the last."""
    ratio = (table.alpha[:-1] / table.sigma[:-1]).tolist()
    return torch.tensor([n for n in range(first, table.steps) if n + 1 == table.steps or ratio[n + 1] > ratio[n] * (1 + 1e-9)])


def _coordinate(table: Table) -> Literal["preserving", "exploding", "flow"]:
    """Which of the three kinds the table's levels are of."""
    alpha, sigma = table.alpha[:-1], table.sigma[:-1]
    if (alpha**2 + sigma**2 - 1).abs().max() < CLOSE:
        return "preserving"
    if (alpha - 1).abs().max() < CLOSE:
        return "exploding"
    if (alpha + sigma - 1).abs().max() < CLOSE:
        return "flow"
    raise ValueError(
        f"table {table.name!r} has levels that are neither variance-preserving nor variance-exploding nor on the line alpha + "
        "sigma = 1, so that those between its nodes are not known; use target='chain'"
    )


def _levels(coordinate: str, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma with alpha/sigma = `ratio`."""
    if coordinate == "preserving":
        size = (ratio**2 + 1).rsqrt()
        return ratio * size, size
    if coordinate == "exploding":
        return torch.ones_like(ratio), 1 / ratio
    return ratio / (1 + ratio), 1 / (1 + ratio)


def _interpolated(at: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of `values` at `known`, in either order."""
    order = known.argsort()
    return torch.from_numpy(np.interp(at.numpy(), known[order].numpy(), values[order].numpy()))

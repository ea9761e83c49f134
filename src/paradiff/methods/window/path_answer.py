# SPDX-License-Identifier: Apache-2.0
"""How a sample answers to an error of a node, read off the path that it takes.

The budget's factor (budget.py) knows the chain's levels alone. A sample of many numbers that is undecided between two data
answers to an early error more strongly, since all its numbers hold evidence of them. The derivative of the clean-data estimate
D by the evidence s = alpha x/sigma^2 is the covariance C of the data given the state, and along a stochastic chain, with
tau = alpha^2/sigma^2,

    s[k+1] - s[k] = D[k] (tau[k+1] - tau[k]) + w[k],      D[k+1] - D[k] = C w[k]  about,                                 (1)

so that each sweep tries C by the noise w of its own nodes, at no row. An error e of the state changes D by up to

    lambda alpha/sigma^2 e,      lambda = |dD|^2/(dD . w),  at most B d^(1/2) |dD|/|w|  for d numbers,                    (2)

where lambda is the largest eigenvalue if one direction is undecided; the bound is B times what a direction at random shows. The
squares and products are summed over three steps, each divided by its tau[k+1] - tau[k], as one step's noise may happen to lie
across the direction. Collocation multiplies the same lambda along a whole path (methods/collocation/growth.py).

It is looked at in narrow windows. Their nodes pass after a sweep or two, often all of them at once, so that the carried errors
(carried_error.py) have no pairs to be carried by. In a wide window a node is swept many times before it passes, and its error
is a small part of what the budget takes it for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.slope import staged
from paradiff.chain.step import Step
from paradiff.chain.table import Table


def on_a_path(table: Table) -> bool:
    """Whether the nodes of a chain are states of one path with noise of its own, each with more signal than the one before."""
    if not table.stochastic or staged(table) or table.steps < 2 or bool((table.sigma[:-1] <= 0).any()):
        return False
    return bool(((table.alpha[:-1] / table.sigma[:-1]).diff() > 0).all())


class PathAnswer:
    """Equation (2) on one table.

    Args:
        step: The table on a device.
        bound: B, 0 or more.
    """

    def __init__(self, step: Step, bound: float) -> None:
        table = step.table
        evidence, snr = table.alpha[:-1] / table.sigma[:-1] ** 2, (table.alpha[:-1] / table.sigma[:-1]) ** 2
        passed = torch.cat([snr.diff(), snr.new_ones(1)])
        self._columns = step.move(torch.stack([evidence, table.p, table.q, passed]))
        self._bound, self._members = bound, step.members

    def __call__(self, lo: int, states: Tensor, outputs: Tensor) -> Tensor:
        """The factors of the nodes after `lo`, the last one that of the node before it.

        Args:
            lo: The window's first node.
            states: `[W, ...]` states of its nodes, in which the network was evaluated.
            outputs: `[W, ...]` its outputs there.

        Returns:
            `[W, b]` factors of each member, 0 or more; zero for a single node.
        """
        x, m = self._members(states), self._members(outputs)
        if len(x) == 1:
            return x.new_zeros(x.shape[:2])
        evidence, p, q, passed = self._columns[:, lo : lo + len(x), None, None]
        clean = torch.addcmul(p * x, q, m)
        moved = clean.diff(dim=0)
        noise = (evidence * x).diff(dim=0).addcmul_(clean[:-1], passed[:-1], value=-1)
        sums = torch.stack([(a * b).sum(2) for a, b in ((moved, moved), (moved, noise), (noise, noise))]) / passed[:-1, :, 0]
        squares, products, noises = torch.nn.functional.avg_pool1d(sums.movedim(1, 2), 3, 1, 1)  # [b, W-1] each
        tiny = torch.finfo(states.dtype).tiny
        most = self._bound * (x.shape[2] * squares / noises.clamp(min=tiny)).sqrt()
        found = torch.where(products > 0, torch.minimum(squares / products.clamp(min=tiny), most), 0.0)
        factors = (found * evidence[1:, 0, 0]).T
        return torch.cat([factors, factors[-1:]])

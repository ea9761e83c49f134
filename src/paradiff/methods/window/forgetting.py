# SPDX-License-Identifier: Apache-2.0
"""What a chain with churn forgets of the errors of early nodes, read off the path that a sample takes.

A chain that adds noise which later steps take away again (chain/volatility.py), as AlphaFold 3's does, forgets a node far
sooner than s of chain/sensitivity.py says: its steps take away more than the noise of a level, and with it most of an error.
Let l[n] be the step's slope for a frozen clean-data estimate D, and m[n] that by which D enters it. A change of node n that D
answers to by J is carried on by l[n] + m[n] J, so that of an error of node n no more than

    f[n] = g[n] g[n+1] ... g[N-1],      g[k] = min(1, |l[k]| + |m[k]| J[k]),                                       (1)

reaches the sample, to first order, if J[k] bounds the derivative of D at node k. This derivative is alpha/sigma^2 C, with C the
covariance of the data given the state. The noise w of the path's own steps (path_answer.py) tries C in directions at random,
D[k+1] - D[k] = C w[k] about, which shows its Frobenius norm, and this bounds its largest eigenvalue:

    |C|_F^2 = mean of d |D[k+1] - D[k]|^2/|w[k]|^2 for d numbers,      J[k] = alpha[k]/sigma[k]^2 |C|_F,                (2)

the mean is over a few nodes about k. Where a sample begins to decide g is 1, and from there on errors count in full.

The first order says nothing of a node whose state is wrong by so much that the data look otherwise from it. An error e (root
mean square of d numbers) moves the logarithm of how likely one datum is beside another by alpha/sigma^2 times its product with
their difference, so that f is 1 where

    e > w sigma,      or      e > v sigma^2/(alpha (d |C|_F)^1/2),                                                 (3)

with the control's `wrong` for w and `deciding` for v, and with the largest C that was ever seen: how far data lie apart shows
where a sample is undecided between them. Where it has nearly decided C is small, yet not their difference, and an error that
moves the logarithm by l makes C up to exp(l) times as large. Nor do nodes say anything of C whose own changes are as large:
they were evaluated elsewhere, perhaps on the way to another outcome (astray.py), from which all looks decided. From the first
of them on, and beyond the window, C is taken to be as large as it was ever seen to be. With g an error of the window's nodes is
carried along it, too: it stands before the sum of equation (1) of budget.py.

It is looked at in windows that are not narrow, on one-step chains of more than `volatile` volatility.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paradiff.chain.slope import freeze_clean_data
from paradiff.chain.step import Step
from paradiff.methods.window.control import WindowControl

ABOUT = 4
"""Nodes on either side over which the mean of equation (2) is taken."""


class Kept(NamedTuple):
    """What is left of the errors of the W nodes after a window's first.

    Attributes:
        share: `[W]` f of equation (1).
        steps: `[W]` g of the steps from them.
        most: `[W]` the largest error of which that is so, in the data's units.
    """

    share: list[float]
    steps: list[float]
    most: list[float]


class Forgetting:
    """Equations (1) and (2) on one table.

    Args:
        step: The table on a device; it reads one step back.
        control: The tuned numbers.
        elements: Elements of a sample, or of a member.
    """

    def __init__(self, step: Step, control: WindowControl, elements: int) -> None:
        table = step.table
        self._table, self._members, self._control = table, step.members, control
        frozen, clean = freeze_clean_data(table)[:, 0].abs(), (table.b[:, 0] / table.q).abs()
        evidence, snr = table.alpha[:-1] / table.sigma[:-1] ** 2, (table.alpha[:-1] / table.sigma[:-1]) ** 2
        self._frozen, self._answered = frozen, clean * evidence  # g is the one and |C| times the other
        passed = torch.cat([snr.diff(), snr.new_ones(1)])
        self._columns = step.move(torch.stack([evidence, table.p, table.q, passed]))
        deciding = control.deciding * table.sigma[:-1] ** 2 / (table.alpha[:-1].clamp(min=1e-12) * math.sqrt(elements))
        self._wrong, self._deciding = (control.wrong * table.sigma).tolist(), [*deciding.tolist(), math.inf]

    def __call__(self, lo: int, states: Tensor, outputs: Tensor) -> Tensor:
        """`[W, b]` |C|_F of equation (2) about each node, for each member; infinite for a single node.

        Args:
            lo: The window's first node.
            states: `[W, ...]` states of its nodes, in which the network was evaluated.
            outputs: `[W, ...]` its outputs there.
        """
        x, m = self._members(states), self._members(outputs)
        if len(x) == 1:
            return x.new_full(x.shape[:2], math.inf)
        evidence, p, q, passed = self._columns[:, lo : lo + len(x), None, None]
        clean = torch.addcmul(p * x, q, m)
        moved = clean.diff(dim=0)
        noise = (evidence * x).diff(dim=0).addcmul_(clean[:-1], passed[:-1], value=-1)
        squares = x.shape[2] * moved.square().sum(2) / noise.square().sum(2).clamp(min=torch.finfo(x.dtype).tiny)  # [W-1, b]
        about = torch.nn.functional.avg_pool1d(squares.T[None], 2 * ABOUT + 1, 1, ABOUT, count_include_pad=False)[0].T
        return torch.cat([about, about[-1:]]).sqrt()

    def small(self, node: int, spread: float) -> float:
        """The largest root mean square error of a node that counts as small, equation (3), where |C|_F is `spread`."""
        return min(self._wrong[node], self._deciding[node] / math.sqrt(max(spread, 1e-300)))

    def known(self, lo: int, changes: Sequence[float], spreads: Sequence[float], largest: float = 0.0) -> int:
        """How many of a window's leading nodes have been evaluated near their states, of which alone |C|_F tells.

        Args:
            lo: The window's first node.
            changes: `[W]` root mean square changes of the nodes after it, for one member.
            spreads: `[W]` |C|_F about the nodes from it on.
            largest: The largest that was known before; 0 for none.
        """
        for k, change in enumerate(changes[:-1]):
            largest = max(largest, spreads[k]) if math.isfinite(spreads[k]) else math.inf
            if not change <= self.small(lo + 1 + k, largest):
                return 1 + k
        return len(changes)

    def kept(self, lo: int, spreads: Sequence[float], known: int, largest: float) -> Kept:
        """What is left of errors.

        Args:
            lo: The window's first node.
            spreads: `[W]` |C|_F about its nodes, for one member; one that is not finite says nothing.
            known: Of how many leading nodes they tell.
            largest: The largest of them that was ever known, which is taken for all other nodes.
        """
        begin, end, steps = lo + 1, lo + known, self._table.steps
        spread = torch.tensor([*spreads[1:known], *[largest] * (steps - end + 1)], dtype=torch.float64)[: steps - begin]
        spread = spread.nan_to_num(nan=math.inf)
        carried = (self._frozen[begin:] + self._answered[begin:] * spread).nan_to_num(nan=1.0, posinf=1.0).clamp(max=1.0)
        share = carried.flip(0).cumprod(0).flip(0)
        whole = torch.ones(len(spreads), dtype=torch.float64)  # of the chain's end nothing is forgotten
        left, through = (torch.cat([v, whole])[: len(spreads)].tolist() for v in (share, carried))
        return Kept(left, through, [self.small(begin + k, largest) for k in range(len(spreads))])

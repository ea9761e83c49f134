# SPDX-License-Identifier: Apache-2.0
"""How early errors grow along the path that a sample takes, read off the path itself.

While the data are hidden, the derivative of the clean-data estimate D by the evidence s = alpha x/sigma^2 is the covariance C
of the data given the state. Along a stochastic chain, with tau = alpha^2/sigma^2,

    s[k+1] - s[k] = D[k] (tau[k+1] - tau[k]) + w[k],      D[k+1] - D[k] = C w[k]  about,                                 (1)

so that the noise w tries C in one direction at each node, without a further evaluation. Its Rayleigh quotient

    lambda[k] = |dD[k]|^2 / (dD[k] . w[k]),      at most B d^(1/2) |dD[k]|/|w[k]  for d numbers,                        (2)

is the largest eigenvalue where one direction is undecided; the bound is B times what a direction at random shows. An error of s
grows by exp(lambda (tau[k+1] - tau[k])) on the way to the next node, where one of Gaussian data of variance v grows with
v sigma^2/(alpha^2 v + sigma^2) in lambda's place. The **growth** of a path is the largest product of the ratios of these two
over consecutive nodes.

A path that passes close to where it is decided between two samples is undecided for long, and grows so on either side of it,
while the linearized sample, once decided, answers to nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paradiff.methods.collocation.system import CollocationSystem
from paradiff.methods.stretch import stretches, total


def path_growth(system: CollocationSystem, states: Tensor, forcings: Tensor, bound: float) -> Tensor:
    """`[1]` log of the growth of a path, 0 or more; of several members that of the one with the largest.

    Args:
        system: The collocation system, of order 0 on a stochastic chain, with M nodes.
        states: `[M, b, d]` states at which the network was evaluated.
        forcings: `[M, b, d]` the forcings there.
        bound: B of equation (2).
    """
    rec, nodes = system.recurrence, system.nodes
    if len(nodes) < 2:
        return states.new_zeros(1)
    columns = torch.stack([rec.evidence[nodes], 1 / rec.nu[nodes], rec.g[nodes], rec.snr[nodes]])
    evidence, share, slope, snr = columns.to(states.dtype).to(states.device, non_blocking=True)[..., None, None]
    passed = snr.diff(dim=0)

    def sums(part: slice) -> Tensor:
        """`[3, M-1, b]` |dD|^2, dD . w and |w|^2 on a stretch."""
        y = states[:, :, part]
        clean = torch.addcmul(share * forcings[:, :, part], slope, y)
        moved = clean.diff(dim=0)
        w = (evidence * y).diff(dim=0).addcmul_(clean[:-1], passed, value=-1)
        return torch.stack([moved.square().sum(2), (moved * w).sum(2), w.square().sum(2)])

    squares, products, noises = total(sums(part) for part in stretches(states.shape, len(states)))
    most = bound * (states.shape[2] * squares / noises.clamp(min=1e-300)).sqrt()
    found = torch.where(products > 0, torch.minimum(squares / products.clamp(min=1e-300), most), 0.0)
    variance = rec.variance
    gaussian = variance / (1 + variance * snr[:-1, 0])
    along = ((found - gaussian) * passed[:, 0]).cumsum(0)
    start = torch.nn.functional.pad(along, (0, 0, 1, 0))
    return (start - start.cummin(0).values).amax().view(1)


def caution(growth: float, free: float) -> float:
    """How much nearer the states of a path have to be that grows by more than `free`: the root of the excess.

    Args:
        growth: Log of the path's growth.
        free: The growth that asks for none, 1 or more.
    """
    return math.exp(max(0.0, growth - math.log(free)) / 2)

# SPDX-License-Identifier: Apache-2.0
"""How a change of a node reaches the sample: the model behind tolerances, error estimates and meshes.

A sample decides what it becomes near signal-to-noise ratio 1. With u = sigma^2/(alpha^2 + sigma^2) the noise's share of a
state's variance, for data of mean square 1, what is still **undecided** is u, and the **decision** is

    d = 4 u (1 - u),                                                                                            (1)

from 0 to 1, with its peak where alpha = sigma. Four things derive from it, each by factors of its own that are documented and
measured where they stand:

- an error of a node, in the sample: it grows by 1 + d, equation (2);
- the mismatch of Parareal's propagators: a constant plus a multiple of d (methods/parareal/stopping.py, equation (2));
- a defect of collocation: a constant plus a multiple of u (methods/collocation/defect.py, equation (2));
- the density of collocation's first mesh: a constant plus a multiple of d (methods/collocation/mesh.py).

A node whose state is wrong by e changes the sample by about s e, with the factor

    s[n] = max(s0[n] (1 + d[n]), 0.6)                                                                           (2)

where s0 is the factor for Gaussian data of mean square 1, (alpha^2 + sigma^2)^(-1/2) for deterministic chains (the
probability-flow map) and alpha/(alpha^2 + sigma^2) for stochastic ones (the regression of the sample on the state). The rest
allows for what Gaussian data lack. Methods multiply s by a caution of their own (`WindowControl`, `PararealControl`), since on
trained networks single states exceed (2) sixfold for a while. So a sum of s e estimates the sample's error, and is no bound.

Data of mean square V are data of mean square 1 times V^(1/2), on a chain whose signal levels are V^(1/2) times as high: they
decide earlier, and answer to early errors up to V^(1/2) or V times as strongly. V is taken for 1 unless the states show that
it is far from it (data_scale.py).

A sweep with slope G that changes a node by delta leaves an error of about (J - G) delta at the next one, with J the derivative
of the step. J is unknown, but lies between those of two extreme networks, a frozen clean-data estimate and a frozen noise
estimate (slope.py), so that

    h[n] = max over the two extremes of |J[n] - G[n]|                                                            (3)

bounds that remainder in units of |delta|.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paradiff.chain.slope import carried, freeze_clean_data, freeze_epsilon, resolve
from paradiff.chain.table import Table

FITTED = 64
"""Elements of the samples on which cautions were fitted."""

ABOVE_TOLERANCE = (
    "an estimated error of {:.2g} was reached, where {:g} was asked for: the network answers to early errors more strongly "
    "than nodes pass for; give a tolerance that is smaller by this ratio, or, where the samples' mean square is far above 1, "
    "data in about -1 ... 1"
)


def noise_units(table: Table, edges: list[int]) -> Tensor:
    """`[M]` standard deviation of the noise that one DDPM step from each node at `edges` `[M+1]` to the next would add: the
    unit of the published tolerances (arXiv 2305.16317, section 3; ParaSolver's error rule)."""
    found = table.posterior_variance(edges).sqrt()
    for n in (found[1:-1] == 0).nonzero()[:, 0].tolist():  # two nodes at one noise level: the stages of a two-stage sampler
        found[n + 1] = found[n]
    return found


def log_snr(table: Table) -> Tensor:
    """`[N+1]` log(alpha^2/sigma^2), infinite where a state is all noise or all data."""
    return 2 * (table.alpha.log() - table.sigma.log())


def undecided(log_snr: Tensor) -> Tensor:
    """u of equation (1), from 1 in noise to 0 in data, at values of log(alpha^2/sigma^2)."""
    return torch.sigmoid(-log_snr)


def decision(log_snr: Tensor) -> Tensor:
    """d of equation (1), from 0 to 1, at values of log(alpha^2/sigma^2)."""
    return 4 * torch.sigmoid(log_snr) * torch.sigmoid(-log_snr)


def sensitivity(table: Table, size: float = 1.0) -> Tensor:
    """`[N+1]` s of equation (2): the factor by which a change of a node reaches the sample, on data of mean square `size`."""
    square = table.alpha**2 * size + table.sigma**2
    gaussian = table.alpha * size / square if table.stochastic else math.sqrt(size) * square.rsqrt()
    return (gaussian * (1 + decision(log_snr(table) + math.log(size)))).clamp(min=0.6)


def scatter(elements: int) -> float:
    """How much more the root mean square error of a sample of few elements scatters about its estimate than that of one of
    `FITTED`: the ratio of the 95 % quantiles of the root of chi^2/d, by Wilson and Hilferty (1931); 1 for as many or more."""

    def quantile(d: int) -> float:
        return (1 - 2 / (9 * d) + 1.645 * math.sqrt(2 / (9 * d))) ** 1.5

    return max(1.0, quantile(max(elements, 1)) / quantile(FITTED))


def slope_error(table: Table, slope: Tensor, edges: list[int]) -> Tensor:
    """`[M]` h of equation (3), for a slope over the sub-intervals between `edges`. What the slope leaves out, the states
    before a sub-interval's left edge, counts in full."""
    extremes = [carried(resolve(s, table), edges) for s in (freeze_clean_data, freeze_epsilon)]
    known = torch.nn.functional.pad(slope, (0, table.band - slope.shape[1]))
    return torch.stack([(e - known).abs().sum(1) for e in extremes]).amax(0)

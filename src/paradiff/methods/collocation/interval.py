# SPDX-License-Identifier: Apache-2.0
"""One mesh interval: a stretch of fine steps, eliminated by the chain's own linear recurrence.

Let g be the slope of the clean-data estimate D = p x + q m for data of variance v (chain/slope.py). The network enters the fine
chain through its **forcing**, the nonlinear remainder of an exponential integrator,

    u = nu (D - g x) = p_u x + q_u m,      g = alpha v/(alpha^2 v + sigma^2),      nu = (alpha^2 v + sigma^2)/sigma^2,    (1)

    x[i+1] = sum_{j<P} ( G[i,j] x[i-j] + b[i,j]/(q nu)[i-j] u[i-j] ) + c[i] z[i],      G = a + b (g - p)/q.               (2)

On Gaussian data of variance v the forcing is the data's mean, at every state and level. For other data it is the mean that the
state's evidence leaves to a Gaussian prior, a martingale along a stochastic chain. It varies slowly and is interpolated.
Between two mesh points l < r equation (2) is linear. Its adjoint, walked once from r to l, gives

    x[r] = sum_p carry[p] x[l-p] + sum_m forcing[m] u[m] + sum_i noise[i] z[i]                                            (3)

with the chain's own coefficients and noises, and the same for x[r-1] ... x[r-P+1], which a multistep sampler reads.

On a stochastic chain the states of an interval scatter about their trend with the noise, and so does the forcing. Equation (3)
needs the weighted average of the forcing. To first order that is the forcing at the averaged state. In the coordinate
s = alpha x/sigma^2 a fluctuation of the state changes D by the posterior covariance times the fluctuation, so the average is
taken there:

    s = sum_i w[i] s[i],      w proportional to nu times the weights of (3),                                              (4)

with D held fixed inside the interval. The averaged state is a noisy datum with less noise than the states that it averages. Let
N be the variance of its noise; the noise of a state at node k has the variance alpha[k]^2/sigma[k]^2 in this coordinate. The
network is evaluated at the node k whose variance is nearest to N, and s is scaled and given the signal of that node. This
removes both errors of first order: averaging removes the fluctuation's, and the node's level removes the mean curvature's,
since the time derivative of a martingale forcing is minus half its Laplacian. The remainder is of second order in the noise.

States of an ancestral chain whose noise is scaled down scatter less than the network's own time derivative answers for. The
node that removes both errors is then the one whose variance is nearest to

    N = tau - F,      F = sum_i w[i] var(s[i]) - var(s),      tau = sum_i w[i] alpha[i]^2/sigma[i]^2,                     (5)

with the variances of what the interval's noises add: F is how much the states scatter about their average. Where they scatter
as the levels say, that is the variance of the averaged state's noise; without noise it is the average level.

Source: our own. Near it: schemes of strong order 1.5 that use the integral of the Brownian path over a step (Kloeden and
Platen 1992, section 10.4; Foster, dos Reis and Strange, arXiv 2210.17543).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.shortfall import coldness
from paradiff.chain.slope import gaussian_gain
from paradiff.chain.table import Table


@dataclass(frozen=True, kw_only=True, eq=False)
class Interval:
    """Equation (3) between two mesh points, and the averaged state of equation (4). All tensors are float64 on the CPU; n fine
    steps, band P.

    Attributes:
        left: Fine node l.
        right: Fine node r.
        carry: `[P, P]` weights of x[l-p'] in x[r-p].
        forcing: `[P, n+P-1]` weights of u[m] in x[r-p], m from l - P + 1.
        noise: `[P, n]` weights of z[i] in x[r-p].
        node: The fine node k at whose time the network is evaluated, l <= k < r.
        state_carry: `[P]` weights of x[l-p] in the averaged state.
        state_forcing: Weight of the interval's own forcing in it.
        state_noise: `[n]` weights of z[i] in it.
    """

    left: int
    right: int
    carry: Tensor
    forcing: Tensor
    noise: Tensor
    node: int
    state_carry: Tensor
    state_forcing: float
    state_noise: Tensor


class Recurrence:
    """Equation (2) of one table and one data variance, as plain numbers, and the intervals made of it.

    Args:
        table: The sampler.
        variance: v, the data's variance; positive.

    Attributes:
        g: `[N]` slope of the clean-data estimate.
        nu: `[N]` scale of the forcing.
        evidence: `[N]` alpha/sigma^2.
        p_u: `[N]` weight of the state in the forcing, equation (1).
        q_u: `[N]` weight of the network's output in the forcing.
        shifted: `[N][P]` G of equation (2).
        forced: `[N][P]` weights of the forcings in equation (2).
        log_snr: `[N]` log(alpha^2/sigma^2), finite and increasing where the table starts from pure noise too.
        coldness: The shortfall of the noise of ancestral steps (chain/shortfall.py); 0 where equation (5) is not needed.
    """

    def __init__(self, table: Table, variance: float) -> None:
        self.table, self.variance = table, variance
        alpha, sigma = table.alpha[:-1], table.sigma[:-1]
        total = alpha**2 * variance + sigma**2
        self.g, self.nu, self.evidence = gaussian_gain(alpha, sigma, variance), total / sigma**2, alpha / sigma**2
        self.p_u, self.q_u = self.nu * (table.p - self.g), self.nu * table.q
        self.snr = (alpha / sigma) ** 2
        self.log_snr = finite_log_snr(table)
        source = (torch.arange(table.steps)[:, None] - torch.arange(table.band)).clamp(min=0)
        in_forcing = table.b / table.q[source]
        self.shifted = (table.a + in_forcing * (self.g - table.p)[source]).tolist()
        self._plain = (table.a - in_forcing * table.p[source]).tolist()
        self.forced = (in_forcing / self.nu[source]).tolist()
        self._clean = in_forcing.tolist()
        self._c = table.c.tolist()
        self.coldness = coldness(table)
        self._intervals: dict[tuple[int, int], Interval] = {}

    def interval(self, left: int, right: int) -> Interval:
        """The interval between two fine nodes; made once."""
        key = (left, right)
        if key not in self._intervals:
            self._intervals[key] = self._make(left, right)
        return self._intervals[key]

    def _make(self, left: int, right: int) -> Interval:
        band = self.table.band
        carry, forcing, noise = [], [], []
        for p in range(band):
            wanted = {right - p: 1.0}
            on_states, on_steps = self._adjoint(self.shifted, left, right, wanted)
            carry.append(on_states)
            forcing.append(self._on_forcings(self.forced, on_steps, left, right))
            noise.append([f * self._c[i] for f, i in zip(on_steps, range(left, right), strict=True)])
        node, of_states, own_forcing, of_noise = self._average(left, right, forcing[0][band - 1 :])
        of_end, of_forcings, of_noises = (torch.tensor(v, dtype=torch.float64) for v in (carry, forcing, noise))
        weights, noises = (torch.tensor(v, dtype=torch.float64) for v in (of_states, of_noise))
        return Interval(
            left=left,
            right=right,
            carry=of_end,
            forcing=of_forcings,
            noise=of_noises,
            node=node,
            state_carry=weights,
            state_forcing=own_forcing,
            state_noise=noises,
        )

    def _adjoint(
        self, slope: list[list[float]], left: int, right: int, wanted: dict[int, float]
    ) -> tuple[list[float], list[float]]:
        """The functional sum_i wanted[i] x[i] as weights of x[l], x[l-1] ... and of the inhomogeneity of each step l ... r-1,
        for a recurrence with the coefficients `slope`."""
        band = self.table.band
        at = [0.0] * (right - left + band)  # of x[l-P+1] ... x[r]
        for i, value in wanted.items():
            at[i - left + band - 1] += value
        for i in range(right - 1, left - 1, -1):
            value = at[i - left + band]
            if value:
                for j, factor in enumerate(slope[i]):
                    at[i - left + band - 1 - j] += factor * value
        return at[:band][::-1], at[band:]

    def _on_forcings(self, factors: list[list[float]], on_steps: list[float], left: int, right: int) -> list[float]:
        """Weights of the forcings at l-P+1 ... r-1, from the weights of the inhomogeneity of each step."""
        band = self.table.band
        found = [0.0] * (right - left + band - 1)
        for i, weight in zip(range(left, right), on_steps, strict=True):
            for j, factor in enumerate(factors[i]):
                found[i - j - left + band - 1] += weight * factor
        return found

    def _average(self, left: int, right: int, weights: list[float]) -> tuple[int, list[float], float, list[float]]:
        """Equation (4): the node of the evaluation, and the weights of the states at the left mesh point, of the interval's own
        forcing and of its noises in the averaged state."""
        band = self.table.band
        if right - left == 1 or not self.table.stochastic:
            return left, [1.0, *[0.0] * (band - 1)], 0.0, [0.0] * (right - left)
        evidence, total = self.evidence, sum(weights[i] * float(self.nu[left + i]) for i in range(right - left))
        wanted = {left + i: w * float(self.nu[left + i] * evidence[left + i]) / total for i, w in enumerate(weights)}
        on_states, on_steps = self._adjoint(self._plain, left, right, wanted)
        on_clean = sum(self._on_forcings(self._clean, on_steps, left, right))
        on_noise = [f * self._c[i] for f, i in zip(on_steps, range(left, right), strict=True)]
        past = range(left, max(left - band, -1), -1)
        variance = sum(w * float(self.table.sigma[n]) for w, n in zip(on_states, past, strict=False)) ** 2
        variance += sum(w * w for w in on_noise)
        signal = sum(w * float(self.table.alpha[n]) for w, n in zip(on_states, past, strict=False)) + on_clean
        if self.coldness > 0:
            variance = signal - self._scatter(left, wanted, on_noise)
        away = (self.snr[left:right].clamp(min=1e-300).log() - math.log(variance)).abs()
        if left == 0:
            away[0] = math.inf  # at node 0 the only state is x[0]
        node = left + int(away.argmin())
        scale = math.sqrt(float(self.snr[node]) / variance)
        on_clean = on_clean * scale + float(self.snr[node]) - signal * scale  # the signal of the node
        to_state = 1 / float(evidence[node])
        implicit = 1 - on_clean * to_state * float(self.g[node])  # D = u/nu + g x holds at the averaged state itself
        factor = scale * to_state / implicit
        own = on_clean * to_state / float(self.nu[node]) / implicit
        return node, [w * factor for w in on_states], own, [w * factor for w in on_noise]

    def _scatter(self, left: int, wanted: dict[int, float], on_noise: list[float]) -> float:
        """F of equation (5), of a chain that reads one step back, from the weights of its states and of its noises."""
        state, spread = 0.0, 0.0
        for i in range(left, left + len(wanted)):
            spread += wanted[i] * float(self.evidence[i]) * state
            state = self._plain[i][0] ** 2 * state + self._c[i] ** 2
        return spread - sum(w * w for w in on_noise)


def finite_log_snr(table: Table) -> Tensor:
    """`[N]` log(alpha^2/sigma^2) at the nodes 0 ... N-1. Pure noise, at node 0, is put as far before node 1 as node 1 is before
    node 2."""
    found = 2 * (table.alpha[:-1].log() - table.sigma[:-1].log())
    if len(found) > 2 and not torch.isfinite(found[0]):
        found[0] = 2 * found[1] - found[2]
    return found

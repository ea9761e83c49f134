"""One gap of a sparse table: a stretch of fine steps, eliminated by their own linear recurrence.

With a guess g for the derivative of the clean-data estimate D = p x + q m (chain/slope.py), that of data of variance v, the
network enters the fine chain through its **drive**

    u = nu (D - g x),      g = alpha v/(alpha^2 v + sigma^2),      nu = (alpha^2 v + sigma^2)/sigma^2,             (1)

    x[i+1] = sum_{j<P} ( G[i,j] x[i-j] + b[i,j]/(q nu)[i-j] u[i-j] ) + c[i] z[i],      G = a + b (g - p)/q.      (2)

On Gaussian data of variance v the drive is their mean, whatever the state and the level; in general it is the mean that the
state's evidence leaves to a Gaussian prior, a martingale along a stochastic chain. It is what varies slowly, so it is what may
be known at few places. Between two edges l < r equation (2) is linear, and its adjoint, walked once from r to l, gives

    x[r] = sum_p carry[p] x[l-p] + sum_m drive[m] u[m] + sum_i noise[i] z[i]                                      (3)

with the chain's own coefficients and its own noises (and the same for x[r-1] ... x[r-P+1], which a multistep sampler reads).

On a stochastic chain the states of a gap scatter about their trend with the noise, and so does the drive. What the gap needs
is the drive's average, weighted as in (3); to first order that is the drive at the averaged state. In the coordinate
s = alpha x/sigma^2 a fluctuation of the state changes D by the posterior covariance times it, so the average is taken there:

    s = sum_i w[i] s[i],      w proportional to nu times those of (3),                                             (4)

with D held fixed inside the gap. The averaged state is a noisy datum like any other, but it has less noise than the states it
averages: its variance of noise N, in units where a state of the chain has alpha^2/sigma^2 of both, is that of an earlier node.
The network is asked at the node k with alpha[k]^2/sigma[k]^2 nearest to N, and s is scaled and given the signal that belongs
there. Both errors of first order are gone: the fluctuation's, by averaging, and the mean curvature's, since the drive's
derivative in time is minus half its Laplacian (it is a martingale). What is left is of second order in the gap's noise.

Source: our own. Near it: schemes of strong order 1.5 that use the integral of the Brownian path over a step (Kloeden and
Platen 1992, section 10.4; Foster, dos Reis and Strange, arXiv 2210.17543).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.table import Table


@dataclass(frozen=True, eq=False)
class Interval:
    """Equation (3) between two edges, and the state at which the gap's drive is asked for. All tensors float64 on the CPU;
    n fine steps, band P.

    Attributes:
        left: Fine node l.
        right: Fine node r.
        carry: `[P, P]` of x[l-p'] in x[r-p].
        drive: `[P, n+P-1]` of u[m] in x[r-p], m from l - P + 1.
        noise: `[P, n]` of z[i] in x[r-p].
        node: The fine node k at whose time the network is asked, l <= k < r.
        state_carry: `[P]` of x[l-p] in the averaged state.
        state_drive: Of the gap's own drive in it.
        state_noise: `[n]` of z[i] in it.
    """

    left: int
    right: int
    carry: Tensor
    drive: Tensor
    noise: Tensor
    node: int
    state_carry: Tensor
    state_drive: float
    state_noise: Tensor


class Recurrence:
    """Equation (2) of one table and one variance, as plain numbers, and the gaps made of it.

    Args:
        table: The sampler.
        variance: v, of the data.

    Attributes:
        g: `[N]` derivative of the clean-data estimate.
        nu: `[N]` scale of the drive.
        evidence: `[N]` alpha/sigma^2.
        of_state: `[N]` weight of the state in the drive, equation (1).
        of_output: `[N]` that of the network's output.
        shifted: `[N][P]` G of equation (2).
        driven: `[N][P]` weights of the drives in equation (2).
        log_snr: `[N]` log(alpha^2/sigma^2), made finite and increasing where the table starts from pure noise.
    """

    def __init__(self, table: Table, variance: float) -> None:
        self.table, self.variance = table, variance
        alpha, sigma = table.alpha[:-1], table.sigma[:-1]
        total = alpha**2 * variance + sigma**2
        self.g, self.nu, self.evidence = alpha * variance / total, total / sigma**2, alpha / sigma**2
        self.of_state, self.of_output = self.nu * (table.p - self.g), self.nu * table.q
        self.snr = (alpha / sigma) ** 2
        self.log_snr = finite_log_snr(table)
        source = (torch.arange(table.steps)[:, None] - torch.arange(table.band)).clamp(min=0)
        in_drive = table.b / table.q[source]
        self.shifted = (table.a + in_drive * (self.g - table.p)[source]).tolist()
        self._plain = (table.a - in_drive * table.p[source]).tolist()
        self.driven = (in_drive / self.nu[source]).tolist()
        self._clean = in_drive.tolist()
        self._c = table.c.tolist()
        self._gaps: dict[tuple[int, int], Interval] = {}

    def gap(self, left: int, right: int) -> Interval:
        """The gap between two fine nodes; made once."""
        key = (left, right)
        if key not in self._gaps:
            self._gaps[key] = self._make(left, right)
        return self._gaps[key]

    def _make(self, left: int, right: int) -> Interval:
        band = self.table.band
        carry, drive, noise = [], [], []
        for p in range(band):
            wanted = {right - p: 1.0}
            on_states, on_forces = self._adjoint(self.shifted, left, right, wanted)
            carry.append(on_states)
            drive.append(self._on_drives(self.driven, on_forces, left, right))
            noise.append([f * self._c[i] for f, i in zip(on_forces, range(left, right), strict=True)])
        node, of_states, of_drive, of_noise = self._average(left, right, drive[0][band - 1 :])
        of_end, of_drives, of_noises = (torch.tensor(v, dtype=torch.float64) for v in (carry, drive, noise))
        weights, noises = (torch.tensor(v, dtype=torch.float64) for v in (of_states, of_noise))
        return Interval(left, right, of_end, of_drives, of_noises, node, weights, of_drive, noises)

    def _adjoint(
        self, slope: list[list[float]], left: int, right: int, wanted: dict[int, float]
    ) -> tuple[list[float], list[float]]:
        """Weights of x[l], x[l-1] ... and of the forcing of each step l ... r-1 in sum_i wanted[i] x[i]."""
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

    def _on_drives(self, factors: list[list[float]], forces: list[float], left: int, right: int) -> list[float]:
        """Weights of the drives at l-P+1 ... r-1, from those of the forcing of each step."""
        band = self.table.band
        found = [0.0] * (right - left + band - 1)
        for i, force in zip(range(left, right), forces, strict=True):
            for j, factor in enumerate(factors[i]):
                found[i - j - left + band - 1] += force * factor
        return found

    def _average(self, left: int, right: int, weights: list[float]) -> tuple[int, list[float], float, list[float]]:
        """Equation (4): the node to ask at, and the weights of edge states, own drive and noises in the averaged state."""
        band = self.table.band
        if right - left == 1 or not self.table.stochastic:
            return left, [1.0, *[0.0] * (band - 1)], 0.0, [0.0] * (right - left)
        evidence, total = self.evidence, sum(weights[i] * float(self.nu[left + i]) for i in range(right - left))
        wanted = {left + i: w * float(self.nu[left + i] * evidence[left + i]) / total for i, w in enumerate(weights)}
        on_states, on_forces = self._adjoint(self._plain, left, right, wanted)
        on_clean = sum(self._on_drives(self._clean, on_forces, left, right))
        on_noise = [f * self._c[i] for f, i in zip(on_forces, range(left, right), strict=True)]
        past = range(left, max(left - band, -1), -1)
        variance = sum(w * float(self.table.sigma[n]) for w, n in zip(on_states, past, strict=False)) ** 2
        variance += sum(w * w for w in on_noise)
        signal = sum(w * float(self.table.alpha[n]) for w, n in zip(on_states, past, strict=False)) + on_clean
        away = (self.snr[left:right].clamp(min=1e-300).log() - math.log(variance)).abs()
        if left == 0:
            away[0] = math.inf  # at node 0 there is one state only, x[0]
        node = left + int(away.argmin())
        scale = math.sqrt(float(self.snr[node]) / variance)
        on_clean = on_clean * scale + float(self.snr[node]) - signal * scale  # the signal that belongs to the node
        to_state = 1 / float(evidence[node])
        implicit = 1 - on_clean * to_state * float(self.g[node])  # D = u/nu + g x holds at the averaged state itself
        factor = scale * to_state / implicit
        own = on_clean * to_state / float(self.nu[node]) / implicit
        return node, [w * factor for w in on_states], own, [w * factor for w in on_noise]


def finite_log_snr(table: Table) -> Tensor:
    """`[N]` log(alpha^2/sigma^2) at the nodes that a chain evaluates; pure noise, at node 0, is put as far before node 1 as
    that is before node 2."""
    found = 2 * (table.alpha[:-1].log() - table.sigma[:-1].log())
    if len(found) > 2 and not torch.isfinite(found[0]):
        found[0] = 2 * found[1] - found[2]
    return found

"""What passing a node costs the sample: the estimate behind tolerances and certificates.

After a sweep that changed the window's states by delta, the update with slope G in place of the true derivative J leaves
about (J - G) delta at the next node, and these errors add up along the window:

    e[n+1] = theta sum_{k<=n} h[k] |delta[k]|,      h[k] = max over the two extreme slopes of |J[k] - G[k]|     (1)

the extremes being a frozen clean-data estimate and a frozen noise estimate (chain/slope.py). theta is observed: a node that
stays in the window is swept again, and the change it then sees is the error it had. A node that becomes final carries its error
to the sample with a factor

    s[n] = k max(s0[n] (1 + 4 w (1 - w)), 0.6),      w = alpha^2 v/(alpha^2 v + sigma^2)                         (2)

where s0 is the factor for Gaussian data, (alpha^2 + sigma^2)^(-1/2) for deterministic chains (the probability-flow map) and
alpha/(alpha^2 + sigma^2) for stochastic ones (the regression of the sample on the state). The rest, with k = 2 for stochastic
chains, which forget, and 32 for deterministic ones, which do not, allows for what Gaussian data lack: a state that is about to
decide which of several samples it becomes, most of all near signal-to-noise ratio 1 (w = 1/2), answers more strongly. On
trained networks most states stay below (2), and single ones exceed it sixfold for a while; so the sum of s e over the nodes
at which a sample's window came to begin is an estimate of its error, not a bound.

With the rule `error` a sample may spend its tolerance along the chain in proportion to the sum of h s^(1/2) passed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paradiff.chain.slope import carried, freeze_clean_data, freeze_epsilon, resolve
from paradiff.chain.table import Table

DATA_VARIANCE = 0.5  # v, for data in -1 ... 1
STOCHASTIC_CAUTION, DETERMINISTIC_CAUTION = 2.0, 32.0  # k
LEAST_THETA = 0.02
FIRST_THETA = 0.5
FORGETTING = 0.7  # how much of theta survives a sweep that observed less


def noise_units(table: Table, edges: list[int]) -> Tensor:
    """`[M]` standard deviation of the noise that one DDPM step from each node at `edges` `[M+1]` to the next would add: the
    unit of the published tolerances (arXiv 2305.16317, section 3; ParaSolver's error rule)."""
    found = table.posterior_variance(edges).sqrt()
    for n in (found[1:-1] == 0).nonzero()[:, 0].tolist():  # two nodes at one noise level: the stages of a two-stage sampler
        found[n + 1] = found[n]
    return found


def response(table: Table) -> Tensor:
    """`[N+1]` factor by which a change of a node reaches the sample on ordinary data: equation (2) with k = 1."""
    signal = table.alpha**2 * DATA_VARIANCE
    weight = signal / (signal + table.sigma**2)
    square = table.alpha**2 + table.sigma**2
    gaussian = table.alpha / square if table.stochastic else square.rsqrt()
    return (gaussian * (1 + 4 * weight * (1 - weight))).clamp(min=0.6)


def sensitivity(table: Table) -> Tensor:
    """`[N+1]` the same with the caution of equation (2)."""
    return (STOCHASTIC_CAUTION if table.stochastic else DETERMINISTIC_CAUTION) * response(table)


def slope_error(table: Table, slope: Tensor, edges: list[int]) -> Tensor:
    """`[M]` h of equation (1), for a slope over the sub-intervals between `edges`. What the slope leaves out, the states
    before a sub-interval's left edge, counts in full."""
    extremes = [carried(resolve(s, table), edges) for s in (freeze_clean_data, freeze_epsilon)]
    known = torch.nn.functional.pad(slope, (0, table.band - slope.shape[1]))
    return torch.stack([(e - known).abs().sum(1) for e in extremes]).amax(0)


class ErrorBudget:
    """One sample's running account of the error it has let pass.

    Args:
        error: `[M]` h of equation (1).
        factor: `[M+1]` s of equation (2) at the nodes.
        least_theta: The smallest contraction believed: 1 for a method without a slope, whose sweeps leave all errors in place
            but the first.

    Attributes:
        theta: The observed contraction.
        spent: Sum of s e so far, in the data's units.
        residual: The largest root mean square change of a node that was passed over.
    """

    def __init__(self, error: list[float], factor: list[float], least_theta: float = LEAST_THETA) -> None:
        self._error, self._factor, self._least_theta = error, factor, least_theta
        self._predicted: list[float] = []
        self.theta = max(FIRST_THETA, least_theta)
        self.spent = 0.0
        self.residual = 0.0

    def record(self, first: int, change: list[float]) -> None:
        """Takes the root mean square changes of the nodes after `first`; updates theta from those seen before."""
        seen = list(zip(self._predicted, change, strict=False))
        predicted = math.sqrt(sum(e * e for e, _ in seen))
        if predicted > 0:
            observed = math.sqrt(sum(d * d for _, d in seen)) / predicted
            self.theta = max(observed, FORGETTING * self.theta, self._least_theta)
        self._errors, total = [0.0], 0.0
        for k, d in enumerate(change[:-1]):
            total += self._error[first + 1 + k] * d
            self._errors.append(total)
        self._first, self._change = first, change

    def cost(self, passed: int) -> float:
        """What the sample pays if `passed` nodes become final: s e at the last of them."""
        return self._factor[self._first + passed] * self.theta * self._errors[passed - 1]

    def settle(self, passed: int) -> None:
        """`passed` nodes became final."""
        self.spent += self.cost(passed)
        self.residual = max([self.residual, *self._change[: passed - 1]])
        self._predicted = [e - self._errors[passed - 1] for e in self._errors[passed:]]

    def forget(self) -> None:
        """A sweep overflowed: its one node that became final is exact, and nothing was observed."""
        self._predicted = []

    @property
    def estimated_error(self) -> float:
        """The estimated root mean square error of the sample so far."""
        return self.spent if math.isfinite(self.spent) else math.inf

# SPDX-License-Identifier: Apache-2.0
"""Data whose optimal denoiser is known in closed form: exact problems for samplers.

A state is x = alpha x0 + sigma eps with x0 from the data and eps standard normal. The optimal denoiser is the mean of
the clean datum given the state, and it carries the score of the states' density p(x; alpha, sigma) (Tweedie's formula):

    D(x) = E[x0 | x] = (x + sigma^2 grad log p(x)) / alpha                                                      (1)

Three families of data have it exactly.

Gaussian, mean mu and covariance V diag(lambda) V^T. Along each eigenvector

    D - mu = alpha lambda / (alpha^2 lambda + sigma^2) (x - alpha mu),                                          (2)

and the probability-flow equation of any schedule, which keeps the deviation in units of its standard deviation, maps
levels (alpha, sigma) to (alpha', sigma') by

    x' - alpha' mu = sqrt((alpha'^2 lambda + sigma'^2) / (alpha^2 lambda + sigma^2)) (x - alpha mu).             (3)

Mixture of Gaussians, weights w[k], means mu[k], variances v[k] (one each, or one per coordinate):

    r[k] proportional to w[k] N(x; alpha mu[k], alpha^2 v[k] + sigma^2),    D = sum_k r[k] D[k],                 (4)

with D[k] the estimate (2) of component k.

Empirical data d[1] ... d[n], point masses of equal weight: (4) with v = 0, a softmax-weighted mean of the data,

    D = sum_k r[k] d[k],    r = softmax_k( alpha/sigma^2 (x.d[k] - alpha/2 |d[k]|^2) ).                          (5)

What a network trained on such data would predict is m = (D - p x)/q (chain/prediction.py); `denoiser(table)` returns just
that, as a function of what a network sees: the scaled state and the time.

All arithmetic is float64, whatever the dtype of the states, and results are rounded to it once. With float32 logits (5)
would be wrong by 0.04 at sigma = 0.01 for states half-way between two of the digits, and the time saved is only half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.chain.table import Table

Level = Tensor | float
Clean = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Gaussian data, its covariance given by eigenvalues and eigenvectors. Targets are compared by identity.

    States may be flat or of any shape with d numbers a row; results have the shape and dtype of the states. Tensors
    stay on the device they are given on: put them on that of the states, or every call copies them there.

    Attributes:
        mean: mu, any shape of d numbers; samples have this shape.
        eigenvalues: lambda `[d]`, not negative.
        eigenvectors: V `[d, d]`, one a column, as torch.linalg.eigh returns them; None for a diagonal covariance.

    Raises:
        ValueError: If sizes disagree, a number is not finite, an eigenvalue is negative, or the eigenvectors are not
            orthonormal to 1e-8.
    """

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor | None = None

    def __post_init__(self) -> None:
        size = _store(self, "mean").numel()
        eigenvalues = _store(self, "eigenvalues", (size,))
        if eigenvalues.min() < 0:
            raise ValueError(f"the smallest eigenvalue is {eigenvalues.min():.3g}; a covariance has none below zero")
        if self.eigenvectors is None:
            return
        vectors = _store(self, "eigenvectors", (size, size))
        gap = (vectors.T @ vectors - torch.eye(size, dtype=torch.float64, device=vectors.device)).abs().max()
        if gap > 1e-8:
            raise ValueError(
                f"the eigenvectors are not orthonormal: V^T V differs from the identity by up to {gap:.2g}; pass the "
                "columns that torch.linalg.eigh returns, computed in float64"
            )

    def clean(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[x0 | x], equation (2).

        Args:
            x: States `[R, ...]`.
            alpha: Signal levels `[R]`, or one for all.
            sigma: Noise levels `[R]`, or one for all.

        Returns:
            Estimates, the shape and dtype of `x`.

        Raises:
            ValueError: If the shapes do not fit each other or the data.
        """
        deviation, alpha, variance = self._deviation(x, alpha, sigma)
        gain = alpha * self.eigenvalues.to(x.device) / variance.clamp(min=_TINY)
        return self._state(deviation * gain, torch.ones_like(alpha), x)

    def log_density(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """log p(x; alpha, sigma) `[R]`, float64; arguments as in `clean`.

        Raises:
            ValueError: If the shapes do not fit, or a direction has no variance at all.
        """
        deviation, _, variance = self._deviation(x, alpha, sigma)
        _check_variance(variance, "the density does not exist")
        return _log_normal(deviation, variance)

    def flow(self, x: Tensor, start_levels: tuple[Level, Level], end_levels: tuple[Level, Level]) -> Tensor:
        """The exact probability-flow map between two pairs of levels, equation (3).

        Args:
            x: States `[R, ...]` at `start_levels`.
            start_levels: (alpha, sigma), each `[R]` or one for all.
            end_levels: (alpha', sigma'), likewise.

        Returns:
            States at `end_levels`, the shape and dtype of `x`.

        Raises:
            ValueError: If the shapes do not fit, or a direction has no variance at the start.
        """
        deviation, _, variance = self._deviation(x, *start_levels)
        _check_variance(variance, "the flow cannot start there")
        _, alpha, end_variance = self._deviation(x, *end_levels)
        return self._state(deviation * (end_variance / variance).sqrt(), alpha, x)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`[count, *mean.shape]` draws, float64."""
        size, device = self.mean.numel(), self.mean.device
        z = torch.randn(count, size, generator=generator, dtype=torch.float64, device=device)
        return self._state(z * self.eigenvalues.sqrt(), torch.ones_like(z[:, :1]), z).view(count, *self.mean.shape)

    def denoiser(self, table: Table) -> Callable[[Tensor, Tensor], Tensor]:
        """The network that is optimal for this data on `table`: see `Empirical.denoiser`."""
        return _denoiser(self.clean, table)

    def _deviation(self, x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Tensor]:
        """V^T(x - alpha mu) `[R, d]`, alpha `[R, 1]` and the variances alpha^2 lambda + sigma^2 `[R, d]`."""
        rows, alpha, sigma = _rows(x, alpha, sigma, self.mean.numel())
        deviation = rows - alpha * self.mean.to(x.device).flatten()
        if self.eigenvectors is not None:
            deviation = deviation @ self.eigenvectors.to(x.device)
        return deviation, alpha, alpha.square() * self.eigenvalues.to(x.device) + sigma.square()

    def _state(self, deviation: Tensor, alpha: Tensor, like: Tensor) -> Tensor:
        """alpha mu + V deviation, shaped as `like`."""
        if self.eigenvectors is not None:
            deviation = deviation @ self.eigenvectors.to(like.device).T
        return (alpha * self.mean.to(like.device).flatten() + deviation).to(like.dtype).view_as(like)


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of K Gaussians. A call holds a few float64 arrays `[R, K, d]`: meant for small problems. Mixtures are compared
    by identity.

    Attributes:
        weights: w `[K]`, positive, adding up to one.
        means: mu `[K, ...]`, d numbers each; samples have the shape of one of them.
        variances: v, `[K]` for components without a direction or `[K, d]` for diagonal covariances; not negative.

    Raises:
        ValueError: If sizes disagree, a number is not finite, a variance is negative, a weight is not positive, or the
            weights do not add up to one (to 1e-6; they are then normalised).
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        weights, means, variances = _store(self, "weights"), _store(self, "means"), _store(self, "variances")
        count, size = weights.numel(), means[0].numel()
        if weights.ndim != 1 or len(means) != count or variances.shape not in ((count,), (count, size)):
            raise ValueError(
                f"the weights have shape {tuple(weights.shape)}, the means {tuple(means.shape)}, the variances "
                f"{tuple(variances.shape)}; for K components of d numbers it must be (K,), (K, ...) and (K,) or (K, d)"
            )
        if weights.min() <= 0 or abs(weights.sum() - 1) > 1e-6:
            raise ValueError(
                f"the weights add up to {weights.sum():.6g} and the smallest is {weights.min():.3g}; they must be "
                "positive and add up to 1"
            )
        if variances.min() < 0:
            raise ValueError(f"the smallest variance is {variances.min():.3g}; none may be below zero")
        object.__setattr__(self, "weights", weights / weights.sum())

    def clean(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[x0 | x], equation (4); arguments, result and errors as in `Gaussian.clean`."""
        deviation, alpha, variance = self._deviation(x, alpha, sigma)
        responsibility = torch.softmax(self._log_joint(deviation, variance), dim=1)
        gain = alpha[:, None] * self._spread(x) / variance.clamp(min=_TINY)
        estimates = self.means.to(x.device).flatten(1) + gain * deviation
        return torch.einsum("rk,rkd->rd", responsibility, estimates).to(x.dtype).view_as(x)

    def log_density(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """log p(x; alpha, sigma) `[R]`, float64; arguments and errors as in `Gaussian.log_density`."""
        deviation, _, variance = self._deviation(x, alpha, sigma)
        _check_variance(variance, "the density does not exist")
        return self._log_joint(deviation, variance).logsumexp(dim=1)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`[count, *means.shape[1:]]` draws, float64."""
        device = self.means.device
        chosen = torch.multinomial(self.weights.to(device), count, replacement=True, generator=generator)
        z = torch.randn(count, self.means[0].numel(), generator=generator, dtype=torch.float64, device=device)
        return self.means[chosen] + (z * self._spread(self.means)[chosen].sqrt()).view(-1, *self.means.shape[1:])

    def denoiser(self, table: Table) -> Callable[[Tensor, Tensor], Tensor]:
        """The network that is optimal for this data on `table`: see `Empirical.denoiser`."""
        return _denoiser(self.clean, table)

    def _spread(self, like: Tensor) -> Tensor:
        """The variances as `[K, d]`."""
        variances = self.variances.to(like.device)
        return variances if variances.ndim == 2 else variances[:, None].expand(-1, self.means[0].numel())

    def _deviation(self, x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Tensor]:
        """x - alpha mu[k] `[R, K, d]`, alpha `[R, 1]` and alpha^2 v[k] + sigma^2 `[R, K, d]`."""
        rows, alpha, sigma = _rows(x, alpha, sigma, self.means[0].numel())
        deviation = rows[:, None] - alpha[:, None] * self.means.to(x.device).flatten(1)
        return deviation, alpha, alpha[:, None].square() * self._spread(x) + sigma[:, None].square()

    def _log_joint(self, deviation: Tensor, variance: Tensor) -> Tensor:
        """log w[k] + log N(x; alpha mu[k], alpha^2 v[k] + sigma^2), `[R, K]`."""
        return self.weights.to(deviation.device).log() + _log_normal(deviation, variance.clamp(min=_TINY))


@dataclass(frozen=True, eq=False)
class Empirical:
    """Point masses of equal weight on the n data, whose optimal denoiser is equation (5). Objects are compared by identity.

    The cost of a call is two matrix products of R x n x d. At sigma = 0 the estimate is the limit, the nearest datum.

    Attributes:
        data: `[n, ...]`, d numbers each; samples have the shape of one of them.

    Raises:
        ValueError: If there are no data or a number is not finite.
    """

    data: Tensor

    def __post_init__(self) -> None:
        data = _store(self, "data")
        if data.ndim < 2:
            raise ValueError(
                f"the data have shape {tuple(data.shape)}; it must be (n, ...), one row a datum, and (n, 1) for numbers"
            )

    @cached_property
    def _extended(self) -> Tensor:
        """`[n, d+1]`: each datum followed by -|d|^2/2, so that one product gives x.d - alpha/2 |d|^2."""
        flat = self.data.flatten(1)
        return torch.cat([flat, -flat.square().sum(1, keepdim=True) / 2], dim=1)

    def clean(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[x0 | x], equation (5); arguments, result and errors as in `Gaussian.clean`."""
        rows, alpha, sigma = _rows(x, alpha, sigma, self.data[0].numel())
        data = self._extended.to(x.device)
        logits = torch.cat([rows, alpha], dim=1) @ data.T * (alpha / sigma.square().clamp(min=_TINY))
        return (torch.softmax(logits, dim=1) @ data[:, :-1]).to(x.dtype).view_as(x)

    def log_density(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """log p(x; alpha, sigma) `[R]`, float64; arguments and errors as in `Gaussian.log_density`."""
        rows, alpha, sigma = _rows(x, alpha, sigma, self.data[0].numel())
        _check_variance(sigma, "the density does not exist")
        square = sigma.square()
        nearness = torch.cat([rows, alpha], dim=1) @ self._extended.to(x.device).T
        peak = rows.square().sum(1) / square[:, 0] + rows.shape[1] * (2 * math.pi * square[:, 0]).log()
        return (nearness * alpha / square).logsumexp(dim=1) - math.log(len(self.data)) - peak / 2

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """`[count, *data.shape[1:]]` draws, with replacement, float64."""
        return self.data[torch.randint(len(self.data), (count,), generator=generator, device=self.data.device)]

    def denoiser(self, table: Table) -> Callable[[Tensor, Tensor], Tensor]:
        """The network that is optimal for this data on `table`.

        Args:
            table: Its times, levels, scales and prediction type are read here, once.

        Returns:
            A function (x, t) -> m: x `[R, ...]` what the network sees, scale times the state; t `[R]` times, each one
            of the table's (its last too, where noise is left there) or its rounding to the dtype of t, else ValueError; m
            the output, the shape and dtype of x. Where the times are on an accelerator, looking them up costs one
            synchronisation a call.

        Raises:
            ValueError: If two nodes share a time but not their levels, since the output is a function of the time.
        """
        return _denoiser(self.clean, table)


def digits() -> Empirical:
    """Scikit-learn's 1797 8x8 digits as empirical data, `[1797, 1, 8, 8]`, scaled to -1 ... 1.

    Raises:
        ImportError: If scikit-learn, which holds the images, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits() reads the images that come with scikit-learn, which is missing; run `pip install scikit-learn`"
        ) from error
    pixels, _ = load_digits(return_X_y=True)
    return Empirical(torch.as_tensor(pixels, dtype=torch.float64).view(-1, 1, 8, 8) / 8 - 1)


_TINY = 1e-200  # stands for a variance of zero: 1/_TINY and its products with squared distances are still finite


def _store(target: object, field: str, shape: tuple[int, ...] | None = None) -> Tensor:
    """Make `field` a float64 tensor, or say what is wrong with it."""
    value = torch.as_tensor(getattr(target, field), dtype=torch.float64)
    if value.ndim < 1 or value.numel() == 0:
        raise ValueError(f"{field} has shape {tuple(value.shape)}; it must be an array of one number or more")
    if not torch.isfinite(value).all():
        raise ValueError(f"{field} holds {int((~torch.isfinite(value)).sum())} numbers that are not finite")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{field} has shape {tuple(value.shape)}; a mean of {shape[0]} numbers asks for {shape}")
    object.__setattr__(target, field, value)
    return value


def _rows(x: Tensor, alpha: Level, sigma: Level, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """States as `[R, d]` and levels as `[R, 1]`, all float64 on the device of `x`."""
    if x.ndim < 2 or math.prod(x.shape[1:]) != size:
        raise ValueError(f"the states have shape {tuple(x.shape)}; they must be (R, ...) with {size} numbers a row")
    alpha, sigma = (torch.as_tensor(level, dtype=torch.float64, device=x.device) for level in (alpha, sigma))
    for name, level in (("alpha", alpha), ("sigma", sigma)):
        if level.ndim and level.shape != (len(x),):
            raise ValueError(f"{name} has shape {tuple(level.shape)}; with {len(x)} states it must be ({len(x)},) or ()")
    return x.reshape(len(x), size).double(), alpha.expand(len(x))[:, None], sigma.expand(len(x))[:, None]


def _log_normal(deviation: Tensor, variance: Tensor) -> Tensor:
    """log N(deviation; 0, variance), summed over the last axis."""
    return -(deviation.square() / variance + (2 * math.pi * variance).log()).sum(-1) / 2


def _check_variance(variance: Tensor, complaint: str) -> None:
    if not (variance > 0).all():
        raise ValueError(f"{complaint}: at sigma = 0 the states have no spread in some direction; take sigma above 0")


@made_at_home
def _denoiser(clean: Clean, table: Table) -> Callable[[Tensor, Tensor], Tensor]:
    """m = (D - p x)/q at the node of each row's time: see `Empirical.denoiser`."""
    assert table.scale is not None
    assert torch.isfinite(table.p / table.q).all(), "a table is refused where its prediction does not exist"
    ended = bool(table.sigma[-1] == 0 or (table.t[:-1] == table.t[-1]).any())  # the sample's own time means nothing then
    seen = slice(None, -1 if ended else None)
    alpha, sigma = table.alpha[seen], table.sigma[seen]
    levels = torch.stack([alpha, sigma, table.scale[seen], *table.clean_at(seen)])
    times, place = torch.unique(table.t[seen], return_inverse=True)
    nodes = torch.empty(len(times), dtype=torch.long).scatter_(0, place, torch.arange(len(place)))
    shared = levels[:, nodes]
    if len(apart := ((shared[:, place] - levels).abs() > 1e-9 * levels.abs()).any(0).nonzero()):
        node = int(apart[0])
        raise ValueError(
            f"table {table.name!r}: nodes {int(nodes[place[node]])} and {node} share the time {table.t[node]:.6g} but "
            "not their levels; a denoiser that sees only the time cannot serve both"
        )

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if t.shape != x.shape[:1]:
            raise ValueError(f"the times have shape {tuple(t.shape)}; with {len(x)} states it must be ({len(x)},)")
        known = times.to(t.device, t.dtype if t.is_floating_point() else torch.float64)
        query = t.to(known.dtype).contiguous()
        found = torch.searchsorted(known, query)
        matches = torch.searchsorted(known, query, right=True) - found
        if (matches != 1).any():
            wrong = int((matches != 1).nonzero()[0])
            raise ValueError(
                f"the time {t[wrong].item():.9g} matches {int(matches[wrong])} of the {len(times)} times of table "
                f"{table.name!r}, {times[0]:.6g} ... {times[-1]:.6g}; it must match one: pass values of table.t"
            )
        row = shared.to(x.device)[:, found.to(x.device)]
        scale, p, q = row[2:].view(3, len(x), *[1] * (x.ndim - 1))
        state = x.double() / scale
        m = (clean(state, row[0], row[1]) - p * state) / q
        return m.to(x.dtype)

    return denoise

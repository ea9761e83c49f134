# SPDX-License-Identifier: Apache-2.0
"""Noise of another covariance than the identity: e = L z, with z the draws of another source.

A network that was trained with such noise, x = alpha x0 + sigma e, is sampled with it from the start on, x[0] = start_scale e
and x[i+1] = ... + c[i] e[i]. The map L is linear, and the covariance of e is L L^T, in the units in which sigma is the noise
level: its diagonal is 1 where each element has as much noise as the level says.

| noise | L | known from |
|---|---|---|
| `Correlated(noise, covariance, axes)` | the lower triangular factor of a matrix, along some axes | - |
| `Correlated.scaled` | diagonal: a deviation for each element | - |
| `Correlated.autoregressive` | AR(1) along one axis | "progressive" noise of videos, arXiv 2305.10474 |
| `Correlated.power_law` | spectral filter, power 1/f^beta: white, pink (1), red (2), blue (-1) | Timmer & Koenig 1995 |
| `Correlated(noise, function)` | any linear function of a draw | - |

The map works on each draw by itself, so that the draws stay those of their places: recorded draws that make one noise of
several (draws.py) are mapped after they are added.

Errors are what they are for other noise: root mean squares over all elements, in the data's units; no norm is weighted by the
covariance. Where the covariance is singular, some directions of a state hold no noise at all: their start is 0, and the network
alone moves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.chain.noise import Noise
from paradiff.chain.table import equal
from paradiff.errors import are_whole, is_real, is_whole, shown

LinearMap = Callable[[Tensor], Tensor]

ASYMMETRY = 1e-6
"""How far a covariance may be from its transpose, and its eigenvalues below 0, as a share of its largest eigenvalue."""

NONLINEAR = 1e-3
"""How far a function may be from linear, as a share of its largest value: what half precision explains."""


class Correlated:
    """The draws of a source, mapped by L.

    Args:
        noise: The source: `Keyed`, `Recorded`, or any other.
        covariance: `[d, d]` the covariance C of the elements along `axes`, symmetric and positive semidefinite: L is its lower
            triangular factor with a diagonal of 0 or more, Cholesky's where C is positive definite; all other elements are
            independent. Or L itself, a function of draws `[n, *shape]` that maps each by itself, linearly.
        axes: The axes of a sample, whose sizes multiply to d; all by default.

    Attributes:
        source: The noise as given.
        shape: Shape of one sample.
        samples: Number of samples.

    Raises:
        ValueError: If a matrix is not square, symmetric, finite, positive semidefinite and not 0, or has another size than the
            axes; or if a function is not linear, or does not map each draw by itself.
    """

    @made_at_home
    def __init__(self, noise: Noise, covariance: Tensor | LinearMap, *, axes: Sequence[int] | None = None) -> None:
        _require_noise(noise)
        if isinstance(covariance, Tensor):
            chosen = _axes(axes, noise.shape)
            linear: LinearMap = Factor(_factor(covariance, [noise.shape[k] for k in chosen]), chosen)
        elif callable(covariance) and not isinstance(covariance, type):
            if axes is not None:
                raise ValueError(f"axes are {shown(axes)} beside a function; give axes with a matrix only")
            _require_linear(covariance, noise)
            linear = covariance
        else:
            raise ValueError(f"the covariance is {shown(covariance)}; give a tensor [d, d], or a linear function of draws")
        self.source, self._map = noise, linear
        self.shape, self.samples = tuple(noise.shape), noise.samples

    @classmethod
    @made_at_home
    def scaled(cls, noise: Noise, deviations: Tensor) -> Correlated:
        """Noise with a deviation for each element.

        Args:
            noise: The source.
            deviations: `[*shape]`, or what can be expanded to it: 0 or more, finite, not all 0.

        Raises:
            ValueError: If they are others.
        """
        _require_noise(noise)
        shape = tuple(noise.shape)
        if not isinstance(deviations, Tensor) or deviations.dtype == torch.bool or deviations.is_complex():
            raise ValueError(f"the deviations are {shown(deviations)}; give a tensor of real numbers of shape {shape}")
        own = deviations.detach().to("cpu", torch.float64)
        if own.ndim > len(shape) or any(a not in (1, b) for a, b in zip(own.shape[::-1], shape[::-1], strict=False)):
            raise ValueError(f"the deviations have shape {tuple(own.shape)}; give a tensor that can be expanded to {shape}")
        if not bool((torch.isfinite(own) & (own >= 0)).all()) or not bool(own.any()):
            raise ValueError(
                "the deviations are negative, not finite, or all 0; give numbers of 0 or more, one above 0 at least"
            )
        return cls(noise, Scale(own))

    @classmethod
    @made_at_home
    def autoregressive(cls, noise: Noise, correlation: float, *, axis: int = 0) -> Correlated:
        """AR(1) noise: each slice along an axis follows the one before, e[0] = z[0], e[k] = rho e[k-1] + sqrt(1 - rho^2) z[k],
        so that each element's variance is 1 and slices j apart have the correlation rho^j.

        Args:
            noise: The source.
            correlation: rho, between -1 and 1.
            axis: Of a sample, such as that of the frames of a video or the steps of a plan.

        Raises:
            ValueError: If an argument is out of range.
        """
        _require_noise(noise)
        if not is_real(correlation) or not -1 < correlation < 1:
            raise ValueError(f"the correlation is {shown(correlation)}; it must be a number between -1 and 1, neither included")
        (chosen,) = _axes([axis], noise.shape)
        k = torch.arange(noise.shape[chosen])
        lag = (k[:, None] - k).abs()
        return cls(noise, torch.tensor(float(correlation), dtype=torch.float64) ** lag, axes=[chosen])

    @classmethod
    @made_at_home
    def power_law(cls, noise: Noise, exponent: float, *, axes: Sequence[int] = (0,)) -> Correlated:
        """Coloured noise: its power falls as 1/f^beta with the frequency f along some axes, along which it is periodic; each
        element's variance is 1. The mean along the axes has the power of the lowest frequency.

        Args:
            noise: The source.
            exponent: beta: 0 is white noise, 1 pink, 2 red, -1 blue; -8 to 8.
            axes: Of a sample, such as (0,) for the frames of a video, or (1, 2) for the plane of a picture.

        Raises:
            ValueError: If an argument is out of range.
        """
        _require_noise(noise)
        if not is_real(exponent) or not -8 <= exponent <= 8:
            raise ValueError(f"the exponent is {shown(exponent)}; it must be a number from -8 to 8")
        chosen = _axes(axes, noise.shape)
        sizes = [noise.shape[k] for k in chosen]
        if math.prod(sizes) < 2:
            raise ValueError(f"axes {chosen} of samples of shape {tuple(noise.shape)} have one element; colour needs several")
        return cls(noise, Filter(float(exponent), chosen, tuple(sizes)))

    def __repr__(self) -> str:
        name = self._map if isinstance(self._map, Factor | Scale | Filter) else shown(self._map)
        return f"{self.source!r}, correlated by {name!r}" if not isinstance(name, str) else f"{self.source!r}, mapped by {name}"

    def __eq__(self, other: object) -> bool:
        """Whether all draws are equal: the same map of equal draws."""
        return isinstance(other, Correlated) and self.source == other.source and self._map == other._map

    def __hash__(self) -> int:
        return hash((self.source, type(self._map)))

    def start(self, sample: int) -> Tensor:
        """The draw behind x[0], of shape `shape`, in float64."""
        return self.mapped(self.source.start(sample)[None])[0]

    def draw(self, sample: int, nodes: range) -> Tensor:
        """L z at consecutive nodes, `[len(nodes), *shape]`, in float64."""
        return self.mapped(self.source.draw(sample, nodes))

    def over(self, noise: Noise) -> Correlated:
        """The same map of the draws of another source, of the same shape."""
        found = Correlated.__new__(Correlated)
        found.source, found._map, found.shape, found.samples = noise, self._map, self.shape, noise.samples
        return found

    def mapped(self, drawn: Tensor) -> Tensor:
        """L of draws `[n, *shape]`, in float64."""
        return self._map(drawn.double()).double()


@dataclass(frozen=True, eq=False, repr=False)
class Factor:
    """L as a matrix `[d, d]` along some axes."""

    matrix: Tensor
    axes: tuple[int, ...]

    def __call__(self, drawn: Tensor) -> Tensor:
        """Draws `[n, *shape]`, mapped."""
        matrix = self.matrix.to(drawn.device)
        last = list(range(-len(self.axes), 0))
        moved = drawn.movedim([k + 1 for k in self.axes], last)
        found = moved.flatten(-len(self.axes)) @ matrix.T
        return found.view(moved.shape).movedim(last, [k + 1 for k in self.axes])

    def __repr__(self) -> str:
        return f"a covariance of {len(self.matrix)} elements along axes {self.axes}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Factor) and self.axes == other.axes and equal(self.matrix, other.matrix)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True, eq=False, repr=False)
class Scale:
    """L as deviations `[*shape]`."""

    deviations: Tensor

    def __call__(self, drawn: Tensor) -> Tensor:
        """Draws `[n, *shape]`, mapped."""
        return drawn * self.deviations.to(drawn.device)

    def __repr__(self) -> str:
        return f"deviations from {float(self.deviations.min()):.3g} to {float(self.deviations.max()):.3g}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scale) and equal(self.deviations, other.deviations)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


@dataclass(frozen=True, repr=False)
class Filter:
    """L as a spectral filter: amplitudes f^(-beta/2) along axes of these sizes, of mean square 1."""

    exponent: float
    axes: tuple[int, ...]
    sizes: tuple[int, ...]

    def __call__(self, drawn: Tensor) -> Tensor:
        """Draws `[n, *shape]`, mapped."""
        last = list(range(-len(self.axes), 0))
        moved = drawn.movedim([k + 1 for k in self.axes], last)
        gains = self._gains().to(drawn.device)
        found = torch.fft.ifftn(torch.fft.fftn(moved, dim=last) * gains, dim=last).real
        return found.movedim(last, [k + 1 for k in self.axes])

    @made_at_home
    def _gains(self) -> Tensor:
        """`[*sizes]` amplitudes: real and even, so that the map is real and symmetric."""
        square = torch.zeros(self.sizes, dtype=torch.float64)
        for k, size in enumerate(self.sizes):
            square = square + torch.fft.fftfreq(size, dtype=torch.float64).view(-1, *[1] * (len(self.sizes) - 1 - k)) ** 2
        least = square[square > 0].min()
        power = torch.where(square > 0, square, least) ** (-self.exponent / 2)
        return (power / power.mean()).sqrt()

    def __repr__(self) -> str:
        return f"a power law 1/f^{self.exponent:g} along axes {self.axes}"


def _require_noise(noise: Any) -> None:
    if isinstance(noise, type) or not all(hasattr(noise, name) for name in ("shape", "samples", "start", "draw")):
        raise ValueError(f"the noise is {shown(noise)}; give a Noise, such as paradiff.Keyed(shape, seed=0)")


def _axes(axes: object, shape: Sequence[int]) -> tuple[int, ...]:
    """The axes of a sample that a covariance is along."""
    if axes is None:
        return tuple(range(len(shape)))
    own = tuple(axes) if are_whole(axes) else ()
    if not own or len(set(own)) < len(own) or not all(is_whole(k) and 0 <= k < len(shape) for k in own):
        raise ValueError(
            f"the axes are {shown(axes)}; give some of the {len(shape)} axes of a sample of shape {tuple(shape)}, from 0 on, "
            "each once"
        )
    return tuple(int(k) for k in own)


def _factor(covariance: Tensor, sizes: Sequence[int]) -> Tensor:
    """`[d, d]` L, lower triangular with a diagonal of 0 or more, float64."""
    wanted = math.prod(sizes)
    if covariance.dtype == torch.bool or covariance.is_complex() or covariance.shape != (wanted, wanted):
        raise ValueError(
            f"the covariance is {shown(covariance)}; give a square matrix of real numbers {[wanted, wanted]}, for axes of "
            f"sizes {tuple(sizes)}"
        )
    own = covariance.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(own).all()):
        raise ValueError("the covariance is not finite; give a matrix of numbers")
    values, vectors = torch.linalg.eigh((own + own.T) / 2)
    largest = float(values.abs().max())
    if largest == 0:
        raise ValueError("the covariance is 0; give one that leaves some noise")
    if float((own - own.T).abs().max()) > ASYMMETRY * largest:
        raise ValueError("the covariance is not equal to its transpose; give a symmetric matrix")
    if float(values[0]) < -ASYMMETRY * largest:
        raise ValueError(
            f"the covariance has the eigenvalue {float(values[0]):.3g}, which would be a variance; give a matrix that is "
            "positive semidefinite"
        )
    found, failed = torch.linalg.cholesky_ex(own)
    if int(failed) == 0:
        return found
    # C = S S with S its symmetric root, and S = Q R: C = R^T R.
    root = vectors * values.clamp(min=0).sqrt()
    upper = torch.linalg.qr(root.T).R
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return (signs[:, None] * upper).T.contiguous()


def _require_linear(linear: LinearMap, noise: Noise) -> None:
    """Refuses a function that is no linear map of each draw by itself, by what it makes of three draws."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn((2, *noise.shape), generator=generator, dtype=torch.float64)
    drawn = torch.stack([a, b, a - 2 * b])
    found, alone = linear(drawn.clone()), linear(a[None].clone())
    for got, wanted in ((found, drawn.shape), (alone, (1, *a.shape))):
        if not isinstance(got, Tensor) or got.shape != wanted or got.is_complex():
            raise ValueError(
                f"the covariance's function returned {shown(got)} for draws of shape {tuple(wanted)}; it must return a tensor "
                "of real numbers of the same shape"
            )
    found, alone = found.double(), alone.double()
    if not bool(torch.isfinite(found).all()) or not bool(found.any()):
        raise ValueError("the covariance's function returned numbers that are not finite, or all 0; give a linear map of draws")
    size = NONLINEAR * float(found.abs().max())
    if float((found[0] - alone[0]).abs().max()) > size:
        raise ValueError(
            "the covariance's function maps a draw to something else by itself than among others; give one that maps each draw "
            "by itself"
        )
    if float((found[0] - 2 * found[1] - found[2]).abs().max()) > size:
        raise ValueError(
            "the covariance's function is not linear: it does not map a - 2 b to L(a) - 2 L(b); give a linear map of draws"
        )

# SPDX-License-Identifier: Apache-2.0
"""How much a loop's arithmetic magnifies the rounding of its networks' outputs, seen in its first pass.

Guidance makes the output of a step of several outputs m[k] of its networks, one with and one without the prompt, say:

    v = sum_k c[k] m[k],                                                                                         (1)

with c = (1 - w, w) for a guidance scale w. Each m[k] is rounded to a share of its own size M[k], independently of the others,
so that v is as uncertain as an output of size

    ( sum_k ( c[k] M[k] )^2 )^(1/2)                                                                              (2)

is by its own rounding, which is far above v's where guidance is strong. The factors c are those of least squares. What sets v
apart from the output m[k] that is closest to it,

    G = min_k |v - m[k]|/|m[k]|,                                                                                 (3)

is the share by which its slope may be another one than a network's; or `SLOPE` |c|, if that is more, since each network's own
may be another one than that of Gaussian data by the share `SLOPE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

SLOPE = 0.3
"""Share by which a network's slope may be another one than that of Gaussian data."""

PARTS = 8
"""Outputs of networks at most that a step's output is taken to be made of."""

ELEMENTS = 8192
"""Numbers of each that the factors are found from, at most."""


@dataclass(frozen=True)
class Magnified:
    """What a loop makes of its networks' outputs.

    Attributes:
        size: Root mean square of an output that its own rounding leaves as uncertain as a step's is: equation (2), or that of
            the step's if that is more.
        apart: G of equation (3), or what is more; 0 where nothing is known of the networks' outputs.
    """

    size: float = 0.0
    apart: float = 0.0


def magnified(outputs: Iterable[Tensor], output: Tensor) -> Magnified:
    """What a pass made of its networks' outputs. Waits for the device.

    Args:
        outputs: The tensors that its networks returned; those of another layout than a step's are left out.
        output: `[B, ...]` v, which its step was given.
    """
    every = max(output.numel() // ELEMENTS, 1)
    whole, parts = _sampled(output, every), [_sampled(part, every) for tensor in outputs for part in _parts(tensor, output)]
    own = float(_size(whole))
    if not 0 < len(parts) <= PARTS:
        return Magnified(own)
    columns = torch.stack(parts, dim=1)
    sizes = _size(columns)
    apart = float((_size(columns - whole[:, None]) / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)).amin())
    if not bool(torch.isfinite(columns).all()) or not math.isfinite(apart):
        return Magnified(own)
    factors = torch.linalg.lstsq(columns, whole[:, None], driver="gelsd").solution[:, 0]
    size = max(own, float((factors * sizes).square().sum().sqrt()))
    return Magnified(size, max(apart, SLOPE * float(factors.square().sum().sqrt())))


def _parts(tensor: Tensor, output: Tensor) -> list[Tensor]:
    """A network's output cut into tensors of the shape of a step's; none where it has another one."""
    if not tensor.is_floating_point() or tensor.shape[1:] != output.shape[1:] or len(tensor) % len(output):
        return []
    return list(tensor.split(len(output)))


def _sampled(value: Tensor, every: int) -> Tensor:
    """`[n]` numbers of a tensor on the CPU, in float64."""
    return value.reshape(-1)[::every].double().cpu()


def _size(values: Tensor) -> Tensor:
    """Root mean squares over the first axis."""
    return values.square().mean(0).sqrt()

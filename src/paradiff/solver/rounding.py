# SPDX-License-Identifier: Apache-2.0
"""How far two outputs for one row lie apart, and how far rounding may set them.

Kernels for calls of other numbers of rows leave a few units of rounding, which a network amplifies. So what rounding explains
is eps^(2/3) of the network's dtype, relative to the output: 2e-5 in float32, 1e-2 in float16 and 4e-2 in bfloat16. On CUDA, eps
is at least that of TF32, 2^-10.
"""

from __future__ import annotations

import torch
from torch import Tensor


def limit_of(dtype: torch.dtype, device: torch.device) -> float:
    """Relative difference of two outputs of a network that rounding explains."""
    eps = torch.finfo(dtype).eps
    if device.type == "cuda" and dtype != torch.float64:
        eps = max(eps, 2.0**-10)
    return eps ** (2 / 3)


def difference(one: Tensor, other: Tensor) -> float:
    """Relative difference of two outputs `[...]` in the root mean square; infinite where one alone is not finite."""
    return differences(one[None], other[None])[0]


def differences(one: Tensor, other: Tensor) -> list[float]:
    """The same of each of the outputs `[R, ...]` for R rows. Waits for the device once."""
    one, other = (of.double().reshape(len(of), -1) for of in (one, other))
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, 0.0, one - other)
    size = torch.where(one.isfinite() & other.isfinite(), torch.maximum(one.abs(), other.abs()), 0.0)
    found = gap.norm(dim=1) / size.norm(dim=1).clamp(min=1e-300)
    return found.nan_to_num(nan=torch.inf, posinf=torch.inf).tolist()

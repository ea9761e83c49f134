# SPDX-License-Identifier: Apache-2.0
"""Limits on the clean-data estimate: C(D).

A pixel model's scheduler may bound the clean-data estimate D of every step, which makes the step nonlinear in the
network's output. The table stays linear: the difference C(D) - D is folded into the output before the step sees it,

    m <- m + w (C(D) - D)                                                                                     (1)

with one weight w a step (`Table.clip_weight`). w = 1/q (see prediction.py) replaces the clean-data estimate everywhere;
other weights serve samplers that limit it in one place only (DDIM as diffusers runs it keeps the raw epsilon).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.errors import number_of, shown


@dataclass(frozen=True)
class Clip:
    """Elementwise bound: C(D) = min(max(D, -limit), limit).

    Raises:
        ValueError: If `limit` is not positive.
    """

    limit: float = 1.0

    def __post_init__(self) -> None:
        if not number_of(self.limit) > 0:
            raise ValueError(f"the clipping limit is {shown(self.limit)}; it must be positive")

    def __call__(self, clean: Tensor) -> Tensor:
        """C(D) for estimates `[R, ...]`."""
        return clean.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding (Saharia et al., arXiv 2205.11487, section 2.3): C(D) = clip(D, -s, s)/s, where s is the
    `ratio` quantile of |D| over one sample, kept between 1 and `maximum`.

    Raises:
        ValueError: If `ratio` is not in (0, 1] or `maximum` is below 1.
    """

    ratio: float = 0.995
    maximum: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < number_of(self.ratio) <= 1:
            raise ValueError(f"the thresholding ratio is {shown(self.ratio)}; it must be above 0 and at most 1")
        if not number_of(self.maximum) >= 1:
            raise ValueError(f"the thresholding maximum is {shown(self.maximum)}; it must be at least 1")

    def __call__(self, clean: Tensor) -> Tensor:
        """C(D) for estimates `[R, ...]`, each row by its own quantile."""
        flat = clean.flatten(1)
        bound = torch.quantile(flat.abs(), self.ratio, dim=1, keepdim=True).clamp(1, self.maximum)
        return (flat.clamp(-bound, bound) / bound).view_as(clean)

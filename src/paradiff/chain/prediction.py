# SPDX-License-Identifier: Apache-2.0
"""What a network predicts, as a linear map to the clean-data estimate.

A state on the ray of a clean datum x0 is x = alpha x0 + sigma eps. Whatever a network predicts, its clean-data estimate is
linear in the state and the output:

    D = p x + q m                                                                                              (1)

| prediction | m | p | q |
|---|---|---|---|
| epsilon | eps | 1/alpha | -sigma/alpha |
| sample | x0 | 0 | 1 |
| v | (alpha eps - sigma x0)/s, s^2 = alpha^2 + sigma^2 | alpha/s^2 | -sigma/s |
| flow | eps - x0 | 1/(alpha + sigma) | -sigma/(alpha + sigma) |

For variance-preserving schedules s = 1, for rectified flow alpha + sigma = 1; the general forms also hold for
variance-exploding states (alpha = 1).

Sources: v, Salimans and Ho, arXiv 2202.00512; flow, Liu, Gong and Liu, arXiv 2209.03003.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from paradiff.errors import shown

Prediction = Literal["epsilon", "sample", "v", "flow"]


def clean_coefficients(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients p and q of equation (1).

    Args:
        prediction: What the network predicts.
        alpha: Signal levels, any shape.
        sigma: Noise levels, the shape of `alpha`.

    Returns:
        p and q, each of the shape of `alpha`. Entries where the estimate does not exist (epsilon prediction at alpha = 0)
        are infinite.

    Raises:
        ValueError: If `prediction` is not one of the four.
    """
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "v":
        square = alpha**2 + sigma**2
        return alpha / square, -sigma / square.sqrt()
    if prediction == "flow":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    raise ValueError(f"prediction is {shown(prediction)}; it must be one of {', '.join(get_args(Prediction))}")

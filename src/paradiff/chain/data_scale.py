# SPDX-License-Identifier: Apache-2.0
"""The data's mean square V, as a run sees it, and what it means for tolerances.

Tolerances and estimates take V for 1. Data of mean square 1/64 ... 4 are **usual**, and nothing is changed for them. Others
decide at other levels (sensitivity.py), and a tolerance near the size of small data would let samples pass that are none of
theirs, whose errors no linear estimate tells. So V is seen from the states:

- a sample found, or a coarse one, has the mean square V itself;
- the clean-data estimate D of a state at levels alpha, sigma has at most that. For Gaussian data its mean square is q with

      q = alpha^2 V^2/(alpha^2 V + sigma^2),      V = q/2 + (q^2/4 + q sigma^2/alpha^2)^(1/2).                    (1)

An error of a tenth of the noise in the network's output is sigma/(10 alpha) in D, which data must exceed to count as large by
equation (1). Iterates overshoot, so that they must have mean square 16, too.
"""

from __future__ import annotations

import math

LARGE = 4.0  # mean square from which on data are large
SMALL = 1 / 64  # mean square below which data are small
OVERSHOT = 16.0  # the same for clean-data estimates of states that are not final
ERROR = 0.1  # root mean square error of a network's output that no data are seen in
SHARE = (
    8e-3  # of the root mean square of small data, to which a tolerance is held: as the default one's of data of variance 1/4
)


def unusual(size: float) -> float:
    """A mean square, rounded to a power of 2, where it is that of small or large data; 1 where it is usual, or none."""
    if not 0 < size < math.inf or SMALL <= size < LARGE:
        return 1.0
    return 2.0 ** round(math.log2(size))


def seen(square: float, alpha: float, sigma: float) -> float:
    """The data's mean square by equation (1) where it is small or large, rounded to a power of 2; 1 where it is usual.

    Args:
        square: Mean square of the clean-data estimate.
        alpha: Signal level of its state.
        sigma: Noise level of its state.
    """
    if alpha <= 0 or not 0 < square < math.inf:
        return 1.0
    noise = (sigma / alpha) ** 2
    certain = max(math.sqrt(square) - ERROR * math.sqrt(noise), 0.0) ** 2
    if certain >= max(OVERSHOT, LARGE):
        return unusual(_gaussian(certain, noise))
    found = _gaussian(square, noise)
    return unusual(found) if found < SMALL else 1.0


def _gaussian(square: float, noise: float) -> float:
    """Equation (1), of q and sigma^2/alpha^2."""
    return square / 2 + math.sqrt(square * square / 4 + square * noise)


def held_to(tolerance: float, size: float) -> float:
    """The tolerance that a sample is held to, on data of mean square `size`: the caller's, and on small data no more than a
    share of their root mean square."""
    return min(tolerance, SHARE * math.sqrt(size)) if size < SMALL else tolerance

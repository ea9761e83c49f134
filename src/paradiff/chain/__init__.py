# SPDX-License-Identifier: Apache-2.0
"""The recurrence: a sampler's table of coefficients, its noises, slopes and steps."""

from paradiff.chain.clipping import Clip, DynamicThreshold
from paradiff.chain.correlated import Correlated
from paradiff.chain.noise import Keyed, Noise, Recorded
from paradiff.chain.table import Table

__all__ = [
    "Clip",
    "Correlated",
    "DynamicThreshold",
    "Keyed",
    "Noise",
    "Recorded",
    "Table",
]

# SPDX-License-Identifier: Apache-2.0
"""What to choose: parameters from the theorems, and the laws of samplers on Gaussian data."""

from paradiff.planning import gaussian_law
from paradiff.planning.theory import Theory

__all__ = [
    "Theory",
    "gaussian_law",
]

"""What to choose: parameters from the theorems, and the laws of samplers on Gaussian data."""

from paradiff.planning.theory import Theory

__all__ = [
    "Theory",
]

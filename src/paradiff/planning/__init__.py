# SPDX-License-Identifier: Apache-2.0
"""What to choose: parameters from the theorems, the laws of samplers on Gaussian data, latency curves, methods side by
side, calibrated bounds."""

from paradiff.planning import gaussian_law
from paradiff.planning.calibration import Calibration
from paradiff.planning.comparison import Compared, Comparison, SampleCost
from paradiff.planning.curves import curve_of
from paradiff.planning.effectivity import Effectivity
from paradiff.planning.latency import LatencyCurve, measure_latency
from paradiff.planning.plan import Plan
from paradiff.planning.side_by_side import compare
from paradiff.planning.theory import Theory

__all__ = [
    "Calibration",
    "Compared",
    "Comparison",
    "Effectivity",
    "LatencyCurve",
    "Plan",
    "SampleCost",
    "Theory",
    "compare",
    "curve_of",
    "gaussian_law",
    "measure_latency",
]

# SPDX-License-Identifier: Apache-2.0
"""A device that is not the CPU, without hardware: `pseudo:0` and `pseudo:1`, in host memory.

Their tensors have storage of their own, refuse to be mixed with the CPU's where CUDA refuses it, and report what would make the
host wait (pseudo.cpp). `load()` compiles the backend once for a user and registers it with torch; `counting()` counts by line.
"""

from __future__ import annotations

from double.backend import load, missing
from double.counts import Counts, counting, limited

__all__ = ["Counts", "counting", "limited", "load", "missing"]

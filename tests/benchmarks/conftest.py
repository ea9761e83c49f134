# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own modules, importable as they import each other."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

# SPDX-License-Identifier: Apache-2.0
"""The widths of padded network calls.

A compiled network is compiled again for each number of rows, and a CUDA graph is captured for each. The rows of a round change
from round to round: a window fills, slides and runs out, samples end, a check evaluates a row by itself. So a padded call is
filled up to one of at most four widths, which depend on the widest round W of a run alone:

    1,  W / 3,  2 W / 3,  W.

Width 1 is that of rows that are checked, of warm-ups and of the last nodes. Of the choices tried, this one cost least where
checks are counted (benchmarks/shapes.py).
"""

from __future__ import annotations


def widths_of(most: int) -> tuple[int, ...]:
    """The widths of calls that have at most `most` rows, in increasing order, at most four."""
    return tuple(sorted({1, -(-most // 3), -(-2 * most // 3), most}))

# SPDX-License-Identifier: Apache-2.0
"""The tuned numbers of CHORDS' error estimate."""

from __future__ import annotations

from dataclasses import dataclass

from paradiff.errors import require_between, require_real


@dataclass(frozen=True, kw_only=True)
class ChordsControl:
    """The tuned numbers of the error estimate (solver.py), fitted so that 95 of 100 answers err by less than it: deterministic
    chains of 25 to 100 steps on the trained and the closed-form digits and on mixtures in 2 to 512 dimensions.

    Attributes:
        caution: The estimate over the root mean square change between two answers in turn; positive.
        least_contraction: The smallest ratio of two changes in turn that is believed, 0 ... 1.

    Raises:
        ValueError: If a number is out of its range.
    """

    caution: float = 2.0
    least_contraction: float = 0.02

    def __post_init__(self) -> None:
        require_real("the control's caution", self.caution, positive=True)
        require_between("the control's least_contraction", self.least_contraction, 0, 1)

# SPDX-License-Identifier: Apache-2.0
"""The tuned numbers of the error budget of a window."""

from __future__ import annotations

from dataclasses import dataclass

from paradiff.errors import require_between


@dataclass(frozen=True, kw_only=True)
class WindowControl:
    """The tuned numbers of the error budget (budget.py). None of them was scanned on its own.

    Attributes:
        first_theta: Contraction that is assumed before any was observed, 0 ... 1. A larger one lets the first nodes pass later.
        least_theta: The smallest contraction believed of a method with a slope, 0 ... 1: a smaller one may be chance.
        forgetting: Share of theta that survives a sweep which observed less, 0 ... 1. A larger one lets nodes pass later.

    Raises:
        ValueError: If a number is out of its range.
    """

    first_theta: float = 0.5
    least_theta: float = 0.02
    forgetting: float = 0.7

    def __post_init__(self) -> None:
        for name in ("first_theta", "least_theta", "forgetting"):
            require_between(f"the control's {name}", getattr(self, name), 0, 1)

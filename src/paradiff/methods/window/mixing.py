# SPDX-License-Identifier: Apache-2.0
"""The frozen numbers of the Anderson mixing (anderson.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from paradiff.errors import require_real, require_whole

HISTORY = 3
"""m where none is given: the paper's own."""


@dataclass(frozen=True, kw_only=True)
class Anderson:
    """The numbers of the mixing; see `methods.parataa`.

    Attributes:
        order: Nodes over which a residual is carried, k; None for the whole window.
        history: Sweeps that are mixed, m, the present one included; 1 for none. None for 3, or the window if that is less.
        ridge: lambda of equation (3), in squares of the states' own units; above 0.
        divergence: The mixing is given up for a sample whose root mean square residual exceeds that of its first sweep by this
            factor: 1 or more in use, as residuals do grow where a window slides.

    Raises:
        ValueError: If a number is out of its range.
    """

    order: int | None = None
    history: int | None = None
    ridge: float = 1e-3
    divergence: float = 100.0

    def __post_init__(self) -> None:
        for name in ("order", "history"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), 1, ", or None")
                object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("ridge", "divergence"):
            require_real(name, getattr(self, name), positive=True)
            object.__setattr__(self, name, float(getattr(self, name)))

    def refuse_longer_than(self, window: int) -> None:
        """Refuses what reaches beyond a window.

        Raises:
            ValueError: If the order or the history does.
        """
        if self.order is not None and self.order > window:
            raise ValueError(
                f"the order is {self.order} nodes, the window has {window}: give an order of at most {window}, or None for the "
                "whole window"
            )
        if self.history is not None and self.history > window:
            raise ValueError(
                f"the history is {self.history} sweeps, and a window of {window} nodes is exact after {window}: give a history "
                f"of at most {window}, or None"
            )

    def within(self, window: int) -> Anderson:
        """The same for a window that may be narrower than what was asked for."""
        order, history = (None if value is None else min(value, window) for value in (self.order, self.history))
        return dataclasses.replace(self, order=order, history=history)

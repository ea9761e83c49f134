# SPDX-License-Identifier: Apache-2.0
"""The methods and windows among which is chosen."""

from __future__ import annotations

from collections.abc import Callable

from paradiff.methods.presets import collocation, parasolver, quasi_newton, srds
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.solver.protocol import Method

WINDOWS = (2, 4, 8, 16, 32)
"""Most rows of one sample in a round, beside the whole chain."""

WHOLE = 200
"""Most steps of a chain that is solved in one window."""

FAMILIES: dict[str, Callable[[int | None, float], Method]] = {
    "parasolver": lambda window, tolerance: parasolver(window, tolerance),
    "quasi_newton": lambda window, tolerance: quasi_newton(window, tolerance),
    "collocation": lambda window, tolerance: collocation(window=window, tolerance=tolerance),
    "srds": lambda window, tolerance: srds(tolerance=tolerance, rows=window),
}
"""Methods by name, as functions of most rows of one sample in a round, and of the tolerance."""


def called(family: str, window: int | None, tolerance: float) -> str:
    """The call of a preset, such as `parasolver(window=8)`.

    Args:
        family: The method's name; `sequential` for the plain chain.
        window: Most rows of a sample in a round; None for the whole chain.
        tolerance: Its tolerance.
    """
    if family not in FAMILIES:
        return f"{family}()"
    given = [] if window is None else [f"{'rows' if family == 'srds' else 'window'}={window}"]
    given += [] if tolerance == DEFAULT_TOLERANCE else [f"tolerance={tolerance:g}"]
    return f"{family}({', '.join(given)})"


def windows_of(steps: int, most: int | None = None) -> list[int | None]:
    """The windows for a chain of so many steps; None for the whole chain.

    Args:
        steps: Steps of the chain.
        most: Most rows of one sample in a round; None for no bound.
    """
    found: list[int | None] = [w for w in WINDOWS if w < steps and (most is None or w <= most)]
    if steps <= WHOLE and (most is None or steps <= most):
        found.append(None)
    return found or [None]

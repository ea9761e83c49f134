# SPDX-License-Identifier: Apache-2.0
"""A solver that has a window solver work for it."""

from __future__ import annotations

from torch import Tensor

from paradiff.methods.window.solver import WindowSolver
from paradiff.solver.trajectory import Part


class Windowed:
    """The part of a solver's protocol that is its window solver's own.

    Args:
        window: The window solver.
    """

    def __init__(self, window: WindowSolver) -> None:
        self._window = window

    @property
    def sample(self) -> int:
        """The sample."""
        return self._window.sample

    @property
    def done(self) -> bool:
        """Whether the sample is found."""
        return self._window.done

    @property
    def final(self) -> Tensor:
        """The sample once it is found."""
        return self._window.final

    def part(self) -> Part:
        """The trajectory of the sample."""
        return self._window.part()

    @property
    def newest(self) -> Tensor:
        """The state furthest along the chain."""
        return self._window.newest

    @property
    def reaches_end(self) -> bool:
        """Whether that is the sample as far as it is known."""
        return self._window.reaches_end

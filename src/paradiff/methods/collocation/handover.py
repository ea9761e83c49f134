# SPDX-License-Identifier: Apache-2.0
"""The handover: the window method over all nodes of the chain, which takes over a sample."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from paradiff.methods.window.solver import WindowSolver
from paradiff.solver.protocol import Query
from paradiff.solver.records import WindowRecord
from paradiff.solver.solution import ErrorEstimate


class Handover:
    """A window solver with a tightened tolerance, its estimate in the units of the sample.

    Args:
        window: The window solver.
        tightening: Factor, 1 or more, by which its tolerance was divided, since its estimate does not know of the sample's
            amplification; its estimate is multiplied by the same.
    """

    def __init__(self, window: WindowSolver, tightening: float) -> None:
        self._window, self._tightening = window, tightening

    @property
    def done(self) -> bool:
        """Whether the sample is found."""
        return self._window.done

    @property
    def final(self) -> Tensor:
        """The sample once it is found."""
        return self._window.final

    @property
    def newest(self) -> Tensor:
        """The state furthest along the chain."""
        return self._window.newest

    def error_estimate(self, rounds: int, evaluations: int) -> ErrorEstimate:
        """How far to trust the sample, with its rounds and evaluations in all."""
        verified = self._window.error_estimate
        error = verified.estimated_error * self._tightening
        return dataclasses.replace(verified, estimated_error=error, rounds=rounds, evaluations=evaluations)

    def ask(self) -> Query:
        """The rows wanted now."""
        return self._window.ask()

    def tell(self, query: Query, outputs: Tensor) -> Tensor | None:
        """Takes the outputs of a query."""
        return self._window.tell(query, outputs)

    def advance(self, norms: list[float], round: int) -> WindowRecord:
        """Judges the round; the sample passes as a whole."""
        record = self._window.advance(norms, round)
        return dataclasses.replace(record, passed=int(self._window.done))

# SPDX-License-Identifier: Apache-2.0
"""One sample's window, whose width is that of the run's pace; the rest of the chain is walked where no wider one pays."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paradiff.methods.adaptive.clock import RoundClock
from paradiff.methods.adaptive.walk import Walk
from paradiff.methods.window.salvage import finite_nodes
from paradiff.methods.window.solver import WindowSolver
from paradiff.solver.protocol import Query
from paradiff.solver.records import WindowRecord
from paradiff.solver.solution import ErrorEstimate


class AdaptiveSolver:
    """A window, and then a walk, of one sample.

    Args:
        window: The window.
        clock: The clock that all samples share.

    Attributes:
        sample: The sample.
    """

    def __init__(self, window: WindowSolver, clock: RoundClock) -> None:
        self._window, self._clock = window, clock
        self._walk: Walk | None = None
        self._rounds = self._evaluations = 0  # of the walk
        self.sample = window.sample
        clock.enter(self)

    @property
    def node(self) -> int:
        """The node up to which states are final."""
        return self._window.lo if self._walk is None else self._walk.node

    @property
    def done(self) -> bool:
        """Whether the sample is found."""
        return self.node == self._window.setup.intervals

    @property
    def final(self) -> Tensor:
        """The sample once it is found."""
        return self._window.final if self._walk is None else self._walk.state

    @property
    def newest(self) -> Tensor:
        """The state furthest along the chain."""
        return self._window.newest if self._walk is None else self._walk.state

    @property
    def reaches_end(self) -> bool:
        """Whether that is the sample as far as it is known."""
        return self.done if self._walk is not None else self._window.reaches_end

    @property
    def error_estimate(self) -> ErrorEstimate:
        """How far to trust the sample: what the window's nodes may have added; the walk adds nothing."""
        window = self._window
        if self._walk is None:
            return window.error_estimate
        rounds, evaluations = window.rounds + self._rounds, window.evaluations + self._evaluations
        return ErrorEstimate(window.members.residual, window.members.estimated_error, rounds, evaluations)

    def ask(self) -> Query:
        """The rows wanted now."""
        self._clock.asked(self)
        if self._walk is None and self._clock.walks and self._window.rounds:
            self._walk = self._window_as_walk()
        if self._walk is not None:
            return Query(*self._walk.ask())
        if self._window.hi - self._window.lo > self._clock.width:
            self._window.narrow(self._clock.width)
        return self._window.ask()

    def _window_as_walk(self) -> Walk:
        """What is known at the window's first node."""
        window, setup = self._window, self._window.setup
        window.narrow(1)
        place = setup.history
        states = [window.x[place - j] for j in range(place + 1)]
        outputs = [window.m[place - 1 - j] for j in range(place)]
        return Walk(setup, window.noise, self.sample, window.lo, states, outputs)

    def tell(self, query: Query, outputs: Tensor, states: Tensor | None = None) -> Tensor | None:
        """Takes the outputs of a query; what `advance` needs on the host."""
        if self._walk is None:
            return self._window.tell(query, outputs, states)
        self._rounds += 1
        self._evaluations += 1
        return self._walk.tell(outputs[0], None if states is None else states[0])

    def advance(self, norms: list[float], round: int) -> WindowRecord:
        """Moves on.

        Raises:
            ValueError: If the state after the first node is not finite.
        """
        if self._walk is None:
            return self._window.advance(norms, round)
        walk, setup = self._walk, self._window.setup
        if not math.isfinite(norms[0]):
            finite_nodes(setup, torch.full_like(walk.state[None], torch.nan), self.sample, walk.node - 1, 1)
        self._window.heard(walk.node, walk.state[None])
        return WindowRecord(round, self.sample, walk.node - 1, [math.sqrt(norms[0])], 1)

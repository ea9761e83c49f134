# SPDX-License-Identifier: Apache-2.0
"""The clock of a run's rounds, which tells its pace what each took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from paradiff.methods.adaptive.pace import Pace
from paradiff.methods.window.setup import WindowSetup


class Sampled(Protocol):
    """A sample's solver, as its clock sees it.

    Attributes:
        node: The node up to which states are final.
        done: Whether the sample is found.
    """

    @property
    def node(self) -> int: ...

    @property
    def done(self) -> bool: ...


class RoundClock:
    """Times rounds from the first query of each to the first query of the next, all that lies between included.

    Args:
        pace: What the times are told.
        setup: The windows' setup, whose width follows the pace.
        now: A function that tells the seconds; None for `time.perf_counter`.
    """

    def __init__(self, pace: Pace, setup: WindowSetup, now: Callable[[], float] | None = None) -> None:
        self.pace, self._setup, self._now = pace, setup, time.perf_counter if now is None else now
        self._all: list[Sampled] = []
        self._asked: set[int] = set()
        self._begun: float | None = None
        setup.width = pace.width

    @property
    def width(self) -> int:
        """The width of the windows now."""
        return self.pace.width

    @property
    def walks(self) -> bool:
        """Whether the rest is walked."""
        return self.pace.walks

    def enter(self, solver: Sampled) -> None:
        """Counts a sample in."""
        self._all.append(solver)

    def asked(self, solver: Sampled) -> None:
        """A sample's query is made: of all queries of a round, the first one ends the round before."""
        if id(solver) in self._asked or not self._asked:
            now = self._now()
            if self._begun is not None:
                final = sum(one.node for one in self._all) / len(self._all)
                self._setup.width = self.pace.round(now - self._begun, final)
            self._asked.clear()
            self._begun = now
        self._asked.add(id(solver))

# SPDX-License-Identifier: Apache-2.0
"""An observer that ends a run when its time is over."""

from __future__ import annotations

import time
from collections.abc import Callable

from paradiff.errors import require_real
from paradiff.solver.protocol import Round


class Deadline:
    """Asks a run to stop after the first round that ends later than it may; the samples are then the best that is known.

    The clock starts when the object is made, and again with `start`, so that one object serves one call after another:

        deadline = Deadline(2.0)
        solution = paradiff.sample(model, table, noise, method, observer=deadline)

    A run ends at most one round late. Its status is `Status.STOPPED`, and the errors of the samples that were not found yet are
    estimated as infinite. Deadlines are compared by identity.

    Args:
        seconds: Time that a run may take, more than 0.
        clock: A function that tells the seconds; None for `time.perf_counter`. Of several ranks, each has to be told the same
            (`Ranks.tell`).

    Attributes:
        seconds: The same.
        stopped: How many runs were asked to stop.

    Raises:
        ValueError: If `seconds` is no positive number.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] | None = None) -> None:
        require_real("the deadline, in seconds,", seconds, positive=True)
        self.seconds, self.stopped, self._clock = float(seconds), 0, clock
        self._begin = self._now()

    def __repr__(self) -> str:
        return f"Deadline({self.seconds:g})"

    def _now(self) -> float:
        return time.perf_counter() if self._clock is None else self._clock()

    def start(self) -> None:
        """Starts the clock anew."""
        self._begin = self._now()

    def __call__(self, round: Round, /) -> bool:
        """True once the time is over."""
        over = self._now() - self._begin >= self.seconds
        self.stopped += over
        return over

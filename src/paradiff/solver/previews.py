# SPDX-License-Identifier: Apache-2.0
"""Previews of samples while they are solved, with an estimate of their errors, and an observer that keeps a deadline by them.

A method that holds the whole sample from its first rounds on, such as `collocation`, improves it with every round. Let p[k] be
the sample as it is known after round k, and d[k] the root mean square of p[k] - p[k-1]. Sweeps contract in the end, so that
d[k] is about the error of p[k-1], and more than that of p[k]; before that they wander. The error of p[k] is estimated by

    CAUTION max(d[k], d[k-1]),    at least the sample's own estimate,                                           (1)

and that of the first preview by the distance of two samples that have nothing to do with each other: with s = rms(p[1]), which
may be a mean of many samples, max(sqrt(2) s, sqrt(s^2 + USUAL)).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from paradiff.errors import require_real
from paradiff.solver.arguments import require_callable
from paradiff.solver.protocol import Observer, Round

CAUTION = 1.0
"""The factor of equation (1)."""

USUAL = 0.5
"""The usual mean square of data."""


@dataclass(frozen=True, eq=False)
class Preview:
    """The samples as they are known after a round. Previews are compared by identity.

    Attributes:
        round: The round, counted from 1.
        sample: `[B, ...]` the samples; a copy on the device.
        estimated_errors: Estimate of the root mean square difference of each to the sequential sample.
        evaluations: Rows that were evaluated so far, of all samples.
        seconds: Since the observer was made, or started.
    """

    round: int
    sample: Tensor = field(repr=False)
    estimated_errors: Sequence[float]
    evaluations: int
    seconds: float

    @property
    def estimated_error(self) -> float:
        """The largest of the estimates."""
        return max(self.estimated_errors)


class ErrorsOfPreviews:
    """Equation (1), round by round. Objects are compared by identity.

    Attributes:
        errors: The newest estimates, one a sample; infinite where no preview is known.
    """

    def __init__(self) -> None:
        self.errors: list[float] = []
        self._last: Tensor | None = None
        self._changes: list[list[float]] = []

    def update(self, round: Round) -> Tensor | None:
        """Takes a round; the samples as they are known, None where a sample is not yet. Waits for the device."""
        if round.number == 1:
            self._last, self._changes = None, []
        if not all(getattr(solver, "reaches_end", solver.done) for solver in round.solvers):
            self.errors, self._last, self._changes = [math.inf] * len(round.solvers), None, []
            return None
        newest = round.states()
        changed = newest if self._last is None else newest - self._last
        rms = [math.sqrt(square) for square in changed.flatten(1).square().mean(1).tolist()]
        if self._last is None:
            rms, self._changes = [max(math.sqrt(2) * one, math.hypot(one, math.sqrt(USUAL))) for one in rms], []
        self._changes = [*self._changes[-1:], rms]
        self._last = newest
        self.errors = [
            solver.error_estimate.estimated_error if solver.done else max(CAUTION * max(of), own(solver.error_estimate))
            for solver, *of in zip(round.solvers, *self._changes, strict=True)
        ]
        return newest


def own(estimate: object) -> float:
    """A sample's own estimate of its error, as far as there is one in the midst of a run."""
    error = getattr(estimate, "estimated_error", 0.0)
    return error if math.isfinite(error) else 0.0


class Previews:
    """An observer that shows the samples as they improve, each with an estimate of its error.

        def show(preview):
            print(preview.round, preview.estimated_error)
            return preview.estimated_error < 0.05  # True ends the run with this preview

        method = paradiff.auto(objective="anytime")
        found = paradiff.sample(model, table, noise, method, observer=paradiff.solver.Previews(show))

    There are previews once a method holds the whole sample: with `auto(objective="anytime")` from the first round on, with a
    window that slides along the chain when it has reached the chain's end. A run that is ended has the status `stopped`, and
    the estimates of its last preview. Each preview waits for the device once. Observers are compared by identity.

    Args:
        show: A function of a `Preview`; it returns True to end the run.
        clock: A function that tells the seconds; None for `time.perf_counter`.

    Raises:
        ValueError: If `show` is no function.
    """

    def __init__(self, show: Callable[[Preview], bool | None], clock: Callable[[], float] | None = None) -> None:
        if show is None:
            raise ValueError("what previews are shown to is None; give a function of a preview")
        require_callable("what previews are shown to", show, "a function of a preview")
        self._show, self._clock, self._errors = show, clock or time.perf_counter, ErrorsOfPreviews()
        self._begin = self._clock()

    def __repr__(self) -> str:
        return f"Previews({getattr(self._show, '__name__', type(self._show).__name__)})"

    @property
    def errors(self) -> Sequence[float]:
        """Estimated errors of the newest preview, one a sample; infinite where there is none."""
        return self._errors.errors

    @property
    def wish(self) -> str:
        """Whose wish it is that a run ends."""
        return "the observer asked for it"

    def __call__(self, round: Round, /) -> bool | None:
        """Shows the samples, where they are known."""
        if round.number == 1:
            self._begin = min(self._begin, self._clock())
        newest = self._errors.update(round)
        if newest is None:
            return None
        evaluations = sum(solver.error_estimate.evaluations for solver in round.solvers)
        seconds = self._clock() - self._begin
        return self._show(Preview(round.number, newest, list(self.errors), evaluations, seconds))


class Timed:
    """An observer that ends a run before a round that would end after a deadline, with estimates of the samples' errors.

    A round is taken to last as long as the longest of the three before it; one more such time is left for what checks the model
    at the end. Objects are compared by identity.

    Args:
        seconds: The deadline, since `begun`.
        observer: Another observer, which sees every round first; None for none.
        begun: When the run began, by the clock; None for now.
        clock: A function that tells the seconds; None for `time.perf_counter`.

    Raises:
        ValueError: If `seconds` is no positive number.
    """

    def __init__(
        self,
        seconds: float,
        observer: Observer | None = None,
        *,
        begun: float | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        require_real("the deadline, in seconds,", seconds, positive=True)
        self.seconds, self._observer, self._clock = float(seconds), observer, clock or time.perf_counter
        self._begin = self._clock() if begun is None else begun
        self._before, self._rounds = self._clock(), list[float]()
        self._errors = ErrorsOfPreviews()
        self.stopped = False

    @property
    def errors(self) -> Sequence[float]:
        """Estimated errors of the samples as they are known, one each; infinite where one is not."""
        return self._errors.errors

    @property
    def wish(self) -> str:
        """Whose wish it is that a run ends."""
        return f"the deadline of {self.seconds:g} s ended it" if self.stopped else "the observer asked for it"

    def __call__(self, round: Round, /) -> bool | None:
        """True where the next round would end too late."""
        self._errors.update(round)
        wish = None if self._observer is None else self._observer(round)
        now = self._clock()
        self._rounds = [*self._rounds[-2:], now - self._before]
        self._before = now
        self.stopped = now + 2 * max(self._rounds) > self._begin + self.seconds
        return True if self.stopped else wish

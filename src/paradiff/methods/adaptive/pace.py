# SPDX-License-Identifier: Apache-2.0
"""How wide a window is, decided between its rounds by what they took.

A round of a window makes its first node final whatever the width, so that a window of one node is the plain chain, and no round
is without progress. Let t(W) be the seconds of a round of W rows a sample, R(W) the rounds that a chain of N steps is expected
to take, and n the nodes that are final. What remains takes

    (N - n)/N R(W) t(W),      R(1) = N                                                                            (1)

The first rounds have W = 1 and tell t(1). A window twice as wide is tried while (1) could be less by a tenth, and while what a
round may cost more than its one sure node fits into an allowance, a share of N t(1). Then W is what makes (1) the least. A
window that falls behind, by seconds since the first was opened less t(1) for each node since, above the allowance, and does not
catch up, is halved; at 1 the rest is walked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from paradiff.errors import require_between, require_real, require_whole


@dataclass(frozen=True, kw_only=True)
class PaceControl:
    """The tuned numbers of a pace.

    Attributes:
        first: Rounds of one node before anything is tried, at least 2: the first one sets things up and is not counted.
        tried: Rounds of a window before it is judged, at least 2: the first still has the width before.
        again: Further rounds of a window that looks too slow, as far as the allowance lasts: one round may be slow by chance.
        allowance: Share of the plain chain's seconds that may be lost, 0 to 1.
        slack: Rounds of one node that a window whose seconds are known may lose beside: single rounds take longer by chance,
            and in some of them rows are evaluated again to check the model.
        worth: Share of the plain chain's seconds that the rest has to fall below for a wider window to be tried, 0 to 1.
    """

    first: int = 3
    tried: int = 2
    again: int = 2
    allowance: float = 0.03
    slack: float = 4.0
    worth: float = 0.9

    def __post_init__(self) -> None:
        require_whole("the pace's first rounds", self.first, 2)
        require_whole("the pace's tried rounds", self.tried, 2)
        require_whole("the pace's further rounds", self.again, 0)
        require_between("the pace's allowance", self.allowance, 0, 1)
        require_between("the pace's worth", self.worth, 0, 1)
        require_real("the pace's slack", self.slack)


class Pace:
    """The width of the windows of all samples of a run.

    Args:
        steps: N.
        expected: R by W, for the widths that may be used.
        seconds: t by W as far as it is known beforehand; None where the run measures it.
        control: The tuned numbers.

    Attributes:
        width: The width now.
        seen: The seconds of rounds that were seen, by width.
        widest: The widest window of the run.
        why: The last decision in words.
    """

    def __init__(
        self,
        steps: int,
        expected: Mapping[int, float],
        seconds: Callable[[int], float] | None = None,
        control: PaceControl | None = None,
    ) -> None:
        self._steps, self._control = steps, PaceControl() if control is None else control
        self._expected = {w: min(r, float(steps)) for w, r in sorted(expected.items()) if 1 < w <= steps}
        self._seconds = seconds
        self.seen: dict[int, list[float]] = {}
        self._rounds = 0  # at this width
        self._walked = 0  # rounds of one node before the first window
        self._spent = self._first = 0.0  # since the first window was opened, and the nodes that were final then
        self._worst = self._final = 0.0
        self._closed: set[int] = set()  # widths that fell behind
        self.width = self.widest = 1
        self.why = "the first rounds walk the chain"
        if seconds is not None:
            self._settle()

    @property
    def walks(self) -> bool:
        """Whether the rest is walked step by step: no wider window is left to be tried."""
        return self.width == 1 and (self._walked >= self._control.first or self._seconds is not None)

    def round(self, seconds: float, final: float) -> int:
        """Takes a round's seconds and the nodes that are final after it, in the mean of all samples; the width of the next."""
        self._rounds += 1
        first = self._seconds is not None and self._rounds <= self._control.tried  # in these the model is checked
        self._spent += min(seconds, self.known(self.width)) if first else seconds
        self._final = final
        if self._rounds > 1:  # the first of a width may set things up, and still has the width before
            self.seen.setdefault(self.width, []).append(seconds)
        if self.width == 1:
            self._walked += 1
            if self._walked == self._control.first:
                self._spent, self._first = 0.0, final
                self._grow()
            return self.width
        if self._rounds < self._control.tried:
            return self.width
        trying = self._seconds is None and self._rounds <= self._control.tried + self._control.again
        if self._behind() > self._allowed() and self._behind() > self._worst:
            self._closed.add(self.width)
            self._shrink()
        elif trying and (
            self._pays(self.width) or not self._fits(self.width) or self._rounds == self._control.tried + self._control.again
        ):
            self._grow()
        self._worst = max(self._worst, self._behind())
        return self.width

    @property
    def times(self) -> dict[int, float]:
        """The usual seconds of a round, by width: the lower median of those seen."""
        return {width: sorted(seen)[(len(seen) - 1) // 2] for width, seen in sorted(self.seen.items())}

    def known(self, width: int) -> float:
        """t of a width: measured, known beforehand, or on the straight line through the two nearest below."""
        times = self.times
        if width in times:
            return times[width]
        if self._seconds is not None:
            return self._seconds(width)
        below = [w for w in times if w < width]
        if not below:
            return times[min(times)]
        last = max(below)
        if len(below) == 1:
            return times[last]
        before = max(w for w in below if w < last)
        slope = (times[last] - times[before]) / (last - before)
        return times[last] + max(slope, 0.0) * (width - last)

    def rest(self, width: int) -> float:
        """Equation (1)."""
        rounds = self._steps if width == 1 else self._expected[width]
        return (self._steps - self._final) / self._steps * rounds * self.known(width)

    def _one(self) -> float:
        return self.known(1)

    def _behind(self) -> float:
        """Seconds by which the run is behind the plain chain."""
        return self._spent - (self._final - self._first) * self._one()

    def _allowed(self) -> float:
        slack = 0.0 if self._seconds is None else self._control.slack
        return (self._control.allowance * self._steps + slack) * self._one()

    def _wider(self) -> int | None:
        """The next wider window that is worth a try and fits into the allowance."""
        wider = next((w for w in self._expected if w > self.width and w not in self._closed), None)
        if wider is None or wider > self._steps - self._final:
            return None
        if self._seconds is not None:
            return wider if self.rest(wider) < self._control.worth * self.rest(1) else None
        if not self._fits(wider):
            return None
        best = min(self.rest(1), self.rest(self.width))
        return wider if self.rest(wider) < self._control.worth * best else None

    def _pays(self, width: int) -> bool:
        """Whether the rest would take less by a window than by the plain chain."""
        return width in self.seen and self.rest(width) < self._control.worth * self.rest(1)

    def _fits(self, width: int) -> bool:
        """Whether what a round of a window may cost more than its one sure node fits into the allowance."""
        times = self.times
        near = max((w for w in times if w <= width), default=1)
        most = times.get(near, 0.0) * width / near
        return self._behind() + most - self._one() <= self._allowed()

    def _grow(self) -> None:
        """Tries the next wider window, or settles on one of those that were tried."""
        wider = self._wider()
        if wider is not None and self._seconds is None:
            self._set(wider, f"a window of {wider} was tried")
        else:
            self._settle()

    def _settle(self) -> None:
        """Takes the window that makes equation (1) the least, of those whose seconds are known."""
        known = [w for w in self._expected if w not in self._closed and (self._seconds is not None or w in self.seen)]
        best = min(known, key=self.rest, default=1)
        if best == 1 or self.rest(best) >= self._control.worth * self.rest(1):
            self._set(1, self._no(known))
            return
        gain = self.rest(1) / self.rest(best)
        price = self.known(best) / self._one()
        self._set(best, f"a round of {best} rows a sample takes {price:.2g} times as long as one of 1: {gain:.1f} times faster")

    def _no(self, known: list[int]) -> str:
        if not known:
            return "sequential: no wider window could pay within what a try may cost"
        best = min(known, key=self.rest)
        price = self.known(best) / self._one()
        return f"sequential is faster: a round of {best} rows a sample takes {price:.2g} times as long as one of 1"

    def _shrink(self) -> None:
        """Halves a window that does not pay."""
        narrower = max((w for w in self._expected if w < self.width and w not in self._closed), default=1)
        if narrower > 1 and self.rest(narrower) >= self._control.worth * self.rest(1):
            narrower = 1
        fell = self.width
        self._set(narrower, f"the window of {fell} fell behind the plain chain and was made {narrower}")

    def _set(self, width: int, why: str) -> None:
        if width != self.width:
            self.width, self._rounds = width, 0
        self.widest = max(self.widest, width)
        self.why = why

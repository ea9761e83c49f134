# SPDX-License-Identifier: Apache-2.0
"""What accepting a node costs the sample: the estimate behind tolerances.

After a sweep that changed the window's states by delta, the update with slope G in place of the true derivative J leaves
about (J - G) delta at the next node, and these errors add up along the window:

    e[n+1] = theta[n+1] sum_{k<=n} ( h[k] + rho[k] |G[k]| ) |delta[k]|                                            (1)

with h of chain/sensitivity.py, equation (3), and rho of edits.py, 0 where states are not edited. theta is observed: a node that
stays in the window is swept again, and the change it then sees is the error it had. With a the predicted errors e/theta of the
last sweep and d the changes of this one,

    theta[n] = max( |d[<=n]|/|a[<=n]|, theta ),        theta = max( |d|/|a|, f theta before, the least theta ),  (2)

over the nodes that stayed in the window, up to n or all, with a memory f. The far nodes change most and have the smallest
ratios, so that the theta of all is too small for the leading nodes, which are those that pass. Of the errors that nodes passed
with, the theta of all predicts 1/2.7 (DDPM 100) and 1/2.4 (DDIM 50) in the median, equation (2) 0.9 to 1.1 times as much as was
measured (digits network, `parasolver`, all nodes, seeds 501 to 504).

A node that becomes final carries its error to the sample with the factor k s: s of chain/sensitivity.py, equation (2), and k
the caution of control.py. So the sum of k s e over the nodes at which a sample's window came to begin is an estimate of its
error, not a bound. Where the network was seen to answer to errors of a node by more than k s (path_answer.py), that counts in
its place; on chains with churn it costs k s f e, with f what the chain was seen to keep (forgetting.py), and an error of node
n is carried to the next one by g[n] of the same file, which stands before the sum of equation (1).

With the rule `error` a sample may use its tolerance along the chain in proportion to the sum of h s^(1/2) passed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from paradiff.methods.window.control import WindowControl
from paradiff.methods.window.forgetting import Kept


class ErrorBudget:
    """One sample's budget: the error that its accepted nodes have used.

    Args:
        error: `[M]` h of equation (1), the `slope_error`.
        factor: `[M+1]` k s of the nodes.
        control: The tuned numbers.
        sloped: Whether changes are carried by a slope; without one, sweeps leave all errors in place but the first, and theta
            is 1 at least.
        carried: `[M]` |G| of each step, what it makes of changes; for chains that are edited.

    Attributes:
        theta: The observed contraction of all nodes that stayed in the window.
        used: Sum of k s e over the nodes at which the window came to begin, in the data's units.
        excess: The part of it above what was allowed when the data were seen to be of another scale: it is spent, and does not
            hold up the nodes to come.
        forgone: What nodes were allowed that pass at no cost, since the chain forgets them: it is not left for others.
        residual: The largest root mean square change of a node that was accepted before it stopped changing.
    """

    def __init__(
        self,
        error: list[float],
        factor: Sequence[float],
        control: WindowControl,
        *,
        sloped: bool = True,
        carried: Sequence[float] = (),
    ) -> None:
        self._carried = carried
        self._error, self._factor, self._control = error, factor, control
        self._least_theta = control.least_theta if sloped else 1.0
        self._accepted: list[tuple[int, float, float]] = []  # nodes at which the window came to begin, e there, f of it
        self._contractions: list[float] = []  # of the leading nodes that stayed in the window, up to each
        self._predicted: list[float] = []  # e/theta of the nodes that stayed in the window
        self._errors: list[float] = []  # e/theta of the window's nodes after the last sweep
        self._change: list[float] = []  # |delta| of the same
        self._answers: Sequence[float] = ()  # factors of the leading ones, as they were seen
        self._kept: Kept | None = None  # what is left of their errors, where that is looked at
        self._first = 0  # the window's first node in the last sweep
        self.theta = max(control.first_theta, self._least_theta)
        self.used = self.excess = self.forgone = 0.0
        self.residual = 0.0

    def observe(
        self,
        first: int,
        change: list[float],
        answers: Sequence[float] = (),
        kept: Kept | None = None,
        edited: Sequence[float] = (),
    ) -> None:
        """Takes the root mean square changes of the nodes after `first`, and the factors by which the leading ones were seen to
        answer, or what is left of their errors, and the shares of changes that edits let go of, of the nodes from `first` on;
        updates theta from those predicted before."""
        seen = list(zip(self._predicted, change, strict=False))
        predicted = list(itertools.accumulate(e * e for e, _ in seen))
        changed = itertools.accumulate(d * d for _, d in seen)
        self._contractions = [math.sqrt(d / e) if e > 0 else 0.0 for d, e in zip(changed, predicted, strict=True)]
        if predicted and predicted[-1] > 0:
            self.theta = max(self._contractions[-1], self._control.forgetting * self.theta, self._least_theta)
        self._errors, total = [0.0], 0.0
        for k, d in enumerate(change[:-1]):
            error = self._error[first + 1 + k]
            if k + 1 < len(edited) and edited[k + 1] > 0:
                error += edited[k + 1] * self._carried[first + 1 + k]
            total = (1.0 if kept is None else kept.steps[k]) * total + error * d
            self._errors.append(total)
        self._first, self._change, self._answers, self._kept = first, change, answers, kept

    def cost_of(self, passed: int) -> float:
        """The error that accepting `passed` nodes uses: k s f e at the last of them."""
        factor = self._factor[self._first + passed]
        if passed <= len(self._answers) and math.isfinite(self._answers[passed - 1]):
            factor = max(factor, self._answers[passed - 1])
        return factor * self._share_of(passed) * self._error_after(passed)

    def _share_of(self, passed: int) -> float:
        """f of the last of `passed` nodes; 1 where its error is too large for it."""
        if self._kept is None or self._error_after(passed) > self._kept.most[passed - 1]:
            return 1.0
        return self._kept.share[passed - 1]

    def _error_after(self, passed: int) -> float:
        """e of the last of `passed` nodes, by equations (1) and (2)."""
        return max([self.theta, *self._contractions[passed - 1 : passed]]) * self._errors[passed - 1]

    def accept(self, passed: int, allowed: float = math.inf) -> None:
        """Uses the error of `passed` nodes, which become final.

        Args:
            passed: How many.
            allowed: What they may have used, with all before them.
        """
        self.used += self.cost_of(passed)
        share, spare = self._share_of(passed), allowed + self.excess - self.used - self.forgone
        if share < 1 and 0 < spare < math.inf:
            self.forgone += (1 - share) * spare
        self._accepted.append((self._first + passed, self._error_after(passed), share))
        self.residual = max([self.residual, *self._change[: passed - 1]])
        before = self._errors[passed - 1]  # the error of the first node to come, which is carried on to those after it
        self._predicted = []
        for k, e in enumerate(self._errors[passed:], passed - 1):
            before *= 1.0 if self._kept is None else self._kept.steps[k]
            self._predicted.append(e - before)

    def weigh(self, factor: Sequence[float], allowed: float) -> None:
        """Counts the nodes to come for data of another mean square.

        Args:
            factor: `[M+1]` k s for such data.
            allowed: What the accepted nodes might have used, had that been known.
        """
        self._factor = factor
        self.excess = max(self.excess, self.used - allowed)
        self.forgone = min(self.forgone, allowed + self.excess - self.used)

    def recount(self, factor: Sequence[float], tolerance: float, decides: float) -> None:
        """Counts the accepted nodes anew, with the data as the sample shows them; no estimate falls by it. What is told counts
        errors that the chain was seen to forget in full; whether the tolerance is kept to is judged without them.

        Args:
            factor: `[M+1]` k s for such data.
            tolerance: That of the method. No more than it is told of an error that keeps to it.
            decides: Factor on the sum where that is judged, up to 1.
        """
        whole = sum(factor[node] * error for node, error, _ in self._accepted)
        left = sum(factor[node] * share * error for node, error, share in self._accepted)
        self._tell(whole, decides * left, tolerance)

    def _tell(self, told: float, judged: float, tolerance: float) -> None:
        """The estimate is at least `told`; at least the tolerance where `judged` keeps to it and `told` does not."""
        self.used = max(self.used, min(told, tolerance) if judged <= tolerance else told)

    @property
    def last_error(self) -> float:
        """e of the node at which the window came to begin last."""
        return self._accepted[-1][1] if self._accepted else 0.0

    def carry(self, size: float, tolerance: float, decides: float) -> None:
        """Tells of the sample no less than of its nodes' errors as they were carried along the chain (carried_error.py).

        Args:
            size: |T v| + e at the chain's end.
            tolerance: That of the method. No more than it is told of an error that keeps to it.
            decides: Factor on `size` where that is judged.
        """
        if math.isfinite(size):
            self._tell(self._control.carried_caution * size, decides * size, tolerance)

    def tell_of(self, apart: float) -> None:
        """Tells of the sample no less than how far another one is that it may have become (odds.py)."""
        if math.isfinite(apart):
            self.used = max(self.used, apart)

    def keep(self, count: int) -> None:
        """Only the first nodes of the window stay, so many sub-intervals; what was predicted of others is not used."""
        self._predicted = self._predicted[:count]

    def forget(self) -> None:
        """A sweep overflowed: its one node that became final is exact, and nothing was observed."""
        self._predicted = []

    @property
    def estimated_error(self) -> float:
        """The estimated root mean square error of the sample so far."""
        return self.used if math.isfinite(self.used) else math.inf

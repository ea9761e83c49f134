# SPDX-License-Identifier: Apache-2.0
"""The budgets of the members that share a window.

A state may be a batch of members (solver/protocol.py), each of which is to come out right: the images of a pipeline's call.
Each member has a budget of its own (budget.py), which observes the member's own changes, contraction, answers and data. A node
passes once all budgets let it, as it does in a window of the slowest member alone, and the error of the worst member is told. A
state without members is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from paradiff.chain.data_scale import seen, unusual
from paradiff.methods.window.budget import ErrorBudget
from paradiff.methods.window.forgetting import Forgetting, Kept
from paradiff.methods.window.setup import WindowSetup


class Member:
    """One member's budget, and the data as far as it shows them.

    Attributes:
        budget: The error that its accepted nodes have used.
        size: The data's mean square.
        passes: The rule by which its nodes pass.
    """

    def __init__(self, setup: WindowSetup) -> None:
        self._setup = setup
        self.size = 1.0
        self._seen = 1.0  # the same by the last sweep alone
        self._largest = 0.0  # the most that data were seen to be undecided; 0 before
        factor, self.passes = setup.scaled(self.size)
        carried = setup.slope.abs().sum(1).tolist()
        self.budget = ErrorBudget(setup.slope_error, factor, setup.method.control, sloped=setup.sloped, carried=carried)

    def see(self, square: float, node: int, first: int) -> None:
        """Takes the mean square of the clean-data estimate at a node; the data are what two sweeps in turn show.

        Args:
            square: It.
            node: The node, the window's last.
            first: The window's first node.
        """
        table = self._setup.table
        before, self._seen = self._seen, seen(square, float(table.alpha[node]), float(table.sigma[node]))
        size = sorted([1.0, before, self._seen])[1]
        if size != self.size:
            self.size = size
            factor, self.passes = self._setup.scaled(size)
            self.budget.weigh(factor, self.passes.allowed(first))

    def kept(self, forgetting: Forgetting, first: int, change: Sequence[float], spreads: Sequence[float]) -> Kept:
        """What is left of errors.

        Args:
            forgetting: What the chain forgets.
            first: The window's first node.
            change: `[W]` root mean square change of each node after it.
            spreads: `[W]` |C|_F about the nodes from it on (forgetting.py).
        """
        known = forgetting.known(first, change, spreads, self._largest)
        self._largest = max([self._largest, *(v for v in spreads[:known] if math.isfinite(v))])
        return forgetting.kept(first, spreads, known, self._largest or math.inf)

    def recount(self, square: float) -> None:
        """Counts the budget for the mean square of the member's own sample."""
        setup, size = self._setup, unusual(square)
        if size != 1 or setup.forgetting is not None:
            self.budget.recount(setup.scaled(size)[0], setup.method.tolerance, setup.recounts)


class Members:
    """The members of one sample.

    Args:
        setup: What all samples share.
        count: Members.
    """

    def __init__(self, setup: WindowSetup, count: int) -> None:
        self._setup = setup
        self._each = [Member(setup) for _ in range(count)]

    @property
    def residual(self) -> float:
        """The largest root mean square change of a node of a member that was accepted before it stopped changing."""
        return max(member.budget.residual for member in self._each)

    @property
    def estimated_error(self) -> float:
        """The estimated root mean square error of the worst member so far."""
        return max(member.budget.estimated_error for member in self._each)

    @property
    def last_errors(self) -> list[float]:
        """e of each member at the node at which the window came to begin last."""
        return [member.budget.last_error for member in self._each]

    def see(self, squares: Sequence[float], node: int, first: int) -> None:
        """Takes the mean square of each member's clean-data estimate at `node`, the last of a window that begins at `first`."""
        for member, square in zip(self._each, squares, strict=True):
            member.see(square, node, first)

    def judge(
        self,
        first: int,
        changes: Sequence[Sequence[float]],
        judged: Sequence[Sequence[float]],
        answers: Sequence[Sequence[float]],
        ages: Sequence[int],
        edited: Sequence[Sequence[float]],
    ) -> int:
        """Accepts the leading nodes that pass for all members; how many.

        Args:
            first: The window's first node.
            changes: `[W]` root mean square change of each node after it, for each member.
            judged: `[W]` what the rule judges, for each: the changes, or residuals.
            answers: `[W]` factors by which the nodes were seen to answer, for each, or what forgetting.py sees; none where
                neither is looked at.
            ages: `[W]` sweeps that the nodes have seen.
            edited: `[W]` rho of the nodes from the first on (edits.py), for each; none where there are no edits.
        """
        passed, forgetting = len(ages), self._setup.forgetting
        for member, change, answer, of_rule, shares in zip(self._each, changes, answers, judged, edited, strict=True):
            kept = None if forgetting is None else member.kept(forgetting, first, change, answer)
            member.budget.observe(first, list(change), answer if kept is None else (), kept=kept, edited=shares)
            passed = min(passed, member.passes(first, of_rule, ages, member.budget))
        for member in self._each:
            member.budget.accept(passed, member.passes.allowed(first + passed))
        return passed

    def carry(self, squares: Sequence[float], apart: Sequence[float], errors: Sequence[float]) -> None:
        """Tells of each member no less than of its nodes' errors as they were carried to the chain's end.

        Args:
            squares: Mean square of T v there (carried_error.py), for each member; 0 where nothing was carried.
            apart: How far another sample is that each may have become; 0 for none.
            errors: e there, likewise.
        """
        setup = self._setup
        for member, square, other, error in zip(self._each, squares, apart, errors, strict=True):
            member.budget.carry(math.sqrt(square) + error, setup.method.tolerance, setup.decides)
            if other > setup.method.control.outcome * math.sqrt(member.size):
                member.budget.tell_of(other)

    def recount(self, squares: Sequence[float]) -> None:
        """Counts the budgets for the mean squares of the members' own samples."""
        for member, square in zip(self._each, squares, strict=True):
            member.recount(square)

    def keep(self, count: int) -> None:
        """Only the first nodes of the window stay, so many sub-intervals."""
        for member in self._each:
            member.budget.keep(count)

    def forget(self) -> None:
        """A sweep overflowed: its nodes that became final are exact, and nothing was observed."""
        for member in self._each:
            member.budget.forget()

# SPDX-License-Identifier: Apache-2.0
"""The rules by which the leading nodes of a window pass after a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from paradiff.methods.window.budget import ErrorBudget


class PassingRule(Protocol):
    """How many of the leading nodes of a window pass."""

    def allowed(self, node: int) -> float:
        """The error that the nodes up to `node` may use; infinite where they are not judged by it."""
        ...

    def __call__(self, first: int, rms: Sequence[float], ages: Sequence[int], budget: ErrorBudget) -> int:
        """The number of nodes that pass, one at least.

        Args:
            first: The window's first node.
            rms: `[W]` root mean square change of each node after it; its residual, with the rule `residual`.
            ages: `[W]` sweeps that each of them has seen, falling along the window.
            budget: The sample's budget, which has observed `rms`.
        """
        ...


@dataclass(frozen=True)
class PassByError:
    """A node passes while the budget lasts.

    Attributes:
        tolerance: The budget of the whole chain.
        held: What of it may be used from the time on when the data were seen to be small; the whole where they are not.
        share: `[M+1]` share of it that may be used up to each node.
    """

    tolerance: float
    held: float
    share: Sequence[float]

    def allowed(self, node: int) -> float:
        """Its share of the tolerance."""
        return self.held * self.share[node]

    def __call__(self, first: int, rms: Sequence[float], ages: Sequence[int], budget: ErrorBudget) -> int:
        """See the class."""
        passed = 1
        while passed < len(rms):
            node, used = first + passed + 1, budget.used + budget.cost_of(passed + 1)
            if used > self.tolerance or used - budget.excess + budget.forgone > self.allowed(node):
                break
            passed += 1
        return passed


@dataclass(frozen=True)
class PassByBound:
    """A node passes, with the one after it, while its change, or its residual, is at most its bound.

    Attributes:
        bound: `[M]` the bound of every node after the chain's first.
    """

    bound: Sequence[float]

    def allowed(self, node: int) -> float:
        """Any."""
        return math.inf

    def __call__(self, first: int, rms: Sequence[float], ages: Sequence[int], budget: ErrorBudget) -> int:
        """See the class."""
        passed = 1
        while passed < len(rms) and rms[passed - 1] <= self.bound[first + passed - 1]:
            passed += 1
        return passed


@dataclass(frozen=True)
class PassBySweeps:
    """A node passes after a number of sweeps.

    Attributes:
        sweeps: The number.
    """

    sweeps: int

    def allowed(self, node: int) -> float:
        """Any."""
        return math.inf

    def __call__(self, first: int, rms: Sequence[float], ages: Sequence[int], budget: ErrorBudget) -> int:
        """See the class."""
        return max(1, sum(age >= self.sweeps for age in ages))

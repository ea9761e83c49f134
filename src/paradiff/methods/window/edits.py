# SPDX-License-Identifier: Apache-2.0
"""Edits: what a caller does to states between two steps, after the step that made them and before the network sees them.

The chain is then x[i+1] = E_i(Phi_i(x)), as where a pipeline puts the known part of a picture back after every step
(inpainting). A solver hands out y[i+1], an iterate for Phi_i(x), and receives the edited x[i+1] = E_i(y[i+1]). Its residual is

    r[i] = Phi_i(x) - y[i+1]                                                                                   (1)

Elements that an edit overwrites do not carry on the change of the node before: they are left out of the slope's part of the
update and of the size of changes. An element counts as overwritten if (a) it was edited at every node of the window, (b) its
edited value never changed, and (c) at one node at least it did not change although the iterate did. Anything else that an
edit does (blending, adding) is corrected sweep by sweep.

The update takes a change of y for one of x. What an edit lets go of it, as limits do, is the share

    rho = |dx - dy|/|dy|                                                                                         (2)

of a node's changes from one sweep to the next, without overwritten elements. Where a node has seen no change yet, it is that of
the node with the largest one, and 1 before any.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Edits:
    """The edits seen in one sample's window.

    Args:
        mean_squares: Of `[W, ...]`, those of each node, `[W, members]`.

    Attributes:
        shares: `[W, members]` rho^2 of equation (2) for the nodes from the window's first on; empty before any edit.
        overwritten: `[...]` which elements are overwritten at every node, or None before any was shown twice.
    """

    def __init__(self, mean_squares: Callable[[Tensor], Tensor]) -> None:
        self._mean_squares = mean_squares
        self.shares = torch.empty(0)
        self._before: tuple[Tensor, Tensor] | None = None  # handed and shown at the last sweep, from the first node on
        self._handed: Tensor | None = None  # [W, ...] what was handed out at the nodes after the first
        self.overwritten: Tensor | None = None

    @property
    def seen(self) -> bool:
        """Whether states were ever edited; from then on every sweep is taken, edited or not."""
        return self._before is not None

    def take(self, first: int, handed: Tensor, shown: Tensor, after: Tensor) -> None:
        """Takes what was shown at the window's nodes from `first` on.

        Args:
            first: The window's first node.
            handed: `[W, ...]` what was handed out at nodes `first` ... `first` + W - 1.
            shown: `[W, ...]` what came of it.
            after: `[W, ...]` what was handed out at the nodes after the first.
        """
        self._handed = after.clone()
        edited = shown != handed
        begin = 1 if first == 0 else 0  # the start of the chain is no step's result
        self.overwritten = None
        if self._before is not None:
            handed_before, shown_before = (v[: len(shown)] for v in self._before)
            stayed = shown[: len(shown_before)] == shown_before
            moved = handed[: len(handed_before)] != handed_before
            self.overwritten = (stayed & moved)[begin:].any(0) & stayed[begin:].all(0) & edited[begin:].all(0)
        self.shares = self._shares(handed, shown, edited)
        self._before = handed.clone(), shown

    def _shares(self, handed: Tensor, shown: Tensor, edited: Tensor) -> Tensor:
        """`[W, members]` rho^2 of each node. Waits for nothing."""
        of_edits = self._mean_squares(self.spare(edited.to(handed.dtype), 0.0))  # 0 where a node is not edited
        found = torch.full_like(of_edits, math.nan)
        if len(self.shares):
            found[: len(self.shares)] = self.shares[: len(found)]
        if self._before is not None:
            handed_before, shown_before = (v[: len(shown)] for v in self._before)
            moved = handed[: len(handed_before)] - handed_before
            lost = self.spare(shown[: len(shown_before)] - shown_before - moved, 0.0)
            squares, of_lost = self._mean_squares(moved), self._mean_squares(lost)
            known = found[: len(squares)]
            found[: len(squares)] = torch.where(squares > 0, of_lost / squares, known)
        largest = found.nan_to_num(-1.0).amax(0)
        guess = torch.where(largest < 0, 1.0, largest) * (of_edits > 0)
        return torch.where(found.isnan(), guess, found)

    def handed_out(self, states: Tensor) -> Tensor:
        """`[W, ...]` what was handed out at the nodes after the first, whose states are now `states`."""
        return states if self._handed is None else self._handed

    def spare(self, values: Tensor, instead: Tensor | float) -> Tensor:
        """`values` `[W, ...]`, with those of `instead` where elements are overwritten."""
        return values if self.overwritten is None else torch.where(self.overwritten, instead, values)

    def advance(self, passed: int, states: Tensor) -> None:
        """The window slides by `passed` nodes.

        A state y that is passed over will not be shown again, but a multistep sampler still reads what would come of it. That
        is E(y) = E(y') + y - y' up to E's share of the change since y', which was shown last.

        Args:
            passed: How many.
            states: `[.., ...]` states from the window's first node on; those passed over become E(y).
        """
        if self._before is not None:
            handed, shown = self._before
            for n in range(1, min(passed, len(shown))):
                states[n] = self.spare(shown[n] + (states[n] - handed[n]), shown[n])
            self._before = handed[passed:], shown[passed:]
            self.shares = self.shares[passed:]

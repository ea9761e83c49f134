# SPDX-License-Identifier: Apache-2.0
"""What a loop gave its steps, where the scheduler keeps these tensors themselves.

A multistep scheduler may keep the state or the output that its step was given without a copy. A loop that writes into one of
them later, as one with a buffer for its state does, changes what the next steps of the plain call read, and no table knows of
that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

WRITTEN = (
    "its passes write into a state or an output that its scheduler keeps, which changes what later steps read: give the step "
    "tensors that stay as they are"
)
"""The reason against a loop that does so."""
BACK = 3
"""Passes for which what was given is looked at again: loops write into one buffer, or into two in turn."""


class Given:
    """The tensors that the last steps were given, and what they held.

    Args:
        kept: Whether the scheduler keeps them; if not, nothing is compared.
    """

    def __init__(self, kept: bool) -> None:
        self._kept = kept
        self._seen = deque[tuple[Callable[[], Tensor], Tensor]](maxlen=2 * BACK)

    def unchanged(self) -> Tensor | None:
        """`[]` whether all of them hold what they did; None where there is nothing to compare."""
        same = [((now() == then) | (now().isnan() & then.isnan())).all() for now, then in self._seen]
        return torch.stack(same).all() if same else None

    def note(self, *given: Callable[[], Tensor]) -> None:
        """Takes what a step is given."""
        if self._kept:
            self._seen.extend((one, one().clone()) for one in given)

# SPDX-License-Identifier: Apache-2.0
"""The size of a run's network calls, the choice of those that are checked, and their cost."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from paradiff.solver.evaluator import RowBound

Check = Literal["first", "every", "off"]
"""Which network calls are checked: `first`, one state of each network's first call with its shapes; `every`, all states of all
calls; `off`, none."""


class Batching:
    """How the windows of one run are batched for its networks, and the cost of that.

    Args:
        max_rows: Largest number of rows in one network call, at least 1; None for no bound. A state's rows stay together.
        pad: The number of states, at least 1, up to which each call is filled with copies of its last state, for networks
            that are compiled for a shape. True for the widest window so far, False for no padding.
        check: See `Check`. A checked state costs a network call of its own and a wait for the device.

    Attributes:
        bound: The bound on rows, halved when the device runs out of memory.
        rows: Rows evaluated, without padding and checks.
        calls: Network calls, without checks.
        seconds: Duration of network calls and checks, as seen from the host: on an asynchronous device that of a call's launch.

    Raises:
        ValueError: If `max_rows` or `pad` is below 1, or `check` is unknown.
    """

    def __init__(self, *, max_rows: int | None = None, pad: int | bool = False, check: Check = "first") -> None:
        if pad is not True and pad is not False and pad < 1:
            raise ValueError(f"pad is {pad}; a network call is filled up to at least 1 state, or give False for no padding")
        if check not in ("first", "every", "off"):
            raise ValueError(f"check is {check!r}; it must be first, every or off")
        self.bound = RowBound(max_rows)
        self.pad, self.check = pad, check
        self.rows = self.calls = 0
        self.seconds = 0.0
        self._widest = 0
        self._checked: set[Any] = set()
        self._kept: dict[int, tuple[weakref.ref[Tensor], int, Any, Tensor | None]] = {}

    def width(self, states: int) -> int | None:
        """The number of states in each call for a window of `states` states; None for no padding."""
        if self.pad is not True:
            return self.pad or None
        self._widest = max(self._widest, states)
        return self._widest

    def wants(self, signature: Any, states: int) -> list[int]:
        """The indices of the states to check in a call with this signature."""
        if self.check == "every" and states > 1:
            return list(range(states))
        if self.check == "off" or states == 1 or signature in self._checked:
            return []
        self._checked.add(signature)
        return [states // 2]

    def repeated(self, leaf: Tensor, key: Any, repeat: Callable[[], Tensor]) -> Tensor:
        """`repeat()`, cached for an input that is repeated again with the same `key`.

        The result is cached from the input's second use on, so that an input made anew in each round takes no memory after
        its call.
        """
        if leaf.is_inference():
            return repeat()
        name = id(leaf)
        seen = self._kept.get(name)
        known = seen is not None and seen[0]() is leaf and seen[1] == leaf._version
        if known and seen is not None and seen[2] == key and seen[3] is not None:
            return seen[3]
        result = repeat()
        kept = self._kept
        reference = weakref.ref(leaf, lambda _: kept.pop(name, None)) if not known or seen is None else seen[0]
        kept[name] = (reference, leaf._version, key, result if known else None)
        return result

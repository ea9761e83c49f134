# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: the calls of one object wait for each other, whichever runs they are of, since they share its scheduler."""

from __future__ import annotations

import threading
import weakref
from typing import Any


class Turn:
    """The calls of one object.

    Attributes:
        lock: Held by the thread whose call runs.
        caller: That thread; None for none.
        call: Its call; None for none.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.caller: int | None = None
        self.call: Any = None


class Turns:
    """The turns of all objects, which are held weakly."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], Turn]] = {}
        self._lock = threading.Lock()

    def of(self, owner: Any) -> Turn:
        """That of an object; one of its own where the object cannot be held weakly.

        Args:
            owner: The object.
        """
        place = id(owner)
        with self._lock:
            held, turn = self._known.get(place, (None, None))
            if held is None or turn is None or held() is not owner:
                turn = Turn()
                try:
                    self._known[place] = weakref.ref(owner, lambda _: self._known.pop(place, None)), turn
                except TypeError:
                    return turn
            return turn


TURNS = Turns()
"""Those of this process."""

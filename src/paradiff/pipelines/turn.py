# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: the calls of one object wait for each other, whichever runs they are of, since they share its scheduler."""

from __future__ import annotations

import contextlib
import functools
import threading
import types
import weakref
from collections.abc import Iterator
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

    @contextlib.contextmanager
    def taken(self, owner: Any, entry: str) -> Iterator[None]:
        """Lets plain calls of the object from other threads wait, until the end of the block.

        Args:
            owner: The object, of which the present thread has the turn.
            entry: The name of the method by which it is called.
        """
        kind: Any = type(owner)
        plain, here = getattr(kind, entry), threading.get_ident()

        @functools.wraps(plain)
        def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == here:
                return plain(owner, *args, **kwargs)
            with self.lock:
                return plain(owner, *args, **kwargs)

        try:
            members = {entry: call, "__module__": kind.__module__}
            waiting = types.new_class(kind.__name__, (kind,), exec_body=lambda body: body.update(members))
            object.__setattr__(owner, "__class__", waiting)
        except TypeError:  # a class that takes no other
            yield
            return
        try:
            yield
        finally:
            if type(owner) is waiting:
                object.__setattr__(owner, "__class__", kind)


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

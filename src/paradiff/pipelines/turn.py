# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: the calls of one object wait for each other, whichever runs they are of, since they share its scheduler."""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
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


class Gates:
    """Methods of classes at which plain calls wait for the turn of their object, while one of the class runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[type, str], int] = {}

    @contextlib.contextmanager
    def at(self, kind: type, entry: str) -> Iterator[None]:
        """Lets calls of a method wait, until the end of the block, where another thread has the turn of their object.

        Args:
            kind: The class of the object whose turn it is.
            entry: The name of the method.
        """
        with self._lock:
            self._open[kind, entry] = self._open.get((kind, entry), 0) + 1
            if self._open[kind, entry] == 1:
                own = vars(kind).get(entry)
                with contextlib.suppress(TypeError):  # a class that takes no other
                    setattr(kind, entry, _waiting(getattr(kind, entry), own))
        try:
            yield
        finally:
            with self._lock:
                self._open[kind, entry] -= 1
                if not self._open[kind, entry]:
                    del self._open[kind, entry]
                    _put_back(kind, entry)


def _waiting(plain: Callable[..., Any], own: Any) -> Callable[..., Any]:
    """A method that waits for the turn of its object; `own` is what the class itself had under its name, None for nothing."""

    @functools.wraps(plain)
    def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
        turn = TURNS.of(owner)
        if turn.caller in (None, threading.get_ident()):
            return plain(owner, *args, **kwargs)
        with turn.lock:
            return plain(owner, *args, **kwargs)

    call.__dict__[_OWN] = own
    return call


def _put_back(kind: type, entry: str) -> None:
    """Gives a class back what it had under a name, unless somebody else has put something there."""
    found = vars(kind).get(entry)
    if _OWN in getattr(found, "__dict__", {}):
        if found.__dict__[_OWN] is None:
            delattr(kind, entry)
        else:
            setattr(kind, entry, found.__dict__[_OWN])


_OWN = "_paradiff_own"


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

GATES = Gates()
"""Those of this process."""

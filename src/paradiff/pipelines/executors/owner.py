# SPDX-License-Identifier: Apache-2.0
"""The object whose loop lanes walk, and its scheduler, as they are found from elsewhere.

Each lane calls a copy of the object. A network, a hook or a helper may hold the object itself, or a copy that another lane
handed to it, and read there what the loop sets in each pass. So for the length of a run the object and its copies have a class
whose attributes are those of the copy that the running lane calls. A network call of several lanes runs in one of them: what is
read of the object there has to be the same in all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import greenlet
from torch import Tensor

from paradiff.errors import Unsupported
from paradiff.pipelines.host.host import attributes_of
from paradiff.pipelines.loop.interrupt import NAMES

DEPTH = 4
"""Containers and objects that are compared one within the other."""


class Reads:
    """What was read of the object and of its scheduler within network calls."""

    def __init__(self) -> None:
        self._names: set[tuple[str, str]] = set()
        self._within = False

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes what is read, until the end of the block."""
        self._within = True
        try:
            yield
        finally:
            self._within = False

    def note(self, name: str) -> None:
        """Takes the name of an attribute that is read of the object."""
        if self._within:
            self._names.add(("owner", name))

    def note_of_scheduler(self, name: str) -> None:
        """Takes the name of an attribute that is read of the scheduler."""
        if self._within:
            self._names.add(("scheduler", name))

    def refuse_differing(self, lanes: Sequence[Any]) -> None:
        """Refuses a network call of several lanes that read something, since the last one, that is another one in each.

        Args:
            lanes: The lanes.

        Raises:
            Unsupported: Then.
        """
        names, self._names = sorted(self._names), set()
        for what, name in names:
            first, *others = (_value(getattr(lane, what), name) for lane in lanes)
            if any(not same(first, other) for other in others):
                whose = type(getattr(lanes[0], what)).__name__
                raise Unsupported(f"a network, or a hook on it, reads {name} of the {whose}, which is another one in each pass")


@contextlib.contextmanager
def answering(owner: Any, reads: Reads) -> Iterator[None]:
    """Lets an object and the copies that are made of it answer for the running lane's copy, until the end of the block.

    Args:
        owner: The object.
        reads: Notes what is read within network calls.
    """
    kind = type(owner)
    try:
        answers = _answering(kind, reads)
        object.__setattr__(owner, "__class__", answers)
    except TypeError:  # a class that takes no other
        yield
        return
    try:
        yield
    finally:
        if type(owner) is answers:
            object.__setattr__(owner, "__class__", kind)


def _answering(kind: Any, reads: Reads) -> type:
    """A class of the object whose attributes are those of the running lane's copy."""

    def present(owner: Any, name: str) -> Any:
        if name in NAMES:  # the flag by which the object is interrupted from anywhere
            return owner
        lane: Any = greenlet.getcurrent()
        copy = lane.__dict__.get("owner") if hasattr(lane, "place_of") else None
        return copy if type(copy) is answers else owner

    def get(owner: Any, name: str) -> Any:
        reads.note(name)
        return kind.__getattribute__(present(owner, name), name)

    def put(owner: Any, name: str, value: Any) -> None:
        kind.__setattr__(present(owner, name), name, value)

    def remove(owner: Any, name: str) -> None:
        kind.__delattr__(present(owner, name), name)

    namespace = {"__getattribute__": get, "__setattr__": put, "__delattr__": remove, "__module__": kind.__module__}
    answers = type(kind)(kind.__name__, (kind,), namespace)
    return answers


def _value(owner: Any, name: str) -> Any:
    """What is read under a name, other than a method."""
    kept = attributes_of(owner)
    return (
        getattr(owner, name) if name not in kept and isinstance(getattr(type(owner), name, None), property) else kept.get(name)
    )


def same(one: Any, other: Any, depth: int = DEPTH) -> bool:
    """Whether two lanes hold the same. Waits for the device where tensors are compared."""
    if one is other:
        return True
    if type(one) is not type(other) or not depth:
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.device == other.device and bool(((one == other) | (one != one)).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key], depth - 1) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b, depth - 1) for a, b in zip(one, other, strict=True))
    try:
        return bool(one == other) or (hasattr(one, "__dict__") and same(vars(one), vars(other), depth - 1))
    except Exception:
        return False

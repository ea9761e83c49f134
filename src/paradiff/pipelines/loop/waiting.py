# SPDX-License-Identifier: Apache-2.0
"""Queues, events and the like by which a loop waits for another thread, or another process; locks that it holds in a pass.

A parallel run makes other passes than the plain call, and more of them, so that a loop could wait for what never comes. Its
passes take turns in one thread, so that each would wait for ever for a lock that another one holds meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import types
from collections.abc import Iterator
from typing import Any

from paradiff.errors import Unsupported
from paradiff.pipelines.loop.ledger import frames, is_host
from paradiff.pipelines.network.origin import is_users
from paradiff.pipelines.network.reads import names

WAITS: dict[str, tuple[type, ...]] = {
    "get": (queue.Queue, queue.SimpleQueue),
    "recv": (),
    "wait": (threading.Event, threading.Condition, threading.Barrier),
    "acquire": (threading.Semaphore,),
}
"""Methods that wait, and the classes of the objects; those of `multiprocessing` are known by their module."""

LOCK = type(threading.Lock())
"""The class of locks that no thread can take twice."""

DEPTH, ITEMS = 3, 32
"""Objects, containers and functions that are entered one within the other; items that are looked at of each."""


def refuse_waiting() -> None:
    """Refuses a loop that may wait for another thread, from within its call.

    Raises:
        Unsupported: If an object by which it can wait is within its reach, and its functions name the method that waits.
    """
    for frame in frames():
        named = names(frame.f_code)
        for name, value in _reached(frame):
            for part, functions in _within(value, DEPTH):
                _refuse_held(name, part)
                called = named.union(*(names(function.__code__) for function in functions))
                method = next((method for method in WAITS if method in called and _waits(part, method)), None)
                if method is not None:
                    raise Unsupported(
                        f"its loop calls {method} of a {type(part).__name__} within {name}, by which it waits for another "
                        "thread; a parallel run makes other passes than the plain call, and more of them"
                    )


def refuse_held() -> None:
    """Refuses a loop that holds a lock now, from within its call.

    Raises:
        Unsupported: If a lock within its reach is locked.
    """
    for frame in frames():
        for name, value in _reached(frame):
            for part, _ in _within(value, DEPTH):
                _refuse_held(name, part)


def _reached(frame: types.FrameType) -> list[tuple[str, Any]]:
    """The variables of a frame, and the global names that its code uses, but for modules and classes."""
    scope = frame.f_globals
    used = [(name, scope[name]) for name in frame.f_code.co_names if name in scope]
    return [*frame.f_locals.items(), *(pair for pair in used if not isinstance(pair[1], types.ModuleType | type))]


def _refuse_held(name: str, part: Any) -> None:
    """Raises Unsupported if an object is a lock that is held."""
    if part.locked() if isinstance(part, LOCK) else isinstance(part, threading.Semaphore) and not vars(part)["_value"]:
        raise Unsupported(
            f"its loop holds a {type(part).__name__} within {name} in its pass, for which the passes of other states, which "
            "take turns with it, would wait for ever: release it before the network and the step are called"
        )


def _waits(part: Any, method: str) -> bool:
    foreign = type(part).__module__.startswith("multiprocessing.") and hasattr(part, method)
    return foreign or isinstance(part, WAITS[method])


def _within(value: Any, depth: int, functions: tuple[types.FunctionType, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """The objects in a value, each with the functions through which it was found."""
    yield value, functions
    if not depth:
        return
    parts: list[Any] = []
    if isinstance(value, types.FunctionType):
        functions = (*functions, value)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # not set yet
                parts.append(cell.cell_contents)
    elif isinstance(value, types.MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, functools.partial):
        parts = [value.func, *value.args]
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif is_host(value) or (is_users(type(value).__module__) and hasattr(value, "__dict__") and not isinstance(value, type)):
        parts = list(vars(value).values())
    for part in parts[:ITEMS]:
        yield from _within(part, depth - 1, functions)

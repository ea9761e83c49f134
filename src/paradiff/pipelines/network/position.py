# SPDX-License-Identifier: Apache-2.0
"""The states of random generators, positions of iterators, texts in memory, files, queues and other objects that show their
values by calls alone: read, recorded, compared and put back."""

from __future__ import annotations

import contextlib
import contextvars
import decimal
import functools
import io
import queue
import random
import sqlite3
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from paradiff.pipelines.network.plain import PLAIN
from paradiff.pipelines.network.saved import equal

LONGEST = 2**22
"""Characters of the longest file that is put back."""

PRECISION = ("prec", "rounding", "Emin", "Emax", "capitals", "clamp")
"""Attributes of a context of decimal numbers."""


def state_of(thing: Any) -> Any:
    """The state of a random generator, or the position of an iterator."""
    match thing:
        case torch.Generator():
            return thing.get_state()
        case random.Random():
            return thing.getstate()
        case np.random.Generator():
            return thing.bit_generator.state
        case np.random.RandomState():
            return thing.get_state(legacy=False)
        case io.StringIO() | io.BytesIO():
            return None if thing.closed else (thing.getvalue(), thing.tell())
        case io.IOBase():
            return _read_again(thing)
        case queue.SimpleQueue():
            return _waiting(thing)
        case contextvars.ContextVar():
            return _set(thing)
        case decimal.Context():
            return [getattr(thing, name) for name in PRECISION]
        case sqlite3.Connection():
            return _changes(thing)
        case _ if is_cache(thing):
            return thing.cache_info()
        case types.GeneratorType():
            frame = thing.gi_frame
            return None if frame is None else (frame.f_lasti, {k: v for k, v in frame.f_locals.items() if isinstance(v, PLAIN)})
        case _:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Python, which gives up the copies of some iterators
                try:
                    return _flat(thing.__reduce__()[1:])
                except TypeError:
                    return None


def is_cache(thing: Any) -> bool:
    """Whether a value is a function whose answers are kept, and counted: of `functools.lru_cache`."""
    return isinstance(thing, functools._lru_cache_wrapper)


def reread(file: Any) -> bool:
    """Whether a file is written to and read: what a loop writes to others is for nobody in it."""
    try:
        return not file.closed and file.readable() and file.writable() and file.seekable()
    except (OSError, ValueError):
        return False


def _read_again(file: Any) -> Any:
    """What a file holds, and the position in it; where it is long, its length and the position."""
    if not reread(file):
        return None
    place = file.tell()
    if (length := file.seek(0, io.SEEK_END)) <= LONGEST:
        file.seek(0)
        found = file.read()
    else:
        found = length
    file.seek(place)
    return found, place


def _taken(things: queue.SimpleQueue[Any]) -> list[Any]:
    """What waited in a queue, which is empty then."""
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(things.get_nowait())
    return found


def _waiting(things: queue.SimpleQueue[Any]) -> list[Any]:
    """What waits in a queue."""
    found = _taken(things)
    for thing in found:
        things.put(thing)
    return found


def _set(variable: contextvars.ContextVar[Any]) -> list[Any]:
    """The value of a variable of the context, or its default; none where it has neither."""
    try:
        return [variable.get()]
    except LookupError:
        return []


def _changes(connection: sqlite3.Connection) -> int | None:
    """The rows that were changed by a connection; None where that is not to be had."""
    try:
        return connection.total_changes
    except sqlite3.Error:  # It is closed, or another thread's.
        return None


def _flat(parts: Any) -> list[Any]:
    """What an iterator is made of, with the iterators within it as what they are made of."""
    return [
        state_of(part) if isinstance(part, Iterator) else _flat(part) if isinstance(part, tuple) else part for part in parts
    ]


def record(thing: Any) -> Any:
    """The state of a random generator; of an iterator a copy, and where there is none, its position."""
    if not isinstance(thing, Iterator) or isinstance(thing, io.IOBase):
        return state_of(thing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _copied(thing)
        except TypeError:
            return state_of(thing)


def _copied(iterator: Any) -> Any:
    """An iterator at the same position, over copies of the iterators within it."""
    make, parts, *state = iterator.__reduce__()
    copied = make(*[_copied(part) if isinstance(part, Iterator) else part for part in parts])
    for value in state:
        if value is not None:
            copied.__setstate__(_copied(value) if isinstance(value, Iterator) else value)
    return copied


def put_back(thing: Any, state: Any, anew: dict[int, Any]) -> None:
    """Sets a random generator to a state. An iterator gets a copy, in `anew`, that takes its place."""
    match thing:
        case torch.Generator():
            thing.set_state(state)
        case random.Random():
            thing.setstate(state)
        case np.random.Generator():
            thing.bit_generator.state = state
        case np.random.RandomState():
            thing.set_state(state)
        case io.IOBase():
            if state is not None and not isinstance(state[0], int) and reread(thing):
                thing.seek(0)
                thing.truncate()
                thing.write(state[0])
                thing.seek(state[1])
        case queue.SimpleQueue():
            _taken(thing)
            for value in state:
                thing.put(value)
        case contextvars.ContextVar():
            for value in state:
                thing.set(value)
        case decimal.Context():
            for name, value in zip(PRECISION, state, strict=True):
                setattr(thing, name, value)
        case _:
            if isinstance(state, Iterator):
                anew[id(thing)] = record(state)


def moved(thing: Any, record: Any) -> bool:
    """Whether a generator or an iterator is elsewhere than it was when it was recorded."""
    return not equal(state_of(thing), state_of(record) if isinstance(record, Iterator) else record)

# SPDX-License-Identifier: Apache-2.0
"""The states of random generators, positions of iterators, and texts in memory: read, recorded, compared and put back."""

from __future__ import annotations

import io
import random
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from paradiff.pipelines.network.plain import PLAIN
from paradiff.pipelines.network.saved import equal


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
        case io.StringIO() | io.BytesIO():
            if state is not None and not thing.closed:
                thing.seek(0)
                thing.truncate()
                thing.write(state[0])
                thing.seek(state[1])
        case _:
            if isinstance(state, Iterator):
                anew[id(thing)] = record(state)


def moved(thing: Any, record: Any) -> bool:
    """Whether a generator or an iterator is elsewhere than it was when it was recorded."""
    return not equal(state_of(thing), state_of(record) if isinstance(record, Iterator) else record)

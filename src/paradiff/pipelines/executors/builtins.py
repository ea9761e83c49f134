# SPDX-License-Identifier: Apache-2.0
"""Built-in functions with which loops walk over their times, for loops that lanes run.

A lane skips most iterations of its loop, which the built-in functions would not count. During a run, the modules of the loops
have an `enumerate`, a `zip`, a `range`, a `list` and a `tuple` of their own, which act as the built-in ones outside of lanes.
In a lane,

    enumerate(times)      numbers the times by their nodes,
    zip(times, values)    takes the values of the times' nodes,
    range(len(times))     yields the lane's nodes,
    list(times)           leaves the times as they are,

the last two only in the head of a `for`.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import linecache
import sys
import threading
import types
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import greenlet
import numpy as np
import torch
from torch import Tensor

from paradiff.errors import Unsupported
from paradiff.pipelines.loop.timesteps import RoundTimesteps, plain

Scope = dict[str, Any]
"""The global names of a module."""
TRANSPARENT = ("paradiff.", "tqdm")
LISTED = (
    dict,
    set,
    frozenset,
    deque,
    str,
    bytes,
    torch.Size,
    *(type(view({})) for view in (dict.keys, dict.values, dict.items)),
)
"""Containers whose items are listed to be taken by their index."""
LOCK = threading.Lock()


class Walker(Protocol):
    """A call whose loop is passed at nodes out of order: a lane, or a dry walk."""

    scheduler: Any

    def rounds(self, timesteps: Tensor) -> Iterator[Tensor]:
        """The iteration over `timesteps` (`LoopHandler`)."""
        ...

    def place_of(self, position: int, value: Any) -> int:
        """The number of a time in its iteration: that of its node where it is the time of a pass, else its position."""
        ...


class _Replacement:
    """A replacement of a built-in function in a module, and the number of runs that use it."""

    def __init__(self) -> None:
        self.runs = 0


class _Enumerate(_Replacement):
    def __call__(self, iterable: Iterable[Any], start: int = 0) -> Iterator[tuple[int, Any]]:
        walker = _walker()
        return builtins.enumerate(iterable, start) if walker is None else _numbered(walker, iterable, start)


class _Zip(_Replacement):
    def __call__(self, *iterables: Iterable[Any], **options: Any) -> Iterator[Any]:
        walker = _walker()
        times = next((values for values in iterables if isinstance(values, RoundTimesteps)), None)
        if walker is None or times is None:
            return builtins.zip(*iterables, **options)  # noqa: B905
        return _beside(walker, times, iterables, bool(options.get("strict")))


class _Range(_Replacement):
    def __call__(self, *bounds: Any) -> Any:
        steps = builtins.range(*bounds)
        walker = _walker()
        times = None if walker is None else vars(walker.scheduler).get("timesteps")
        if walker is None or not isinstance(times, Tensor) or not _in_a_head(sys._getframe(1), "range"):
            return steps
        fits = steps.step == 1 and 0 <= steps.start < steps.stop <= len(times)
        return Nodes(walker, steps, plain(times)[steps.start : steps.stop]) if fits else steps


class Nodes:
    """A range of whole numbers that are indices of a loop's times, iterated as a walker goes.

    Args:
        walker: The lane or dry walk.
        steps: The range.
        times: `[n]` the times at these indices.
    """

    def __init__(self, walker: Walker, steps: range, times: Tensor) -> None:
        self._walker, self._steps, self._times = walker, steps, times

    def __iter__(self) -> Iterator[int]:
        for position, time in builtins.enumerate(self._walker.rounds(self._times)):
            yield self._steps.start + self._walker.place_of(position, time)

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, place: Any) -> Any:
        return self._steps[place]


class _Kind(type):
    """The class of a replaced `list` or `tuple`, which stands for the built-in one in all else than being called."""

    real: type
    runs: int

    def __call__(cls, *values: Any, **options: Any) -> Any:
        times = len(values) == 1 and isinstance(values[0], RoundTimesteps)
        if times and _walker() is not None and _in_a_head(sys._getframe(1), cls.real.__name__):
            return values[0]
        return cls.real(*values, **options)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.real)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.real)

    def __eq__(cls, other: Any) -> bool:
        return other is cls or other is cls.real

    def __hash__(cls) -> int:
        return hash(cls.real)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.real, name)

    def __getitem__(cls, item: Any) -> Any:
        return types.GenericAlias(cls.real, item)


REPLACEMENTS: dict[str, Any] = {
    "enumerate": _Enumerate,
    "zip": _Zip,
    "range": _Range,
    "list": lambda: _Kind("list", (), {"real": list, "runs": 0}),
    "tuple": lambda: _Kind("tuple", (), {"real": tuple, "runs": 0}),
}
"""What makes the replacement of each built-in function."""


@contextlib.contextmanager
def counting(scopes: Iterable[Scope]) -> Iterator[None]:
    """Puts the replacements into modules; the last run that ends removes them."""
    scopes = builtins.list(scopes)
    with LOCK:
        for scope in scopes:
            for name in _replaced(scope):
                scope.setdefault(name, REPLACEMENTS[name]()).runs += 1
    try:
        yield
    finally:
        with LOCK:
            for scope in scopes:
                for name in _replaced(scope):
                    scope[name].runs -= 1
                    if scope[name].runs == 0:
                        del scope[name]


def uncounted() -> Scope | None:
    """The global names of the loop that now starts to iterate its times, if it uses a built-in function; else None."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith(TRANSPARENT):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    used = [name for name in ("enumerate", "zip") if name in frame.f_code.co_names]
    return frame.f_globals if any(name not in frame.f_globals for name in used) else None


def _walker() -> Walker | None:
    """The lane or dry walk that runs; None in any other code."""
    running: Any = greenlet.getcurrent()
    return running if hasattr(running, "place_of") else None


def _numbered(walker: Walker, iterable: Iterable[Any], start: int) -> Iterator[tuple[int, Any]]:
    for position, value in builtins.enumerate(iterable):
        yield start + walker.place_of(position, value), value


def _beside(walker: Walker, times: RoundTimesteps, iterables: Sequence[Any], strict: bool) -> Iterator[Any]:
    """`zip` of times and other values, of the times' nodes."""
    columns = [values if values is times else _column(values) for values in iterables]
    lengths = {len(column) for column in columns}
    if strict and len(lengths) > 1:
        raise Unsupported(
            "the loop walks over its times beside another number of values, which a strict zip refuses at its end"
        )
    for position, time in builtins.enumerate(times[: min(lengths)]):
        place = walker.place_of(position, time)
        yield builtins.tuple([time if column is times else column[place] for column in columns])


def _column(values: Any) -> Any:
    """Values that are taken by their index."""
    if isinstance(values, Tensor):
        return plain(values).unbind()
    if isinstance(values, LISTED):
        return builtins.list(values)
    if isinstance(values, builtins.list | builtins.tuple | builtins.range | Nodes | np.ndarray):
        return values
    walked = getattr(type(values), "__iter__", Sequence.__iter__)  # by its indices, where it has no way of its own
    if walked is not Sequence.__iter__ or not hasattr(values, "__getitem__") or not hasattr(values, "__len__"):
        raise Unsupported(
            f"the loop walks over its times beside a {type(values).__name__}, whose values come in the order of its passes"
        )
    return values


def _replaced(scope: Scope) -> list[str]:
    """The names of the built-in functions that are replaced in a module: those that its code does not set itself."""
    return [name for name in REPLACEMENTS if isinstance(scope.get(name, _Replacement()), _Replacement | _Kind)]


def _in_a_head(frame: types.FrameType, name: str) -> bool:
    """Whether the running line of a frame is the head of a `for` that walks over a call of a built-in function."""
    return (frame.f_lineno, name) in _heads(frame.f_code.co_filename)


@functools.lru_cache(maxsize=64)
def _heads(filename: str) -> frozenset[tuple[int, str]]:
    """The lines of a file in which a `for` walks over calls of built-in functions, with their names."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return frozenset()
    found = set[tuple[int, str]]()
    for loop in ast.walk(tree):
        if isinstance(loop, ast.For):
            found |= {(node.lineno, node.func.id) for node in _calls(loop.iter) if isinstance(node.func, ast.Name)}
    return frozenset(found)


def _calls(node: ast.expr) -> Iterator[ast.Call]:
    """A call, and those among its arguments: not those in a sum of lists, or in a part of one."""
    if isinstance(node, ast.Call):
        yield node
        for part in node.args:
            yield from _calls(part)

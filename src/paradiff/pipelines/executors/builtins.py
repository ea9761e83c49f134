# SPDX-License-Identifier: Apache-2.0
"""`enumerate` for loops that lanes run: it yields the number of the lane's node, not that of the pass.

A lane skips most iterations of its loop, which the built-in `enumerate` would not count. During a run, the modules of the loops
have an `enumerate` of their own, which acts as the built-in one outside of lanes, and a `zip`, which refuses a lane's times.
"""

from __future__ import annotations

import builtins
import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import greenlet

from paradiff.errors import Unsupported
from paradiff.pipelines.loop.timesteps import RoundTimesteps

Scope = dict[str, Any]
"""The global names of a module."""
TRANSPARENT = ("paradiff.", "tqdm")
LOCK = threading.Lock()


class _Replacement:
    """A replacement of a built-in function in a module, and the number of runs that use it."""

    def __init__(self) -> None:
        self.runs = 0


class _Enumerate(_Replacement):
    def __call__(self, iterable: Iterable[Any], start: int = 0) -> Iterator[tuple[int, Any]]:
        lane = greenlet.getcurrent()
        count = getattr(lane, "count", None)
        return builtins.enumerate(iterable, start) if count is None else count(iterable, start)


class _Zip(_Replacement):
    def __call__(self, *iterables: Iterable[Any], **options: Any) -> Iterator[Any]:
        if hasattr(greenlet.getcurrent(), "count") and any(isinstance(values, RoundTimesteps) for values in iterables):
            raise Unsupported("the loop walks over its times and something else at once")
        return builtins.zip(*iterables, **options)  # noqa: B905


@contextlib.contextmanager
def counting(scopes: Iterable[Scope]) -> Iterator[None]:
    """Puts the replacements into modules; the last run that ends removes them."""
    scopes = list(scopes)
    with LOCK:
        for scope in scopes:
            for name, kind in (("enumerate", _Enumerate), ("zip", _Zip)):
                scope.setdefault(name, kind()).runs += 1
    try:
        yield
    finally:
        with LOCK:
            for scope in scopes:
                for name in ("enumerate", "zip"):
                    scope[name].runs -= 1
                    if scope[name].runs == 0:
                        del scope[name]


def uncounted() -> Scope | None:
    """The global names of the loop that now starts to iterate its times, if it uses the built-in `enumerate`; else None."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").startswith(TRANSPARENT):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    ours = isinstance(frame.f_globals.get("enumerate"), _Enumerate)
    return frame.f_globals if "enumerate" in frame.f_code.co_names and not ours else None

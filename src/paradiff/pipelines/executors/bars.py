# SPDX-License-Identifier: Apache-2.0
"""Progress bars of loops that are run by lanes: one bar is shown, that of the user's own call."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import greenlet
from tqdm.std import tqdm

_LOCK = threading.Lock()
_real: list[Any] = []  # tqdm's own `__init__`, once for each run that goes on


@contextlib.contextmanager
def one_bar() -> Iterator[None]:
    """Shows no bar of a greenlet whose `quiet` is true, until the end of the block."""
    with _LOCK:
        if not _real:
            init: Any = tqdm.__init__

            @functools.wraps(init)
            def made(self: Any, *args: Any, **options: Any) -> None:
                if getattr(greenlet.getcurrent(), "quiet", False):
                    options["disable"] = True
                init(self, *args, **options)

            _real.append(vars(tqdm)["__init__"])
            tqdm.__init__ = made
        else:
            _real.append(_real[0])
    try:
        yield
    finally:
        with _LOCK:
            own = _real.pop()
            if not _real:
                tqdm.__init__ = own

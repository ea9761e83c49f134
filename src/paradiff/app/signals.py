# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM: both end a run, and neither ends one that is being written."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes of Ctrl-C and of SIGTERM: 128 and the signal's number."""

WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


SOON = 0.02
"""Seconds after which a signal is sent again that came where it would have been lost."""


class EndedLate(Exception):
    """A signal that came when a run was written, or while it was, which is whole all the same. The text is the end of a
    sentence for the user.

    Args:
        where: The folder that was written to.
        number: The signal; None where `termination` alone knows it.

    Attributes:
        number: As given.
    """

    def __init__(self, where: str, number: int | None = None) -> None:
        super().__init__(f"the run was whole and is written to {where}")
        self.number = number


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def termination() -> Iterator[list[int]]:
    """Makes SIGINT and SIGTERM end a run by KeyboardInterrupt; the list it gives holds the signal once it came."""
    came: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        if _in_finalizer(frame):  # where Python drops exceptions
            again = threading.Timer(SOON, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
        elif not came:
            came.append(number)
            raise KeyboardInterrupt

    if not _in_main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in WORDS}
    heeded = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in heeded:
        signal.signal(number, end)
    try:
        yield came
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether a frame runs within an object's `__del__`."""
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


@contextmanager
def noting(came: list[int]) -> Iterator[None]:
    """Notes signals in a list in place of heeding them; a second one is heeded at once."""

    def note(number: int, _: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    if not _in_main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in WORDS}
    heeded = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in heeded:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


@contextmanager
def held() -> Iterator[None]:
    """Lets a short block come to its end before a signal is heeded; a second one ends it at once."""
    came: list[int] = []
    try:
        with noting(came):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextmanager
def finishing(written: list[str], where: str) -> Iterator[None]:
    """Lets a block that writes a run come to its end before a signal is heeded; a second one ends it at once.

    Args:
        written: Where it is noted that the block came to its end.
        where: The folder that is written to.

    Raises:
        EndedLate: At the end of the block, if a signal came.
    """
    came: list[int] = []
    with noting(came):
        yield
        written.append(where)
    if came:
        raise EndedLate(where, came[0])


@contextmanager
def whole_from(written: list[str]) -> Iterator[None]:
    """A block of which a signal ends nothing that is lost, once its run is written.

    Args:
        written: The folder that was written to, once it was (`finishing`).

    Raises:
        EndedLate: If a signal came then.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if written:
            raise EndedLate(written[0]) from interrupt
        raise

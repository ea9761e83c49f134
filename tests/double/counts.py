# SPDX-License-Identifier: Apache-2.0
"""Counts of waits and copies, by the line of the package that caused them."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import paradiff
from double.backend import load

PACKAGE = str(Path(paradiff.__file__).parent) + "/"
READER = PACKAGE + "solver/accelerator.py"
"""Reads numbers for others, whose lines are told."""
OUTSIDE = "outside"
"""Where no line of the package was at work: the plain part of a pipeline, or the test itself."""


class Counts:
    """What was reported while it was counted.

    Attributes:
        lines: How often each thing happened at each line of the package, as `(what, "methods/secant.py:112")`. A wait begins
            with `wait: `; an upload that does not wait is `upload`.
    """

    def __init__(self) -> None:
        self.lines: Counter[tuple[str, str]] = Counter()

    def __call__(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame is not None and (not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_filename == READER):
            frame = frame.f_back
        place = OUTSIDE if frame is None else f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
        self.lines[what, place] += 1

    def of(self, *kinds: str, under: str = "", without: str = OUTSIDE) -> int:
        """How often things happened whose names begin with one of `kinds`, at lines of files under `under`."""
        return sum(
            number
            for (what, place), number in self.lines.items()
            if what.startswith(kinds) and place.startswith(under) and place != without
        )

    @property
    def waits(self) -> int:
        """Waits for the device, blocking uploads included."""
        return self.of("wait")

    @property
    def blocking(self) -> int:
        """Copies to the device that wait for it."""
        return self.of("wait: blocking upload")

    @property
    def copies(self) -> int:
        """Copies between host and device, whether or not they wait."""
        return self.of("wait: blocking upload", "wait: to the host", "wait: item", "upload", "download")

    def __str__(self) -> str:
        return "\n".join(f"{number:5} {what} at {place}" for (what, place), number in self.lines.most_common())


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Counts what happens in a `with` block."""
    extension, counts = load(), Counts()
    extension.listen(counts)
    try:
        yield counts
    finally:
        extension.listen(None)


@contextlib.contextmanager
def limited(bytes_: int, device: int = 0) -> Iterator[None]:
    """Gives a device so many bytes of memory beyond those that it holds, for a `with` block."""
    extension = load()
    extension.limit(device, extension.held(device) + bytes_)
    try:
        yield
    finally:
        extension.limit(device, -1)

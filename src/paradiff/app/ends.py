# SPDX-License-Identifier: Apache-2.0
"""How a command ends: its exit code, and one sentence for what it could not do."""

from __future__ import annotations

import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from signal import SIGINT
from typing import cast

from paradiff.app.launched import rank
from paradiff.app.outcome import CutShort
from paradiff.app.signals import INTERRUPTED, TERMINATED, WORDS, EndedLate, termination
from paradiff.errors import RanksFailed

LONGEST = 800
"""Characters of a sentence."""

FAILED, REFUSED, LATE = 1, 2, 3
"""Exit codes of an error that nobody foresaw, of what was refused or could not be written, and of a run that its deadline
ended, whose files are written."""

EXIT_CODES = (
    f"Exit codes: 0, all is well; {FAILED}, a package is missing, memory ran out, a rank failed, or paradiff is at fault; "
    f"{REFUSED}, what was given is refused, or the output cannot be written; {LATE}, the deadline ended the run; "
    f"{INTERRUPTED}, Ctrl-C; {TERMINATED}, SIGTERM."
)

TRACEBACK = "PARADIFF_TRACEBACK"
"""The environment variable that asks for the traceback of an error that nobody foresaw."""


def _as_typed(sentence: str) -> str:
    """A sentence of the library, with None as the command line has it."""
    return re.sub(r"\bor None\b", "or none", sentence)


def _unforeseen(error: Exception) -> str:
    """The sentence of an error that nobody foresaw: that memory ran out, or that paradiff is at fault."""
    line = next(iter(str(error).splitlines()), "")
    said = f"{type(error).__name__}: {line}" if line else type(error).__name__
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
        return f"memory ran out ({said}); give fewer seeds, a smaller window, or --max-rows"
    return f"{said}; this is a fault of paradiff: please report it with the command ({TRACEBACK}=1 shows where)"


def _one_line(text: str) -> str:
    """A sentence in one line of a length that can be read, whatever texts it repeats."""
    line = " ".join(text.splitlines())
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} [...] {line[-LONGEST // 4 :]}"


def _told(error: Exception) -> tuple[str, int]:
    """The sentence of an error, and the exit code."""
    if isinstance(error, ValueError):
        return _as_typed(str(error)), REFUSED
    if isinstance(error, RanksFailed):
        return str(error), FAILED
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f': {error.filename!r}' if error.filename else ''}", REFUSED
    if hasattr(error, "format_message"):  # of typer's
        return error.format_message(), getattr(error, "exit_code", REFUSED)  # pyright: ignore[reportAttributeAccessIssue]
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    return _unforeseen(error), FAILED


def ended(command: Callable[[], int | None]) -> int:
    """Runs a command to its end, whatever that is, and prints its sentence; the exit code.

    Args:
        command: What is run; it gives an exit code, or None for 0.

    Raises:
        ModuleNotFoundError: If a package is missing.
    """
    end = ""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before Python started
            setattr(sys, name, io.StringIO())
    with termination() as came:
        try:
            code = command()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except EndedLate as late:
            number = late.number or (came[0] if came else SIGINT)
            code, end = 128 + number, f"{WORDS[number]}: {late}"
        except CutShort as cut:
            cause = cast(Exception | KeyboardInterrupt, cut.__cause__)
            if isinstance(cause, KeyboardInterrupt):
                number = came[0] if came else SIGINT
                code, end = 128 + number, f"{WORDS[number]}: {cut}; {cut.saved}"
            else:
                sentence, code = _told(cause)
                end = f"error: {sentence}; {cut}; {cut.saved}"
        except ModuleNotFoundError:
            raise  # a package of an extra, perhaps: app/__init__.py names it
        except Exception as error:
            sentence, code = _told(error)
            end = f"error: {sentence}"
    if code == INTERRUPTED and not end:
        number = came[0] if came else SIGINT
        code, end = 128 + number, f"{WORDS[number]}: nothing was written"
    if end:
        end = end if rank() == 0 else f"rank {rank()}: {end}"
        print(_one_line(end), file=sys.stderr)
    return code or 0

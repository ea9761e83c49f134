"""Why something cannot be done, as a sentence."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class Unsupported(Exception):
    """A loop, scheduler or option that has no parallel form here. The text is a clause for the user: what was found."""


class NeedsLanes(Unsupported):
    """The loop body read the step number or the time in Python, where the states of a window differ: each state needs a lane
    of its own (pipelines/executors/lanes.py)."""


class MissingPackage(ImportError):
    """A package of an extra that is not installed. The text is a sentence: what needs it, and how to install it."""


def refuse_unknown(option: str, given: str, known: Sequence[str]) -> None:
    """Raises ValueError, with the nearest known name, unless `given` is one of `known`."""
    if given in known:
        return
    near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{option} is {given!r}; it must be one of {', '.join(known)}{hint}")

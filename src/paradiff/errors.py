"""Why a pipeline's loop cannot be run in parallel over time, as a sentence."""

from __future__ import annotations


class Unsupported(Exception):
    """A loop, scheduler or option that has no parallel form here. The text is a clause for the user: what was found."""


class NeedsLanes(Unsupported):
    """The loop body read the step number or the time in Python, where the states of a window differ: each state needs a lane
    of its own (lanes.py)."""

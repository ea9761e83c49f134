# SPDX-License-Identifier: Apache-2.0
"""What a run computed, before it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paradiff.solver.trajectory import Trajectory

Writer = Callable[[Path], None]
"""Writes one or more files into a folder."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run computed.

    Attributes:
        contents: Of run.json.
        title: Of the table at its end.
        writers: Functions that write its files into a folder, run.json left out.
        trajectory: The trajectory of all samples, where it was asked for and is known; None otherwise.
    """

    contents: dict[str, Any]
    title: str
    writers: Sequence[Writer]
    trajectory: Trajectory | None = None


class CutShort(Exception):
    """The end of a run after some of its samples; the cause is why. The text is a clause for the user: which are finished.

    Attributes:
        writers: What writes those.
        saved: A clause that says where they were written to.
    """

    def __init__(self, finished: str, writers: Sequence[Writer]) -> None:
        super().__init__(finished)
        self.writers, self.saved = writers, ""

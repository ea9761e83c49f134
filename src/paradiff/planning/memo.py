# SPDX-License-Identifier: Apache-2.0
"""What was looked up and chosen for a model before in this process, so that a run that is made again chooses in no time.

An entry lasts as long as the model, and holds while the stored files that it was read from are as they were.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paradiff.planning.latency import LatencyCurve
from paradiff.planning.picking import Picked
from paradiff.planning.traces import Traces

KEPT = 16
"""Entries of one model that are kept, the newest ones."""


@dataclass(frozen=True, eq=False)
class Entry:
    """What was looked up for a model on a chain. Entries are compared by identity.

    Attributes:
        stamp: When the stored files were written.
        curve: The latency curve; None where it is not known.
        traces: Traces of runs.
        notes: Sentences: which stored file was left out, and why.
        picks: What was chosen, by the number of samples.
    """

    stamp: tuple[int | None, ...]
    curve: LatencyCurve | None
    traces: Traces
    notes: tuple[str, ...]
    picks: dict[int, Picked] = field(default_factory=dict)


class Memo:
    """Entries by model. Objects are compared by identity."""

    def __init__(self) -> None:
        self._of: weakref.WeakKeyDictionary[Any, dict[Hashable, Entry]] = weakref.WeakKeyDictionary()

    def find(self, model: Any, key: Hashable) -> Entry | None:
        """The entry of a model, if its files are as they were."""
        try:
            entry = self._of.get(model, {}).get(key)
        except TypeError:  # no object that can be referred to weakly, or none with a hash
            return None
        return entry if entry is not None and entry.stamp == stamp_of(*entry.traces.files) else None

    def keep(self, model: Any, key: Hashable, entry: Entry) -> None:
        """Keeps an entry, where the model can be referred to weakly."""
        try:
            entries = self._of.setdefault(model, {})
        except TypeError:
            return
        entries.pop(key, None)
        entries[key] = entry
        while len(entries) > KEPT:
            del entries[next(iter(entries))]


def stamp_of(*paths: Path | None) -> tuple[int | None, ...]:
    """When files were written; None of one that is not there."""
    return tuple(_written(path) for path in paths)


def _written(path: Path | None) -> int | None:
    try:
        return None if path is None else path.stat().st_mtime_ns
    except OSError:
        return None


MEMO = Memo()

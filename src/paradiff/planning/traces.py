# SPDX-License-Identifier: Apache-2.0
"""Traces of earlier runs of a model on a chain, kept in the user's cache folder (store.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from paradiff.chain.table import Table
from paradiff.planning.cost import Trace, costs_of_json
from paradiff.planning.identity import curve_key, machine_facts, table_key
from paradiff.planning.store import Store, digest
from paradiff.solver.evaluator import Evaluator

KEPT = 8
"""Traces of one method that are kept, the newest ones."""


def traces_of(
    evaluator: Evaluator, table: Table, shape: Sequence[int], folder: Path | None = None, *, key: str | None = None
) -> Traces:
    """The traces of a model on a chain, with samples of a shape."""
    return Traces(digest(curve_key(evaluator, shape, key), table_key(table)), evaluator.device, folder)


class Traces:
    """The traces of one model on one chain, by a method's label, its repr. Objects are compared by identity.

    Args:
        key: What they are of.
        device: The device that they were made on.
        folder: Where traces are kept; None for the user's cache folder.

    Attributes:
        files: The files that an entry of memo.py rests on: that of the traces, and those that are added.
        known: Traces by label.
        notes: Sentences: which stored file was left out, or could not be written, and why.
    """

    def __init__(self, key: str, device: torch.device, folder: Path | None = None) -> None:
        self._store, self._facts, self._key = Store("trace", folder), machine_facts(device), key
        self.files = [self._store.path(key)]
        self.known, self.notes = self._read()

    def of(self, label: str, samples: int) -> list[Trace]:
        """The traces of a method for so many samples: of runs of the same number where there are any."""
        found = self.known.get(label, [])
        same = [trace for trace in found if trace.samples == samples]
        return same or [trace.of(samples) for trace in found]

    def add(self, found: Mapping[str, Sequence[Trace]]) -> None:
        """Keeps further traces, beside those that other processes have kept meanwhile."""
        stored, _ = self._read()
        for label, traces in found.items():
            stored[label] = [*stored.get(label, []), *traces][-KEPT:]
        self.known = stored
        content = {label: [trace.to_json() for trace in traces] for label, traces in stored.items()}
        notice = self._store.write(self._key, self._facts, content)
        self.notes += [] if notice is None else [notice]

    def _read(self) -> tuple[dict[str, list[Trace]], list[str]]:
        content, notice = self._store.read(self._key, self._facts)
        notes = [] if notice is None else [notice]
        if content is None:
            return {}, notes
        try:
            return costs_of_json(content), notes
        except ValueError as error:
            return {}, [*notes, f"the stored trace {str(self._store.path(self._key))!r} was left out: {error}"]

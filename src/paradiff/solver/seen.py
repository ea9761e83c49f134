# SPDX-License-Identifier: Apache-2.0
"""The models that were seen to be right in this process: whose rows depend on themselves alone, by the check of a whole run.

A model was seen if a run of it passed the whole check (row_check.py), consists of the same at the run's beginning, at its end
and at the next one's beginning (identity.py), and the next run is of the same kind: table, method, shape, dtypes, number of
samples, structure of the conditioning, bound on rows, devices. Values on a device are compared at the ends of runs alone, where
the check waits for it anyway. What cannot be read, what was made anew, a function within a function, say, and what changes in a
run, was not seen.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from paradiff.solver.identity import Identity, identity_of

MOST = 16
"""Kinds of runs that are kept of a model."""


@dataclass(frozen=True, eq=False)
class Sight:
    """What was seen of a model in runs of one kind.

    Attributes:
        identity: What the model consisted of.
        runs: Runs that passed the check one after the other.
    """

    identity: Identity
    runs: int


@dataclass(eq=False)
class Models:
    """The models that were seen. They are held weakly."""

    _known: dict[int, tuple[weakref.ref[Any], dict[str, Sight]]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def look(
        self, model: Any, kind: str, copies: Sequence[Any] = (), least: Callable[[int], int] = lambda number: number
    ) -> Look:
        """Looks at a model at the beginning of a run.

        Args:
            model: The model.
            kind: What kind of run it is.
            copies: The model's copies on other devices.
            least: The least of the numbers of all ranks, which have to decide alike.
        """
        identity = identity_of((model, *copies))
        found = None if identity is None else self.take(model, kind)
        same = found is not None and identity is not None and found.identity.same(identity)
        known = found if same else None
        runs = least(0 if known is None else known.runs)
        return Look(self, model, kind, copies, least, identity, None if known is None else known.identity, runs)

    def take(self, model: Any, kind: str) -> Sight | None:
        """Takes out what is known of a model, until a run has passed once more."""
        with self._lock:
            held, sights = self._known.get(id(anchor := _anchor(model)), (None, {}))
            return sights.pop(kind, None) if held is not None and held() is anchor else None

    def put(self, model: Any, kind: str, sight: Sight) -> None:
        """Keeps what was seen of a model."""
        anchor = _anchor(model)
        place = id(anchor)
        try:
            held = weakref.ref(anchor, lambda _: self._known.pop(place, None))
        except TypeError:  # an object that cannot be held weakly
            return
        with self._lock:
            known, sights = self._known.get(id(anchor), (None, {}))
            if known is None or known() is not anchor:
                sights = {}
                self._known[id(anchor)] = held, sights
            sights[kind] = sight
            while len(sights) > MOST:
                sights.pop(next(iter(sights)))

    def forget(self) -> None:
        """Forgets all."""
        with self._lock:
            self._known.clear()


@dataclass(frozen=True, eq=False)
class Look:
    """A look at a model at the beginning of a run.

    Attributes:
        models: Where it is kept.
        model: The model.
        kind: The kind of run.
        copies: The model's copies on other devices.
        least: The least of the numbers of all ranks.
        identity: What they consist of; None if that cannot be read.
        known: What they consisted of at the end of the run before; None if nothing is known of it.
        runs: Runs of the same model and kind that passed the check before; 0 where the whole check is due.
    """

    models: Models
    model: Any
    kind: str
    copies: Sequence[Any]
    least: Callable[[int], int]
    identity: Identity | None
    known: Identity | None
    runs: int

    def still(self) -> bool:
        """Whether the model consists of the same still, on all ranks, but for values on other devices than the CPU. Waits for
        none."""
        now = None if self.identity is None else identity_of((self.model, *self.copies))
        return self.least(int(now is not None and self.identity is not None and self.identity.same(now))) == 1

    def unchanged(self) -> bool:
        """Whether the model consists of the same still, on all ranks; of values too. Waits for the devices."""
        return self.least(int(self._unchanged())) == 1

    def _unchanged(self) -> bool:
        now = None if self.identity is None else identity_of((self.model, *self.copies))
        if now is None or self.identity is None or not self.identity.same(now):
            return False
        return now.alike(self.identity if self.known is None else self.known)

    def passed(self) -> None:
        """Keeps that the model passed; for one that is unchanged."""
        if self.identity is not None:
            self.models.put(self.model, self.kind, Sight(self.identity, self.runs + 1))


def _anchor(model: Any) -> Any:
    """The object by whose life a model is told from others: a method's owner, which is made anew at each use."""
    return model.__self__ if isinstance(model, MethodType) else model


MODELS = Models()
"""Those of this process."""

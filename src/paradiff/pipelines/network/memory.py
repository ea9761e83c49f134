# SPDX-License-Identifier: Apache-2.0
"""What networks keep from one call to the next: recorded, compared, and put back.

A network's memory is what its call can change: buffers and attributes of its modules, objects and containers in these, the
variables that its functions and hooks share, and generators (walk.py).
"""

from __future__ import annotations

import itertools
import sqlite3
import types
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paradiff.pipelines.network.holder import DEEP, Holder
from paradiff.pipelines.network.position import is_cache, moved, put_back
from paradiff.pipelines.network.reads import is_read
from paradiff.pipelines.network.saved import changed, equal
from paradiff.pipelines.network.walk import LONG, Walk


@dataclass(frozen=True)
class Change:
    """A value that is no longer what it was.

    Attributes:
        path: Where it is, such as `unet.mid_block.count`.
        name: The name under which functions reach it; empty if there is none.
        silent: Whether it is a number, a text or a list of such, which is harmless where no function reads it.
    """

    path: str
    name: str
    silent: bool


def is_plain(value: Any, deep: int = DEEP) -> bool:
    """Whether a value is a number, a text, a shape or a class, or holds such values alone, as far as so many levels show."""
    if isinstance(value, dict | tuple | list | deque | set | frozenset):
        parts = itertools.chain(value, value.values()) if isinstance(value, dict) else value
        return deep > 0 and all(is_plain(part, deep - 1) for part in parts)
    return isinstance(value, bool | int | float | str | np.generic | torch.dtype | torch.device | type | type(None))


class Memory:
    """The values that some objects, and all that they refer to, hold at the time of its making.

    Args:
        roots: Networks, functions and containers, each with its name.
        owners: Objects, such as pipelines, of which all attributes are recorded.
        leave: Objects that the walk leaves out.
        readers: Further functions that may read what is kept: a loop's.
    """

    def __init__(
        self,
        roots: Iterable[tuple[str, Any]],
        *,
        owners: Iterable[Any] = (),
        leave: Iterable[Any] = (),
        readers: Iterable[types.FunctionType] = (),
    ) -> None:
        self._readers = list(readers)
        self._walk = Walk(roots, owners, leave)

    def influence(self) -> Change | None:
        """The first change since that a later call may depend on; None if there is none. Waits once for each device.

        A number, a text or a list of these that no function reads is harmless. A tensor that is kept, by itself or in a list,
        is not, since the loop, or whoever keeps it, may read it.
        """
        for change in self._changes():
            if (
                not change.silent
                or not change.name
                or any(is_read(change.name, function) for function in [*self._walk.functions, *self._readers])
            ):
                return change
        return None

    def change(self) -> Change | None:
        """The first change since, whether or not anything depends on it; None if there is none. Waits once for each device."""
        return next(self._changes(), None)

    @property
    def functions(self) -> list[types.FunctionType]:
        """The users' functions within reach of the objects, without the methods of networks."""
        return [function for function in self._walk.functions if id(function) not in self._walk.networks_own]

    @property
    def lasting(self) -> str | None:
        """Where there is what cannot be put back, and what it is; None if there is nothing."""
        for path, thing, _ in self._walk.states:
            if isinstance(thing, types.GeneratorType):
                return f"{path} is a Python generator, whose position"
            if isinstance(thing, sqlite3.Connection):
                return f"{path} is a connection to a database, whose rows"
            if is_cache(thing):
                return f"{path} is a function with a cache, whose counts"
        return None

    @property
    def operators(self) -> set[str]:
        """The names by which operators within reach, such as `operator.attrgetter`, get or call something."""
        return self._walk.operators

    @torch.no_grad()
    def restore(self) -> None:
        """Puts all values back, except the positions of Python generators."""
        anew: dict[int, Any] = {}
        for _, thing, state in self._walk.states:
            if moved(thing, state):
                put_back(thing, state, anew)
        for holder in self._walk.holders:
            values = {key: anew.get(id(value), value) for key, value in holder.before.items()}
            now = holder.read()
            others = [key for key in self._changed(holder, now) if key is not None]
            others += [key for key, value in values.items() if value is not holder.before[key] and key not in others]
            if others:
                holder.write(values, now, others)
        for saved in changed(list(self._walk.saved.values())):
            saved.put_back()

    def _changes(self) -> Iterator[Change]:
        for saved in changed(list(self._walk.saved.values())):
            yield Change(saved.path, "", silent=False)
        for path, thing, state in self._walk.states:
            if moved(thing, state):
                yield Change(path, "", silent=False)
        for holder in self._walk.holders:
            if holder.hooks:
                continue
            now = holder.read()
            for key in self._changed(holder, now):
                values = [held[key] for held in (holder.before, now) if key in held]
                yield Change(holder.label(key), holder.reached(key), silent=all(map(is_plain, values)))

    def _changed(self, holder: Holder, now: dict[Any, Any]) -> Iterator[Any]:
        """The keys of a holder whose values are others."""
        before = holder.before
        if isinstance(holder.owner, set) or len(before) > LONG:
            yield from list(before.keys() ^ now.keys())[:1]
            return
        for key in [*before, *(key for key in now if key not in before)]:
            if key not in before or key not in now or not self._same(before[key], now[key]):
                yield key

    def _same(self, before: Any, now: Any) -> bool:
        """Whether a value is what it was. An object that changed inside has a holder of its own."""
        if before is now:
            return True
        if isinstance(before, Tensor) and isinstance(now, Tensor):
            saved = self._walk.saved.get(id(before))
            return equal(before if saved is None or saved.copy is None else saved.copy, now)
        if type(before) is not type(now):
            return False
        if isinstance(before, types.MethodType):
            return before.__func__ is now.__func__ and before.__self__ is now.__self__
        if isinstance(before, list | tuple) and len(before) == len(now):
            return all(self._same(a, b) for a, b in zip(before, now, strict=True))
        if isinstance(before, dict) and before.keys() == now.keys():
            return all(self._same(before[key], now[key]) for key in before)
        return equal(before, now)

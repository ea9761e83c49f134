# SPDX-License-Identifier: Apache-2.0
"""The results of a pipeline's networks before its loop and in the loop's first pass, so that the call can be made again.

A call that is made again gets copies of what the networks returned, and the random generators go on from where the networks
left them. Three kinds of calls are not played from the log but made anew: those that are handed an object, or that write into a
tensor, those that return no tensor, and those that return an iterator.
"""

from __future__ import annotations

import copy
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from paradiff.errors import Unsupported
from paradiff.pipelines.loop.random_state import Snapshot
from paradiff.pipelines.network.plain import PLAIN

Signature = tuple[Any, ...]
"""A network's method, and the shapes and dtypes of the tensors that it is given."""


def signature(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
    """The signature of a network call."""
    leaves = _pytree.tree_leaves((args, kwargs))
    bound = isinstance(method, types.MethodType)  # made anew whenever it is asked for
    which = (id(method.__self__), id(method.__func__)) if bound else (id(method),)
    return (*which, *[(tuple(leaf.shape), leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)])


@dataclass(frozen=True, eq=False)
class Entry:
    """A network call.

    Attributes:
        signature: See `signature`.
        output: A copy of what it returned; None where that has no tensors or no copy.
        anew: Whether it has to be made anew.
        states: The states in which it left the generators among its arguments, in order; None if it drew nothing.
        others: The states in which it left the global generators; None if it drew nothing.
    """

    signature: Signature
    output: Any
    anew: bool
    states: list[Tensor] | None = None
    others: Snapshot | None = None

    def play(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A copy of the output, with the generators left as the call left them."""
        if self.states is not None:
            for generator, state in zip(_generators(args, kwargs), self.states, strict=True):
                generator.set_state(state)
        if self.others is not None:
            self.others.restore()
        return copied(self.output)


class CallLog:
    """Network calls in order, with copies of their outputs.

    Args:
        known: Those of an earlier try before its loop, which are played as long as the calls are the same.

    Attributes:
        open: Whether calls are recorded.
        before: The calls before the loop; known when the loop is (`divide`).
        first: Those of the loop's first pass.
        drawing: The class of the network that drew random numbers in the pass that is recorded; None for none.
    """

    def __init__(self, known: Iterable[Entry] = ()) -> None:
        self.open = True
        self._known = deque(known)
        self.before: list[Entry] = []
        self.first: list[Entry] = []
        self.drawing: str | None = None
        self._entries: list[Entry] = []
        self._marks: dict[int, tuple[Tensor, int]] = {}

    def mark(self, timesteps: Tensor) -> None:
        """An iteration over these times begins, which may be the loop."""
        if self.open:
            self._marks[id(timesteps)] = timesteps, len(self._entries)
            self.drawing = None

    def made(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: Callable[[], Any]) -> Any:
        """Makes a call and records it.

        Args:
            method: The network's method.
            args: Its arguments.
            kwargs: Its named arguments.
            call: Makes the call.
        """
        leaves = _pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        versions, called = [_version(tensor) for tensor in tensors], signature(method, args, kwargs)
        if self._known and self._known[0].signature != called:
            self._known.clear()  # this call takes another way
        if self._known and not (entry := self._known.popleft()).anew:
            self._entries.append(entry)
            return entry.play(args, kwargs)
        generators = _generators(args, kwargs)
        before = Snapshot({"generators": generators})
        output = call()
        writes = not all(isinstance(leaf, (Tensor, torch.Generator, *PLAIN)) for leaf in leaves)
        writes |= versions != [_version(tensor) for tensor in tensors]
        kept = _kept(output)
        anew, same = writes or kept is None, before.same
        if not same:
            self.drawing = type(getattr(method, "__self__", method)).__name__
        if anew or same:
            self._entries.append(Entry(called, kept, anew))
        else:
            self._entries.append(Entry(called, kept, anew, [g.get_state() for g in generators], Snapshot({})))
        return output

    def divide(self, timesteps: Tensor) -> None:
        """The iteration over these times is the loop, and has made its first pass."""
        _, place = self._marks[id(timesteps)]
        self.before, self.first = self._entries[:place], self._entries[place:]

    @property
    def made_first(self) -> list[Tensor]:
        """The tensors that the networks returned in the loop's first pass."""
        found: list[Tensor] = []
        _find([entry.output for entry in self.first], found, set())
        return found

    def close(self, *, keep: bool = False) -> None:
        """Ends the record and lets its tensors go.

        Args:
            keep: Whether the calls before the loop are kept, to be played again.
        """
        self.open, self.drawing = False, None
        self._known.clear()
        self.before, self.first, self._entries = self.before if keep else [], [], []
        self._marks.clear()


class Player:
    """Plays the calls of a log before the loop, in order.

    Args:
        log: The log, which is divided.
    """

    def __init__(self, log: CallLog) -> None:
        self._log, self._played = log, 0

    @property
    def over(self) -> bool:
        """Whether all calls were played."""
        return self._played >= len(self._log.before)

    def forward(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry:
        """The next call, which has to be this one of a network's `forward`.

        Raises:
            Unsupported: If it is another one.
        """
        if self.over or self._log.before[self._played].signature != signature(forward, args, kwargs):
            raise Unsupported("the call takes another way to its loop when it is made again")
        self._played += 1
        return self._log.before[self._played - 1]

    def other(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Entry | None:
        """The next call if it is this one of another method; else None."""
        if self.over or self._log.before[self._played].signature != signature(method, args, kwargs):
            return None
        self._played += 1
        return self._log.before[self._played - 1]


def copied(value: Any) -> Any:
    """A value with tensors and arrays of its own, also within containers and within the attributes of objects.

    Raises:
        TypeError: If there is an iterator in it.
    """
    return _copied(value, {})


def _copied(value: Any, made: dict[int, Any]) -> Any:
    return _pytree.tree_map(lambda leaf: _copied_leaf(leaf, made), value)


def _copied_leaf(leaf: Any, made: dict[int, Any]) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.clone()
    if isinstance(leaf, np.ndarray):
        return leaf.copy()
    if isinstance(leaf, Iterator):
        raise TypeError("an iterator has no copy")
    if isinstance(leaf, set):
        return set(leaf)
    if isinstance(leaf, (nn.Module, type, types.FunctionType, types.MethodType, *PLAIN)) or not hasattr(leaf, "__dict__"):
        return leaf
    if id(leaf) not in made:
        made[id(leaf)] = own = copy.copy(leaf)
        vars(own).update({name: _copied(part, made) for name, part in vars(leaf).items()})
    return made[id(leaf)]


def _kept(output: Any) -> Any:
    """A copy of an output; None if it has no tensor or no copy."""
    found: list[Tensor] = []
    try:
        kept = copied(output)
    except Exception:  # What cannot be copied is made anew.
        return None
    _find(kept, found, set())
    return kept if found else None


def _find(value: Any, found: list[Tensor], seen: set[int]) -> None:
    """Adds the tensors in a value."""
    for leaf in _pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif not isinstance(leaf, (nn.Module, type, types.FunctionType, types.MethodType, *PLAIN)) and id(leaf) not in seen:
            seen.add(id(leaf))
            _find(list(getattr(leaf, "__dict__", {}).values()), found, seen)


def _generators(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Generator]:
    return [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version

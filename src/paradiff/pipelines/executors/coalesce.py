# SPDX-License-Identifier: Apache-2.0
"""Network calls of several lanes as one call.

Arguments that depend on the lane's state are stacked to one windowed tensor. Arguments that are equal in all lanes (position
tables, text embeddings) are passed once. Equality is found by comparing values once; later it follows from identity, since a
lane passes the very tensor that it made before its loop. A lane that starts later is taken to pass what the others do, and
whether it does is read with the numbers of its pass.

What is equal is held twice, by the user's own call and by all other lanes together: theirs lies in one place in memory. A lane
that writes into it is seen by the tensor's version.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from paradiff.errors import Unsupported
from paradiff.pipelines.loop.scheduler_proxy import Flags
from paradiff.pipelines.network.batched_call import batched_call
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.tensor.windowed import Windowed, stacked
from paradiff.solver.accelerator import read

OTHER_INPUT = "a network is given another input, of those that do not change with the state, when the call is made again"
"""The reason against a call whose lanes differ in what all before had in common."""

WRITES = "its loop writes into an input of a network that does not change with the state, and that its calls share"
"""The reason against a call whose lanes cannot hold an input in one place."""

LEAST = 2**10
"""Bytes of an input from which on it is held in one place."""

Key = tuple[int, int, int]
"""The place of an argument: the network's id, the number of the call in its pass, and the number of the leaf."""


@dataclass
class Shared:
    """The tensor that is passed in place of the equal tensors of all lanes.

    Attributes:
        tensor: The tensor.
        version: Its version.
        lent: That of a lane beside the user's own call, in whose memory those of all others lie; None before there is one.
    """

    tensor: Tensor
    version: int
    lent: Tensor | None = None


Known = tuple[Tensor, int, Shared]
"""A tensor that a lane passed, its version, and the shared tensor that it equals."""


@dataclass
class NetworkCall:
    """A network call for which a lane waits.

    Attributes:
        module: The network.
        forward: The network's own `forward`.
        leaves: The arguments, flattened.
        spec: The structure of the arguments.
        turn: Number of network calls that the lane made before this one in its pass.
        known: Tensors that the lane passed in earlier calls and that are equal in all lanes, by place.
        users: Whether the lane is the user's own call, whose tensors stay where they are.
    """

    module: Any
    forward: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    turn: int
    known: dict[Key, Known]
    users: bool = False

    @staticmethod
    def of(
        module: Any,
        forward: Callable[..., Any],
        args: Any,
        kwargs: Any,
        turn: int,
        known: dict[Key, Known],
        *,
        users: bool = False,
    ) -> NetworkCall:
        """The call `module(*args, **kwargs)`."""
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        return NetworkCall(module, forward, leaves, spec, turn, known, users)

    @property
    def signature(self) -> tuple[Any, ...]:
        """The network, and the shapes and dtypes of the tensors among the arguments."""
        shapes = [(tuple(leaf.shape), leaf.dtype) for leaf in self.leaves if isinstance(leaf, Tensor)]
        return (id(self.module), *shapes)

    def joins(self, other: NetworkCall) -> bool:
        """Whether both calls fit into one network call: same network, same structure, same shapes and equal numbers."""
        return (
            self.module is other.module
            and self.spec == other.spec
            and all(_alike(a, b) for a, b in zip(self.leaves, other.leaves, strict=True))
        )


@dataclass
class Coalescer:
    """Combines network calls of several lanes into one.

    Attributes:
        batching: The run's batching (network/batching.py).
        flags: Takes whether lanes that started pass what the others do.
        differing: Places whose values differed between lanes in an earlier call.
        watched: Tensors that lie in one place in memory, with their versions, by their ids.
    """

    batching: Batching
    flags: Flags = field(default_factory=list)
    differing: set[Key] = field(default_factory=set)
    watched: dict[int, tuple[weakref.ref[Tensor], int]] = field(default_factory=dict)

    def refuse_writes(self) -> None:
        """Refuses lanes that wrote into what they hold in one place.

        Raises:
            Unsupported: Then.
        """
        for reference, version in self.watched.values():
            tensor = reference()
            if tensor is not None and _version(tensor) != version:
                raise Unsupported(WRITES)

    def __call__(self, calls: list[NetworkCall]) -> list[Any]:
        """The result of each call, in order.

        Raises:
            Unsupported: If a lane wrote into what all hold in one place, or as `batched_call` does.
        """
        self.refuse_writes()
        first = calls[0]
        columns = [list(column) for column in zip(*[call.leaves for call in calls], strict=True)]
        leaves: list[Any] = self._leaves(calls, columns) if len(calls) > 1 else []
        if not any(isinstance(leaf, Windowed) for leaf in leaves):  # one lane, or several with the same state
            leaves = self._single(first)
        args, kwargs = _pytree.tree_unflatten(leaves, first.spec)
        output = batched_call(self.batching, type(first.module).__name__, first.forward, args, kwargs)
        result, spec = _pytree.tree_flatten(output)
        return [
            _pytree.tree_unflatten([_of(leaf, w) if isinstance(leaf, Windowed) else leaf for leaf in result], spec)
            for w in range(len(calls))
        ]

    def _single(self, call: NetworkCall) -> list[Any]:
        """The arguments of a single lane, with its first tensor that has rows as a window of width 1."""
        leaves = list(call.leaves)
        places = sorted(enumerate(leaves), key=lambda item: getattr(item[1], "ndim", 0) < 2)
        main = next((path for path, leaf in places if isinstance(leaf, Tensor)), None)
        if main is None:
            raise Unsupported(
                f"{type(call.module).__name__} was called without a tensor, a list, a tuple or a dict of tensors, so that the "
                "rows of its call are not known"
            )
        leaves[main] = Windowed.wrap(leaves[main][None], self)
        return leaves

    def _leaves(self, calls: list[NetworkCall], columns: list[list[Any]]) -> list[Any]:
        """The arguments of several lanes: passed once where they are equal, else stacked."""
        first = calls[0]
        rows = next((leaf.shape[0] for leaf in first.leaves if isinstance(leaf, Tensor) and leaf.ndim > 1), 0)
        unknown: list[int] = []
        leaves: list[Any] = []
        for path, column in enumerate(columns):
            key, leaf = (id(first.module), first.turn, path), column[0]
            leaves.append(leaf)
            if not isinstance(leaf, Tensor) or all(other is leaf for other in column):
                continue
            marks = [_shared(call, key, leaf) for call, leaf in zip(calls, column, strict=True)]
            only = marks[0]
            if only is not None and all(mark is only for mark in marks):
                leaves[path] = only.tensor
                continue
            again = all(key in call.known for call in calls)
            taken = [mark for call, mark in zip(calls, marks, strict=True) if mark is not None or key in call.known]
            if key in self.differing or (again and leaf.ndim > 0 and leaf.shape[0] == rows):
                leaves[path] = Windowed.wrap(stacked(column), self)
            elif taken and taken[0] is not None and all(mark is taken[0] for mark in taken):
                leaves[path] = taken[0].tensor
                for call, other, mark in zip(calls, column, marks, strict=True):
                    if mark is None:
                        self.flags.append(((other == taken[0].tensor).all(), OTHER_INPUT))
                        self._know(call, key, other, taken[0])
            else:
                unknown.append(path)
        for path, equal in zip(unknown, _equal([columns[path] for path in unknown]), strict=True):
            key, column = (id(first.module), first.turn, path), columns[path]
            if not equal:
                self.differing.add(key)
                leaves[path] = Windowed.wrap(stacked(column), self)
                continue
            known = (_shared(call, key, leaf) for call, leaf in zip(calls, column, strict=True))
            shared = next((mark for mark in known if mark is not None), Shared(column[0], _version(column[0])))
            leaves[path] = shared.tensor
            for call, leaf in zip(calls, column, strict=True):
                self._know(call, key, leaf, shared)
        return leaves

    def _know(self, call: NetworkCall, key: Key, leaf: Tensor, shared: Shared) -> None:
        """Notes that a lane's tensor equals that of the others, and moves it to where theirs is in memory."""
        if not call.users and _is_whole(leaf):
            shared.lent = leaf if shared.lent is None else shared.lent
            known = self.watched.get(id(leaf))
            if known is None or known[0]() is not leaf:  # a tensor may be an input at several places
                if leaf is not shared.lent and _is_whole(shared.lent):
                    with torch.no_grad():
                        leaf.set_(shared.lent)  # pyright: ignore[reportArgumentType] - a tensor is a source, too
                self.watched[id(leaf)] = weakref.ref(leaf), _version(leaf)
        call.known[key] = leaf, _version(leaf), shared


def _of(leaf: Windowed, place: int) -> Tensor:
    """The output of the call at this place; a single one is that of all."""
    return leaf.window[place if leaf.width > 1 else 0]


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return type(a) is type(b) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:
        return False


def _shared(call: NetworkCall, key: Key, leaf: Tensor) -> Shared | None:
    """The shared tensor that a lane's argument equals, if the argument is the tensor that was passed there before."""
    if key not in call.known:
        return None
    tensor, version, shared = call.known[key]
    unchanged = version == _version(leaf) >= 0 and shared.version == _version(shared.tensor)
    return shared if tensor is leaf and unchanged else None


def _is_whole(leaf: Tensor) -> bool:
    """Whether a tensor is all that its memory holds, and large."""
    if type(leaf) is not Tensor or leaf.is_inference() or leaf.requires_grad or leaf._is_view() or not leaf.is_contiguous():
        return False
    size = leaf.untyped_storage().nbytes()
    return size >= LEAST and size == leaf.numel() * leaf.element_size()


def _version(leaf: Tensor) -> int:
    """The number of changes of a tensor in place; -1 for inference tensors, where torch does not count."""
    return -1 if leaf.is_inference() else leaf._version


def _equal(columns: list[list[Tensor]]) -> list[bool]:
    """Whether the tensors of each column are equal. Waits once for each device."""
    return [
        bool(flag) for flag in read([torch.stack([(b == column[0]).all() for b in column[1:]]).all() for column in columns])
    ]

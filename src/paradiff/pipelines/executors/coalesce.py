"""Network calls of several lanes as one call.

Tensors of the lanes that belong to their states are stacked to one windowed tensor. Those that are the same in all lanes
(position tables, text embeddings) are handed on as they are. Which are the same is found by comparing values once; later the
object itself tells: a lane hands over the very tensor that it made before its loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from paradiff.pipelines.network.batching import Batching, batched_call
from paradiff.pipelines.tensor.windowed import Windowed

Key = tuple[int, int, int]


@dataclass(frozen=True)
class Shared:
    """A tensor that stands for the equal ones of all lanes, and its version."""

    tensor: Tensor
    version: int


Known = tuple[Tensor, int, Shared]
"""A tensor that a lane handed over, its version, and what it was found to be equal to."""


@dataclass
class NetworkCall:
    """A network call that a lane waits for.

    Attributes:
        module: The network.
        forward: Its own forward.
        leaves: The arguments, flat.
        spec: Their structure.
        turn: How many calls the lane made before this one in its pass.
        known: What the lane handed over before, by place, and was found to be the same in other lanes.
    """

    module: Any
    forward: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    turn: int
    known: dict[Key, Known]

    @staticmethod
    def of(module: Any, forward: Callable[..., Any], args: Any, kwargs: Any, turn: int, known: dict[Key, Known]) -> NetworkCall:
        """The call `module(*args, **kwargs)`."""
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        return NetworkCall(module, forward, leaves, spec, turn, known)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What of a call does not depend on values."""
        shapes = [(tuple(leaf.shape), leaf.dtype) for leaf in self.leaves if isinstance(leaf, Tensor)]
        return (id(self.module), *shapes)

    def joins(self, other: NetworkCall) -> bool:
        """Whether both can be one network call."""
        return (
            self.module is other.module
            and self.spec == other.spec
            and all(_alike(a, b) for a, b in zip(self.leaves, other.leaves, strict=True))
        )


@dataclass
class Coalescer:
    """Makes one network call of several.

    Attributes:
        batching: The run's batching (network/batching.py).
        differing: Places where values were seen to differ between lanes.
    """

    batching: Batching
    differing: set[Key] = field(default_factory=set)

    def __call__(self, calls: list[NetworkCall]) -> list[Any]:
        """The result of each call."""
        first = calls[0]
        columns = [list(column) for column in zip(*[call.leaves for call in calls], strict=True)]
        leaves: list[Any] = self._leaves(calls, columns) if len(calls) > 1 else self._single(first)
        args, kwargs = _pytree.tree_unflatten(leaves, first.spec)
        output = batched_call(self.batching, type(first.module).__name__, first.forward, args, kwargs)
        result, spec = _pytree.tree_flatten(output)
        return [
            _pytree.tree_unflatten([leaf.window[w] if isinstance(leaf, Windowed) else leaf for leaf in result], spec)
            for w in range(len(calls))
        ]

    def _single(self, call: NetworkCall) -> list[Any]:
        """The arguments of one lane alone: the first tensor that has rows stands for the window."""
        leaves = list(call.leaves)
        main = next(
            path
            for path, leaf in sorted(enumerate(leaves), key=lambda item: getattr(item[1], "ndim", 0) < 2)
            if isinstance(leaf, Tensor)
        )
        leaves[main] = Windowed.wrap(leaves[main][None], self)
        return leaves

    def _leaves(self, calls: list[NetworkCall], columns: list[list[Any]]) -> list[Any]:
        """The arguments of several lanes: one for all of them where they are the same, else stacked."""
        first = calls[0]
        rows = next((leaf.shape[0] for leaf in first.leaves if isinstance(leaf, Tensor) and leaf.ndim > 1), 0)
        asked: list[int] = []
        leaves: list[Any] = []
        for path, column in enumerate(columns):
            key, leaf = (id(first.module), first.turn, path), column[0]
            leaves.append(leaf)
            if not isinstance(leaf, Tensor) or all(other is leaf for other in column):
                continue
            shared = {id(mark): mark for mark in (_shared(call, key, leaf) for call, leaf in zip(calls, column, strict=True))}
            only = next(iter(shared.values()))
            if len(shared) == 1 and only is not None:
                leaves[path] = only.tensor
                continue
            again = all(key in call.known for call in calls)
            if key in self.differing or (again and leaf.ndim > 0 and leaf.shape[0] == rows):
                leaves[path] = Windowed.wrap(torch.stack(column), self)
            else:
                asked.append(path)
        for path, equal in zip(asked, _equal([columns[path] for path in asked]), strict=True):
            key, column = (id(first.module), first.turn, path), columns[path]
            if not equal:
                self.differing.add(key)
                leaves[path] = Windowed.wrap(torch.stack(column), self)
                continue
            known = (_shared(call, key, leaf) for call, leaf in zip(calls, column, strict=True))
            shared = next((mark for mark in known if mark is not None), Shared(column[0], _version(column[0])))
            leaves[path] = shared.tensor
            for call, leaf in zip(calls, column, strict=True):
                call.known[key] = leaf, _version(leaf), shared
        return leaves


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
    """What a lane's argument was found to be equal to, if it is the tensor that was handed over before."""
    if key not in call.known:
        return None
    tensor, version, shared = call.known[key]
    unchanged = version == _version(leaf) >= 0 and shared.version == _version(shared.tensor)
    return shared if tensor is leaf and unchanged else None


def _version(leaf: Tensor) -> int:
    """How often a tensor was changed in place; -1 where torch does not count."""
    return -1 if leaf.is_inference() else leaf._version


def _equal(columns: list[list[Tensor]]) -> list[bool]:
    """Whether the tensors of each column are equal. Waits for the devices."""
    flags = [torch.stack([(leaf == column[0]).all() for leaf in column[1:]]).all() for column in columns]
    return [bool(flag) for flag in torch.stack([flag.cpu() for flag in flags])] if flags else []

# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs without CUDA: a graph is the operations that were recorded, with their memory, where a replay makes them again.

It refuses what CUDA's refuse ("Constraints" in torch's notes on CUDA semantics): a capture of what was not called before on
another stream, a capture within a capture, and, while one is made, whatever would make the host wait and copies between host
and device. As with CUDA a capture computes nothing: its outputs hold no numbers until the first replay, and lie in the same
memory at every one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "masked_select",
    "bincount",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
}
"""Operations whose result has a size, or a value for Python, that only the device knows."""

INDEXING, MASKS = {"index", "index_put", "index_put_"}, (torch.bool, torch.uint8)
"""Operations by indices, and dtypes of indices whose number only the device knows."""

REFUSED = "operation not permitted when stream is capturing"


class Stream:
    """A queue of work. All of it is done at once, so that there is one queue in truth."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        """Waits for another's work."""

    def synchronize(self) -> None:
        """Waits for its work."""


class State:
    """What there is of a device's streams.

    Attributes:
        own: The stream that work goes to by default.
        streams: Those whose blocks are open, the last one the current.
        warm: Whether work was given to another stream since the last capture.
        capturing: Whether a capture is made.
    """

    def __init__(self) -> None:
        self.own = Stream()
        self.streams: list[Stream] = []
        self.warm = self.capturing = False


STATE = State()


def current_stream(device: Any = None) -> Stream:
    """The stream that work goes to."""
    return STATE.streams[-1] if STATE.streams else STATE.own


@contextlib.contextmanager
def stream(one: Stream | None) -> Iterator[None]:
    """Gives the work of a block to a stream."""
    if one is None:
        yield
        return
    STATE.streams.append(one)
    try:
        yield
    finally:
        STATE.streams.pop()
        STATE.warm = STATE.warm or one is not STATE.own


MADE: WeakKeyDictionary[CUDAGraph, list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]] = WeakKeyDictionary()
"""The operations of each graph, which is opaque itself, as CUDA's are."""


class CUDAGraph(TorchDispatchMode):
    """The operations that were recorded."""

    def __init__(self) -> None:
        super().__init__()
        MADE[self] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in WAITING or (name in INDEXING and any(one is not None and one.dtype in MASKS for one in args[1])):
            raise RuntimeError(f"{REFUSED} ({func}, for which the host waits)")
        given = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        output = func(*args, **(kwargs or {}))
        found = [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        places = {tensor.device.type for tensor in given if tensor.ndim} | {tensor.device.type for tensor in found}
        if len(places) > 1:
            raise RuntimeError(f"{REFUSED} ({func}, a copy between host and device)")
        MADE[self].append((func, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        """Makes the operations again, in the same memory.

        Raises:
            RuntimeError: If nothing was captured.
        """
        if not MADE[self]:
            raise RuntimeError("the graph was replayed before anything was captured")
        for func, args, kwargs, output in MADE[self]:
            again = func(*args, **kwargs)
            for now, then in zip(_pytree.tree_leaves(again), _pytree.tree_leaves(output), strict=True):
                if isinstance(now, Tensor) and now.data_ptr() != then.data_ptr():  # no view of an earlier output
                    then.copy_(now)

    def reset(self) -> None:
        """Forgets them."""
        MADE[self].clear()

    def _spoil(self) -> None:
        """Takes the numbers out of all memory that was made while the operations were recorded."""
        own: set[int] = set()
        for _, args, kwargs, output in MADE[self]:
            given = {one.untyped_storage().data_ptr() for one in _pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
            for one in _pytree.tree_leaves(output):
                if isinstance(one, Tensor) and (place := one.untyped_storage().data_ptr()) not in given - own and one.numel():
                    own.add(place)
                    if one.is_floating_point():
                        one.fill_(float("nan"))


@contextlib.contextmanager
def graph(recorded: CUDAGraph, pool: Any = None, stream: Stream | None = None) -> Iterator[None]:
    """Records the operations of a block.

    Raises:
        RuntimeError: If another capture is made, or nothing was given to another stream before.
    """
    if STATE.capturing:
        raise RuntimeError(f"{REFUSED} (a capture within a capture)")
    if not STATE.warm:
        raise RuntimeError("a capture of what was never called: call it on a stream of its own before")
    STATE.capturing, STATE.warm = True, False
    try:
        with recorded:
            yield
    finally:
        STATE.capturing = False
    recorded._spoil()

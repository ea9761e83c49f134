# SPDX-License-Identifier: Apache-2.0
"""The outputs of a pipeline's networks before its loop and in the loop's first pass, so that the call can be made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from paradiff.errors import Unsupported

Signature = tuple[Any, ...]
"""A network, and the shapes and dtypes of the tensors that it is given."""


def signature(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
    """The signature of a network call."""
    leaves = _pytree.tree_leaves((args, kwargs))
    return (id(forward), *[(tuple(leaf.shape), leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)])


class CallLog:
    """Network calls in order, with copies of their outputs.

    Attributes:
        open: Whether calls are recorded.
        before: The calls before the loop; known when the loop is (`divide`).
        first: Those of the loop's first pass.
    """

    def __init__(self) -> None:
        self.open = True
        self.before: list[tuple[Signature, Any]] = []
        self.first: list[tuple[Signature, Any]] = []
        self._entries: list[tuple[Signature, Any]] = []
        self._marks: dict[int, tuple[Tensor, int]] = {}

    def mark(self, timesteps: Tensor) -> None:
        """An iteration over these times begins, which may be the loop."""
        if self.open:
            self._marks[id(timesteps)] = timesteps, len(self._entries)

    def add(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Records a call."""
        kept = _pytree.tree_map_only(Tensor, torch.clone, output)
        self._entries.append((signature(forward, args, kwargs), kept))

    def divide(self, timesteps: Tensor) -> None:
        """The iteration over these times is the loop, and has made its first pass."""
        _, place = self._marks[id(timesteps)]
        self.before, self.first = self._entries[:place], self._entries[place:]

    def close(self) -> None:
        """Ends the record and lets its tensors go."""
        self.open = False
        self.before, self.first, self._entries = [], [], []
        self._marks.clear()

    def played(self, place: int, called: Signature) -> Any:
        """The output of a call before the loop.

        Raises:
            Unsupported: If the call at that place was another one.
        """
        if self.before[place][0] != called:
            raise Unsupported("the call takes another way to its loop when it is made again")
        return _pytree.tree_map_only(Tensor, torch.clone, self.before[place][1])

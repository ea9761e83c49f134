# SPDX-License-Identifier: Apache-2.0
"""A tensor or an array with a copy of its values, and the equality of values."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from paradiff.pipelines.tensor.windowed import Windowed
from paradiff.solver.accelerator import read


@dataclass(frozen=True, eq=False)
class Saved:
    """A tensor, an array or other memory, and a copy of its values; the copy is None for a large tensor."""

    path: str
    value: Any
    copy: Any
    version: int = -1

    def same(self) -> bool | Tensor:
        """Whether it has its values still: a truth value, or one `[]` on the tensor's device."""
        if self.copy is None:
            return self.value.is_inference() or self.value._version == self.version
        if is_memory(self.value):
            return memory_of(self.value).tobytes() == self.copy
        plain = all(isinstance(one, Tensor) and not isinstance(one, Windowed) for one in (self.copy, self.value))
        return _same_numbers(self.copy, self.value) if plain else equal(self.copy, self.value)

    def put_back(self) -> None:
        """Gives the tensor or array its values again, where they are known."""
        value, values = self.value, self.copy
        if values is None:
            return
        if isinstance(value, np.ndarray):
            value[...] = values
        elif is_memory(value):
            with memory_of(value) as memory:
                memory[:] = values
        elif not isinstance(value, Tensor):
            value[:] = values
        elif value.dtype != values.dtype:
            value.data = values.to(value.device)
        elif value.shape == values.shape:
            for axis, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
                if size > 1 and stride == 0:  # an expanded axis shows its elements again, in whose place nothing is written
                    value, values = value.narrow(axis, 0, 1), values.narrow(axis, 0, 1)
            value.copy_(values)
        else:
            value.set_(values.to(value.device))


def is_memory(value: Any) -> bool:
    """Whether a value is memory that can be written to, of none of the kinds that show numbers: mapped files, ctypes, views."""
    if not isinstance(value, mmap.mmap | memoryview | ctypes.Array | ctypes.Structure | ctypes.Union | ctypes._SimpleCData):
        return False
    try:
        memory = memoryview(value)
    except (BufferError, TypeError, ValueError):  # of a file that was closed, a view that was released
        return False
    return memory.contiguous and not memory.readonly


def memory_of(value: Any) -> memoryview:
    """The bytes of such memory."""
    return memoryview(value).cast("B", shape=[memoryview(value).nbytes]) if memoryview(value).nbytes else memoryview(b"")


def changed(saved: Sequence[Saved]) -> list[Saved]:
    """Those that have other values by now. Waits once for each device."""
    told = [one.same() for one in saved]
    flags = iter(read([flag for flag in told if isinstance(flag, Tensor)]))
    return [one for one, flag in zip(saved, told, strict=True) if not (next(flags) if isinstance(flag, Tensor) else flag)]


def equal(a: Any, b: Any) -> bool:
    """Whether two values are equal; NaN equals NaN, and a tensor its copy on another device."""
    if isinstance(a, Windowed) or isinstance(b, Windowed):
        return a is b
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return bool(_same_numbers(a, b))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
    if isinstance(a, dict | list | tuple) and type(a) is type(b):
        if len(a) != len(b):
            return False
        if isinstance(a, dict):
            return all(key in b and equal(value, b[key]) for key, value in a.items())
        return all(map(equal, a, b))
    try:
        return bool(a is b or a == b or (a != a and b != b))
    except Exception:
        return False


def _same_numbers(a: Tensor, b: Tensor) -> bool | Tensor:
    """Whether two tensors have the same numbers, NaN included: a truth value, or one `[]` on the first one's device."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return True
    b = b.to(a.device)
    return ((a == b) | ((a != a) & (b != b))).all()

# SPDX-License-Identifier: Apache-2.0
"""A tensor or an array with a copy of its values, and the equality of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from paradiff.pipelines.tensor.windowed import Windowed


@dataclass(frozen=True, eq=False)
class Saved:
    """A tensor or an array, and a copy of its values; the copy is None for a large tensor."""

    path: str
    value: Any
    copy: Any
    version: int = -1

    @property
    def same(self) -> bool:
        """Whether it has its values still."""
        if self.copy is None:
            return self.value.is_inference() or self.value._version == self.version
        return equal(self.copy, self.value)

    def put_back(self) -> None:
        """Gives the tensor or array its values again, where they are known and others."""
        if self.copy is None or self.same:
            return
        value, values = self.value, self.copy
        if isinstance(value, np.ndarray):
            value[...] = values
        elif value.shape == values.shape:
            value.copy_(values)
        else:
            value.set_(values.to(value.device))


def equal(a: Any, b: Any) -> bool:
    """Whether two values are equal; NaN equals NaN, and a tensor its copy on another device."""
    if isinstance(a, Windowed) or isinstance(b, Windowed):
        return a is b
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.is_meta or b.is_meta:
            return True
        b = b.to(a.device)
        return bool(((a == b) | ((a != a) & (b != b))).all())
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

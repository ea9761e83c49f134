# SPDX-License-Identifier: Apache-2.0
"""Functions of torch that make a tensor of numbers: `torch.full` and `torch.tensor`.

They take a tensor of one number for the number, without asking its class, so that a windowed one would be read. For the length
of a vector run they are functions of their own, which make a windowed tensor of windowed numbers, and are torch's for all else.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from paradiff.pipelines.tensor.windowed import Windowed

LOCK = threading.Lock()
_runs = 0
_real: dict[str, Any] = {}


@contextlib.contextmanager
def making() -> Iterator[None]:
    """Puts the functions into torch; the last run that ends takes them out."""
    global _runs
    with LOCK:
        _runs += 1
        if _runs == 1:
            with torch.device("cpu"):
                torch.empty(0)  # torch keeps which functions follow a default device from the first such call on
            for name, make in (("full", _full), ("tensor", _tensor)):
                _real[name] = getattr(torch, name)
                setattr(torch, name, functools.wraps(_real[name])(functools.partial(make, _real[name])))
    try:
        yield
    finally:
        with LOCK:
            _runs -= 1
            if _runs == 0:
                for name, real in _real.items():
                    setattr(torch, name, real)


def _full(
    real: Callable[..., Tensor],
    size: Any,
    fill_value: Any,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    **options: Any,
) -> Tensor:
    if not _is_number(fill_value) or options.get("out") is not None:
        return real(size, fill_value, dtype=dtype, device=device, **options)
    if dtype is None:
        kind = fill_value.dtype
        dtype = torch.get_default_dtype() if kind.is_floating_point else kind if kind == torch.bool else torch.int64
    return fill_value.to(device, dtype).expand(size).clone()


def _tensor(
    real: Callable[..., Tensor], data: Any, *, dtype: torch.dtype | None = None, device: Any = None, **options: Any
) -> Tensor:
    numbers = [data] if isinstance(data, Windowed) else data
    if not isinstance(numbers, list | tuple) or not numbers or not all(map(_is_number, numbers)):
        return real(data, dtype=dtype, device=device, **options)
    made = [number.detach().to(device, dtype or number.dtype) for number in numbers]
    return made[0].clone() if isinstance(data, Windowed) else torch.stack(made)


def _is_number(value: Any) -> bool:
    return isinstance(value, Windowed) and value.dim() == 0

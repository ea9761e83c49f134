# SPDX-License-Identifier: Apache-2.0
"""Where a model's weights are: the device that its rows are wanted on.

A model is a module, or a function that calls modules: a method of an object that holds them, a function that reads them from
its closure or its module, a partial of one of these. What it hides otherwise is not found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

ELSEWHERE = ("on the same device", "weight type", "same device type")
"""What torch says of tensors of several devices."""


def location_of(model: Callable[..., Any]) -> torch.device:
    """The device on which all weights and buffers of a model's modules are; the CPU where there is none, or several."""
    left, seen, found = [*_modules(model)], set[int](), set[torch.device]()
    while left:  # torch's own walk makes the name of each weight
        module = left.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found.update(
                tensor.device for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None
            )
            left += [part for part in module._modules.values() if part is not None]
    device = found.pop() if len(found) == 1 else torch.device("cpu")
    return torch.device("cpu") if device.type == "meta" else device


def elsewhere(error: Exception) -> bool:
    """Whether an error is torch's on tensors of several devices."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ELSEWHERE)


def _modules(model: Any, depth: int = 3) -> Iterator[nn.Module]:
    """The modules that a model calls."""
    if isinstance(model, nn.Module):
        yield model
        return
    if depth == 0 or isinstance(model, ModuleType | type):
        return
    held: list[Any] = []
    if isinstance(model, functools.partial):
        held = [model.func, *model.args, *model.keywords.values()]
    elif isinstance(model, MethodType):
        held = [model.__self__]
    elif isinstance(model, FunctionType):
        held = [cell.cell_contents for cell in model.__closure__ or () if _full(cell)]
        held += [model.__globals__[name] for name in model.__code__.co_names if name in model.__globals__]
    elif hasattr(model, "__dict__"):
        held = [*vars(model).values()]
    for one in held:
        yield from _modules(one, depth - 1)


def _full(cell: Any) -> bool:
    """Whether a cell of a closure was assigned to."""
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False

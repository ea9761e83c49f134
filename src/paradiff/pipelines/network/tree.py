# SPDX-License-Identifier: Apache-2.0
"""Maps over the nested lists, tuples and dicts in which networks get and return tensors, with the names of the leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from paradiff.pipelines.tensor.windowed import Windowed

Visitor = Callable[[Any, str], Any]
"""A function of a value and its name, the nearest key above it."""


def each(f: Visitor, value: Any, name: str = "", lists: Visitor | None = None) -> Any:
    """`value` with `f(leaf, name)` in place of each leaf, a value that is no list, tuple or dict.

    Args:
        f: A function of a leaf and its name, the nearest key above it.
        value: Nested lists, tuples and dicts. Data classes of diffusers (`BaseOutput`) are dicts.
        name: The name of `value` itself.
        lists: A function of a list and its name that returns what replaces the whole list, or None to map its items.
    """
    if isinstance(value, dict):
        parts = {key: each(f, part, key if isinstance(key, str) else name, lists) for key, part in value.items()}
        if type(value) is dict:
            return parts
        return type(value)(**parts) if dataclasses.is_dataclass(value) else type(value)(parts)
    if isinstance(value, list):
        whole = lists(value, name) if lists is not None else None
        return [each(f, part, name, lists) for part in value] if whole is None else whole
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        items = [each(f, part, name, lists) for part in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return f(value, name)


def windowed_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Windowed]:
    """All windowed tensors of a call, in order."""
    found: list[Windowed] = []
    each(lambda leaf, _: found.append(leaf) if isinstance(leaf, Windowed) else None, (args, kwargs))
    return found

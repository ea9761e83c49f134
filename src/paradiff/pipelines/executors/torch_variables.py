# SPDX-License-Identifier: Apache-2.0
"""Context variables of torch's own: the settings of its compiler and what is derived from them.

A network that is compiled within a lane sets them there. They say nothing of the loop.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType
from typing import Any


def is_torchs(variable: ContextVar[Any]) -> bool:
    """Whether a context variable is made by a module of torch."""
    return variable.name.startswith("torch.") or variable in _of_modules(len(sys.modules))


@lru_cache(maxsize=1)
def _of_modules(_: int) -> frozenset[ContextVar[Any]]:
    """The variables that modules of torch hold; sought again when there are more modules."""
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "torch"]
    return frozenset(variable for module in modules if isinstance(module, ModuleType) for variable in _held(vars(module)))


def _held(names: dict[str, Any]) -> Iterator[ContextVar[Any]]:
    """The variables of a module: its own, and those of the entries of its settings."""
    entries = names.get("_config")
    holders = [names, *map(_attributes, entries.values())] if isinstance(entries, dict) else [names]
    for holder in holders:
        yield from (value for value in list(holder.values()) if type(value) is ContextVar)


def _attributes(value: Any) -> dict[str, Any]:
    return getattr(value, "__dict__", {})

# SPDX-License-Identifier: Apache-2.0
"""The settings of networks: numbers and texts in the attributes of their modules and of objects that these hold.

A scale of an adapter or a switch that a loop sets in its passes belongs to a place in the chain. Lanes share the networks, so
such a setting is one for all states of a window, and the loop is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import Tensor, nn

from paradiff.pipelines.network.holder import STRUCTURE

PLAIN = (bool, int, float, complex, str, type(None))
LIBRARIES = {"torch", "builtins", "types", "collections", "numpy", "functools", "weakref"}
"""Modules of the objects that are not looked into."""


class Attributes:
    """The settings of some networks when they were last looked at.

    Args:
        networks: The networks.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._owners: list[tuple[str, dict[str, Any]]] = []
        self._containers: list[tuple[str, list[Any] | dict[Any, Any]]] = []
        for network in networks:
            for name, module in network.named_modules():
                path = ".".join([type(network).__name__, *([name] if name else [])])
                self._owners.append((path, vars(module)))
                for key, value in vars(module).items():
                    if key in STRUCTURE or key.endswith("_hooks") or key.startswith("_"):
                        continue
                    if isinstance(value, list | dict):
                        self._containers.append((f"{path}.{key}", value))
                    elif not isinstance(value, nn.Module | Tensor | type) and _has_attributes(value):
                        self._owners.append((f"{path}.{key}", vars(value)))
        self._marked = self._read()
        self._keys = [list(values) for _, values in self._owners]

    def mark(self) -> None:
        """Takes the present settings."""
        self._marked = self._read()
        self._keys = [list(values) for _, values in self._owners]

    def changed(self) -> str | None:
        """The path of a setting that is another one since `mark`; None if there is none."""
        now = self._read()
        try:
            if now == self._marked:  # compares by identity first
                return None
        except (RuntimeError, ValueError):  # a tensor of several values is another one
            pass
        return self._search(now)

    def _read(self) -> list[Any]:
        values = chain.from_iterable(held.values() for _, held in self._owners)
        parts = [tuple(part.items()) if isinstance(part, dict) else tuple(part) for _, part in self._containers]
        return [*values, *parts]

    def _search(self, now: list[Any]) -> str | None:
        before = iter(self._marked)
        for (path, values), keys in zip(self._owners, self._keys, strict=True):
            held = {key: next(before) for key in keys}
            for key, value in values.items():
                was = held.get(key, self)
                both = isinstance(value, PLAIN) + isinstance(was, PLAIN)
                if both == 1 or (both == 2 and was != value):
                    return f"{path}.{key}"
        for (path, _), part, was in zip(self._containers, now[len(now) - len(self._containers) :], before, strict=True):
            numbers = [value for value in chain.from_iterable(x if isinstance(x, tuple) else (x,) for x in part)]
            if all(isinstance(value, PLAIN) for value in numbers) and part != was:
                return path
        return None


def _has_attributes(value: Any) -> bool:
    return hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in LIBRARIES

# SPDX-License-Identifier: Apache-2.0
"""An object that holds values under keys, with what it held before."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from paradiff.pipelines.network.plain import PLAIN
from paradiff.pipelines.tensor.windowed import Windowed

CONTAINERS = (list, deque, set, types.CellType)
STRUCTURE = {"_parameters", "_modules", "_buffers"}
"""Attributes of modules that have holders of their own, or none."""
GRADIENT = "grad"
"""The attribute of a tensor that gradients are added up in."""
COMPILERS = "_dynamo"
"""What attributes of tensors that torch's compiler sets begin with."""
DEEP = 4
"""How many objects within each other are looked into for tensors: a network's output within lists of an object of an object."""


@dataclass(eq=False)
class Holder:
    """A container, a variable that functions share, or an object with attributes.

    Attributes:
        owner: The object.
        path: Where it was found, such as `unet.mid_block`.
        name: The name under which functions reach it.
        named: Whether the keys are names: those of attributes, buffers or global variables.
        names: The names that are looked at; None for all.
        hooks: Whether it holds a module's hooks, which are put back and are no memory: what they keep has holders of its own.
        before: The values at the time of the record.
    """

    owner: Any
    path: str
    name: str = ""
    named: bool = False
    names: set[str] | None = None
    hooks: bool = False
    before: dict[Any, Any] = field(default_factory=dict)

    def read(self) -> dict[Any, Any]:
        """The values now."""
        owner = self.owner
        if isinstance(owner, list | deque):
            return dict(enumerate(owner))
        if isinstance(owner, set):
            return {item: item for item in owner}
        if isinstance(owner, types.CellType):
            return contents(owner)
        if isinstance(owner, Tensor):
            return of_tensor(owner)
        values = dict(owner) if isinstance(owner, dict) else _attributes(owner)
        if isinstance(owner, nn.Module):
            values = {key: value for key, value in values.items() if key not in STRUCTURE and not is_boundary(value)}
        return values if self.names is None else {key: value for key, value in values.items() if key in self.names}

    def write(self, values: dict[Any, Any], now: dict[Any, Any], changed: Iterable[Any]) -> None:
        """Sets the changed keys to these values; now holds the present ones."""
        owner = self.owner
        if isinstance(owner, set | dict) and not self.named:
            owner.clear()
            owner.update(values)
        elif isinstance(owner, list | deque):
            owner.clear()
            owner.extend(values.values())
        elif isinstance(owner, types.CellType):
            for value in values.values():
                owner.cell_contents = value
        else:
            for key in changed:
                self._put(key, values, key in now)

    def _put(self, key: str, values: dict[Any, Any], present: bool) -> None:
        owner = self.owner
        held = owner if isinstance(owner, dict) else None
        if held is None and not isinstance(owner, type) and key not in _slots(owner) and not _is_gradient(owner, key):
            held = vars(owner)
        if key in values:
            _ = setattr(owner, key, values[key]) if held is None else held.__setitem__(key, values[key])
        elif present:
            _ = delattr(owner, key) if held is None else held.pop(key)

    def label(self, key: Any) -> str:
        """The path of a value."""
        if isinstance(self.owner, CONTAINERS):
            return self.path
        if self.named:
            return f"{self.path}.{key}" if self.path else str(key)
        return f"{self.path}[{key!r}]"

    def reached(self, key: Any) -> str:
        """The name under which functions reach a value; empty if there is none."""
        return self.name or str(key) if self.named else self.name


def holds_tensors(value: Any, deep: int = DEEP) -> bool:
    """Whether a value is a tensor, or holds one in its items, attributes or, of a function, variables."""
    if isinstance(value, Tensor):
        return True
    if not deep or isinstance(value, (*PLAIN, type, types.ModuleType, nn.Module)):
        return False
    if isinstance(value, types.MethodType):
        return holds_tensors(value.__self__, deep)
    parts: Iterable[Any] = value if isinstance(value, tuple | frozenset) else Holder(value, "").read().values()
    if isinstance(value, types.FunctionType):
        parts = [part for cell in value.__closure__ or () for part in contents(cell).values()]
    return any(holds_tensors(part, deep - 1) for part in parts)


def of_tensor(tensor: Tensor) -> dict[str, Any]:
    """The attributes of a tensor that users set, and its gradient, or None."""
    if isinstance(tensor, Windowed):
        return {}
    found = {GRADIENT: tensor.grad if tensor.is_leaf or tensor.retains_grad else None}
    if own := vars(tensor):
        found |= {name: value for name, value in own.items() if not name.startswith(COMPILERS)}
    return found


def _is_gradient(owner: Any, key: str) -> bool:
    return isinstance(owner, Tensor) and key == GRADIENT


def contents(cell: types.CellType) -> dict[str, Any]:
    """The value of a variable that functions share, under an empty key; without one before it is set."""
    try:
        return {"": cell.cell_contents}
    except ValueError:
        return {}


def _attributes(owner: Any) -> dict[str, Any]:
    values = dict(vars(owner)) if hasattr(owner, "__dict__") else {}
    return values | {name: getattr(owner, name) for name in _slots(owner) if hasattr(owner, name)}


def _slots(owner: Any) -> set[str]:
    if isinstance(owner, type):
        return set()
    found = [vars(cls).get("__slots__", ()) for cls in type(owner).__mro__]
    return {name for slots in found for name in ([slots] if isinstance(slots, str) else slots)} - {"__dict__", "__weakref__"}


def is_boundary(value: Any) -> bool:
    """Whether a module's attribute is a boundary, which runs install and remove."""
    return isinstance(value, types.FunctionType) and value.__globals__.get("__name__") == "paradiff.pipelines.network.boundary"

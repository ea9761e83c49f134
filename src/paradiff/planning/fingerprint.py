# SPDX-License-Identifier: Apache-2.0
"""What an object's answers depend on, within reach of it: tensors by their numbers, everything else as a text.

Within reach are the attributes of objects, the modules, hooks and mode of a network, what a function holds, its defaults and
the globals that its code names. Code that is not of `PACKAGES`, whose versions are known, is told by what it was compiled to,
that of a class as well: a class of the same name may have been written anew. What cannot be looked into is told by its class.
"""

from __future__ import annotations

import dataclasses
import dis
import enum
import functools
import hashlib
import sys
from collections.abc import Mapping, Set
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paradiff.planning.identity import content_of
from paradiff.planning.store import digest
from paradiff.solver.agreement import described, sums_of

PACKAGES = ("paradiff", "torch", "diffusers", "transformers", "peft", "accelerate", "numpy")
"""Packages whose code is that of their version."""

DEPTH = 24
"""How deep an object is looked into: that of blocks in blocks of large networks, and what these hold."""

MODULE_OWN = frozenset(vars(nn.Module())) - {"training"}
"""What every module keeps of itself."""

BOOKKEEPING = ("_use_default_values", "_name_or_path")
"""Entries of diffusers' configs that no answer depends on: which others were left at their defaults, in any order, and where
the files were."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks")


class Fingerprint(NamedTuple):
    """Two digests.

    Attributes:
        weights: Of all tensors, by their numbers.
        settings: Of all else.
    """

    weights: str
    settings: str


def fingerprint(value: Any) -> Fingerprint:
    """The fingerprint of an object. Reads its tensors, and waits for their devices.

    Args:
        value: A model, a method, an argument.
    """
    walk = _Walk()
    texts = walk.of(value, DEPTH)
    sums = sums_of({str(k): tensor for k, tensor in enumerate(walk.tensors)})
    return Fingerprint(digest([*sums.values()]), digest(texts))


class _Walk:
    """One walk through an object.

    Attributes:
        tensors: Those that were met, in order.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._seen: dict[int, tuple[int, Any]] = {}  # the place in the walk, and the object, so that no other has its id

    def of(self, value: Any, depth: int) -> Any:
        """An object as a text, or as nested lists of texts."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
            return repr(value)
        if isinstance(value, enum.Enum):
            return str(value)
        if isinstance(value, type):
            return self._class(value, depth - 1) if depth > 0 else _name(value)
        if id(value) in self._seen:
            return f"number {self._seen[id(value)][0]}"
        self._seen[id(value)] = len(self._seen), value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if depth <= 0 or isinstance(value, ModuleType):
            return _name(value)
        return self._parts(value, depth - 1)

    def _tensor(self, value: Tensor) -> Any:
        if value.layout is torch.strided and value.device.type != "meta":
            self.tensors.append(value)
        return ["tensor", [*value.shape], str(value.dtype), type(value).__qualname__]

    def _parts(self, value: Any, depth: int) -> Any:
        if isinstance(value, nn.Module):
            return self._module(value, depth)
        if isinstance(value, functools.partial):
            return ["partial", self.of(value.func, depth), self.of(value.args, depth), self.of(value.keywords, depth)]
        if isinstance(value, MethodType):
            return ["method", self.of(value.__func__, depth), self.of(value.__self__, depth)]
        if isinstance(value, FunctionType):
            return self._function(value, depth)
        if isinstance(value, Mapping):
            return [
                self._class(type(value), depth),
                [[str(key), self.of(part, depth)] for key, part in value.items() if key not in BOOKKEEPING],
            ]
        if isinstance(value, Set):
            return [self._class(type(value), depth), sorted(str(self.of(part, depth)) for part in value)]
        if isinstance(value, list | tuple):
            return [self.of(part, depth) for part in value]
        if hasattr(value, "tobytes"):  # an array, a picture
            return described(value)
        if dataclasses.is_dataclass(value):
            held = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        else:
            held = _attributes(value)
        return [self._class(type(value), depth), [[name, self.of(part, depth)] for name, part in held.items()]]

    def _module(self, module: nn.Module, depth: int) -> Any:
        own = {name: part for name, part in _attributes(module).items() if name not in MODULE_OWN}
        hooks = [self.of([*vars(module).get(name, {}).values()], depth) for name in HOOKS]
        held = {**module._parameters, **module._buffers, **module._modules, **own}
        return [self._class(type(module), depth), hooks, [[name, self.of(part, depth)] for name, part in held.items()]]

    def _function(self, function: FunctionType, depth: int) -> Any:
        code, known = function.__code__, function.__globals__
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        held = {name: content_of(cell) for name, cell in cells if name not in _used(code, "STORE_DEREF")}  # no counters
        held |= {"defaults": function.__defaults__, "keyword defaults": function.__kwdefaults__}
        own = not _of_package(function.__module__)
        if own:
            held |= {name: known[name] for name in sorted(_used(code, "LOAD_GLOBAL", "LOAD_NAME")) if name in known}
        return [_name(function), _compiled(code) if own else "", [[name, self.of(part, depth)] for name, part in held.items()]]

    def _class(self, kind: type, depth: int) -> Any:
        """A class by its names, and by the functions and values that it was written with outside of packages."""
        return [[_name(one), "" if _of_package(one.__module__) else self._written(one, depth)] for one in kind.__mro__]

    def _written(self, kind: type, depth: int) -> Any:
        if id(kind) in self._seen:
            return f"number {self._seen[id(kind)][0]}"
        self._seen[id(kind)] = len(self._seen), kind
        found = []
        for name, value in vars(kind).items():
            function = getattr(value, "fget", getattr(value, "func", getattr(value, "__func__", value)))
            if isinstance(function, FunctionType) or (not name.startswith("__") and not name.startswith("_abc_")):
                found.append([name, self.of(function, depth)])
        return found


def _attributes(value: Any) -> dict[str, Any]:
    """An object's attributes, less those that were made when they were first asked for, and all of what Python's own are."""
    kind = type(value)
    if kind.__module__.startswith("torch._") or _of_python(kind.__module__):
        return {}
    slots = [name for one in kind.__mro__ for name in _slots(one)]
    held = {name: getattr(value, name) for name in slots if hasattr(value, name)} | dict(getattr(value, "__dict__", {}))
    return {name: part for name, part in held.items() if not isinstance(_member(kind, name), functools.cached_property)}


def _slots(kind: type) -> list[str]:
    found = vars(kind).get("__slots__", ())
    return [name for name in ([found] if isinstance(found, str) else found) if name not in ("__dict__", "__weakref__")]


def _member(kind: type, name: str) -> Any:
    return next((vars(one)[name] for one in kind.__mro__ if name in vars(one)), None)


def _name(value: Any) -> str:
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(kind, '__module__', '')}.{kind.__qualname__}"


def _of_package(module: str | None) -> bool:
    return (module or "").partition(".")[0] in PACKAGES or _of_python(module)


def _of_python(module: str | None) -> bool:
    root = (module or "").partition(".")[0]
    return root in sys.stdlib_module_names and root != "__main__"


def _codes(code: CodeType) -> list[CodeType]:
    """A function's code, and that of the functions within."""
    return [code, *(one for part in code.co_consts if isinstance(part, CodeType) for one in _codes(part))]


@functools.lru_cache(maxsize=4096)
def _used(code: CodeType, *kinds: str) -> frozenset[str]:
    """The names in instructions of these kinds, in a function and those within."""
    return frozenset(step.argval for one in _codes(code) for step in dis.get_instructions(one) if step.opname in kinds)


@functools.lru_cache(maxsize=4096)
def _compiled(code: CodeType) -> str:
    """A digest of what a function was compiled to, wherever it was written."""
    found = hashlib.sha256()
    for one in _codes(code):
        constants = [_constant(part) for part in one.co_consts if not isinstance(part, CodeType)]
        found.update(one.co_code + repr((constants, one.co_names, one.co_freevars, one.co_varnames)).encode())
    return found.hexdigest()[:16]


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)

# SPDX-License-Identifier: Apache-2.0
"""What networks keep from one call to the next: recorded, compared, and put back.

A network's memory is what its call can change: buffers and attributes of its modules, objects and containers in these, the
variables that its functions and hooks share, and generators. `Memory` walks from a network to all of it and records the values.
Parameters of more than a few numbers are left out, since they are large and no forward changes them.

Of a user's own objects, only those attributes are recorded whose names occur in the functions that the walk found, so that an
object that does other work beside is left alone.
"""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import io
import random
import sys
import types
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paradiff.pipelines.network.holder import STRUCTURE, Holder, contents
from paradiff.pipelines.network.reads import is_read, names
from paradiff.pipelines.tensor.windowed import Windowed

SMALL = 2**12
"""Numbers of the largest parameter that is recorded."""
LARGE = 2**24
"""Numbers of the largest other tensor whose values are recorded; of a larger one it is known whether it changed."""
LONG = 2**12
"""Length of the longest container whose items are looked at."""
PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.Size, range, slice)
MODELS = {"diffusers", "transformers", "accelerate", "peft"}
"""Libraries whose objects hold the memory of networks: hooks, attention processors, caches."""
OTHERS = {"torch", "torchvision", "numpy", "PIL", "tokenizers", "safetensors", "tqdm", "greenlet", "paradiff"}
MAKERS = ("__init__", "__new__", "__init_subclass__")
"""Methods that make an object; no call of a network is one of them."""


@dataclass(frozen=True)
class Change:
    """A value that is no longer what it was.

    Attributes:
        path: Where it is, such as `unet.mid_block.count`.
        name: The name under which functions reach it; empty if there is none.
        silent: Whether it is a number, a text or a list, which is harmless where no function reads it.
    """

    path: str
    name: str
    silent: bool


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
        return _equal(self.copy, self.value)


class Memory:
    """The values that some objects, and all that they refer to, hold at the time of its making.

    Args:
        roots: Networks, functions and containers, each with its name.
        owners: Objects, such as pipelines, of which all attributes are recorded.
        leave: Objects that the walk leaves out.
        readers: Further functions that may read what is kept: a loop's.
    """

    def __init__(
        self,
        roots: Iterable[tuple[str, Any]],
        *,
        owners: Iterable[Any] = (),
        leave: Iterable[Any] = (),
        readers: Iterable[types.FunctionType] = (),
    ) -> None:
        self._readers = list(readers)
        self._seen: dict[int, Any] = {id(value): value for value in leave}
        self._holders: list[Holder] = []
        self._saved: dict[int, Saved] = {}
        self._states: list[tuple[str, Any, Any]] = []
        self._functions: list[types.FunctionType] = []
        self._names: set[str] = set()
        self._objects: list[tuple[Any, str]] = []
        self._reached: set[tuple[int, str]] = set()
        for name, root in roots:
            self._visit(root, name, name)
        for owner in owners:
            holder = Holder(owner, type(owner).__name__, named=True)
            self._holders.append(holder)
            for name, value in holder.read().items():
                self._visit(value, f"{holder.path}.{name}", name)
        while self._visit_named():
            pass
        for holder in self._holders:
            holder.before = holder.read()

    def influence(self) -> Change | None:
        """The first change since that a later call may depend on; None if there is none.

        A number, a text or a list that no function reads is harmless. A tensor that is kept is not, since the loop may read it.
        """
        for change in self._changes():
            if (
                not change.silent
                or not change.name
                or any(is_read(change.name, function) for function in [*self._functions, *self._readers])
            ):
                return change
        return None

    @property
    def lasting(self) -> str | None:
        """Where there is a Python generator, whose position cannot be put back; None if there is none."""
        return next((path for path, thing, _ in self._states if isinstance(thing, types.GeneratorType)), None)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts all values back, except the positions of Python generators."""
        anew: dict[int, Any] = {}
        for _, thing, state in self._states:
            if not _equal(_state(thing), _state(state) if isinstance(state, Iterator) else state):
                _put_state(thing, state, anew)
        for holder in self._holders:
            values = {key: anew.get(id(value), value) for key, value in holder.before.items()}
            now = holder.read()
            changed = [key for key in self._changed(holder, now) if key is not None]
            changed += [key for key, value in values.items() if value is not holder.before[key] and key not in changed]
            if changed:
                holder.write(values, now, changed)
        for saved in self._saved.values():
            if saved.copy is not None and not saved.same:
                _refill(saved.value, saved.copy)

    def _changes(self) -> Iterator[Change]:
        for saved in self._saved.values():
            if not saved.same:
                yield Change(saved.path, "", silent=False)
        for path, thing, state in self._states:
            if not _equal(_state(thing), _state(state) if isinstance(state, Iterator) else state):
                yield Change(path, "", silent=False)
        for holder in self._holders:
            if holder.hooks:
                continue
            now = holder.read()
            for key in self._changed(holder, now):
                values = [held[key] for held in (holder.before, now) if key in held]
                counts = all(isinstance(value, bool | int | float | str | type(None)) for value in values)
                grows = isinstance(holder.owner, list | deque | set)
                yield Change(holder.label(key), holder.reached(key), silent=counts or grows)

    def _changed(self, holder: Holder, now: dict[Any, Any]) -> Iterator[Any]:
        """The keys of a holder whose values are others."""
        before = holder.before
        if isinstance(holder.owner, set) or len(before) > LONG:
            yield from list(before.keys() ^ now.keys())[:1]
            return
        for key in [*before, *(key for key in now if key not in before)]:
            if key not in before or key not in now or not self._same(before[key], now[key]):
                yield key

    def _same(self, before: Any, now: Any) -> bool:
        """Whether a value is what it was. An object that changed inside has a holder of its own."""
        if before is now:
            return True
        if isinstance(before, Tensor) and isinstance(now, Tensor):
            saved = self._saved.get(id(before))
            return _equal(before if saved is None or saved.copy is None else saved.copy, now)
        if type(before) is not type(now):
            return False
        if isinstance(before, types.MethodType):
            return before.__func__ is now.__func__ and before.__self__ is now.__self__
        if isinstance(before, list | tuple) and len(before) == len(now):
            return all(self._same(a, b) for a, b in zip(before, now, strict=True))
        if isinstance(before, dict) and before.keys() == now.keys():
            return all(self._same(before[key], now[key]) for key in before)
        return _equal(before, now)

    # The walk.

    def _visit(self, value: Any, path: str, name: str) -> None:
        if isinstance(value, PLAIN) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        match value:
            case Tensor():
                self._visit_tensor(value, path)
            case np.ndarray():
                if value.size <= LARGE and value.dtype.kind != "O":
                    self._saved[id(value)] = Saved(path, value, value.copy())
            case nn.Module():
                self._visit_module(value, path)
            case types.FunctionType():
                self._visit_function(value, path)
            case types.MethodType():
                self._visit(value.__func__, path, name)
                self._visit(value.__self__, path, name)
            case functools.partial():
                for part in (value.func, *value.args, *value.keywords.values()):
                    self._visit(part, path, name)
            case type():
                self._visit_class(value)
            case dict() | list() | deque() | set():
                self._holders.append(Holder(value, path, name))
                for key, item in value.items() if isinstance(value, dict) else enumerate(list(value)):
                    if _short(value):
                        self._visit(item, f"{path}[{key!r}]" if isinstance(value, dict) else path, name)
            case tuple() | frozenset():
                for item in value if _short(value) else ():
                    self._visit(item, path, name)
            case torch.Generator() | random.Random() | np.random.Generator() | np.random.RandomState():
                self._states.append((path, value, _state(value)))
            case Iterator() if type(value).__module__ in ("builtins", "itertools"):
                self._states.append((path, value, _position(value)))
            case io.IOBase():
                pass
            case _:
                self._visit_object(value, path)

    def _visit_tensor(self, tensor: Tensor, path: str) -> None:
        is_parameter = isinstance(tensor, nn.Parameter)
        if tensor.is_meta or tensor.layout != torch.strided or (is_parameter and tensor.numel() > SMALL):
            return
        values = tensor.detach().clone() if tensor.numel() <= LARGE else None
        self._saved[id(tensor)] = Saved(path, tensor, values, -1 if tensor.is_inference() else tensor._version)

    def _visit_module(self, module: nn.Module, path: str) -> None:
        self._holders += [Holder(module, path, named=True), Holder(module._buffers, path, named=True)]
        for name, part in [*module._buffers.items(), *module._parameters.items(), *module._modules.items()]:
            self._visit(part, f"{path}.{name}", name)
        for name, part in vars(module).items():
            if name.startswith("_forward_") and isinstance(part, dict):
                self._holders.append(Holder(part, f"{path}.{name}", hooks=True))
            if name in ("_forward_hooks", "_forward_pre_hooks"):
                for hook in part.values():
                    self._visit(hook, f"a hook of {path}", "")
            elif name not in STRUCTURE and not name.endswith("_hooks") and not name.startswith("_forward_"):
                self._visit(part, f"{path}.{name}", name)
        for cls in type(module).__mro__:
            if _is_users(cls.__module__):
                self._visit(cls, path, "")
                for name, part in list(vars(cls).items()):
                    if name not in MAKERS:
                        self._visit(_function(part), path, "")

    def _visit_function(self, function: types.FunctionType, path: str) -> None:
        code, scope = function.__code__, function.__globals__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if id(cell) not in self._seen:
                self._seen[id(cell)] = cell
                self._holders.append(Holder(cell, name, name))
                for held in contents(cell).values():
                    self._visit(held, name, name)
        positional, defaults = code.co_varnames[: code.co_argcount], function.__defaults__ or ()
        given = dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
        for name, value in [*given.items(), *(function.__kwdefaults__ or {}).items()]:
            self._visit(value, name, name)
        if vars(function):
            self._holders.append(Holder(vars(function), path, named=True))
            for name, value in vars(function).items():
                self._visit(value, f"{path}.{name}", name)
        if not _is_users(scope.get("__name__")):
            return
        self._functions.append(function)
        self._names |= names(code)
        shared = {name for name in names(code) if name in scope and not isinstance(scope[name], types.ModuleType | type)}
        if shared:
            self._holders.append(Holder(scope, "", named=True, names=shared))
            for name in shared:
                self._visit(scope[name], name, name)

    def _visit_class(self, cls: type) -> None:
        if not _is_users(cls.__module__):
            return
        data = {name for name, value in vars(cls).items() if not name.startswith("__") and not hasattr(value, "__get__")}
        if data:
            self._holders.append(Holder(cls, cls.__name__, named=True, names=data))
            for name in data:
                self._visit(vars(cls)[name], f"{cls.__name__}.{name}", name)

    def _visit_object(self, value: Any, path: str) -> None:
        origin = type(value).__module__
        if hasattr(value, "components"):  # A pipeline's attributes are its loop's affair.
            return
        if isinstance(value, types.SimpleNamespace) or origin.partition(".")[0] in MODELS:
            holder = Holder(value, path, named=True)
            self._holders.append(holder)
            for name, part in holder.read().items():
                self._visit(part, f"{path}.{name}", name)
        elif _is_users(origin):
            self._holders.append(Holder(value, path, named=True, names=self._names))
            self._objects.append((value, path))

    def _visit_named(self) -> bool:
        """Visits the attributes and methods of users' objects whose names occur; whether there were further ones."""
        before = len(self._reached)
        for value, path in list(self._objects):
            for owner in [value, *(cls for cls in type(value).__mro__ if _is_users(cls.__module__))]:
                if isinstance(owner, type):
                    self._visit(owner, path, "")
                for name, part in Holder(owner, path).read().items():
                    named = (name in self._names and name not in MAKERS) or name == "__call__"
                    if named and (id(owner), name) not in self._reached:
                        self._reached.add((id(owner), name))
                        self._visit(_function(part), f"{path}.{name}", name)
        return len(self._reached) > before


def users_methods(cls: type) -> list[types.FunctionType]:
    """The methods of a class that are of no known library."""
    members = [_function(part) for owner in cls.__mro__ if _is_users(owner.__module__) for part in vars(owner).values()]
    return [part for part in map(inspect.unwrap, filter(callable, members)) if isinstance(part, types.FunctionType)]


def _is_users(module: str | None) -> bool:
    """Whether a module is neither of Python's own nor of a library that is known."""
    top = (module or "builtins").partition(".")[0]
    return top not in MODELS and top not in OTHERS and top not in sys.stdlib_module_names


def _function(member: Any) -> Any:
    """The function of a method, a static method or a property."""
    return getattr(member, "__func__", getattr(member, "fget", member)) if not isinstance(member, types.MethodType) else member


def _short(value: Any) -> bool:
    return len(value) <= LONG


def _equal(a: Any, b: Any) -> bool:
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
            return all(key in b and _equal(value, b[key]) for key, value in a.items())
        return all(map(_equal, a, b))
    try:
        return bool(a is b or a == b or (a != a and b != b))
    except Exception:
        return False


def _refill(value: Any, values: Any) -> None:
    """Gives a tensor or an array its values back."""
    if isinstance(value, np.ndarray):
        value[...] = values
    elif value.shape == values.shape:
        value.copy_(values)
    else:
        value.set_(values.to(value.device))


def _state(thing: Any) -> Any:
    """The state of a random generator, or the position of an iterator."""
    match thing:
        case torch.Generator():
            return thing.get_state()
        case random.Random():
            return thing.getstate()
        case np.random.Generator():
            return thing.bit_generator.state
        case np.random.RandomState():
            return thing.get_state(legacy=False)
        case types.GeneratorType():
            frame = thing.gi_frame
            return None if frame is None else (frame.f_lasti, {k: v for k, v in frame.f_locals.items() if isinstance(v, PLAIN)})
        case _:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Python, which gives up the copies of some iterators
                try:
                    return _flat(thing.__reduce__()[1:])
                except TypeError:
                    return None


def _flat(parts: Any) -> list[Any]:
    """What an iterator is made of, with the iterators within it as what they are made of."""
    return [_state(part) if isinstance(part, Iterator) else _flat(part) if isinstance(part, tuple) else part for part in parts]


def _position(thing: Any) -> Any:
    """A copy of an iterator; where there is none, its position."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return copy.copy(thing)
        except TypeError:
            return _state(thing)


def _put_state(thing: Any, state: Any, anew: dict[int, Any]) -> None:
    """Sets a random generator to a state. An iterator gets a copy, in `anew`, that takes its place."""
    match thing:
        case torch.Generator():
            thing.set_state(state)
        case random.Random():
            thing.setstate(state)
        case np.random.Generator():
            thing.bit_generator.state = state
        case np.random.RandomState():
            thing.set_state(state)
        case _:
            if isinstance(state, Iterator):
                anew[id(thing)] = _position(state)

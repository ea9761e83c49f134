# SPDX-License-Identifier: Apache-2.0
"""The walk from networks to all that their calls can change.

It goes from modules to their buffers, attributes and hooks, to the objects and containers in these, to the variables that their
functions share, and to generators. Parameters of more than a few numbers are left out, since they are large and no forward
changes them. Of a user's own objects, only those attributes are visited whose names occur in the functions that the walk found,
so that an object that does other work beside is left alone.
"""

from __future__ import annotations

import _csv
import array
import contextvars
import decimal
import functools
import gc
import io
import logging
import operator
import queue
import random
import sqlite3
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paradiff.models.absent import Absent
from paradiff.pipelines.loop.switch import SWITCH
from paradiff.pipelines.network.holder import GRADIENT, STRUCTURE, Holder, contents
from paradiff.pipelines.network.offloaded import in_files
from paradiff.pipelines.network.origin import MODELS, function_of, is_users
from paradiff.pipelines.network.plain import PLAIN
from paradiff.pipelines.network.position import is_cache, record, reread
from paradiff.pipelines.network.reads import names
from paradiff.pipelines.network.saved import Saved, is_memory, memory_of

SMALL = 2**12
"""Numbers of the largest parameter that is recorded."""
LARGE = 2**24
"""Numbers of the largest other tensor whose values are recorded; of a larger one it is known whether it changed."""
LONG = 2**12
"""Length of the longest container whose items are looked at."""
LONGEST_PATH = 200
"""Characters of the longest path that a sentence shows in full."""
LONGEST_KEY = 60
"""Characters of the longest key that a sentence shows."""
INSTALLED = {"site-packages", "dist-packages"}
"""Folders of installed packages, of Python and of Debian."""
KEEPERS = {
    "_thread",
    "_weakrefset",
    "collections",
    "csv",
    "multiprocessing",
    "queue",
    "tempfile",
    "threading",
    "types",
    "weakref",
}
"""Python's own modules whose objects are looked into: they hold values for others."""
LOGS = {"logging", "logging.handlers"}
"""Its modules whose handlers are, for records that they keep; where they write to is not."""
TRAINERS = ("torch.amp.", "torch.optim.", "torch.utils.data.")
"""Modules of torch whose objects are, too."""
VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
COUNTS, CLEAR = "cache_info", "cache_clear"
"""Methods of a cached function: one tells how often it was called, the other begins anew, by which a call does not depend on
those before."""
MAKERS = ("__init__", "__new__", "__init_subclass__")
"""Methods that make an object; no call of a network is one of them."""


class Walk:
    """What is within reach of some objects.

    Args:
        roots: Networks, functions and containers, each with its name.
        owners: Objects, such as pipelines, of which all attributes are visited.
        leave: Objects that the walk leaves out.

    Attributes:
        holders: The containers, shared variables and objects with attributes.
        saved: The tensors and arrays by identity, with copies of their values.
        states: The random generators and iterators, each with its path and its record.
        functions: The users' functions.
        networks_own: Those among them that are methods of networks, by identity.
        operators: The names by which operators within reach, such as `operator.attrgetter`, get or call something.
    """

    def __init__(self, roots: Iterable[tuple[str, Any]], owners: Iterable[Any], leave: Iterable[Any]) -> None:
        self._seen: dict[int, Any] = {id(value): value for value in leave}
        self.holders: list[Holder] = []
        self.saved: dict[int, Saved] = {}
        self.states: list[tuple[str, Any, Any]] = []
        self.functions: list[types.FunctionType] = []
        self.networks_own: set[int] = set()
        self.operators: set[str] = set()
        self._names: set[str] = set()
        self._objects: list[tuple[Any, str]] = []
        self._reached: set[tuple[int, str]] = set()
        self._parts: list[tuple[Any, str, str]] = []
        self._weights: set[int] = set()  # modules' parameters, by identity
        self._caches: list[tuple[str, Any]] = []
        for name, root in roots:
            self._walk(root, name, name)
        for owner in owners:
            holder = Holder(owner, type(owner).__name__, named=True)
            self.holders.append(holder)
            for name, value in holder.read().items():
                self._walk(value, f"{holder.path}.{name}", name)
        while self._visit_named():
            pass
        if COUNTS in self._names and CLEAR not in self._names:
            self.states += [(path, cache, record(cache)) for path, cache in self._caches]
        for holder in self.holders:
            holder.before = holder.read()

    def _visit(self, value: Any, path: str, name: str) -> None:
        """Notes a part to be visited: objects may hold each other in chains of any length, so that nothing here recurs."""
        self._parts.append((value, path if len(path) <= LONGEST_PATH else f"{path[: LONGEST_PATH // 2]} ... {name}", name))

    def _walk(self, value: Any, path: str, name: str) -> None:
        """Visits a value and all that it holds, in the order in which parts are noted, each with its own parts."""
        waiting = [(value, path, name)]
        while waiting:
            self._visit_one(*waiting.pop())
            waiting += reversed(self._parts)
            self._parts.clear()

    def _visit_one(self, value: Any, path: str, name: str) -> None:
        if isinstance(value, PLAIN) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        match value:
            case Tensor():
                self._visit_tensor(value, path)
                self._visit_parts_of(value, path)
            case np.ndarray():
                if value.size <= LARGE:
                    self.saved[id(value)] = Saved(path, value, value.copy())
                for item in value.flat if value.dtype.kind == "O" and value.size <= LONG else ():
                    self._visit(item, path, name)
            case torch.UntypedStorage() | torch.TypedStorage():
                memory = value if isinstance(value, torch.UntypedStorage) else value.untyped()
                self._visit_tensor(torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory), path)
            case nn.Module():
                self._visit_module(value, path)
            case types.FunctionType():
                self._visit_function(value, path)
            case types.MethodType():
                self._visit(value.__func__, path, name)
                self._visit(value.__self__, path, name)
            case types.BuiltinMethodType() if not isinstance(value.__self__, types.ModuleType | type):
                self._visit(value.__self__, path, name)
            case functools.partial():
                for part in (value.func, *value.args, *value.keywords.values()):
                    self._visit(part, path, name)
            case operator.attrgetter() | operator.itemgetter() | operator.methodcaller():
                self._visit_operator(value, path, name)
            case type():
                self._visit_class(value)
            case dict() | list() | deque() | set():
                self.holders.append(Holder(value, path, name))
                for key, item in value.items() if isinstance(value, dict) else enumerate(list(value)):
                    if _short(value):
                        self._visit(item, f"{path}[{_named(key)}]" if isinstance(value, dict) else path, name)
            case tuple() | frozenset():
                for item in value if _short(value) else ():
                    self._visit(item, path, name)
            case types.MappingProxyType() | _csv.Writer():
                for part in gc.get_referents(value):
                    self._visit(part, path, name)
            case weakref.ref():
                self._visit(value(), path, name)
            case _ if isinstance(value, VIEWS):
                self._visit(value.mapping, path, name)
            case torch.Generator() | random.Random() | np.random.Generator() | np.random.RandomState():
                self.states.append((path, value, record(value)))
            case queue.SimpleQueue() | contextvars.ContextVar() | decimal.Context() | sqlite3.Connection():
                self.states.append((path, value, record(value)))
            case Iterator() if type(value).__module__ in ("builtins", "itertools"):
                self.states.append((path, value, record(value)))
            case io.StringIO() | io.BytesIO() if not value.closed:
                self.states.append((path, value, record(value)))
            case io.IOBase() if reread(value):
                self.states.append((path, value, record(value)))
            case io.IOBase():
                pass
            case array.array() | bytearray():
                self.saved[id(value)] = Saved(path, value, value[:])
            case _ if is_memory(value):
                if 0 < memory_of(value).nbytes <= LARGE:
                    self.saved[id(value)] = Saved(path, value, memory_of(value).tobytes())
                for part in getattr(value, "_objects", None) or ():
                    self._visit(part, path, name)
            case _ if type(value).__module__ == "functools" and hasattr(value, "__wrapped__"):
                if is_cache(value):
                    self._caches.append((path, value))
                self._visit(value.__wrapped__, path, name)
            case _:
                self._visit_object(value, path, name)

    def _visit_operator(self, value: Any, path: str, name: str) -> None:
        parts = value.__reduce__()[1:]
        for given in parts:
            for part in given.values() if isinstance(given, dict) else given:
                if isinstance(part, str):
                    self.operators.update(part.split("."))
                else:
                    self._visit(part, path, name)
        self._names |= self.operators

    def _visit_tensor(self, tensor: Tensor, path: str) -> None:
        is_parameter = isinstance(tensor, nn.Parameter)
        if (
            tensor.is_meta
            or isinstance(tensor, Absent)
            or tensor.layout != torch.strided
            or (is_parameter and tensor.numel() > SMALL)
        ):
            return
        values = tensor.detach().clone() if tensor.numel() <= LARGE else None
        self.saved[id(tensor)] = Saved(path, tensor, values, -1 if tensor.is_inference() else tensor._version)

    def _visit_parts_of(self, tensor: Tensor, path: str) -> None:
        """Visits the attributes of a tensor and its gradient; a large weight's is not copied."""
        holder = Holder(tensor, path, named=True)
        self.holders.append(holder)
        for name, part in holder.read().items():
            if name == GRADIENT and isinstance(part, Tensor) and id(tensor) in self._weights and part.numel() > SMALL:
                self._seen[id(part)] = part
                self.saved[id(part)] = Saved(f"{path}.{name}", part, None, -1 if part.is_inference() else part._version)
            else:
                self._visit(part, f"{path}.{name}", name)

    def _visit_module(self, module: nn.Module, path: str) -> None:
        self.holders += [Holder(module, path, named=True), Holder(module._buffers, path, named=True)]
        self._seen.update((id(part), part) for part in in_files(module))
        self._weights.update(map(id, module._parameters.values()))
        for name, part in [*module._buffers.items(), *module._parameters.items(), *module._modules.items()]:
            self._visit(part, f"{path}.{name}", name)
        for name, part in vars(module).items():
            if name.startswith("_forward_") and isinstance(part, dict):
                self.holders.append(Holder(part, f"{path}.{name}", hooks=True))
            if name in ("_forward_hooks", "_forward_pre_hooks"):
                for hook in part.values():
                    self._visit(hook, f"a hook of {path}", "")
            elif name not in STRUCTURE and not name.endswith("_hooks") and not name.startswith("_forward_"):
                self._visit(part, f"{path}.{name}", name)
        for cls in type(module).__mro__:
            if is_users(cls.__module__):
                self._visit(cls, path, "")
                for name, part in list(vars(cls).items()):
                    if name not in MAKERS:
                        self.networks_own.add(id(function_of(part)))
                        self._visit(function_of(part), path, "")

    def _visit_function(self, function: types.FunctionType, path: str) -> None:
        code, scope = function.__code__, function.__globals__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if id(cell) not in self._seen:
                self._seen[id(cell)] = cell
                self.holders.append(Holder(cell, name, name))
                for held in contents(cell).values():
                    self._visit(held, name, name)
        positional, defaults = code.co_varnames[: code.co_argcount], function.__defaults__ or ()
        given = dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
        for name, value in [*given.items(), *(function.__kwdefaults__ or {}).items()]:
            self._visit(value, name, name)
        if vars(function) or is_users(scope.get("__name__")):
            self.holders.append(Holder(vars(function), path, named=True))
            for name, value in vars(function).items():
                self._visit(value, f"{path}.{name}", name)
        if not is_users(scope.get("__name__")):
            return
        self.functions.append(function)
        self._names |= names(code)
        self._visit_scope(names(code), scope, "")
        for name in names(code):
            held = scope.get(name)
            if isinstance(held, types.ModuleType) and is_users(held.__name__) and not _installed(held):
                self._visit_scope(names(code), vars(held), f"{name}.")

    def _visit_scope(self, named: set[str], scope: dict[str, Any], path: str) -> None:
        """Visits those of some names that are global variables of a module."""
        shared = {name for name in named if name in scope and not isinstance(scope[name], types.ModuleType | type)}
        if shared:
            self.holders.append(Holder(scope, path.rstrip("."), named=True, names=shared))
            for name in shared:
                self._visit(scope[name], f"{path}{name}", name)
        for name in named:
            if isinstance(scope.get(name), type):
                self._visit(scope[name], name, name)

    def _visit_class(self, cls: type) -> None:
        if not is_users(cls.__module__):
            return
        self.holders.append(Holder(cls, cls.__name__, named=True))
        for name, value in list(vars(cls).items()):
            if not name.startswith("__") and not hasattr(value, "__get__"):
                self._visit(value, f"{cls.__name__}.{name}", name)

    def _visit_object(self, value: Any, path: str, name: str) -> None:
        origin = type(value).__module__
        if hasattr(value, "components"):  # A pipeline's attributes are its loop's affair.
            return
        if SWITCH in vars(type(value)):  # So are those of a scheduler whose times are walked over.
            return
        if isinstance(value, types.SimpleNamespace) or origin.partition(".")[0] in MODELS:
            holder = Holder(value, path, named=True)
            self.holders.append(holder)
            for name, part in holder.read().items():
                self._visit(part, f"{path}.{name}", name)
        elif isinstance(value, logging.Logger):
            for handler in handlers_of(value):
                self._visit(handler, path, name)
        elif origin.partition(".")[0] in KEEPERS or origin in LOGS or f"{origin}.".startswith(TRAINERS):
            self.holders.append(Holder(value, path, name, named=True))
            for key, part in self.holders[-1].read().items():
                self._visit(part, f"{path}.{key}", name or key)
            if isinstance(value, torch.optim.Optimizer):  # which writes to its parameters, however large
                for part in (part for group in value.param_groups for part in group["params"]):
                    self._visit_tensor(part.detach(), path)
        elif is_users(origin):
            self.holders.append(Holder(value, path, named=True, names=self._names))
            self._objects.append((value, path))

    def _visit_named(self) -> bool:
        """Visits the attributes and methods of users' objects whose names occur; whether there were further ones."""
        before = len(self._reached)
        for value, path in list(self._objects):
            for owner in [value, *(cls for cls in type(value).__mro__ if is_users(cls.__module__))]:
                if isinstance(owner, type):
                    self._walk(owner, path, "")
                for name, part in Holder(owner, path).read().items():
                    named = (name in self._names and name not in MAKERS) or name == "__call__" or overrides(value, name)
                    if named and (id(owner), name) not in self._reached:
                        self._reached.add((id(owner), name))
                        self._walk(function_of(part), f"{path}.{name}", name)
        return len(self._reached) > before


def overrides(value: Any, name: str) -> bool:
    """Whether a method of a user's object stands for one of a library, or of Python's own, whose methods may call it."""
    bases = [base for base in type(value).__mro__ if base is not object and not is_users(base.__module__)]
    return name not in MAKERS and any(callable(vars(base).get(name)) for base in bases)


def handlers_of(logger: logging.Logger) -> Iterator[logging.Handler]:
    """The handlers that the records of a logger come to."""
    found: logging.Logger | None = logger
    while found is not None:
        yield from found.handlers
        found = found.parent if found.propagate else None


def _installed(module: types.ModuleType) -> bool:
    """Whether a module is one of the installed packages, whose variables are no loop's own."""
    return not INSTALLED.isdisjoint(Path(getattr(module, "__file__", None) or "").parts)


def _short(value: Any) -> bool:
    return len(value) <= LONG


def _named(key: Any) -> str:
    """A key as a sentence shows it."""
    text = repr(key)
    return text if len(text) <= LONGEST_KEY and text.isprintable() else "..."

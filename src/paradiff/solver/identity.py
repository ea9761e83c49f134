# SPDX-License-Identifier: Apache-2.0
"""What a model consists of at one time, as far as it can be read, to tell whether it is the same at another time.

Two things are compared: a digest of all plain values within reach of the model, and the objects that are compared by identity,
tensors, classes and code. Of a module that is every attribute: parameters and buffers with their memory and version, the
training flag, hooks, settings and containers; of a function its closure, defaults, attributes and the names of its module that
it uses; of a method or a partial what it holds; of an object its attributes. Of classes that are no library's the methods are
read too. Of a compiled module the one that was compiled counts. Objects are held weakly.

Writing through `.data` is counted nowhere by torch, so that a few values of each tensor, spread over it, are read too. Those on
the CPU belong to the digest; those of another device stay there until they are compared, since to read them is to wait for it.
A write to other places of a tensor is not seen.

A model is not readable if it reaches something whose state cannot be read: an iterator, a file, a lock of another library, a
cache of functools, a scripted module, large tensors without a version.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import logging
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LIBRARIES = {"torch", "torchvision", "numpy", "diffusers", "transformers", "accelerate", "peft", "safetensors", "paradiff"}
"""Whose classes and functions are told by their names; what they hold is read all the same."""

QUICK = {bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device}
QUICK |= {torch.layout, torch.memory_format}
"""Kinds of plain values."""

PLAIN = (PurePath, np.generic, np.dtype, range, slice)
"""Kinds of further ones, whose text tells them."""

CONTAINERS = {dict, list, tuple, set, OrderedDict}
"""Of which most are empty."""

MOST = 300_000
"""Things that are read of a model at most."""

SPREAD = 3
"""Places along each dimension of a tensor at which its values are read."""

SMALL = 1 << 20
"""Bytes of an array, or of a tensor whose changes torch does not count, that are read."""

WORD = 8
"""Bytes of a pointer."""


class Unreadable(Exception):
    """That a model reaches something whose state cannot be read."""


class Identity:
    """What a model consists of.

    Args:
        model: The model.

    Raises:
        Unreadable: If it reaches something whose state cannot be read.
    """

    def __init__(self, model: Any) -> None:
        reader = _Reader()
        try:
            reader.read(model)
            self._objects = [weakref.ref(one) for one in reader.objects]
        except Unreadable:
            raise
        except Exception as error:  # attributes that raise, tensors without memory
            raise Unreadable(str(error)) from error
        self._digest, self._samples = reader.digest(), reader.sampled()

    def alike(self, other: Identity) -> bool:
        """Whether the values of one model's tensors that lie on other devices than the CPU were the same at another time. Waits
        for these devices."""
        pairs = zip(self._samples, other._samples, strict=False)
        return len(self._samples) == len(other._samples) and all(torch.equal(a, b) for a, b in pairs)

    def same(self, other: Identity) -> bool:
        """Whether a model consisted of the same at another time, but for what `alike` compares. Waits for no device."""
        if self._digest != other._digest or len(self._objects) != len(other._objects):
            return False
        pairs = ((one(), two()) for one, two in zip(self._objects, other._objects, strict=True))
        return all(one is not None and one is two for one, two in pairs)


class _Reader:
    """Reads a model, each thing once."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self._facts: list[Any] = []
        self._samples: dict[torch.device, list[Tensor]] = {}
        self._seen: dict[int, tuple[int, Any]] = {}  # what was read is kept alive, so that no number is used twice

    def digest(self) -> bytes:
        """Of the plain values."""
        return hashlib.blake2b(repr(self._facts).encode(), digest_size=16).digest()

    def sampled(self) -> list[Tensor]:
        """`[n]` bytes of the tensors on each device other than the CPU."""
        return [torch.cat(parts) for parts in self._samples.values()]

    def read(self, model: Any) -> None:
        """Reads a model and all within its reach.

        Raises:
            Unreadable: If the state of something cannot be read.
        """
        if any(vars(nn.modules.module)[name] for name in GLOBAL_HOOKS):
            raise Unreadable("hooks of all modules")
        left: list[Any] = [model]
        while left:
            value = left.pop()
            if len(self._facts) + len(left) > MOST:
                _raise(f"more than {MOST} parts")
            if type(value) in QUICK or isinstance(value, PLAIN):
                large = isinstance(value, str | bytes) and len(value) > SMALL
                self._facts.append(_raise("a large text") if large else value)
                continue
            if (known := self._seen.get(id(value))) is not None:
                self._facts.append(known[0])
                continue
            self._seen[id(value)] = len(self._seen), value
            left += reversed([*self._parts(value)])

    def _parts(self, value: Any) -> Iterator[Any]:
        """What a value holds; its plain facts are told."""
        kind = type(value)
        self._facts.append((kind.__module__, kind.__qualname__))
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, type):
            yield from self._class(value)
        elif isinstance(value, enum.Enum):
            self._facts.append(value.name)
        elif isinstance(value, np.ndarray) and value.nbytes <= SMALL and value.dtype != object:
            self._facts.append((value.shape, value.dtype.str, value.tobytes()))
        elif isinstance(value, torch.Generator):
            self._facts.append(value.get_state().numpy().tobytes())
        elif isinstance(value, types.ModuleType):
            self._facts.append(value.__name__)
        elif isinstance(value, logging.Logger) or _is_compilers(value):
            self._facts.append("by name")
        elif isinstance(value, types.FunctionType):
            compiled = vars(value).get("_torchdynamo_orig_callable")
            yield from self._function(value) if compiled is None else (value.__code__, compiled)
        elif isinstance(value, types.CodeType):
            self.objects.append(value)
        elif isinstance(value, types.MethodType):
            yield from (value.__func__, value.__self__)
        elif isinstance(value, types.BuiltinFunctionType | types.WrapperDescriptorType | types.MethodDescriptorType):
            self._facts.append(value.__qualname__)
            owner = getattr(value, "__self__", None)
            if not isinstance(owner, types.ModuleType | type | None):
                yield owner
        elif isinstance(value, functools.partial):
            yield from (value.func, value.args, value.keywords, vars(value))
        elif isinstance(value, staticmethod | classmethod):
            yield value.__func__
        elif isinstance(value, property):
            yield from (value.fget, value.fset)
        elif isinstance(value, set | frozenset):
            yield from self._set(value)
        else:
            yield from self._contents(value, kind)

    def _tensor(self, value: Tensor) -> None:
        self.objects.append(value)
        place = value.data_ptr() if value.layout is torch.strided else _raise("a sparse tensor")
        version = _bytes(value) if value.is_inference() else value._version
        self._facts.append((place, version, tuple(value.shape), value.stride(), value.dtype, value.device))
        if value.is_inference() or value.device.type == "meta" or not value.numel():
            return
        sample = value.detach()[tuple(slice(None, None, -(-size // SPREAD)) for size in value.shape)].resolve_neg()
        sample = torch.view_as_real(sample.resolve_conj()) if sample.is_complex() else sample
        found = sample.reshape(-1).contiguous().view(torch.uint8)
        if value.device.type == "cpu":
            self._facts.append(found.numpy().tobytes())
        else:
            self._samples.setdefault(value.device, []).append(found)

    def _set(self, value: Iterable[Any]) -> Iterator[Any]:
        if not all(type(one) in QUICK for one in value):
            _raise("a set of objects")
        self._facts.append(sorted(map(repr, value)))
        yield from ()

    def _contents(self, value: Any, kind: type) -> Iterator[Any]:
        """Of containers, modules and objects."""
        if isinstance(value, dict | types.MappingProxyType | list | tuple | deque):
            self._facts.append(len(value) if len(value) <= MOST else _raise("a large container"))
        if isinstance(value, dict | types.MappingProxyType):
            for key, part in value.items():
                if type(key) in QUICK:
                    self._facts.append(key)
                else:
                    yield key
                if type(part) in QUICK or (type(part) in CONTAINERS and not part):
                    self._facts.append(part)
                else:
                    yield part
        elif isinstance(value, list | tuple | deque):
            yield from value
        elif isinstance(value, nn.Module):
            if isinstance(value, torch.jit.ScriptModule):
                _raise("a scripted module")
            if (compiled := vars(value).get("_modules", {}).get("_orig_mod")) is not None and "dynamo_ctx" in vars(value):
                yield from (compiled, {k: v for k, v in vars(value).items() if k.endswith("_hooks")}, value.training)
                return
        elif not _is_pure(kind):
            _raise(f"an object of {kind.__module__}.{kind.__qualname__}")
        if kind in CONTAINERS:
            return
        yield kind
        slots = sorted(_slots(kind))
        self._facts.append(slots)
        yield from (getattr(value, name) for name in slots if hasattr(value, name))
        yield getattr(value, "__dict__", None)

    def _class(self, value: type) -> Iterator[Any]:
        self.objects.append(value)
        for owner in value.__mro__:
            if _is_users(owner.__module__):
                self._facts.append(owner.__qualname__)
                yield from (part for name, part in vars(owner).items() if _is_part(name, part))

    def _function(self, value: types.FunctionType) -> Iterator[Any]:
        self._facts.append(value.__qualname__)
        yield from (value.__code__, value.__defaults__, value.__kwdefaults__, vars(value))
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:
                self._facts.append("empty")
        if not _is_users(value.__globals__.get("__name__")):
            return
        names = _names(value.__code__)
        self._facts.append(names)
        for name in names:
            known = value.__globals__.get(name, self)
            if isinstance(known, types.ModuleType) and _is_users(known.__name__):
                yield from (vars(known)[of] for of in names if of in vars(known))
            elif known is not self:
                yield known


GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
"""Where torch keeps the hooks of all modules."""


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names that a function and those within it use."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const)]
    return tuple(sorted({*code.co_names, *inner}))


def _is_users(module: str | None) -> bool:
    """Whether a module is of no library."""
    top = (module or "builtins").partition(".")[0]
    return top not in LIBRARIES and (top == "__main__" or top not in sys.stdlib_module_names)


def _is_compilers(value: Any) -> bool:
    """Whether an object is of torch's compiler, and no module."""
    return type(value).__module__.startswith("torch._dynamo") and not isinstance(value, nn.Module)


def _is_part(name: str, part: Any) -> bool:
    """Whether an entry of a class is a method, a property or a setting."""
    if isinstance(part, types.FunctionType | staticmethod | classmethod | property):
        return True
    return not (name.startswith("__") or name == "_abc_impl" or inspect.isdatadescriptor(part))


def _slots(kind: type) -> set[str]:
    found = [vars(owner).get("__slots__", ()) for owner in kind.__mro__]
    return {name for slots in found for name in ([slots] if isinstance(slots, str) else slots)} - {"__dict__", "__weakref__"}


def _is_pure(kind: type) -> bool:
    """Whether all that an object of a class holds are its attributes: a class that is written in Python."""
    if not (kind.__flags__ & HEAP) or not (kind.__dictoffset__ or _slots(kind)):
        return kind is object or kind is types.SimpleNamespace
    return kind.__basicsize__ <= object.__basicsize__ + WORD * (2 + len(_slots(kind)))


HEAP = 1 << 9
"""The flag of classes that are made while Python runs."""


def _bytes(value: Tensor) -> bytes:
    """The numbers of a tensor whose changes torch does not count."""
    if value.nbytes > SMALL or value.device.type != "cpu":
        _raise("a large inference tensor")
    return value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _raise(what: str) -> Any:
    raise Unreadable(what)


def identity_of(model: Any) -> Identity | None:
    """What a model consists of; None if that cannot be read."""
    try:
        return Identity(model)
    except Unreadable:
        return None

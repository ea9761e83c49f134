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
import marshal
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LIBRARIES = {"torch", "torchvision", "numpy", "diffusers", "transformers", "accelerate", "peft", "safetensors", "paradiff"}
"""Whose classes and functions are told by their names; what they hold is read all the same."""

QUICK = {bool, int, float, complex, str, bytes, type(None), type(...)}
"""Kinds of plain values."""

PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, PurePath, np.generic, np.dtype, range, slice)
"""Kinds of further ones, whose text tells them."""

CONTAINERS = {kind: [kind.__name__] for kind in (dict, list, tuple, set, OrderedDict)}
"""Of which most are empty, and what tells those."""

MOST = 300_000
"""Things that are read of a model at most."""

SPREAD = 3
"""Places along each dimension of a tensor at which its values are read."""

NUMPYS = {torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool}
"""Kinds of numbers that numpy has, too, which reads a few of them in less time."""

SMALL = 1 << 20
"""Bytes of an array, or of a tensor whose changes torch does not count, that are read."""

WITHOUT_REFERENCES = 2
"""The version of `marshal` that writes what is met twice twice."""

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


Parts = Iterable[Any]
"""What a thing holds, to be read after it."""


class _Reader:
    """Reads a model, each thing once.

    Facts are plain values, `[n]` for the n-th thing that was read, `{n}` for the n-th kind of things, and `frozenset({n})` for
    the n-th list of names.
    """

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self._facts: list[Any] = []
        self._values: list[bytes] = []  # of arrays and tensors, whose sizes are facts
        self._samples: dict[torch.device, list[Tensor]] = {}
        self._seen: dict[int, tuple[list[int], Any]] = {}  # what was read is kept alive, so that no number is used twice
        self._kinds: dict[type, tuple[set[int], Callable[[Any], Parts]]] = {}
        self._slots: dict[type, tuple[str, ...]] = {}
        self._names: dict[tuple[str, ...], frozenset[int]] = {}

    def digest(self) -> bytes:
        """Of the plain values."""
        found = hashlib.blake2b(marshal.dumps(self._facts, WITHOUT_REFERENCES), digest_size=16)
        found.update(b"".join(self._values))
        return found.digest()

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
        left, facts, seen = [model], self._facts, self._seen
        while left:
            value = left.pop()
            if len(facts) + len(left) > MOST:
                _raise(f"more than {MOST} parts")
            kind = type(value)
            if kind in QUICK:
                facts.append(_raise("a large text") if kind in (str, bytes) and len(value) > SMALL else value)
                continue
            if isinstance(value, PLAIN):
                facts.append([kind.__name__, repr(value)])
                continue
            if (known := seen.get(id(value))) is not None:
                facts.append(known[0])
                continue
            seen[id(value)] = [len(seen)], value
            if kind not in self._kinds:
                self._kinds[kind] = {len(self._kinds)}, self._reads(kind)
                facts.append((kind.__module__, kind.__qualname__))
            number, parts = self._kinds[kind]
            facts.append(number)
            left += reversed([*parts(value)])

    def _reads(self, kind: type) -> Callable[[Any], Parts]:
        """What tells the plain facts of a thing of a kind, and returns what it holds."""
        for kinds, parts in (
            (Tensor, self._tensor),
            (type, self._class),
            (enum.Enum, lambda value: (value.name,)),
            (np.ndarray, self._array),
            (torch.Generator, self._generator),
            (types.ModuleType, lambda value: (value.__name__,)),
        ):
            if issubclass(kind, kinds):
                return parts
        if issubclass(kind, logging.Logger) or _is_compilers(kind):
            return lambda value: ("by name",)
        for kinds, parts in (
            (types.FunctionType, self._function),
            (types.CodeType, self._code),
            (types.MethodType, lambda value: (value.__func__, value.__self__)),
            ((types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodDescriptorType), self._builtin),
            (functools.partial, lambda value: (value.func, value.args, value.keywords, vars(value))),
            ((staticmethod, classmethod), lambda value: (value.__func__,)),
            (property, lambda value: (value.fget, value.fset)),
            ((set, frozenset), self._set),
            (nn.Module, self._module),
        ):
            if issubclass(kind, kinds):
                return parts
        own = (lambda value: ()) if kind in CONTAINERS else self._object
        if issubclass(kind, dict | types.MappingProxyType):
            return lambda value: (*self._mapping(value), *own(value))
        if issubclass(kind, list | tuple | deque):
            return lambda value: (*self._sequence(value), *own(value))
        return self._object if _is_pure(kind) else _raise(f"an object of {kind.__module__}.{kind.__qualname__}")

    def _tensor(self, value: Tensor) -> Parts:
        self.objects.append(value)
        place = value.data_ptr() if value.layout is torch.strided else _raise("a sparse tensor")
        shape, dtype, device, counted = value.shape, value.dtype, value.device, not value.is_inference()
        self._facts.append((place, value._version if counted else None, *shape, *value.stride(), str(dtype), str(device)))
        if not counted:
            self._values.append(_bytes(value))
        elif device.type == "cpu" and dtype in NUMPYS and not (value.is_conj() or value.is_neg()):
            self._values.append(value.detach().numpy()[_places(shape)].tobytes())
        elif device.type != "meta" and value.numel():
            sample = value.detach()[_places(shape)].resolve_neg()
            sample = torch.view_as_real(sample.resolve_conj()) if sample.is_complex() else sample
            found = sample.reshape(-1).contiguous().view(torch.uint8)
            if device.type == "cpu":
                self._values.append(found.numpy().tobytes())
            else:
                self._samples.setdefault(device, []).append(found)
        return ()

    def _array(self, value: np.ndarray) -> Parts:
        if value.nbytes > SMALL or value.dtype == object:
            _raise("a large array, or one of objects")
        self._facts.append((value.shape, value.dtype.str))
        self._values.append(value.tobytes())
        return ()

    def _generator(self, value: torch.Generator) -> Parts:
        state = value.get_state().numpy().tobytes()
        self._facts.append(len(state))
        self._values.append(state)
        return ()

    def _code(self, value: types.CodeType) -> Parts:
        self.objects.append(value)
        return ()

    def _builtin(self, value: Any) -> Parts:
        owner = getattr(value, "__self__", None)
        self._facts.append(value.__qualname__)
        return () if isinstance(owner, types.ModuleType | type | None) else (owner,)

    def _set(self, value: Iterable[Any]) -> Parts:
        if not all(type(one) in QUICK for one in value):
            _raise("a set of objects")
        self._facts.append(sorted(map(repr, value)))
        return ()

    def _sequence(self, value: Sequence[Any]) -> Parts:
        self._facts.append(len(value) if len(value) <= MOST else _raise("a large container"))
        return value

    def _mapping(self, value: Mapping[Any, Any]) -> list[Any]:
        facts, parts, names = self._facts, list[Any](), tuple(value)
        if len(names) > MOST:
            _raise("a large container")
        if (known := self._names.get(names)) is not None:
            facts.append(known)
        elif all(type(name) is str for name in names):
            self._names[names] = frozenset({len(self._names)})
            facts.append(names)
        else:
            facts.append(len(names))
            parts += names
        for part in value.values():
            kind = type(part)
            if kind in QUICK:
                facts.append(part)
            elif kind in CONTAINERS and not part:
                facts.append(CONTAINERS[kind])
            elif kind is tuple and all(type(one) in QUICK for one in part):
                facts.append(part)
            else:
                parts.append(part)
        return parts

    def _module(self, value: nn.Module) -> Parts:
        if isinstance(value, torch.jit.ScriptModule):
            _raise("a scripted module")
        held = vars(value)
        if (compiled := held.get("_modules", {}).get("_orig_mod")) is not None and "dynamo_ctx" in held:
            return compiled, {k: v for k, v in held.items() if k.endswith("_hooks")}, value.training
        return self._object(value)

    def _object(self, value: Any) -> Parts:
        """Its class, where it is the first of it, its slots and its attributes."""
        kind, parts = type(value), list[Any]()
        if (slots := self._slots.get(kind)) is None:
            slots = self._slots[kind] = tuple(sorted(_slots(kind)))
            parts.append(kind)
        if slots:
            held = [name for name in slots if hasattr(value, name)]
            self._facts.append(tuple(held))
            parts += [getattr(value, name) for name in held]
        attributes = getattr(value, "__dict__", None)
        parts += self._mapping(attributes) if type(attributes) is dict else [attributes]
        return parts

    def _class(self, value: type) -> Parts:
        self.objects.append(value)
        for owner in value.__mro__:
            if _is_users(owner.__module__):
                self._facts.append(owner.__qualname__)
                yield from (part for name, part in vars(owner).items() if _is_part(name, part))

    def _function(self, value: types.FunctionType) -> Parts:
        if (compiled := vars(value).get("_torchdynamo_orig_callable")) is not None:
            yield from (value.__code__, compiled)
            return
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


def _is_compilers(kind: type) -> bool:
    """Whether a class is of torch's compiler, and of no module."""
    return kind.__module__.startswith("torch._dynamo") and not issubclass(kind, nn.Module)


@functools.lru_cache(maxsize=4096)
def _places(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The places of a tensor at which its values are read."""
    return tuple(slice(None, None, -(-size // SPREAD) or 1) for size in shape)


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

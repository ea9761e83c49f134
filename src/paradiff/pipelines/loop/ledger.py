# SPDX-License-Identifier: Apache-2.0
"""What a loop counts or collects: whole numbers and lengths in the containers and objects that its variables lead to.

A counter that has not reached its threshold, or a list that is read after the loop, changes no output that an audit could
compare. So numbers, truth values and lengths are read in the frames of the running pipeline call, from its variables, the
global names that its code uses and the attributes of its `self`, at most DEPTH containers or objects deep. Plain variables are
left to the reader of the source (reader.py), and tensors to the audit.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import operator
import sys
import types
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from paradiff.pipelines.kinds import PIPELINES

DEPTH, ITEMS, ENTRIES = 4, 32, 4000
"""Containers or objects that are entered one within the other; items that are read of each; entries in all."""
LARGE = 2**24
"""Numbers of the largest tensor whose norm is taken."""
FOREIGN = (
    "torch",
    "numpy",
    "PIL",
    "tqdm",
    "transformers",
    "tokenizers",
    "accelerate",
    "paradiff",
    "logging",
    "greenlet",
    "threading",
    "builtins",
)
REPLACED = "paradiff.pipelines.executors.builtins"
"""The module of what stands for built-in functions in the modules of loops."""
LEFT_OUT = {"scheduler", "_internal_dict", "_progress_bar_config", "__builtins__"}
ITERATORS = tuple({type(iter(v)) for v in ([], (), range(1), {}, set(), "", {}.values(), {}.items(), deque())})

HOSTS: Counter[type] = Counter(PIPELINES)
"""Classes of the objects whose attributes belong to their loop, each with the number of runs that know it."""

Ledger = dict[str, int | float | str | Tensor]
"""Numbers by their path from a variable, as `box.count` or `len(found)`; tensors are numbers that were not read yet."""


def ledger(*, tensors: Mapping[int, Any] | None = None, identities: bool = False) -> Ledger:
    """The numbers within reach of the pipeline call that runs in this thread, or greenlet, above the caller.

    Args:
        tensors: Objects by identity (`variables`), of which the norms of the tensors within are added, and of those within the
            pipeline's attributes, on their devices (`unread`). None for no norms.
        identities: Whether to add which tensors are within containers and objects, or that there are none.
    """
    entries = _Entries()
    entries.identities = identities
    seen: set[int] = set()
    for frame in frames():
        for name, value in list(frame.f_locals.items()):
            entries.tensors = tensors is not None and (is_host(value) or id(value) in tensors)
            if is_host(value):
                if id(value) not in seen:
                    seen.add(id(value))
                    for attribute, part in list(vars(value).items()):
                        if attribute not in LEFT_OUT:
                            _enter(f"{name}.{attribute}", part, 1, entries, seen)
            elif not isinstance(value, int | float | str):
                _enter(name, value, 0, entries, seen)
        entries.tensors = False
        for name, value in _globals(frame.f_code, frame.f_globals):
            _enter(name, value, 0, entries, seen)
    return entries


@contextlib.contextmanager
def entered(kind: type) -> Iterator[None]:
    """Takes objects of a class for hosts, until the end of the block."""
    HOSTS[kind] += 1
    try:
        yield
    finally:
        HOSTS[kind] -= 1
        if not HOSTS[kind]:
            del HOSTS[kind]


def _globals(code: types.CodeType, scope: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The values of the global names of a function, but for plain numbers and texts."""
    for name in code.co_names:
        value = scope.get(name)
        if (not callable(value) or isinstance(value, types.FunctionType | type)) and not isinstance(value, int | float | str):
            yield name, value


def is_host(value: Any) -> bool:
    """Whether a value is a pipeline, or another object whose loop a run walks."""
    return isinstance(value, tuple(HOSTS))


class _Entries(Ledger):
    """A ledger that is being made."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = self.identities = False


def unread(entries: Ledger) -> list[tuple[str, Tensor]]:
    """The numbers of a ledger that are on a device still, by their paths."""
    return [(path, value) for path, value in entries.items() if isinstance(value, Tensor)]


def variables() -> dict[int, Any]:
    """What the variables of the pipeline call above the caller refer to, by identity."""
    return {id(value): value for frame in frames() for value in frame.f_locals.values() if not isinstance(value, Tensor)}


def grown(first: Ledger, second: Ledger, third: Ledger) -> str | None:
    """The first path whose number grew, or shrank, by the same amount from one pass to the next, twice."""
    for path, value in third.items():
        a, b = first.get(path), second.get(path)
        numbers = [number for number in (a, b, value) if isinstance(number, int | float)]
        if len(numbers) == 3 and _steady(*numbers):
            return path
    return None


def differing(one: Ledger, other: Ledger, granted: float = 0.0) -> str | None:
    """The first path whose numbers differ; those that are no whole numbers by more than `granted`, relative to the larger."""
    return next((path for path, value in one.items() if path in other and not _same(value, other[path], granted)), None)


def _steady(a: float, b: float, c: float) -> bool:
    """Whether three numbers are equally far apart."""
    rounding = 0.0 if {type(a), type(b), type(c)} == {int} else 1e-9 * max(abs(a), abs(b), abs(c))
    return abs((c - b) - (b - a)) <= rounding < abs(b - a)


def _same(a: Any, b: Any, granted: float) -> bool:
    if isinstance(a, str) or isinstance(b, str) or {type(a), type(b)} == {int}:
        return a == b
    return a == b or (math.isnan(a) and math.isnan(b)) or abs(a - b) <= granted * max(abs(a), abs(b))


def frames() -> Iterator[types.FrameType]:
    """The frames of the pipeline's code, from the innermost one to its `__call__`."""
    frame: types.FrameType | None = sys._getframe(1)
    entered = False
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        own = module == "paradiff" or (module.startswith("paradiff.") and module != REPLACED)
        if own and entered:
            return
        if not own and module != REPLACED and module.split(".")[0] not in ("torch", "functools", "contextlib"):
            entered = True
            yield frame
        frame = frame.f_back


def _enter(path: str, value: Any, depth: int, entries: _Entries, seen: set[int]) -> None:
    """Adds the numbers at and below a value."""
    if isinstance(value, int | float):
        entries[path] = value
        return
    if isinstance(value, str):
        entries[f"len({path})"] = len(value)
        return
    if type(value) is Tensor and value.ndim == 0 and value.device.type == "cpu" and not value.is_complex():
        entries[path] = value.item()
        return
    if entries.identities and depth and (value is None or isinstance(value, Tensor)):
        entries[path] = "nothing" if value is None else f"tensor {id(value)}"
        return
    if entries.tensors and depth and type(value) is Tensor and value.is_floating_point() and value.numel() <= LARGE:
        entries[f"the norm of {path}"] = value.detach().norm()
        return
    if len(entries) >= ENTRIES or isinstance(value, bytes | complex | Tensor | nn.Module | types.ModuleType):
        return
    if isinstance(value, types.FunctionType | type) and value.__module__.split(".")[0] in (*FOREIGN, "diffusers"):
        return
    if value is None or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, list | deque | dict | set | tuple):
        entries[f"len({path})"] = len(value)
    elif isinstance(value, ITERATORS):
        entries[f"the rest of {path}"] = operator.length_hint(value, 0)
        return
    elif type(value) is itertools.count:
        entries[path] = repr(value)
        return
    elif isinstance(value, io.StringIO | io.BytesIO) and not value.closed:
        entries[f"the place in {path}"] = value.tell()
    if depth < DEPTH:
        for name, part in itertools.islice(_parts(path, value), ITEMS):
            _enter(name, part, depth + 1, entries, seen)


def _parts(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values within a value, with their paths."""
    if isinstance(value, dict):
        yield from ((f"{path}[{key!r}]", part) for key, part in list(value.items()) if isinstance(key, str | int))
    elif isinstance(value, list | deque | tuple):
        yield from ((f"{path}[{place}]", part) for place, part in enumerate(list(itertools.islice(value, ITEMS))))
    elif isinstance(value, types.GeneratorType):
        if value.gi_frame is not None:
            yield from ((f"{path}.{name}", part) for name, part in list(value.gi_frame.f_locals.items()))
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f"{path}.{name}", cell.cell_contents
            except ValueError:
                continue  # The cell is empty yet.
        yield from ((f"{path}.{name}", part) for name, part in list(vars(value).items()))
        yield from _globals(value.__code__, value.__globals__)
    elif isinstance(value, type):
        own = ((name, part) for name, part in list(vars(value).items()) if not name.startswith("__"))
        yield from ((f"{path}.{name}", part) for name, part in own if not callable(part))
    elif isinstance(value, types.MethodType | types.BuiltinMethodType):
        yield path, value.__self__
    elif type(value).__module__.split(".")[0] not in FOREIGN and not hasattr(value, "set_timesteps"):
        yield from ((f"{path}.{name}", part) for name, part in list(getattr(value, "__dict__", {}).items()))
        slots = [name for cls in type(value).__mro__ for name in _listed(vars(cls).get("__slots__", ()))]
        yield from ((f"{path}.{name}", getattr(value, name)) for name in slots if hasattr(value, name))


def _listed(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)

# SPDX-License-Identifier: Apache-2.0
"""What passes change in objects of Python's own, in memory and in files, is that of the plain call, sample and all."""

from __future__ import annotations

import collections
import contextvars
import csv
import ctypes
import decimal
import functools
import io
import logging
import logging.handlers
import mmap
import multiprocessing
import queue
import sqlite3
import tempfile
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from adversary import Net
from torch import Tensor, nn

from paradiff import parallelize, parasolver


class Structure(ctypes.Structure):
    """A number in C."""

    _fields_ = (("n", ctypes.c_double),)


class Kept:
    """What is kept for a key, and for an object."""

    n = 0


class Records(logging.Handler):
    """A handler that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def number(held: Any) -> None:
    """Adds one to the first of some numbers."""
    held[0] += 1


def byte(held: Any) -> None:
    held[0] = held[0] + 1 & 255


def numbers(held: Any) -> list[Any]:
    return list(held[:])


def logger(handler: logging.Handler) -> tuple[logging.Logger, Any]:
    found = logging.Logger("a loop's own")
    found.addHandler(handler)
    return found, handler


def more(held: Any, name: str) -> None:
    setattr(held, name, getattr(held, name) + 1)


def written() -> tuple[Any, io.StringIO]:
    text = io.StringIO()
    return csv.writer(text), text


def rows(connection: sqlite3.Connection) -> Any:
    return connection.execute("select count(*) from a").fetchone()


def database() -> sqlite3.Connection:
    found = sqlite3.connect(":memory:")
    found.execute("create table a(x)")
    return found


def whole(file: Any) -> Any:
    place = file.tell()
    file.seek(0)
    return file.read(), file.seek(place)


def viewed() -> Any:
    held = {"n": 0}
    return types.MappingProxyType(held), held.__setitem__


def weight(count: int = 8) -> nn.Parameter:
    return nn.Parameter(torch.ones(count))


@torch.enable_grad()
def add_up(held: nn.Parameter) -> None:
    (0.25 * held).square().sum().backward()


def gradient(held: Tensor) -> float:
    return 0.0 if held.grad is None else float(held.grad.sum())


def begun() -> Tensor:
    held = torch.zeros(8)
    held.grad = torch.zeros(8)
    return held


KEY = Kept()
KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    # name: (what makes it, what a pass does with it, what is in it)
    "a deque": (collections.deque, lambda held: held.append(1), len),
    "a UserDict": (collections.UserDict, lambda held: held.update({len(held): 1}), len),
    "a queue": (queue.Queue, lambda held: held.put(1), lambda held: held.qsize()),
    "a simple queue": (queue.SimpleQueue, lambda held: held.put(1), lambda held: held.qsize()),
    "an array of objects": (lambda: np.array([0, None], dtype=object), number, numbers),
    "a view": (lambda: memoryview(bytearray(4)), byte, numbers),
    "mapped memory": (lambda: mmap.mmap(-1, 4), byte, numbers),
    "a number in C": (lambda: ctypes.c_int(0), lambda held: more(held, "value"), lambda held: held.value),
    "numbers in C": (lambda: (ctypes.c_double * 2)(), number, numbers),
    "a structure in C": (Structure, lambda held: more(held, "n"), lambda held: held.n),
    "a shared number": (lambda: multiprocessing.Value("d", 0), lambda held: more(held, "value"), lambda held: held.value),
    "a storage": (lambda: torch.zeros(2).untyped_storage(), byte, lambda held: held.tolist()),
    "weak keys": (
        weakref.WeakKeyDictionary,
        lambda held: held.update({KEY: held.get(KEY, 0) + 1}),
        lambda held: held.get(KEY, 0),
    ),
    "weak values": (weakref.WeakValueDictionary, lambda held: held.update({len(held): KEY}), len),
    "a view of a dict": (viewed, lambda held: held[1]("n", held[0]["n"] + 1), lambda held: held[0]["n"]),
    "a writer of rows": (written, lambda held: held[0].writerow([1]), lambda held: len(held[1].getvalue())),
    "a buffer of records": (
        lambda: logger(logging.handlers.MemoryHandler(1000)),
        lambda held: held[0].warning("a pass"),
        lambda held: len(held[1].buffer),
    ),
    "a handler's own list": (lambda: logger(Records()), lambda held: held[0].warning("a pass"), lambda held: len(held[1].told)),
    "a database": (database, lambda held: held.execute("insert into a values(1)"), rows),
    "a file": (functools.partial(tempfile.TemporaryFile, "w+"), lambda held: held.write("x"), whole),
    "a named file": (functools.partial(tempfile.NamedTemporaryFile, "w+"), lambda held: held.write("x"), whole),
    "a file in memory": (tempfile.SpooledTemporaryFile, lambda held: held.write(b"x"), whole),
    "a variable of the context": (
        lambda: contextvars.ContextVar("passes", default=0),
        lambda held: held.set(held.get() + 1),
        lambda held: held.get(),
    ),
    "a precision": (decimal.Context, lambda held: more(held, "prec"), lambda held: held.prec),
    "a semaphore": (lambda: threading.Semaphore(0), lambda held: held.release(), lambda held: vars(held)["_value"]),
    "a gradient": (weight, add_up, gradient),
    "a large gradient": (lambda: weight(9000), add_up, gradient),
    "a gradient that is there": (begun, lambda held: held.grad.add_(0.25), gradient),
    "a tensor's own number": (
        lambda: torch.zeros(2),
        lambda held: vars(held).update(passes=vars(held).get("passes", 0) + 1),
        lambda held: vars(held).get("passes", 0),
    ),
    "a cache's counts": (
        lambda: functools.lru_cache(str),
        lambda held: held(held.cache_info().currsize),
        lambda held: held.cache_info().misses,
    ),
    "an optimizer": (
        lambda: torch.optim.Adam([nn.Parameter(torch.ones(8192))]),
        lambda held: (held.zero_grad(), held.step(lambda: held.param_groups[0]["params"][0].square().sum().backward())),
        lambda held: (len(held.state), float(held.param_groups[0]["params"][0].detach().sum())),
    ),
}


def loop_of(kind: str, place: str) -> tuple[Callable[[Tensor], Tensor], Any]:
    """A loop whose passes, or whose network's hook, change an object that changes the sample; and the object."""
    make, change, read = KINDS[kind]
    held, net, scheduler = make(), Net(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    def factor() -> float:
        return 1 + 0.003 * (sum(map(ord, str(read(held)))) % 97)

    @torch.no_grad()
    def loop(x: Tensor) -> Tensor:
        scheduler.set_timesteps(20)
        for t in scheduler.timesteps:
            if place == "a loop":
                change(held)
            x = scheduler.step(net(x, t), t, x)[0]
        return x * factor() if place == "a loop" else x

    def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        change(held)
        return output * factor()

    if place == "a hook":
        net.register_forward_hook(hook)
    return loop, held


@pytest.mark.parametrize("place", ["a loop", "a hook"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_passes_change_is_as_after_the_plain_call(kind: str, place: str) -> None:
    if (kind, place) == ("an optimizer", "a hook"):
        pytest.skip("its step wants gradients, which a hook of a network has none of")
    x, read = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)), KINDS[kind][2]
    loop, first = loop_of(kind, place)
    plain, left = [loop(x), loop(x)], read(first)
    loop, held = loop_of(kind, place)
    run = parallelize(loop, parasolver(window=8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = [run(x), run(x)]
    assert read(held) == left
    assert all(map(torch.equal, found, plain))
    assert [report.executor for report in run.reports] == ["sequential"] * 2
    if "file" in kind:
        first.close()
        held.close()

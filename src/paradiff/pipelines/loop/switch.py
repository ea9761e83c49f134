# SPDX-License-Identifier: Apache-2.0
"""A scheduler that answers as its proxies do, wherever a loop finds it.

A pipeline's loop asks its pipeline for the scheduler, so a proxy can stand there. The loop of a function, or of an object of
any other kind, has the scheduler by any name: an argument, a variable that functions share, an attribute of a part. So for the
length of a run the scheduler object itself gets a class whose attributes are those of a proxy: that of the lane which runs, or
else that of the run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import greenlet

from paradiff.errors import Unsupported

SWITCH = "_paradiff_switch"
"""The name under which the class of a scheduler that answers as a proxy has its switch."""

TURN = threading.Lock()
"""Held while a scheduler's class is looked at and exchanged."""


class Switch:
    """A user's scheduler object, and what answers in its place.

    Args:
        scheduler: The scheduler.

    Attributes:
        scheduler: The scheduler.
        proxy: What answers outside of lanes; None for the scheduler itself.
        noted: Told the name of each attribute that is read.
        real: A shallow copy of the scheduler, of its own class, for the length of a run; the scheduler itself outside of one.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = self.real = scheduler
        self.proxy: Any = None
        self.noted: Callable[[str], None] = lambda name: None

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Lets proxies answer, until the end of the block.

        Raises:
            Unsupported: If those of another call do.
        """
        scheduler = self.scheduler
        with TURN:
            kind = type(scheduler)
            if SWITCH in vars(kind):
                raise Unsupported(
                    f"another parallel call walks over the same {kind.__name__} object at this time; give each call a "
                    "scheduler of its own, a copy.deepcopy of it"
                )
            real = object.__new__(kind)
            vars(real).update(vars(scheduler))
            self.real = real
            object.__setattr__(scheduler, "__class__", _answering(kind, self))
        try:
            yield
        finally:
            with TURN:
                object.__setattr__(scheduler, "__class__", kind)
                self.real = scheduler

    @contextlib.contextmanager
    def to(self, proxy: Any) -> Iterator[None]:
        """Lets this proxy answer outside of lanes, until the end of the block."""
        self.proxy = proxy
        try:
            yield
        finally:
            self.proxy = None

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Lets the scheduler itself answer outside of lanes, until the end of the block: for what a user's callback calls."""
        proxy, self.proxy = self.proxy, None
        try:
            yield
        finally:
            self.proxy = proxy

    def answering(self) -> Any:
        """What answers now."""
        running = greenlet.getcurrent()
        own = vars(running).get("scheduler") if hasattr(running, "place_of") else None
        if own is not None:
            return own
        return self.real if self.proxy is None else self.proxy


def _answering(kind: Any, switch: Switch) -> type:
    """A class of the scheduler whose attributes are those of what answers, in the thread of the run; its own in others."""

    here = threading.get_ident()

    def get(scheduler: Any, name: str) -> Any:
        if threading.get_ident() != here:
            return kind.__getattribute__(scheduler, name)
        switch.noted(name)
        return getattr(switch.answering(), name)

    def put(scheduler: Any, name: str, value: Any) -> None:
        if threading.get_ident() != here:
            kind.__setattr__(scheduler, name, value)
        else:
            setattr(switch.answering(), name, value)

    def remove(scheduler: Any, name: str) -> None:
        if threading.get_ident() != here:
            kind.__delattr__(scheduler, name)
        else:
            delattr(switch.answering(), name)

    namespace = {"__getattribute__": get, "__setattr__": put, "__delattr__": remove, "__module__": kind.__module__}
    namespace[SWITCH] = switch
    return type(kind)(kind.__name__, (kind,), namespace)

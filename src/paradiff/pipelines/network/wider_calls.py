# SPDX-License-Identifier: Apache-2.0
"""Network calls on several states, made and timed beside a loop's own ones: what a window's calls would take.

After a call of its own a network is called once more, on copies of its input, and what that returns is let go. What the call
changed is put back: random states, and what networks of a user's own keep.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree

from paradiff.errors import Unsupported
from paradiff.pipelines.loop.random_state import Snapshot
from paradiff.pipelines.network.batched_call import MAIN_INPUTS, batched_call
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.network.memory import Memory
from paradiff.pipelines.network.origin import is_users
from paradiff.pipelines.tensor.windowed import Windowed


@dataclasses.dataclass(eq=False)
class _Round:
    """What windowed inputs belong to, as network/boundary.py has it."""

    batching: Batching


class _Cut(BaseException):
    """A call takes too long."""


class WiderCalls:
    """The calls of some networks, from `begin` on.

    Args:
        networks: The networks by name.

    Attributes:
        width: The states of a further call after each of the networks' own; below 2 for none.
        own: Seconds of the networks' own calls since `begin`.
        last: Seconds of the last of these.
        wider: Seconds of the further calls, with what was put back after them.
        calls: The seconds of the further calls alone.
        cut: Whether one was cut short, since it took longer than was asked about.
        failed: What a further call raised; None if none did.
        batching: Counts the further calls.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.width = 1
        self.own = self.last = self.wider = self.calls = 0.0
        self.cut = False
        self._most: float | None = None
        self.failed: Exception | None = None
        self.batching = Batching(check="off")
        self._inside = False
        self._begun: float | None = None
        self._thread = threading.get_ident()
        self._users = {name: network for name, network in networks.items() if has_users_parts(network)}
        self._handles: list[Any] = []
        for name, network in networks.items():
            self._handles.append(network.register_forward_pre_hook(self._before))
            self._handles.append(network.register_forward_hook(self._hook(name), with_kwargs=True))

    def begin(self, width: int = 1, most: float | None = None) -> None:
        """Times the networks' calls from here on.

        Args:
            width: The states of a further call after each; 1 for none.
            most: How many times as long as a network's own call a further one may take before it is cut short, between two of
                its modules; None for no bound.
        """
        self.width, self._most, self.cut = width, most, False
        self.own = self.last = self.wider = self.calls = 0.0

    def remove(self) -> None:
        """Leaves the networks as they were found."""
        while self._handles:
            self._handles.pop().remove()

    @property
    def _idle(self) -> bool:
        return self._inside or self.failed is not None or threading.get_ident() != self._thread

    def _before(self, network: nn.Module, args: Any) -> None:
        if not self._idle:
            self._begun = time.perf_counter()

    def _hook(self, name: str) -> Any:
        def ended(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            begun, self._begun = self._begun, None
            if self._idle or begun is None:
                return
            wait(output)
            now = time.perf_counter()
            self.last = now - begun
            self.own += self.last
            if self.width < 2:
                return
            self._inside = True
            try:
                self._call(name, network, args, kwargs)
            except Exception as error:
                self.failed = error
            finally:
                self._inside = False
                self.wider += time.perf_counter() - now

        return ended

    def _call(self, name: str, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = _Round(self.batching)
        random = Snapshot({})
        memory = Memory([(name, network)]) if name in self._users else None
        try:
            args, kwargs = self._copies(args, kwargs, run)
            begin = time.perf_counter()
            with self._cut_after(begin):
                wait(batched_call(self.batching, type(network).__name__, network.forward, args, kwargs))
            self.calls += time.perf_counter() - begin
        finally:
            random.restore()
            if memory is not None:
                memory.restore()

    @contextlib.contextmanager
    def _cut_after(self, begin: float) -> Iterator[None]:
        """Ends the block where it takes too long, when a module is called."""
        if self._most is None:
            yield
            return
        latest = begin + self._most * self.last

        def look(module: nn.Module, args: Any) -> None:
            if time.perf_counter() > latest and threading.get_ident() == self._thread:
                raise _Cut

        handle = register_module_forward_pre_hook(look)
        try:
            yield
        except _Cut:
            self.cut = True
        finally:
            handle.remove()

    def _copies(self, args: tuple[Any, ...], kwargs: dict[str, Any], run: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with copies of its main input, which tells the number of rows."""
        named: list[tuple[Any, Any]] = [*enumerate(args), *((key, kwargs[key]) for key in MAIN_INPUTS if key in kwargs)]
        for place, value in [*named, *kwargs.items()]:
            if not isinstance(value, Tensor) and not (isinstance(value, list) and value and isinstance(value[0], Tensor)):
                continue
            copies = _pytree.tree_map_only(Tensor, lambda leaf: Windowed.wrap(torch.stack([leaf] * self.width), run), value)
            if isinstance(place, int):
                return (*args[:place], copies, *args[place + 1 :]), kwargs
            return args, {**kwargs, place: copies}
        raise Unsupported(f"{type(self).__name__} was given a call without a tensor")


def has_users_parts(network: nn.Module) -> bool:
    """Whether a network, or a module within it, is of no known library."""
    return any(is_users(type(module).__module__) for module in network.modules())


def wait(value: Any) -> bool:
    """Waits for what a device computes, by reading a number of it; whether there is one."""
    for leaf in _pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            leaf = leaf.window if isinstance(leaf, Windowed) else leaf
            leaf.flatten()[-1:].tolist()
            return True
    return False

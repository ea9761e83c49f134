# SPDX-License-Identifier: Apache-2.0
"""Hosts that are no diffusers pipelines: an object with a method that walks, such as a robot's policy, and a function."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from paradiff.pipelines.host.host import Host, device_of
from paradiff.pipelines.loop.ledger import entered
from paradiff.pipelines.loop.switch import Switch

OWNER = "_paradiff_host"
"""The name of the first argument of a function's call, which is its host."""

Look = Callable[[Mapping[str, Any]], tuple[Any, dict[str, nn.Module]]]
"""Finds the scheduler and the networks of a call by its arguments, or raises a ValueError."""


class LoopHost(Host):
    """A host whose loop has its scheduler by any name. See `Host`.

    Args:
        owner: The object.
        kind: A class derived from its own, whose `__call__` is the method that walks.
        entry: The name of that method in the object's own class.
        look: Finds the scheduler and the networks.
        arguments: The arguments of the call by name.
    """

    def __init__(self, owner: Any, kind: Any, entry: str, look: Look, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__(owner, kind)
        self.entry, self._look = entry, look
        self._arguments = {} if arguments is None else arguments

    def of(self, arguments: Mapping[str, Any]) -> LoopHost:
        return LoopHost(self.owner, self.kind, self.entry, self._look, arguments)

    @functools.cached_property
    def _found(self) -> tuple[Switch, dict[str, nn.Module]]:
        scheduler, networks = self._look(self._arguments)
        return Switch(scheduler), networks

    @property
    def scheduler(self) -> Any:
        return self._found[0].real

    @property
    def switch(self) -> Switch:
        return self._found[0]

    @property
    def networks(self) -> dict[str, nn.Module]:
        return dict(self._found[1])

    @property
    def device(self) -> torch.device:
        return device_of(self._found[1].values())

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        with self._found[0].on(), entered(type(self.owner)):
            yield

    @contextlib.contextmanager
    def standing(self, proxy: Any) -> Iterator[None]:
        with self._found[0].to(proxy):
            yield

    def present(self, owner: Any, proxy: Any) -> Any:
        return proxy

    def copied(self, proxy: Any) -> Any:
        return copy.copy(self.owner)


class Function:
    """A function as the owner of a chain.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


def method_kind(owner: Any, entry: str) -> type:
    """A class derived from an object's own, whose `__call__` is the method of this name."""
    kind = type(owner)
    walking = getattr(kind, entry)
    return types.new_class(kind.__name__, (kind,), {}, lambda names: names.update(__call__=walking, __module__=kind.__module__))


def function_kind(function: Callable[..., Any]) -> type:
    """A class whose `__call__` is a function, behind a first argument that it does not get."""
    signature = inspect.signature(function)
    ahead = [name for name, parameter in signature.parameters.items() if parameter.kind is parameter.POSITIONAL_ONLY]

    @functools.wraps(function)
    def call(_host: Any, *args: Any, **named: Any) -> Any:
        return function(*args, *[named.pop(name) for name in ahead if name in named], **named)

    own = inspect.Parameter(OWNER, inspect.Parameter.POSITIONAL_ONLY)
    vars(call)["__signature__"] = signature.replace(parameters=[own, *signature.parameters.values()])
    name = getattr(function, "__name__", type(function).__name__)
    return type(name, (Function,), {"__call__": call, "__module__": function.__module__})

# SPDX-License-Identifier: Apache-2.0
"""The host of a chain: an object, its method that walks over a scheduler's times, and its networks."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from paradiff.pipelines.loop.source import kept, obstacles, reads_index
from paradiff.pipelines.loop.switch import Switch
from paradiff.pipelines.signature import bound, plain_call


def attributes_of(owner: Any) -> dict[str, Any]:
    """The attributes of this very object, which may answer for another one (executors/owner.py)."""
    return object.__getattribute__(owner, "__dict__")


def device_of(networks: Iterable[nn.Module]) -> torch.device:
    """Where the first of some networks' weights are; the CPU where they have none."""
    tensors = (tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


class Host:
    """A diffusers pipeline, whose scheduler is its attribute and whose `__call__` walks.

    Args:
        owner: The object.
        kind: Its class, or one derived from it; its `__call__` is the method that walks.

    Attributes:
        owner: The object.
        kind: Its class, or one derived from it; its `__call__` is the method that walks.
        entry: The name of that method in the object's own class.
        call: `call(owner, **arguments)`, the plain call.
    """

    entry = "__call__"

    def __init__(self, owner: Any, kind: Any) -> None:
        self.owner, self.kind = owner, kind
        self.call = plain_call(kind)
        self._switch: Switch | None = None  # while proxies stand for the scheduler

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.kind.__name__

    @property
    def scheduler(self) -> Any:
        """The scheduler whose times the method walks over."""
        return attributes_of(self.owner)["scheduler"] if self._switch is None else self._switch.real

    @property
    def switch(self) -> Switch | None:
        """What answers for the scheduler object in a try; None outside of one."""
        return self._switch

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The networks by name, whether or not they are registered as components."""
        return {name: part for name, part in vars(self.owner).items() if isinstance(part, nn.Module)}

    @property
    def device(self) -> torch.device:
        """Where the states are: where the owner says, or, where it cannot say, as a pipeline of plain modules, its networks."""
        found = getattr(self.owner, "device", None)  # diffusers' own property fails where a module has none
        return found if isinstance(found, torch.device) else device_of(self.networks.values())

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name.

        Raises:
            TypeError: If they do not fit, as the call raises it.
        """
        return bound(self.kind, self.owner, args, kwargs)

    def of(self, arguments: Mapping[str, Any]) -> Host:
        """The host for a call with these arguments."""
        return self

    def scopes(self) -> list[dict[str, Any]]:
        """The global names of the modules in which the loop may be."""
        return [inspect.unwrap(self.call).__globals__]

    def obstacles(self) -> list[str]:
        """The reasons, as clauses, why the loop has no parallel form, as its source shows them."""
        return obstacles(self.kind)

    def index_reads(self) -> list[str] | None:
        """The lines in which the loop uses its step number; None if there is no readable loop."""
        return reads_index(self.kind)

    def kept(self) -> list[str]:
        """The names of what a pass sets, other than the state, and what follows the loop reads, as far as its source shows."""
        return kept(self.kind)

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """A try, in which proxies stand for the scheduler, whoever holds it.

        Raises:
            Unsupported: If those of another call do.
        """
        switch = Switch(attributes_of(self.owner)["scheduler"])
        with switch.on():
            self._switch = switch
            try:
                yield
            finally:
                self._switch = None

    @contextlib.contextmanager
    def standing(self, proxy: Any) -> Iterator[None]:
        """Lets a proxy stand for the scheduler, in the object itself and wherever else it is held."""
        scheduler = self.owner.scheduler
        object.__setattr__(self.owner, "scheduler", proxy)
        try:
            with contextlib.nullcontext() if self._switch is None else self._switch.to(proxy):
                yield
        finally:
            object.__setattr__(self.owner, "scheduler", scheduler)

    def present(self, owner: Any, proxy: Any) -> Any:
        """The scheduler that the object, or a copy of it, has at present, while a proxy stands for it."""
        return vars(owner).get("scheduler")

    def copied(self, proxy: Any) -> Any:
        """A shallow copy of the object for a call of its own, in which a proxy stands for the scheduler."""
        owner = copy.copy(self.owner)
        attributes = vars(owner)
        attributes["scheduler"] = proxy
        for name, value in attributes.items():
            if hasattr(value, "set_state") and hasattr(value, "prepare_inputs"):  # a guider holds its step number
                attributes[name] = copy.copy(value)
        return owner

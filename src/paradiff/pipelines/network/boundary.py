# SPDX-License-Identifier: Apache-2.0
"""The boundary before a network's `forward`: calls with windowed tensors are batched (batched_call.py), all others pass.

Other methods that a pipeline calls of its networks (methods.py), such as an autoencoder's `encode`, have a boundary, too, and
modules within a network have one before their `forward` where a pipeline calls them by themselves, as it may a text encoder's
embedding. Their calls before the loop are made once, like those of a network.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from contextvars import ContextVar, Token
from typing import Any

import greenlet
from torch import nn

from paradiff.pipelines.network.batched_call import batched_call
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.network.methods import SHARED, inner_modules, other_methods
from paradiff.pipelines.network.tree import windowed_inputs
from paradiff.pipelines.tensor.windowed import common_run

_BATCHING: ContextVar[Batching | None] = ContextVar("batching", default=None)
"""The batching of the run whose `with` block of boundaries was entered last."""


def install(modules: Iterable[nn.Module], batching: Batching | None = None, names: Iterable[str] = ()) -> Installed:
    """Puts a boundary before the `forward` of each module, until `remove()` or the end of a `with` block.

    Other methods of a module get one if they have one of the `names`, and so do modules within it that have one, or that one of
    these methods returns.

    Calls without windowed inputs pass through, so runs and threads may share modules: each run installs boundaries for itself,
    and the last run that removes them restores the `forward`. A module within a compiled one gets no boundary. Within the
    `with` block, calls that pass through are counted by `batching`.
    """
    return Installed(modules, batching, names)


def ordinary(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A network call without a window, counted by the run's batching."""
    batching = _BATCHING.get()
    return forward(*args, **kwargs) if batching is None else batching.ordinary(forward, args, kwargs)


class Installed:
    """The boundaries of one run. See `install`."""

    def __init__(self, modules: Iterable[nn.Module], batching: Batching | None, names: Iterable[str] = ()) -> None:
        self._batching, names = batching, list(names)
        self._token: Token[Batching | None] | None = None
        listed = list({id(module): module for module in modules}.values())
        whole = {part for module in listed for part in module.modules()}
        inner = {id(part) for module in whole if _is_compiled(module) for part in module.modules() if part is not module}
        self._records: list[_Record] = []
        self._others: list[_Record] = []
        self._left = {id(module) for module in listed} | inner  # that have one, or are to have none
        if batching is not None:
            batching.met = self._meet
        with _LOCK:
            for module in listed:
                if id(module) not in inner:
                    self._records.append(_Record.of(module))
                own = getattr(module, "_orig_mod", module)  # that of a compiled module
                self._others += [_Record.of(own, name) for name in other_methods(own, names)]
        for module in listed:
            for part in inner_modules(module, names):
                self._meet(part)

    def _meet(self, module: nn.Module) -> None:
        """Puts a boundary before a module within a network that the pipeline calls by itself."""
        if id(module) not in self._left and not _is_compiled(module):
            self._left.add(id(module))
            with _LOCK:
                self._others.append(_Record.of(module, "forward"))

    def replaced(self) -> str | None:
        """The class of a module whose boundary is no longer in place; None if all are."""
        lost = (record.module for record in self._records if not record.in_place)
        return next((type(module).__name__ for module in lost), None)

    def remove(self) -> None:
        """Removes the run's boundaries. One that another run shares stays until that run removes it."""
        with _LOCK:
            records, self._records, self._others = [*self._others, *self._records], [], []
            for record in records:
                record.release()

    def __enter__(self) -> Installed:
        self._token = _BATCHING.set(self._batching)
        return self

    def __exit__(self, *error: object) -> None:
        if self._token is not None:
            _BATCHING.reset(self._token)
            self._token = None
        self.remove()


_LOCK = threading.Lock()


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module.__dict__.get("_compiled_call_impl") is not None


class _Record:
    """The boundary before one method of a module, and the number of runs that use it.

    It is found through the function in the module's dict.
    """

    def __init__(self, module: nn.Module, attribute: str, name: str | None) -> None:
        self.module, self.attribute, self.count = module, attribute, 0
        self.had = self.attribute in module.__dict__
        self.before = getattr(module, self.attribute)
        self.boundary = _boundary(module, self.before) if name is None else _other_boundary(name, self.before)
        self.boundary.record = self  # pyright: ignore[reportFunctionMemberAccess]
        module.__dict__[self.attribute] = self.boundary

    @classmethod
    def of(cls, module: nn.Module, name: str | None = None) -> _Record:
        """The record of the boundary before a method; None for `forward`."""
        # `module.compile()` compiles the call around `forward`; the boundary belongs before it.
        compiled = module.__dict__.get("_compiled_call_impl") is not None
        record = None
        for attribute in ("forward", "_compiled_call_impl") if name is None else (name,):
            present = module.__dict__.get(attribute)
            found = getattr(present, "record", None)
            # A function that wraps the boundary may have copied its attributes.
            if isinstance(found, cls) and found.boundary is present:
                record = found
        record = record or cls(module, name or ("_compiled_call_impl" if compiled else "forward"), name)
        record.count += 1
        return record

    @property
    def in_place(self) -> bool:
        """Whether the module's calls still meet the boundary."""
        return self.module.__dict__.get(self.attribute) is self.boundary

    def release(self) -> None:
        self.count -= 1
        if self.count or not self.in_place:
            return  # Other runs use it, or another library has replaced the function since.
        if self.had:
            self.module.__dict__[self.attribute] = self.before
        else:
            del self.module.__dict__[self.attribute]


def _boundary(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    name = type(getattr(module, "_orig_mod", module)).__name__

    @functools.wraps(forward)
    def boundary(*args: Any, **kwargs: Any) -> Any:
        route = getattr(greenlet.getcurrent(), "route", None)
        if route is not None:
            return route(module, forward, args, kwargs)
        leaves = windowed_inputs(args, kwargs)
        if not leaves:
            return ordinary(forward, args, kwargs)
        return batched_call(common_run(leaves).batching, name, forward, args, kwargs)

    return boundary


def _other_boundary(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """The boundary before a method that is not `forward`."""

    @functools.wraps(method)
    def boundary(*args: Any, **kwargs: Any) -> Any:
        batching = _BATCHING.get()
        route = getattr(greenlet.getcurrent(), "route_other", None)
        if batching is None or (route is None and name not in SHARED and not batching.log.open):
            return method(*args, **kwargs)
        result = (route or batching.other)(method, args, kwargs, name in SHARED)
        if isinstance(result, nn.Module):
            batching.met(result)
        return result

    return boundary

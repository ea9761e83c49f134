# SPDX-License-Identifier: Apache-2.0
"""The chains of a server's requests: tables with their coefficients on the device, kept for those that ask for the same."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Generic, TypeVar

import torch

from paradiff.chain.noise import Keyed
from paradiff.chain.step import Step
from paradiff.chain.table import Table
from paradiff.methods.collocation.method import CollocationMethod
from paradiff.serving.model import ServedModel
from paradiff.serving.request import SampleRequest, method_of
from paradiff.solver.protocol import Method, Problem, Walks

MOST = 64
"""Chains that are kept, and methods of each."""

Kept = TypeVar("Kept")


class Store(Generic[Kept]):
    """What is made once under a key and kept; of many, what was asked for longest ago goes. Any thread may ask; it waits only
    for one that is making the same."""

    def __init__(self) -> None:
        self._lock, self._found = threading.Lock(), OrderedDict[Hashable, Kept]()
        self._making: dict[Hashable, threading.Lock] = {}

    def get(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What is kept under a key, or is made now."""
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
            making = self._making.setdefault(key, threading.Lock())
        try:
            with making:
                with self._lock:
                    if key in self._found:
                        return self._found[key]
                found = make()
                with self._lock:
                    self._found[key] = found
                    if len(self._found) > MOST:
                        self._found.popitem(last=False)
                return found
        finally:
            with self._lock:
                self._making.pop(key, None)


class Chain:
    """One chain.

    Args:
        table: The sampler.
        shape: `[...]` of one sample.
        device: Where states live.
        resolution: Relative precision of the network's outputs; None for that of the states.

    Attributes:
        table: As given.
        step: Its coefficients on the device, in float32.
        past: Earlier states that are kept of a walk: those that a step reads, and one for a guess.
    """

    def __init__(self, table: Table, shape: tuple[int, ...], device: torch.device, resolution: float | None) -> None:
        self.table, self._shape, self._device, self._resolution = table, shape, device, resolution
        self.step = Step(table, device, torch.float32)
        self.past = max(1, table.band - 1)
        self._methods = Store[tuple[Method, bool]]()

    def problem(self, noise: object) -> Problem:
        """The problem of one request."""
        return Problem(
            table=self.table,
            noise=noise,  # pyright: ignore[reportArgumentType]
            device=self._device,
            resolution=self._resolution,
        )

    def method(self, name: str, window: int | None, tolerance: float | None) -> tuple[Method, bool]:
        """A method, and whether its solver lets others walk in its place (`Walks`).

        Raises:
            ValueError: If it does not fit the chain.
        """
        return self._methods.get((name, window, tolerance), lambda: self._tried(method_of(name, window, tolerance)))

    def _tried(self, method: Method) -> tuple[Method, bool]:
        if isinstance(method, CollocationMethod):
            method = replace(method, control=method.control_at_any_window(self.table))
        method.edges(self.table)
        if method.width(self.table) == 1:
            return method, method.solves_chain
        solver = method.prepare(self.problem(Keyed(self._shape, [0]))).solver(0)
        return method, isinstance(solver, Walks) and solver.resizable


class Chains:
    """The chains of a model.

    Args:
        model: The model.
        device: Where states live.
    """

    def __init__(self, model: ServedModel, device: torch.device) -> None:
        self._model, self._device = model, device
        self._resolution = None if model.dtype is None else torch.finfo(model.dtype).eps
        self._chains = Store[Chain]()

    def of(self, request: SampleRequest) -> Chain:
        """The chain of a request.

        Raises:
            ValueError: If the model has none.
        """
        key = request.sampler, request.steps, request.eta
        return self._chains.get(key, lambda: self._made(request))

    def _made(self, request: SampleRequest) -> Chain:
        return Chain(self._model.chain(request), tuple(self._model.shape), self._device, self._resolution)

# SPDX-License-Identifier: Apache-2.0
"""Timesteps whose iteration is decided by an executor.

A loop over the timesteps makes a pass of its body for each value that the iteration yields. `RoundTimesteps` hold the true
values, and their iteration is that of a `LoopHandler`: after the first pass it yields the times of the solver's rounds.

An iteration over the timesteps need not be the denoising loop: pipelines also walk them to prepare something. `Iterations`
tells the two apart: values are yielded in order until a step is taken between two of them; the innermost such iteration is the
loop. An iteration around the loop goes on in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from paradiff.errors import NotWalked, Unsupported
from paradiff.pipelines.loop.consumer import Pull
from paradiff.pipelines.loop.ledger import frames

REPEATABLE = {
    Tensor.to,
    Tensor.clone,
    Tensor.contiguous,
    Tensor.detach,
    Tensor.cpu,
    Tensor.cuda,
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.long,
    Tensor.int,
    Tensor.type,
    Tensor.flip,
    Tensor.__deepcopy__,
    torch.clone,
    torch.flip,
}
"""Functions whose result, for timesteps, are timesteps again."""


class LoopHandler(Protocol):
    """The receiver of a loop's requests to its scheduler."""

    def rounds(self, timesteps: Tensor) -> Iterator[Tensor]:
        """The iteration over `timesteps` `[n]`, a plain tensor: all times of the scheduler, or the pipeline's slice of them."""
        ...

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        """The network's input for `sample`: the scheduler's `scale_model_input`."""
        ...

    def step(self, output: Tensor, timestep: Any, sample: Tensor, kwargs: dict[str, Any]) -> Any:
        """What the scheduler's `step` returns; `kwargs` are the further arguments that were given, by name."""
        ...


class RoundTimesteps(torch.Tensor):
    """Timesteps `[n]` with their true values, iterated by a `LoopHandler`.

    Slices, moves to a device, casts and copies of timesteps are iterated by the handler too; the result of any other operation
    is a plain tensor.
    """

    handler: LoopHandler

    @staticmethod
    def wrap(values: Tensor, handler: LoopHandler) -> RoundTimesteps:
        """`values`, iterated by `handler`; shares their memory."""
        wrapped = plain(values).as_subclass(RoundTimesteps)
        wrapped.handler = handler
        return wrapped

    def __iter__(self) -> Iterator[Tensor]:
        return self.handler.rounds(plain(self))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = [plain(value) for value in args]
        result = func(*values, **{name: plain(value) for name, value in (kwargs or {}).items()})
        handler = getattr(args[0], "handler", None) if args and isinstance(args[0], RoundTimesteps) else None
        if handler is None or type(result) is not Tensor or result.ndim != 1:
            return result
        if func in REPEATABLE or (func is Tensor.__getitem__ and isinstance(args[1], slice) and args[1].step in (None, 1)):
            return RoundTimesteps.wrap(result, handler)
        return result


class Iterations:
    """The iterations over a proxy's timesteps in one pipeline call, and which of them is the loop.

    Attributes:
        timesteps: `[n]` times of the iteration that was last advanced, or None.
        position: Index of the time that this iteration yielded last.
        pulls: The frames that asked for the first time of the iteration that was last begun; empty from the first step on.
    """

    def __init__(self) -> None:
        self._listed = False  # whether an iteration came to its end without a step
        self.timesteps: Tensor | None = None
        self.position = -1
        self.pulls: list[Pull] = []
        self._walked: object = None  # the iteration that was last advanced
        self._loop: object = self  # the one that is the loop

    def walk(self, timesteps: Tensor, rounds: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
        """Yields the times in order, until a step is taken between two of them; from there on yields from `rounds()`."""
        outer, mine = (self.timesteps, self.position, self._walked), object()
        for position, time in enumerate(timesteps.unbind()):
            if position == 0:
                self.pulls = Pull.of(frames())
            self.timesteps, self.position, self._walked = timesteps, position, mine
            yield time
            if self._loop is mine:
                yield from rounds()
                break
        else:
            self._listed = True
        self.timesteps, self.position, self._walked = outer
        self.pulls = []

    def begin(self) -> Tensor:
        """The loop's times `[n]`, at its first step.

        Raises:
            NotWalked: If the step was not taken in a loop over the timesteps.
            Unsupported: If it was not taken in the loop's first iteration.
        """
        if self.timesteps is None:
            copied = ", but over a copy of them" if self._listed else ""
            raise NotWalked(f"the loop does not walk over scheduler.timesteps{copied}")
        if self.position != 0:
            raise Unsupported(f"the loop takes its first step in its iteration number {self.position + 1}")
        self._loop = self._walked
        return self.timesteps


def plain(value: Any) -> Any:
    """`value` with `RoundTimesteps` as plain tensors, also within lists and tuples."""
    if isinstance(value, RoundTimesteps):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return value

# SPDX-License-Identifier: Apache-2.0
"""`callback_on_step_end` in a parallel run: called in order, once a step, with states that are final.

A callback that only reads (previews, logging, progress) gets the states of the plain call, several steps at a time. A callback
that changes the loop's course is refused by name, since later steps have been swept before it is called. It may interrupt the
call (interrupt.py). What it returns is what the loop takes its latents from: where diffusers' own loops do, `pop` of it fails
here as it fails there.
"""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paradiff.errors import NeedsOrder, shown
from paradiff.pipelines.by_class import by_class
from paradiff.pipelines.loop.interrupt import NAMES, flag
from paradiff.pipelines.loop.scheduler_proxy import first_index, is_proxy, other_setting, place, settings
from paradiff.pipelines.loop.torch_modes import Modes
from paradiff.pipelines.network.attributes import Attributes
from paradiff.pipelines.network.methods import called_names
from paradiff.pipelines.network.origin import function_of
from paradiff.pipelines.network.outside import Outside
from paradiff.pipelines.network.reads import names
from paradiff.solver.accelerator import random_states

CALLBACK, INPUTS, LEGACY = "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback"
DEPTH, ITEMS = 3, 64
"""Containers or objects that are looked into one within the other; items that are looked at of each."""


class Callback:
    """A user's callback.

    Args:
        pipeline: The pipeline that it is called with.
        function: `function(pipeline, step, time, {"latents": ...})`.
        kind: The pipeline's own class.

    Attributes:
        timesteps: `[N]` the loop's times; set at the loop's first step.
        dtype: Dtype of the loop's states; set at the loop's first step.
        modes: Torch's modes in the loop, in which it is called: not those of the solver, in which tensors know no gradients.
        scheduler: The scheduler that the callback is shown as the pipeline's; None for that which the pipeline has.
        error: What the function raised, or None.
    """

    timesteps: Tensor
    dtype: torch.dtype

    def __init__(self, pipeline: Any, function: Any, kind: type) -> None:
        self._pipeline, self._function = pipeline, function
        self._read = called_names(kind)
        self._left = NAMES - (self._read if flag(kind) is None else set())  # flags that are followed, or that no function asks
        self.scheduler: Any = None
        self.modes = Modes.now()
        self.error: BaseException | None = None
        self._pops = _pops(kind)
        networks = {name: part for name, part in vars(pipeline).items() if isinstance(part, nn.Module)}
        self._networks, self._outside = Attributes(networks.values()), Outside(networks)
        self._own: frozenset[str] | None = None  # the pipeline's attributes before the callback could add any

    @classmethod
    def of(cls, pipeline: Any, arguments: Mapping[str, Any], kind: type | None = None) -> Callback | None:
        """The callback among a call's arguments, for a pipeline of a class; by default that of the object.

        Raises:
            ValueError: If it asks for more than the latents, or is of the old form.
        """
        if arguments.get(LEGACY) is not None:
            raise ValueError(
                f"{LEGACY}= was given, which may read any value of the loop while it runs; a parallel run gives final "
                f"states only: use {CALLBACK}=, or leave it out"
            )
        function = arguments.get(CALLBACK)
        if function is None:
            return None
        wanted = getattr(function, "tensor_inputs", None) or arguments.get(INPUTS) or ["latents"]
        more = [name for name in wanted if name != "latents"]
        if more:
            raise ValueError(
                f"{CALLBACK} asks for {', '.join(more)}, with which it could change later steps; a parallel run has swept "
                "those already and gives the latents only: ask for these alone, or call the pipeline outside of parallelize"
            )
        return cls(pipeline, function, type(pipeline) if kind is None else kind)

    @staticmethod
    def without(arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the call without those of the callback."""
        return {name: value for name, value in arguments.items() if name not in (CALLBACK, INPUTS)}

    def on_final(self, first: int, states: Tensor, drawn_from: Sequence[torch.Generator | None] = ()) -> None:
        """Calls the callback with the final states `[n, ...]` of the nodes from `first` on, in order.

        Args:
            first: The first of the nodes.
            states: Their states.
            drawn_from: The generators from which the noises of later steps come, None for torch's own.

        Raises:
            ValueError: If the callback changes the latents, the pipeline, its scheduler or a setting of its networks, or draws
                from one of the generators.
            NeedsOrder: If it returns what a loop of the user's own may not take latents from.
            Exception: What the callback raises, or the loop for what it returns.
        """
        if self._own is None:
            self._own = frozenset(vars(self._pipeline))
        for k, state in enumerate(states):
            with self.modes.entered():
                latents = state.to(self.dtype, copy=True)
            given, before, drawn = latents.clone(), self._settings(), _states(drawn_from)
            self._networks.mark()
            self._outside.mark()
            step = first - 1 + k
            with self._shown(step) as scheduler:
                levels = {} if scheduler is None else settings(scheduler)
                try:
                    with self.modes.entered():
                        returned = self._function(self._pipeline, step, self.timesteps[step], {"latents": latents})
                    back = self._taken(returned, latents)
                except NeedsOrder:
                    raise
                except BaseException as error:
                    self.error = error
                    raise
            if not all(map(torch.equal, drawn, _states(drawn_from))):
                raise ValueError(
                    f"{CALLBACK} drew from the call's generator after step {step}, from which the noises of later steps come; "
                    "a parallel run has drawn those already: give the callback a generator of its own, or call the pipeline "
                    "outside of parallelize"
                )
            extra = [k for k in returned if k != "latents"] if isinstance(returned, Mapping) else []
            after = self._settings()
            changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
            what = "the latents" if not torch.equal(back, given) else ", ".join([*extra, *(f"pipe.{n}" for n in changed)])
            what = what or self._networks.changed() or self._outside.changed()
            if not what and levels and (name := other_setting(scheduler, levels)) is not None:
                what = f"pipe.scheduler.{'config' if name == '_internal_dict' else name}"
            if what:
                raise ValueError(
                    f"{CALLBACK} changed {what} after step {step}; a parallel run has swept later steps already and cannot "
                    "follow that: leave the change out, or call the pipeline outside of parallelize"
                )

    def _taken(self, returned: Any, latents: Tensor) -> Any:
        """What the loop takes of what the callback returned as its latents."""
        if self._pops == "diffusers" or (self._pops == "own" and isinstance(returned, MutableMapping)):
            return returned.pop("latents", latents)
        if self._pops == "own":
            raise NeedsOrder(f"{CALLBACK} returned {shown(returned)}, from which the loop takes its latents by `pop`")
        return returned.get("latents", latents) if isinstance(returned, Mapping) else latents

    @contextlib.contextmanager
    def _shown(self, step: int) -> Iterator[Any]:
        """Lets the pipeline have the scheduler that it has after a step of the plain call, and yields it; None where the
        pipeline has none."""
        attributes = vars(self._pipeline)
        own = attributes.get("scheduler")
        scheduler = own if self.scheduler is None else self.scheduler
        if scheduler is None:
            yield None
            return
        index = first_index(scheduler, self.timesteps[0]) if is_proxy(scheduler) else None
        counted = vars(scheduler).get("_step_index")
        try:
            attributes["scheduler"] = scheduler
            if index is not None:
                place(scheduler, index + step + 1)
            yield scheduler
        finally:
            if index is not None:
                place(scheduler, counted)
            if attributes.get("scheduler") is scheduler:
                attributes["scheduler"] = own

    def _settings(self) -> dict[str, Any]:
        """What the loop may read of the pipeline: its numbers and texts, and all attributes that its class's functions name."""
        own = self._own or ()
        return {
            name: _seen(value)
            for name, value in vars(self._pipeline).items()
            if name not in self._left and (name in self._read or (name in own and isinstance(value, SIMPLE)))
        }


@by_class
def _pops(kind: type) -> Literal["diffusers", "own"] | None:
    """Whose loop takes its latents by `pop` of what a callback returns; None if none does."""
    for part in (part for owner in kind.__mro__ for part in vars(owner).values()):
        function = inspect.unwrap(found) if (found := function_of(part)) is not None else None
        if isinstance(function, types.FunctionType) and {CALLBACK, "pop"} <= names(function.__code__):
            return "diffusers" if function.__module__.partition(".")[0] == "diffusers" else "own"
    return None


def _states(generators: Sequence[torch.Generator | None]) -> list[Tensor]:
    """The states of generators, with those of torch's own for None."""
    shared = random_states() if None in generators else []
    return [*shared, *(generator.get_state() for generator in generators if generator is not None)]


SIMPLE = (bool, int, float, str, type(None))


def _seen(value: Any, depth: int = 0) -> Any:
    """What tells whether a value was changed: its numbers and texts, and which tensors in which versions are in it."""
    if isinstance(value, SIMPLE):
        return value if value == value else "NaN"
    if isinstance(value, Tensor):
        return id(value), -1 if value.is_inference() else value._version
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = list(value.items())
    elif isinstance(value, list | tuple):
        parts = list(enumerate(value))
    elif isinstance(value, types.SimpleNamespace) or hasattr(value, "prepare_inputs"):  # a guider
        parts = list(vars(value).items())
    if depth == DEPTH or isinstance(value, nn.Module):
        parts = ()
    return id(value), len(parts), *((str(key), _seen(part, depth + 1)) for key, part in parts[:ITEMS])

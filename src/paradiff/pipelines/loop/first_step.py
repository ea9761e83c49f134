# SPDX-License-Identifier: Apache-2.0
"""The first step of a pipeline's loop, and what a loop's later steps return in its form.

The loop's first pass is an ordinary one, at x[0]. Its step shows what no argument of the pipeline does: the state's shape and
dtype, the times of the loop, the generator and the options of `step`, and the form of the step's result.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from paradiff.errors import Unsupported
from paradiff.pipelines.loop.random_state import clone
from paradiff.pipelines.loop.torch_modes import Modes
from paradiff.samplers.scheduler.walk import NextTime, resolved, time_of
from paradiff.solver.accelerator import forked_random_state

GIVEN_NOISE = "variance_noise"
NEXT_TIME = "prev_timestep"  # closer to the data
READS_MORE = "the loop reads more of a step's result than the new state"
"""The reason against a loop that uses what a parallel step does not give."""


@dataclass(frozen=True, kw_only=True)
class FirstStep:
    """The loop's first step.

    Attributes:
        scheduler: A copy of the user's scheduler, in its state before the step.
        timesteps: `[N]` the loop's times.
        output: `[B, ...]` the network's output at x[0].
        sample: `[B, ...]` the state x[0]; like the output, a copy, which later passes do not change.
        timestep: The time that the step was given.
        kwargs: The further arguments of the step, by name.
        modes: Torch's modes in the loop.

    Raises:
        Unsupported: If the output and the sample are no tensors of floats of one shape, or have derivatives, the time is not
            the loop's, or the loop gives the step's noise.
        ValueError: If the output is not finite.
    """

    scheduler: Any
    timesteps: Tensor
    output: Tensor
    sample: Tensor
    timestep: Any
    kwargs: Mapping[str, Any]
    modes: Modes = field(default_factory=Modes.now)

    def __post_init__(self) -> None:
        output, sample = self.output, self.sample
        if not isinstance(output, Tensor) or not isinstance(sample, Tensor) or not sample.is_floating_point():
            raise Unsupported(
                f"the loop steps a {type(sample).__name__} with a {type(output).__name__}; both must be tensors of floats"
            )
        if output.shape != sample.shape:
            raise Unsupported(
                f"the network's output has shape {tuple(output.shape)} and its state {tuple(sample.shape)}: the network also "
                "predicts a variance, or the scheduler keeps a state of another kind"
            )
        if torch.is_grad_enabled() and (output.requires_grad or sample.requires_grad):
            raise Unsupported(
                "its sample would have derivatives, which a parallel call does not keep: call it within torch.no_grad(), if "
                "none are wanted"
            )
        if self.kwargs.get(GIVEN_NOISE) is not None:
            raise Unsupported("the loop gives the step's noise itself")
        refuse_other_time(self.timestep, self.timesteps[0])
        if not torch.isfinite(output).all():
            raise ValueError("the network's output at the first time is not finite; check its weights, dtype and inputs")
        if len(self.timesteps) > 1 and is_time(self.kwargs.get(NEXT_TIME), self.timesteps[1]):
            object.__setattr__(self, "kwargs", {**self.kwargs, NEXT_TIME: NextTime(self.timesteps)})
        object.__setattr__(self, "output", output.clone())
        object.__setattr__(self, "sample", sample.clone())

    @property
    def generator(self) -> Any:
        """The generator that the step draws from: one, a list of them, or None for torch's global one."""
        return self.kwargs.get("generator")

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of the step that its coefficients depend on, such as `eta`."""
        return {k: v for k, v in self.kwargs.items() if k not in ("generator", "return_dict", GIVEN_NOISE)}

    def check_options(self, kwargs: Mapping[str, Any], time: Tensor | None = None) -> None:
        """Checks that a later step has the arguments of this one, since the chain is probed with these.

        Args:
            kwargs: The arguments.
            time: `[]` the time of the step; None for those of a window.

        Raises:
            Unsupported: If they differ.
        """
        for name in {*kwargs, *self.kwargs}:
            first, now = self.kwargs.get(name), kwargs.get(name)
            if isinstance(first, NextTime) and time is not None:
                wanted = first.after(time)
                if not (now is None if wanted is None else is_time(now, wanted)):
                    raise Unsupported(f"the loop gives its scheduler's step a {name} that is not the time of its next pass")
                continue
            if name != "generator" and now is not first and (isinstance(now, Tensor) or now != first):
                raise Unsupported(f"the loop changes the {name} of its scheduler's step")

    @property
    def running(self) -> set[str]:
        """The attributes that the scheduler's own step changes, besides its step index."""
        return self._two_steps[0]

    @property
    def keeps(self) -> bool:
        """Whether the scheduler keeps the very state or output that its step is given, in one of its first two steps."""
        return self._two_steps[1]

    @functools.cached_property
    def _two_steps(self) -> tuple[set[str], bool]:
        scheduler = copy.deepcopy(self.scheduler)
        before, keeps, changed = copy.deepcopy(vars(scheduler)), False, set[str]()
        with forked_random_state(self.sample.device):
            for time in self.timesteps[:2]:
                kwargs = {name: value for name, value in self.kwargs.items() if name != "generator"}
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(self.sample.clone(), time)
                options = resolved(kwargs, time)
                output, sample = self.output.clone(), self.sample.clone()
                scheduler.step(output, time_of(scheduler, time, self.sample), sample, **options)
                after = vars(scheduler)
                keeps |= any(_same_memory(leaf, output, sample) for leaf in _pytree.tree_leaves(after))
                # After each, since a scheduler of two stages is after the second as it was before the first.
                changed |= {name for name in {*before, *after} if not _alike(before.get(name), after.get(name))}
        return changed - {"_step_index"}, keeps

    def real_step(self, index: int, output: Tensor, sample: Tensor) -> Any:
        """What the scheduler's own `step` number `index` returns, made on copies of the scheduler and the generators."""
        scheduler = copy.deepcopy(self.scheduler)
        if index and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(_first_index(scheduler, self.timesteps) + index)
        kwargs = resolved(self.kwargs, self.timesteps[index])
        if kwargs.get("generator") is not None:
            kwargs["generator"] = _pytree.tree_map_only(torch.Generator, clone, kwargs["generator"])
        with forked_random_state(sample.device):
            scale_model_input = getattr(scheduler, "scale_model_input", None)
            if scale_model_input is not None:
                scale_model_input(sample.clone(), self.timesteps[index])
            return scheduler.step(output.clone(), time_of(scheduler, self.timesteps[index], sample), sample.clone(), **kwargs)


def is_time(given: Any, wanted: Tensor) -> bool:
    """Whether an option is one number, equal to a time `[]`. Waits for the device."""
    if isinstance(given, Tensor):
        return type(given) is Tensor and given.ndim == 0 and bool(given == wanted.to(given.device))
    return isinstance(given, int | float) and not isinstance(given, bool) and given == wanted.item()


def refuse_other_time(given: Any, wanted: Tensor) -> None:
    """Refuses a step whose time is not that of its pass. Waits for the device.

    Args:
        given: The time that the step was given: a number, or a tensor with one or several equal entries a pass.
        wanted: `[]` the time of the pass, or `[W]` those of a window, as `given` has them along its first axis.

    Raises:
        Unsupported: If they differ.
    """
    if given is wanted:
        return
    if isinstance(given, Tensor):
        wanted = wanted.to(given.device, given.dtype)
        same = given == (wanted if wanted.ndim == 0 else wanted.reshape(-1, *[1] * (given.ndim - 1)))
        if bool(same.all()):
            return
    elif wanted.ndim == 0 and isinstance(given, int | float) and given == wanted.item():
        return
    raise Unsupported("the loop gives its scheduler's step another time than that of its pass")


def refuse_other_generator(given: Any, wanted: Any) -> None:
    """Refuses a step that draws from another generator than the step before.

    Args:
        given: The step's generator, a list of them, or None.
        wanted: That of the step before.

    Raises:
        Unsupported: If they are others.
    """
    both = [leaf if isinstance(leaf, list | tuple) else [leaf] for leaf in (given, wanted)]
    if len(both[0]) != len(both[1]) or any(a is not b for a, b in zip(*both, strict=True)):
        raise Unsupported("the loop gives its scheduler's step another generator from pass to pass")


def new_state(result: Any) -> Tensor:
    """`[B, ...]` the new state in the result of a scheduler's step, whose dtype need not be that of the state before."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


def step_result(template: Any, sample: Tensor, real: Any = None) -> Any:
    """A step's result with `sample` as its new state.

    Args:
        template: The result of another step of the scheduler, whose form it takes: a tuple, or an output with fields.
        sample: `[B, ...]` the new state.
        real: A result of the scheduler's own step, for the other fields, such as an estimate of the clean data. Without it,
            reading them raises `Unsupported`.
    """
    if isinstance(template, tuple):
        rest = [Unread()] * (len(template) - 1) if real is None else list(real[1:])
        return (sample, *rest)
    known = template if real is None else real
    fields = {k: v if real is not None or v is None else Unread() for k, v in vars(known).items() if k != "prev_sample"}
    return type(template)(prev_sample=sample, **fields)


def _alike(a: Any, b: Any) -> bool:
    """Whether two attributes are equal, wherever their tensors are."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        b = b if a.device == b.device else b.to(a.device)  # a call elsewhere, or the step's own move of a table
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(map(_alike, a, b))
    try:
        return type(a) is type(b) and (bool(a == b) or hasattr(a, "set_timesteps"))
    except (ValueError, RuntimeError):  # Values that have no one answer.
        return False


def _same_memory(leaf: Any, *others: Tensor) -> bool:
    """Whether a value is a tensor in the memory of another one."""
    places = {other.untyped_storage().data_ptr() for other in others if other.numel()}
    return type(leaf) is Tensor and leaf.untyped_storage().data_ptr() in places


class Unread:
    """A field of a step's result that does not exist in a parallel run."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise Unsupported(READS_MORE)

    def __getattr__(self, name: str) -> Any:
        return self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Unsupported(READS_MORE)

    __getitem__ = __iter__ = __len__ = __bool__ = __float__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _refuse


def _first_index(scheduler: Any, timesteps: Tensor) -> int:
    """The index of the loop's first time among the scheduler's."""
    begin = getattr(scheduler, "_begin_index", None)
    return len(scheduler.timesteps) - len(timesteps) if begin is None else int(begin)

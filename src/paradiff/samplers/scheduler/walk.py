# SPDX-License-Identifier: Apache-2.0
"""One walk of a scheduler over all its steps, with inputs of the prober's choice.

Walks are made on copies, in float64 on the CPU, with states of shape [1, 1, 1, L] whose L channels do not know of each other.
Here is also what a scheduler can be asked at all, and what makes two questions the same.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from paradiff.chain.draws import Source
from paradiff.chain.generators import borrowed
from paradiff.errors import Unsupported

UNUSED = ("generator", "return_dict")  # options of step that do not change the table
TOKENS = "its states are tokens, which it draws from the network's output, and no numbers"
STAGES = "its levels are those of one stage of several, which set_timesteps(..., stage_index) begins in the loop"
NO_CHAIN = {
    "AmusedScheduler": TOKENS,
    "BlockRefinementScheduler": TOKENS,
    "DiscreteDDIMScheduler": TOKENS,
    "EntropyBoundScheduler": TOKENS,
    "HeliosDMDScheduler": STAGES,
    "HeliosScheduler": STAGES,
    "PiflowScheduler": "its network predicts n_grid outputs for one state, which its step integrates",
    "SCMScheduler": "its loops keep the second result of step, the clean-data estimate, which is no state of a chain",
    "VQDiffusionScheduler": TOKENS,
}
"""Schedulers of diffusers whose steps are those of no table, and why."""
FACTOR = 1e-6  # relative error of a factor that is one


@dataclass(frozen=True)
class Request:
    """A question for the cache: equal if the fingerprints are."""

    fingerprint: Hashable
    scheduler: Any = field(compare=False)
    timesteps: Tensor = field(compare=False)
    kwargs: dict[str, Any] = field(compare=False)


@dataclass(frozen=True, eq=False)
class NextTime:
    """An option of a step that is the time of the pass after it, and None in the last pass.

    Attributes:
        timesteps: `[N]` the loop's times.
    """

    timesteps: Tensor

    def after(self, time: Tensor) -> Tensor | None:
        """The time after a time of the loop."""
        place = int((self.timesteps == time.to(self.timesteps.device)).nonzero()[0]) + 1
        return self.timesteps[place] if place < len(self.timesteps) else None


def resolved(kwargs: Mapping[str, Any], time: Tensor) -> dict[str, Any]:
    """The options of the step at a time."""
    return {name: value.after(time) if isinstance(value, NextTime) else value for name, value in kwargs.items()}


def on_cpu(scheduler: Any) -> Any:
    """A deep copy, its tensors ordinary ones on the CPU."""
    own = copy.copy(scheduler)
    own.__dict__ = {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in vars(scheduler).items()
    }
    return own


def fingerprint(value: Any) -> Hashable:
    """A hashable stand-in that is equal for equal values only; TypeError for values without one."""
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1)
        return "tensor", value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""
    if isinstance(value, np.ndarray):
        return "array", str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return "map", tuple(sorted((str(k), fingerprint(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return "list", tuple(fingerprint(v) for v in value)
    if value is None or isinstance(value, bool | int | float | str | np.generic | torch.dtype | torch.device):
        return type(value).__name__, repr(value)
    if isinstance(value, NextTime):
        return "the next time"  # of the loop's times, which are in the key
    if inspect.isfunction(value):
        return value  # by identity, and kept alive by the cache
    raise TypeError(f"{type(value).__name__} has no fingerprint")


def refuse_unfit(scheduler: Any, timesteps: Tensor, kwargs: Mapping[str, Any]) -> None:
    """Refuses what can be seen without a step."""
    name = type(scheduler).__name__
    if name in NO_CHAIN:
        raise Unsupported(f"{name} has no table: {NO_CHAIN[name]}")
    if not hasattr(scheduler, "step"):
        others = ", ".join(found for found in dir(scheduler) if found.startswith("step_")) or "no method for a step"
        raise Unsupported(f"{name} has no step of (model_output, timestep, sample), which alone has a table, but {others}")
    parameters = list(inspect.signature(scheduler.step).parameters.values())
    names = [p.name for p in parameters]
    needed = [p.name for p in parameters[3:] if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in kwargs]
    if names[:3] != ["model_output", "timestep", "sample"] or needed:
        raise Unsupported(
            f"{name}.step takes ({', '.join(names[: 3 + len(needed)])}); only steps of (model_output, timestep, sample), with "
            "options, have a table"
        )
    for option, value in kwargs.items():
        if isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value)):
            raise Unsupported(f"the loop hands {option!r}, a tensor, to {name}.step: only numbers and switches have a table")
    if "learned" in str(scheduler.config.get("variance_type")):
        raise Unsupported(
            f"{name} has variance_type = {scheduler.config['variance_type']!r}: the network's own variance makes the step "
            "nonlinear"
        )
    every = getattr(scheduler, "timesteps", None)
    counted = getattr(scheduler, "num_inference_steps", None) is not None or getattr(scheduler, "custom_timesteps", False)
    known = (
        "num_inference_steps" not in vars(scheduler)
        and every is not None
        and len(every) != scheduler.config.get("num_train_timesteps")
    )
    if every is None or not (counted or known):
        raise Unsupported(f"{name} has no timesteps yet: call its set_timesteps first")
    places = range(len(every) - len(timesteps) + 1)
    if (
        timesteps.ndim != 1
        or not len(timesteps)
        or not any(torch.equal(every[k : k + len(timesteps)], timesteps) for k in places)
    ):
        raise Unsupported(
            f"the loop's {len(timesteps) if timesteps.ndim else 0} timesteps are no stretch of the {len(every)} of {name}: "
            "hand over scheduler.timesteps or a slice of it"
        )


class _Draws(TorchFunctionMode):
    """Puts basis vectors in place of standard normal draws: a new one for each draw, the same one for a draw that is repeated
    from the same state of its generator (a Brownian tree). Zeros, beyond the given number of channels.

    Attributes:
        calls: Draws asked for.
        known: The draws seen, by the state of their generator.
        sources: Whose generators they were made with.
        dtypes: In which dtypes they were made.
    """

    def __init__(self, channels: int, given: torch.Generator, size: int) -> None:
        super().__init__()
        self.calls, self.known, self._channels = 0, dict[bytes, int](), channels
        self.sources, self.dtypes = set[Source](), set[torch.dtype]()
        self._given, self._size = given, size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.randn, torch.randn_like):
            return func(*args, **kwargs)
        generator = kwargs.get("generator") or torch.default_generator
        channel = self.known.setdefault(generator.get_state().numpy().tobytes(), len(self.known))
        self.calls += 1
        found = func(*args, **kwargs).zero_()
        self.dtypes.add(found.dtype)
        plain: dict[int, Source] = {id(self._given): "given", id(torch.default_generator): "torch"}
        self.sources.add(plain.get(id(generator), "own") if found.numel() == self._size else "own")
        if channel < self._channels:
            found.view(-1)[channel] = 1
        return found


@dataclass(frozen=True)
class Walk:
    """One walk: `[N, L]` states returned, `[N]` input scales, the scheduler's step indices, the number of draws asked for by
    each step, that of different ones in all, whose generators made them, and in which dtypes."""

    states: Tensor
    scale: Tensor
    places: list[int] | None
    draws: list[int]
    different: int
    sources: set[Source]
    dtypes: set[torch.dtype]


Inputs = Callable[[int], tuple[Tensor, Tensor]]


def walk(request: Request, inputs: Inputs, draws: int | None = None, **config: Any) -> Walk:
    """Walks a copy over all steps.

    Args:
        request: Scheduler, times and options.
        inputs: State and output for step i: `[L]`, which are a sample of L channels, or `[B, C, H, W]`, whose L numbers the
            walk returns one after the other.
        draws: Number of basis vectors in place of random draws; None for real draws, the same in each walk.
        config: Options of the scheduler to be changed.
    """
    scheduler = copy.deepcopy(request.scheduler)
    name = type(scheduler).__name__
    if config:
        scheduler.register_to_config(**config)
    generator = torch.Generator().manual_seed(0)
    states, scales, places, counts = [], [], [], [0]
    mode = _Draws(draws or 0, generator, inputs(0)[0].numel())
    with borrowed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loop itself will give them
        torch.default_generator.manual_seed(0)  # not those of the devices, which are not put back
        for i, t in enumerate(request.timesteps):
            x, m = (v.clone() if v.ndim == 4 else v.reshape(1, 1, 1, -1).clone() for v in inputs(i))
            try:
                scales.append(_scale(scheduler, t))
                found = step_of(scheduler, m, t, x, request.kwargs, generator, mode if draws is not None else None)
            except Unsupported:
                raise
            except Exception as error:
                said = (str(error).splitlines() or [""])[0]
                if isinstance(error, IndexError) and i == len(request.timesteps) - 1:
                    raise Unsupported(
                        f"{name} has no step at the last of these {i + 1} times, {float(t):g}, which ends its chain: leave it "
                        "out, as in timesteps[:-1]"
                    ) from error
                raise Unsupported(f"{name} cannot be probed: step {i} raised {type(error).__name__}: {said}") from error
            if not isinstance(found, Tensor) or found.shape != x.shape:
                raise Unsupported(f"{name}.step returns no state of the shape of its input, so it has no table")
            counts.append(mode.calls)
            states.append(found.reshape(-1).double().clone())  # a step may return the same memory each time
            places.append(getattr(scheduler, "step_index", None))
    known = None if None in places else [int(p) - 1 for p in places]
    per_step = [after - before for before, after in itertools.pairwise(counts)]
    scale = torch.tensor(scales, dtype=torch.float64)
    return Walk(torch.stack(states), scale, known, per_step, len(mode.known), mode.sources, mode.dtypes)


def _scale(scheduler: Any, t: Tensor) -> float:
    if not hasattr(scheduler, "scale_model_input"):
        return 1.0
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    once, twice = (float(scheduler.scale_model_input(v, t)) for v in (one, 2 * one))
    if abs(twice - 2 * once) > FACTOR * abs(once):
        raise Unsupported(f"{type(scheduler).__name__}.scale_model_input is not a factor on the state, so it has no table")
    return once


@lru_cache(maxsize=64)
def _parameters(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind.step).parameters)


def time_of(scheduler: Any, t: Tensor, x: Tensor) -> Tensor:
    """The time as a scheduler's step takes it: a number `[]`, or `[B]`, one for each sample of the state `x` `[B, ...]`."""
    return t.expand(len(x)) if _takes_rows(type(scheduler), Sampled(scheduler, t)) else t


@dataclass(frozen=True)
class Sampled:
    """A scheduler and one of its times, equal to all others: what a trial of the scheduler's class is made with."""

    scheduler: Any = field(compare=False)
    time: Tensor = field(compare=False)


@lru_cache(maxsize=64)
def _takes_rows(kind: type, sampled: Sampled) -> bool:
    """Whether the step of a scheduler class fails with one time for all samples, and not with a time for each of them."""
    x = torch.zeros(1, 1, 1, 1)

    def fails(time: Tensor) -> bool:
        with borrowed(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = on_cpu(sampled.scheduler)
            try:
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(x, time)
                scheduler.step(x, time, x)
            except Exception:
                return True
            return False

    time = sampled.time.cpu()
    return fails(time) and not fails(time.expand(1))


def step_of(
    scheduler: Any, m: Tensor, t: Tensor, x: Tensor, kwargs: Mapping[str, Any], generator: Any, mode: _Draws | None
) -> Any:
    """What the step returns as the next state; draws replaced by `mode`."""
    known, kwargs = _parameters(type(scheduler)), resolved(kwargs, t)
    t = time_of(scheduler, t, x)
    options = {"generator": generator} if "generator" in known else {}
    if mode is None:
        found = scheduler.step(m, t, x, **kwargs, **options)
    else:
        with mode:
            found = scheduler.step(m, t, x, **kwargs, **options)
    if isinstance(found, tuple):
        return found[0]
    return getattr(found, "prev_sample", found)

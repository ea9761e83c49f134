# SPDX-License-Identifier: Apache-2.0
"""The scheduler a pipeline's loop sees during a parallel run.

A denoising loop requests three things from its scheduler: the times, a scaled network input, and a step. A scheduler proxy is
an instance of a subclass of the user's scheduler class. It passes these requests to a `LoopHandler` and is the user's scheduler
in every other respect. Its `timesteps` are a tensor with the true values whose *iteration* the `LoopHandler` decides.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from paradiff.errors import NeedsLanes, Unsupported
from paradiff.pipelines.loop.timesteps import LoopHandler, RoundTimesteps, plain

HANDLER, RUNNING = "_paradiff_handler", "_paradiff_running"
STEP = ("model_output", "timestep", "sample")
STRAY = ("step_", "undo_step", "batch_step_no_noise")  # prefixes of methods that take a step in another way


def make_proxy(scheduler: Any, handler: LoopHandler) -> Any:
    """A copy of `scheduler` whose timesteps, `step` and `scale_model_input` go to `handler`.

    Args:
        scheduler: A diffusers scheduler; the proxy's changes do not reach it.
        handler: The executor of the loop.

    Raises:
        Unsupported: If the scheduler's `step` does not take a model output, a time and a sample first.
    """
    real = type(scheduler)
    if issubclass(real, SchedulerProxy):
        raise Unsupported(f"the pipeline's {real.__name__} already belongs to a parallel run")
    names = tuple(inspect.signature(real.step).parameters)[1:4] if hasattr(real, "step") else ()
    if names != STEP:
        raise Unsupported(f"{real.__name__}.step takes {', '.join(names) or 'nothing'} first and not {', '.join(STEP)}")
    proxy = object.__new__(_subclass(real))
    vars(proxy).update({name: _own(value) for name, value in vars(scheduler).items()})
    vars(proxy)[HANDLER] = handler
    return proxy


def real_scheduler(proxy: Any) -> Any:
    """A deep copy of a proxy's scheduler: of the user's class, in the proxy's present state."""
    real = object.__new__(_real_class(proxy))
    state = {name: None if value is BLURRED else value for name, value in vars(proxy).items() if name not in (HANDLER, RUNNING)}
    vars(real).update(copy.deepcopy(state))
    return real


def first_index(proxy: Any, time: Tensor) -> int | None:
    """The step index of a loop that starts at `time`; None for a scheduler that counts no steps."""
    state = vars(proxy)
    if "_step_index" not in state:
        return None
    if state.get("_begin_index") is not None:
        return int(state["_begin_index"])
    return int(proxy.index_for_timestep(time))


def place(proxy: Any, index: int) -> None:
    """Sets the step index of a scheduler that counts its steps; it decides on the level of noise added within the loop."""
    vars(proxy)["_step_index"] = index


def blur(proxy: Any) -> None:
    """Makes every read of the step index raise `NeedsLanes`, for a round that takes several steps at once."""
    if "_step_index" in vars(proxy):
        vars(proxy)["_step_index"] = BLURRED


def seal(proxy: Any, names: set[str]) -> None:
    """Makes every read of these attributes raise `Unsupported`: a scheduler's own step changes them, a proxy's does not."""
    state = vars(proxy)
    for name in names:
        state.pop(name, None)
    state[RUNNING] = names


class SchedulerProxy:
    """The base of all scheduler proxies. Timesteps are kept as a plain tensor and read as `RoundTimesteps`."""

    @property
    def timesteps(self) -> Any:
        try:
            value = vars(self)["timesteps"]
        except KeyError:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute 'timesteps'") from None
        handler = vars(self)[HANDLER]
        return RoundTimesteps.wrap(value, handler) if isinstance(value, Tensor) and value.ndim == 1 else value

    @timesteps.setter
    def timesteps(self, value: Any) -> None:
        vars(self)["timesteps"] = plain(value)

    @property
    def _step_index(self) -> Any:
        value = vars(self).get("_step_index")
        if value is BLURRED:
            raise NeedsLanes("the loop reads the scheduler's step index")
        return value

    @_step_index.setter
    def _step_index(self, value: Any) -> None:
        vars(self)["_step_index"] = value

    def __getattr__(self, name: str) -> Any:
        if name in vars(self).get(RUNNING, ()):
            raise Unsupported(f"the loop reads the scheduler's {name}, which changes from step to step")
        above = getattr(super(), "__getattr__", None)
        if above is None:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return above(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise Unsupported("the pipeline copies its scheduler: it steps several coupled states in one loop")


BLURRED = object()
"""The step index of a scheduler that takes several steps at once."""


def _own(value: Any) -> Any:
    """An attribute for a scheduler's proxy: a copy of containers and inner schedulers, else the attribute itself."""
    if type(value) in (list, dict, set, deque):
        return copy.copy(value)
    return copy.deepcopy(value) if hasattr(value, "set_timesteps") else value


def _real_class(proxy: Any) -> type:
    return type(proxy).__mro__[2]


@functools.cache
def _subclass(real: Any) -> type:
    """The proxy class of a scheduler class, with the same name, module and signatures."""
    signature = inspect.signature(real.step)

    @functools.wraps(real.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        given.pop("self")
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given.update(given.pop(name, {}))
        return vars(self)[HANDLER].step(*(given.pop(name) for name in STEP), given)

    @functools.wraps(real.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        handler, vars(self)[HANDLER] = vars(self)[HANDLER], _InOrder()
        try:
            return real.set_timesteps(self, *args, **kwargs)
        finally:
            vars(self)[HANDLER] = handler

    namespace: dict[str, Any] = {
        "__module__": real.__module__,
        "__doc__": real.__doc__,
        "step": step,
        "set_timesteps": set_timesteps,
    }
    if hasattr(real, "scale_model_input"):

        @functools.wraps(real.scale_model_input)
        def scale_model_input(self: Any, sample: Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> Tensor:
            return vars(self)[HANDLER].scale(sample, timestep)

        namespace["scale_model_input"] = scale_model_input
    if hasattr(real, "from_config"):
        namespace["from_config"] = staticmethod(real.from_config)
    for name in dir(real):
        if name.startswith(STRAY) and inspect.isfunction(getattr(real, name)):
            namespace[name] = _stray(name)
    return type(real.__name__, (SchedulerProxy, real), namespace)


def _stray(name: str) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise Unsupported(f"the loop calls the scheduler's {name}, which has no parallel form")

    return refuse


class _InOrder:
    """The handler while a scheduler's own `set_timesteps` runs."""

    def rounds(self, timesteps: Tensor) -> Iterator[Tensor]:
        return iter(timesteps)

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        raise AssertionError(timestep)

    def step(self, output: Tensor, timestep: Any, sample: Tensor, kwargs: dict[str, Any]) -> Any:
        raise AssertionError(timestep)

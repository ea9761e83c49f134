"""The scheduler a pipeline's loop sees during a parallel run.

A denoising loop requests three things from its scheduler: the times, a scaled network input, and a step. A scheduler proxy is
an instance of a subclass of the user's scheduler class. It passes these requests to a `LoopHandler` and is the user's scheduler
in every other respect. Its `timesteps` are a tensor with the true values whose *iteration* the `LoopHandler` decides.

An iteration over the timesteps need not be the loop: pipelines also walk them to prepare something. `Iterations` tells the
two apart: values come in order until a step is taken between two of them; from there on the iteration is the loop.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from paradiff.errors import NeedsLanes, Unsupported

HANDLER = "_paradiff_handler"
STEP = ("model_output", "timestep", "sample")
STRAY = ("step_", "undo_step", "batch_step_no_noise")  # methods that take a step in another way
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


class LoopHandler(Protocol):
    """The receiver of a loop's requests to its scheduler."""

    def rounds(self, timesteps: Tensor) -> Iterator[Tensor]:
        """The iteration over `timesteps` `[n]`, a plain tensor: all of them, or the slice the pipeline took."""
        ...

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        """The network's input for `sample`: the scheduler's `scale_model_input`."""
        ...

    def step(self, output: Tensor, timestep: Any, sample: Tensor, kwargs: dict[str, Any]) -> Any:
        """What the scheduler's `step` returns; `kwargs` are its further arguments, by name, as far as they were given."""
        ...


def make_proxy(scheduler: Any, handler: LoopHandler) -> Any:
    """A copy of `scheduler` whose timesteps, `step` and `scale_model_input` go to `handler`.

    Args:
        scheduler: A diffusers scheduler. It is not changed, nor is anything that the copy changes.
        handler: The executor.

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
    state = {name: None if value is BLURRED else value for name, value in vars(proxy).items() if name != HANDLER}
    vars(real).update(copy.deepcopy(state))
    return real


def first_index(proxy: Any, time: Tensor) -> int | None:
    """The step index of a loop that starts at `time`, for a scheduler that counts its steps; else None."""
    state = vars(proxy)
    if "_step_index" not in state:
        return None
    if state.get("_begin_index") is not None:
        return int(state["_begin_index"])
    return int(proxy.index_for_timestep(time))


def place(proxy: Any, index: int) -> None:
    """Puts a scheduler that counts its steps at a step index: pipelines that add noise within the loop depend on it."""
    vars(proxy)["_step_index"] = index


def blur(proxy: Any) -> None:
    """Makes reading the step index of a scheduler that counts its steps a `NeedsLanes`: several steps are taken at once."""
    if "_step_index" in vars(proxy):
        vars(proxy)["_step_index"] = BLURRED


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
        vars(self)["timesteps"] = _plain(value)

    @property
    def _step_index(self) -> Any:
        value = vars(self).get("_step_index")
        if value is BLURRED:
            raise NeedsLanes("the loop reads the scheduler's step index")
        return value

    @_step_index.setter
    def _step_index(self, value: Any) -> None:
        vars(self)["_step_index"] = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise Unsupported("the pipeline copies its scheduler: it steps several coupled states in one loop")


BLURRED = object()


class RoundTimesteps(torch.Tensor):
    """Timesteps `[n]` with their true values, iterated by a `LoopHandler`.

    What remains a run of times (slices, moves to a device, casts, copies) stays iterated by the loop; everything else is a
    plain tensor.
    """

    handler: LoopHandler

    @staticmethod
    def wrap(values: Tensor, handler: LoopHandler) -> RoundTimesteps:
        """`values`, iterated by `handler`; shares their memory."""
        wrapped = _plain(values).as_subclass(RoundTimesteps)
        wrapped.handler = handler
        return wrapped

    def __iter__(self) -> Iterator[Tensor]:
        return self.handler.rounds(_plain(self))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        plain = [_plain(value) for value in args]
        result = func(*plain, **{name: _plain(value) for name, value in (kwargs or {}).items()})
        handler = getattr(args[0], "handler", None) if args and isinstance(args[0], RoundTimesteps) else None
        if handler is None or type(result) is not Tensor or result.ndim != 1:
            return result
        if func in REPEATABLE or (func is Tensor.__getitem__ and isinstance(args[1], slice) and args[1].step in (None, 1)):
            return RoundTimesteps.wrap(result, handler)
        return result


class Iterations:
    """The iterations over a proxy's timesteps in one pipeline call, and which of them is the loop.

    Attributes:
        steps: Steps taken in this call.
        timesteps: `[n]` times of the iteration that was last advanced, or None.
        position: Index of the time which that iteration gave last.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.timesteps: Tensor | None = None
        self.position = -1

    def walk(self, timesteps: Tensor, rounds: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
        """The times in order; goes on with `rounds()` once a step was taken between two of them."""
        outer = self.timesteps, self.position
        for position, time in enumerate(timesteps.unbind()):
            self.timesteps, self.position = timesteps, position
            steps = self.steps
            yield time
            if self.steps != steps:
                yield from rounds()
                return
        self.timesteps, self.position = outer

    def begin(self) -> Tensor:
        """The loop's times `[n]`, at its first step.

        Raises:
            Unsupported: If the step was not taken in the first iteration of a loop over the timesteps.
        """
        if self.timesteps is None:
            raise Unsupported("the loop does not walk over scheduler.timesteps")
        if self.position != 0:
            raise Unsupported(f"the loop takes its first step in its iteration number {self.position + 1}")
        return self.timesteps


def _own(value: Any) -> Any:
    """What the copy of a scheduler holds for an attribute: containers and inner schedulers are its own."""
    if type(value) in (list, dict, set, deque):
        return copy.copy(value)
    return copy.deepcopy(value) if hasattr(value, "set_timesteps") else value


def _plain(value: Any) -> Any:
    """`value` with timesteps as plain tensors, also within lists and tuples."""
    if isinstance(value, RoundTimesteps):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _real_class(proxy: Any) -> type:
    return type(proxy).__mro__[2]


@functools.cache
def _subclass(real: Any) -> type:
    """The subclass of a scheduler class: same name, same module, same signatures."""
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

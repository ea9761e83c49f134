# SPDX-License-Identifier: Apache-2.0
"""The scheduler a pipeline's loop sees during a parallel run.

A denoising loop requests three things from its scheduler: the times, a scaled network input, and a step. A scheduler proxy is
a copy of the user's scheduler, of the very same class, since loops ask for that. Its own attributes `step`, `scale_model_input`
and `set_timesteps` hide the methods of the class and pass these requests to a `LoopHandler`. Its `timesteps` are a tensor with
the true values whose *iteration* the `LoopHandler` decides.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree

from paradiff.errors import Unsupported
from paradiff.pipelines.loop.timesteps import LoopHandler, RoundTimesteps, plain
from paradiff.pipelines.tensor.windowed import Windowed

OWN = "_paradiff_own"  # the proxy's attribute that names those that the user's scheduler does not have
KIND = "_paradiff_kind"  # the attribute of a sealed proxy's class that is the class of the user's scheduler
STEP = ("model_output", "timestep", "sample")
STRAY = ("step_", "undo_step", "batch_step_no_noise")  # prefixes of methods that take a step in another way
REPLACED = ("step", "set_timesteps", "scale_model_input")

PLAIN = (int, float, str, torch.dtype, torch.device, type(None))
"""Kinds of arguments of `set_timesteps`, beside arrays, that two calls are seen to have in common."""

Flags = list[tuple[Tensor, str]]
"""Truth values `[]` on devices, each with the reason against the loop if it is false; read together (lanes.py)."""


def make_proxy(scheduler: Any, handler: LoopHandler, log: TimesLog | None = None) -> Any:
    """A copy of `scheduler` whose timesteps, `step` and `scale_model_input` go to `handler`.

    Args:
        scheduler: A diffusers scheduler; the proxy's changes do not reach it.
        handler: The executor of the loop.
        log: What `set_timesteps` did to another proxy of the scheduler, in the same pipeline call; None for the first one.

    Raises:
        Unsupported: If the scheduler's `step` does not take a model output, a time and a sample first, or one of the methods
            that a proxy replaces was replaced before.
    """
    real = type(scheduler)
    if OWN in vars(scheduler):
        raise Unsupported(f"the pipeline's {real.__name__} already belongs to a parallel run")
    names = tuple(inspect.signature(real.step).parameters)[1:4] if hasattr(real, "step") else ()
    if names != STEP:
        raise Unsupported(f"{real.__name__}.step takes {', '.join(names) or 'nothing'} first and not {', '.join(STEP)}")
    if not hasattr(real, "set_timesteps"):
        raise Unsupported(f"{real.__name__} has no set_timesteps in its class, which a parallel run puts its own in place of")
    for name in REPLACED:
        if name in vars(scheduler):
            raise Unsupported(f"the {name} of this {real.__name__} object is not that of its class: somebody has replaced it")
    proxy = object.__new__(real)
    vars(proxy).update({name: _own(value) for name, value in vars(scheduler).items()})
    methods = _methods(proxy, handler, TimesLog() if log is None else log)
    vars(proxy).update({**methods, OWN: frozenset(methods)})
    _wrap(proxy, handler)
    return proxy


def is_proxy(scheduler: Any) -> bool:
    """Whether a scheduler is a proxy."""
    return OWN in vars(scheduler)


def real_scheduler(proxy: Any) -> Any:
    """A deep copy of a proxy's scheduler: with the methods of its class, in the proxy's present state."""
    real = object.__new__(_kind(proxy))
    own = {OWN, *vars(proxy)[OWN]}
    state = {name: plain(value) for name, value in vars(proxy).items() if name not in own and type(value) is not _Sealed}
    if isinstance(state.get("_step_index"), Windowed):
        state["_step_index"] = None
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


def place(proxy: Any, index: Any) -> None:
    """Sets the step index of a scheduler that counts its steps; it decides on the level of noise added within the loop.

    Args:
        proxy: The proxy.
        index: The index, or a windowed one for a round that takes several steps at once.
    """
    vars(proxy)["_step_index"] = index


def seal(proxy: Any, names: set[str]) -> None:
    """Makes every use of these attributes raise `Unsupported`: a scheduler's own step changes them, a proxy's does not.

    Its class's own methods and properties read them too, where a loop held one of them before the call, or calls it by the
    class; and some ask no more than whether there is a value. So the class becomes one that derives from it, of the same name.
    """
    vars(proxy).update({name: _Sealed(name) for name in names})
    if names:
        object.__setattr__(proxy, "__class__", _sealing(_kind(proxy)))


def _kind(proxy: Any) -> type:
    """The class of the user's scheduler."""
    kind = type(proxy)
    return vars(kind).get(KIND, kind)


@functools.lru_cache(maxsize=32)
def _sealing(kind: type) -> type:
    """A class of proxies whose sealed attributes cannot be read."""
    read: Any = kind.__getattribute__

    def get(proxy: Any, name: str) -> Any:
        value = read(proxy, name)
        if type(value) is _Sealed:
            value._refuse()
        return kind if name == "__class__" else value

    return type(kind)(kind.__name__, (kind,), {"__getattribute__": get, "__module__": kind.__module__, KIND: kind})


def passed_over(present: Any, proxy: Any, circumstance: str = "") -> Unsupported:
    """The refusal of a loop that went on to its next time without a step of the proxy.

    Args:
        present: The scheduler that the loop's host has at present.
        proxy: The proxy.
        circumstance: Of the pass, if it is none of the plain call's (lane.py).
    """
    if present is not proxy:
        return Unsupported(f"the loop replaces its pipeline's scheduler, by a {type(present).__name__}: make a call with each")
    advice = "leave that time out of scheduler.timesteps" + ", if the plain call passes over it, too" * bool(circumstance)
    return Unsupported(f"the loop passes over a time without a step{circumstance}: {advice}")


def settings(scheduler: Any) -> dict[str, Any]:
    """The attributes of a proxy, or of a scheduler, its configuration among them, as `refuse_changes` and `other_setting`
    compare them; without its step index."""
    own = {OWN, "_step_index", *vars(scheduler).get(OWN, ())}
    return {name: _setting(value) for name, value in vars(scheduler).items() if name not in own}


def other_setting(scheduler: Any, before: dict[str, Any]) -> str | None:
    """The name of a setting that a scheduler had, and that is another one now; None if there is none.

    Args:
        scheduler: A proxy, or a scheduler.
        before: Its `settings`.
    """
    now = settings(scheduler)
    return next((name for name, value in before.items() if name not in now or not _alike(value, now[name])), None)


def refuse_changes(proxy: Any, before: dict[str, Any], flags: Flags | None = None) -> None:
    """Refuses a loop that changes its scheduler, since its chain was probed before.

    Args:
        proxy: The proxy.
        before: Its `settings` at the loop's start. A tensor that was moved to another device since, as diffusers does with a
            table at its first use, is replaced by what it is there.
        flags: Takes what is known on a device, whether such a tensor is equal there; None to wait for it.

    Raises:
        Unsupported: If they are others.
    """
    now = settings(proxy)
    for name in {**before, **now}:
        refusal = f"the loop changes the {'configuration' if name == '_internal_dict' else name} of its scheduler"
        moved = _moved(before[name], now[name]) if name in before and name in now else None
        if moved is not None:
            before[name] = now[name]
            if flags is not None:
                flags.append((moved, refusal))
        if (
            name not in before
            or name not in now
            or (moved is not None and flags is None and not moved)
            or not _alike(before[name], now[name])
        ):
            raise Unsupported(refusal)


def _setting(value: Any) -> Any:
    """A value with what tells a change of it in place: a tensor's version, or a copy of a container."""
    if isinstance(value, Tensor):
        return value, -1 if value.is_inference() else value._version
    return copy.copy(value) if type(value) in (list, set, deque) else dict(value) if isinstance(value, dict) else value


def _moved(a: Any, b: Any) -> Tensor | None:
    """`[]` on the second one's device, whether two settings are equal tensors of two devices; None if they cannot be."""
    pairs = isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 2
    if not (pairs and isinstance(a[0], Tensor) and isinstance(b[0], Tensor)):
        return None
    (was, version), (value, _) = a, b
    if was.device == value.device or was.shape != value.shape or was.dtype != value.dtype:
        return None
    if not was.is_inference() and was._version != version:
        return None
    return (was.to(value.device, non_blocking=True) == value).all()


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and a and isinstance(a[0], Tensor):
        return a[0] is b[0] and a[1] == b[1]
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except (ValueError, RuntimeError):  # arrays of several values
        return False


class _Sealed:
    """An attribute of a scheduler that has no value in a parallel run."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise Unsupported(f"the loop reads the scheduler's {vars(self)['name']}, which changes from step to step")

    def __getattr__(self, name: str) -> Any:
        return self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = _pytree.tree_leaves((args, kwargs or {}))
        return next(leaf for leaf in leaves if isinstance(leaf, cls))._refuse()

    __getitem__ = __iter__ = __len__ = __bool__ = __index__ = __int__ = __float__ = __call__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _refuse
    __neg__ = __abs__ = __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _refuse  # pyright: ignore[reportAssignmentType]
    __hash__ = object.__hash__


class TimesLog:
    """What the calls of `set_timesteps` of one proxy did to it, for further proxies of the scheduler in the same pipeline call.

    They make the same calls, one after the other, and what a call does need not be computed, and moved to a device, again.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any, dict[str, Any]]] = []

    def made(self, proxy: Any, turn: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes a proxy's call number `turn`, or does what the first proxy's did if it had the same arguments."""
        given = args, kwargs
        if turn < len(self._calls) and _equal(self._calls[turn][0], given):
            vars(proxy).update({name: _own(_cloned(value)) for name, value in self._calls[turn][2].items()})
            return self._calls[turn][1]
        before = settings(proxy)
        result = _kind(proxy).set_timesteps(proxy, *args, **kwargs)
        if turn == len(self._calls):
            now = settings(proxy)
            names = {name for name in now if name not in before or not _alike(before[name], now[name])} | {"_step_index"}
            changed = {name: _own(_cloned(vars(proxy)[name])) for name in names if name in vars(proxy)}
            known = all(name in now for name in before) and _equal(given, given)
            self._calls.append((copy.deepcopy(given) if known else None, result, changed))
        return result


def _cloned(value: Any) -> Any:
    return value.clone() if type(value) is Tensor else value


def _equal(a: Any, b: Any) -> bool:
    """Whether two calls have equal arguments, seen without waiting for a device."""
    (one, form), (other, shape) = _pytree.tree_flatten(a), _pytree.tree_flatten(b)
    return a is not None and form == shape and all(map(_equal_leaves, one, other))


def _equal_leaves(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        host = isinstance(a, Tensor) and isinstance(b, Tensor) and a.device == b.device == torch.device("cpu")
        return host and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and a.dtype == b.dtype and np.array_equal(a, b)
    return isinstance(a, PLAIN) and type(a) is type(b) and a == b


def _own(value: Any) -> Any:
    """An attribute for a scheduler's proxy: a copy of containers and inner schedulers, else the attribute itself."""
    if type(value) in (list, dict, set, deque):
        return copy.copy(value)
    return copy.deepcopy(value) if hasattr(value, "set_timesteps") else value


def _wrap(proxy: Any, handler: LoopHandler) -> None:
    """Gives the iteration of the scheduler's timesteps to the handler."""
    values = vars(proxy).get("timesteps")
    if isinstance(values, Tensor) and values.ndim == 1:
        vars(proxy)["timesteps"] = RoundTimesteps.wrap(values, handler)


def _methods(proxy: Any, handler: LoopHandler, log: TimesLog) -> dict[str, Callable[..., Any]]:
    """The methods that hide those of the proxy's class, with their signatures."""
    real: Any = type(proxy)
    signature = inspect.signature(proxy.step)
    turns = itertools.count()

    @functools.wraps(proxy.step)
    def step(*args: Any, **kwargs: Any) -> Any:
        given = dict(signature.bind(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given.update(given.pop(name, {}))
        output, time, sample = (given.pop(name) for name in STEP)
        return handler.step(output, time, sample, given)

    @functools.wraps(proxy.set_timesteps)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        if "timesteps" in vars(proxy):
            vars(proxy)["timesteps"] = plain(vars(proxy)["timesteps"])
        try:
            return log.made(proxy, next(turns), args, kwargs)
        finally:
            _wrap(proxy, handler)

    def copied(memo: dict[int, Any]) -> Any:
        raise Unsupported(
            "the pipeline copies its scheduler within its call, so that further states, or other steps, may belong to its loop"
        )

    methods: dict[str, Callable[..., Any]] = {"step": step, "set_timesteps": set_timesteps}
    methods |= {"__deepcopy__": copied, "__reduce_ex__": copied}
    if hasattr(real, "scale_model_input"):

        def scale_model_input(sample: Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> Tensor:
            return handler.scale(sample, timestep)

        methods["scale_model_input"] = functools.update_wrapper(scale_model_input, proxy.scale_model_input)
    for name in dir(real):
        if name.startswith(STRAY) and inspect.isfunction(getattr(real, name)):
            methods[name] = _stray(name)
    return methods


def _stray(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Unsupported(f"the loop calls the scheduler's {name}, which has no parallel form")

    return refuse

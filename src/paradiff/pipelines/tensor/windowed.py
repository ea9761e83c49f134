# SPDX-License-Identifier: Apache-2.0
"""A tensor whose window axis is hidden: the body of a pipeline's loop, written for one state, acts on all states of a window.

A `Windowed` shows the shape [*v] of one state and holds the states of the whole window, `window` [W, *v]. An operation f of
the loop body acts on each state by itself,

    f(x, y)[w] = f(x[w], y[w])        for windowed x and y,      f(x, p)[w] = f(x[w], p)        for a plain tensor p,

so that no axis has to be guessed: concatenation for guidance, chunks, reshapes and time factors mean the same as in the
sequential loop. Operations that broadcast, or that name their axes, run on the window directly (rules.py); all others run
under `torch.vmap`. A number of the CPU goes with a tensor of any device, so a window's numbers are moved to the device that
they meet.

A value read in Python (`bool`, `float`, `.item()`) must be equal for all states; else the read raises `NeedsLanes`. There is
no storage behind a `Windowed`: code that reads it past these rules fails, and never gets a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from paradiff.errors import MixedWindows, NeedsLanes, Unsupported

Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Computes a function of torch on whole windows, from its arguments `(func, args, kwargs)`, or returns UNSUITABLE."""

UNSUITABLE = object()
"""What a rule returns for arguments that it does not cover."""

RULES: dict[Any, Rule] = {}
"""The rule of each function of torch that has one, filled by rules.py; all other functions are mapped over the states."""


class Windowed(torch.Tensor):
    """The states of a window behind the shape of one of them.

    A read of a value in Python waits for the device. `_version` is the window's count of changes in place. Operations that
    change nothing, such as `.to` its own dtype and device, return the same object.

    Attributes:
        window: `[W, *v]` the values of all states; `shape` is `[*v]`.
        run: The object given to `wrap`, which results of operations share. Windows with different `run` do not mix.
    """

    window: Tensor
    run: Any

    @staticmethod
    def wrap(window: Tensor, run: Any) -> Windowed:
        """A windowed tensor of visible shape `[*v]` from `window` `[W, *v]`, a plain tensor that it keeps and does not copy."""
        shown = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            Windowed, window.shape[1:], strides=window.stride()[1:], dtype=window.dtype, device=window.device
        )
        shown.window, shown.run = window, run
        return shown

    @property
    def width(self) -> int:
        """W, the number of states."""
        return len(self.window)

    @classmethod
    def __torch_function__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            rule = RULES.get(func)
            if rule is not None:
                result = rule(func, args, kwargs)
                if result is not UNSUITABLE:
                    return result
            return mapped_over_states(func, args, kwargs)
        except Unsupported as error:
            raise _told(error, (args, kwargs)) from error.__cause__
        except (TypeError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            text = f"`{title(func)}` cannot act on all states of a window at once ({type(error).__name__}: {first_line(error)})"
            raise _told(NeedsLanes(text), (args, kwargs)) from error

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # Where C++ takes a number.
            return RULES[Tensor.item](Tensor.item, args, {})
        raise _told(NeedsLanes(f"`{func}` reads the states of a window as if they were one"), (args, kwargs))

    def __copy__(self) -> Windowed:
        return Windowed.wrap(self.window, self.run)

    def __deepcopy__(self, memo: dict[int, Any]) -> Windowed:
        memo[id(self)] = copied = Windowed.wrap(self.window.clone(), self.run)
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise _told(NeedsLanes("the loop pickles a tensor of the states of a window"), self)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Windowed(width={self.width}, shape={tuple(self.window.shape[1:])}, dtype={self.window.dtype})"

    def __format__(self, spec: str) -> str:
        if self.window.dim() > 1:
            return repr(self)
        return " ".join(dict.fromkeys(format(value, spec) for value in self.window.tolist()))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind(0))


def mapped(f: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `f(leaf)` in place of each leaf of its nested lists, tuples, dicts and slices."""
    kind = type(value)
    if kind is tuple:
        return tuple([mapped(f, part) for part in value])
    if kind is list:
        return [mapped(f, part) for part in value]
    if kind is dict:
        return {key: mapped(f, part) for key, part in value.items()}
    if kind is slice:
        return slice(mapped(f, value.start), mapped(f, value.stop), mapped(f, value.step))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*[mapped(f, part) for part in value])
    if isinstance(value, tuple) and hasattr(value, "n_fields"):  # Such as torch.return_types.max.
        return kind([mapped(f, part) for part in value])
    return f(value)


def windowed_leaves(value: Any) -> list[Windowed]:
    """All windowed tensors in nested lists, tuples and dicts, in order."""
    found: list[Windowed] = []
    mapped(lambda leaf: found.append(leaf) if isinstance(leaf, Windowed) else None, value)
    return found


def common_run(leaves: list[Windowed]) -> Any:
    """The run that these windowed tensors share.

    Raises:
        MixedWindows: If they belong to different windows.
    """
    first = leaves[0]
    for leaf in leaves:
        if len(leaf.window) != len(first.window):
            raise MixedWindows(
                f"the loop mixes the states of two windows, of {len(first.window)} and {len(leaf.window)} states"
            )
        if leaf.run is not first.run:
            raise MixedWindows("the loop mixes the states of two windows")
    return first.run


def beside(window: Tensor, device: torch.device | None) -> Tensor:
    """A window `[W, *v]` on the device of what it meets, where torch takes one of its states as it is: a number of the CPU.

    Does not wait for the device.

    Args:
        window: The window; only one of numbers, `[W]`, on the CPU is moved.
        device: The device; None for the CPU.
    """
    if device is None or window.dim() > 1 or window.device.type != "cpu":
        return window
    return window.to(device, non_blocking=True)


def met(leaves: list[Any]) -> torch.device | None:
    """The device of the tensors among `leaves` that is not the CPU; None where there is none."""
    return next((leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type != "cpu"), None)


def copied(tensor: Tensor) -> Tensor:
    """A copy that is expanded along the axes along which the tensor is, so that a compiled network takes it for the same."""
    return _narrowed(tensor, _expanded(tensor)).clone().expand_as(tensor)


def stacked(tensors: list[Tensor]) -> Tensor:
    """`[n, ...]` tensors of one shape, expanded along the axes along which all of them are."""
    axes = set[int].intersection(*map(_expanded, tensors))
    return torch.stack([_narrowed(tensor, axes) for tensor in tensors]).expand(len(tensors), *tensors[0].shape)


def _expanded(tensor: Tensor) -> set[int]:
    return {axis for axis, size in enumerate(tensor.shape) if size > 1 and tensor.stride(axis) == 0}


def _narrowed(tensor: Tensor, axes: set[int]) -> Tensor:
    for axis in axes:
        tensor = tensor.narrow(axis, 0, 1)
    return tensor


def title(func: Callable[..., Any]) -> str:
    """The name of a torch function as users write it."""
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None) if name in ("__get__", "__set__") else None
    return name if owner is None else getattr(owner, "__name__", name)


def first_line(error: Exception) -> str:
    """The first line of an error's text, without its full stop."""
    return (str(error).splitlines() or [""])[0].rstrip(".")


def mapped_over_states(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on each state by itself, under `torch.vmap`.

    Raises:
        NeedsLanes: If it writes states into a plain tensor, changes a shape in place, or mixes two windows.
    """
    name = getattr(func, "__name__", "")
    if kwargs.get("out") is not None:
        raise NeedsLanes(f"`{title(func)}` writes the states of a window into a tensor given as `out`")
    in_place = name in WRITERS or (name.endswith("_") and not name.endswith("__"))
    if in_place and not isinstance(args[0], Windowed):
        raise NeedsLanes(f"`{title(func)}` writes the states of a window into a tensor of one state")
    leaves = windowed_leaves((args, kwargs))
    run = common_run(leaves)
    everything: list[Any] = []
    mapped(everything.append, (args, kwargs))
    device = met(everything)
    target: Any = args[0] if in_place else None
    windows = [leaf.window if leaf is target else beside(leaf.window, device) for leaf in leaves]
    structure: list[Any] = []

    def one_state(*states: Tensor) -> tuple[Tensor, ...]:
        rest = iter(states)
        inner_args, inner_kwargs = mapped(lambda leaf: next(rest) if isinstance(leaf, Windowed) else leaf, (args, kwargs))
        outputs: list[Tensor] = []

        def noted(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and is_batchedtensor(leaf):
                outputs.append(leaf)
                return HERE
            return leaf

        structure.append(mapped(noted, func(*inner_args, **inner_kwargs)))
        return tuple(outputs)

    outputs = torch.vmap(one_state, randomness="different")(*windows)
    if in_place:
        if target.window.shape[1:] != target.shape:
            raise NeedsLanes(f"`{title(func)}` changes the shape of a tensor of the states of a window in place")
        return None if name == "__setitem__" else target
    rest = iter(outputs)
    return mapped(lambda leaf: Windowed.wrap(next(rest), run) if leaf is HERE else leaf, structure[0])


def _told(error: Unsupported, value: Any) -> Unsupported:
    """The error, of which the runs of these windowed tensors are told, since the loop may catch it."""
    for leaf in windowed_leaves(value):
        if getattr(leaf.run, "refused", error) is None:
            leaf.run.refused = error
    return error


class _Here:
    """The kind of HERE, which is one object in every process."""

    def __reduce__(self) -> str:
        return "HERE"


HERE = _Here()
WRITERS = {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ifloordiv__"} | {
    *("__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__")
}

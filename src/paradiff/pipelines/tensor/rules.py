# SPDX-License-Identifier: Apache-2.0
"""Rules that compute functions of torch on all states of a window at once (see windowed.py).

A rule takes a function of torch and its arguments. It returns UNSUITABLE for arguments that it does not cover; the function is
then mapped over the states, with the same result in more time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import EllipsisType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass

from paradiff.errors import NeedsLanes
from paradiff.pipelines.tensor.windowed import (
    RULES,
    UNSUITABLE,
    Windowed,
    beside,
    common_run,
    mapped,
    met,
    title,
    windowed_leaves,
)

PLAIN = (Tensor, torch.nn.Parameter)


def shown(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Attributes of one state that need no values, such as its shape."""
    with DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def unchanged(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functions that return their tensor as it is, such as `detach`."""
    return args[0]


def version(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The window's count of changes in place."""
    return args[0].window._version


def on_window(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functions of the window's memory that return no tensor."""
    return func(args[0].window, *args[1:], **kwargs)


def addressed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    """Functions that need memory of one state: refused."""
    raise NeedsLanes(f"the loop asks for the memory of a tensor (`{title(func)}`), which holds the states of a window")


def moved(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Changes of dtype and device; the same object if nothing changes. A move to a device does not wait for it."""
    kwargs = {name: value for name, value in kwargs.items() if name != "memory_format"}
    if func is Tensor.to and not args[2:] and any(leaf.window.is_cpu for leaf in windowed_leaves(args[:1])):
        kwargs["non_blocking"] = True
    bare = mapped(lambda leaf: leaf.window if isinstance(leaf, Windowed) else leaf, (args, kwargs))
    result = func(*bare[0], **bare[1])
    if not isinstance(args[0], Windowed) or not isinstance(result, Tensor):
        return result
    return args[0] if result is args[0].window else Windowed.wrap(result, args[0].run)


def contiguous(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`contiguous` for each state; a memory format is ignored, since it changes no value."""
    x = args[0]
    if kwargs or len(args) > 1 or not len(x.window) or x.window[0].is_contiguous():
        return x
    return Windowed.wrap(x.window.contiguous(), x.run)


def read(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Reads of a value in Python, which must be equal for all states. Waits for the device."""
    leaves = windowed_leaves((args, kwargs))
    common_run(leaves)

    def at(w: int) -> Any:
        bare = mapped(lambda leaf: leaf.window[w] if isinstance(leaf, Windowed) else leaf, (args, kwargs))
        return func(*bare[0], **bare[1])

    if len(leaves) == 1 and len(args) == 1:
        window = leaves[0].window.ne(0) if func in (Tensor.__bool__, torch.is_nonzero, Tensor.is_nonzero) else leaves[0].window
        agreed = len(window) == 1 or bool(((window == window[:1]) | ((window != window) & (window != window)[:1])).all())
        value = at(0) if agreed else None
    else:
        values = [at(w) for w in range(len(leaves[0].window))]
        agreed, value = all(other == values[0] for other in values), values[0]
    if not agreed:
        raise NeedsLanes(
            f"the loop reads the value of a tensor in Python (`{title(func)}`), and it differs between the states of a window"
        )
    return value


def elementwise(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Elementwise functions of one tensor and numbers."""
    if not isinstance(args[0], Windowed) or any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
        return UNSUITABLE
    x = args[0]
    result = func(x.window, *args[1:], **kwargs)
    return x if result is x.window else Windowed.wrap(result, x.run)


def aligned(values: tuple[Any, ...]) -> list[Any] | None:
    """Operands with windows in place of windowed tensors, such that broadcasting keeps the window's axis in front.

    None for tensors of several dtypes, which torch promotes by their ranks, and for operands that are neither tensors nor
    numbers.
    """
    leaves = [value for value in values if isinstance(value, Windowed)]
    if not leaves:
        return None
    common_run(leaves)
    dtype, rank = leaves[0].window.dtype, 0
    for value in values:
        if isinstance(value, Windowed):
            tensor, own = value.window, value.window.dim() - 1
        elif type(value) in PLAIN:
            tensor, own = value, value.dim()
        elif isinstance(value, (int, float)):
            continue
        else:
            return None
        if tensor.dtype != dtype:
            return None
        rank = max(rank, own)
    device = met([value.window if isinstance(value, Windowed) else value for value in values])
    parts: list[Any] = []
    for value in values:
        if isinstance(value, Windowed):
            window = beside(value.window, device)
            missing = rank + 1 - window.dim()
            parts.append(window[(slice(None), *[None] * missing)] if missing else window)
        else:
            parts.append(value)
    return parts


def broadcast(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operations of two operands that broadcast; axes align from the end."""
    parts = aligned(args) if len(args) == 2 and not kwargs else None
    if parts is None:
        return UNSUITABLE
    result = func(*parts)
    owner = args[0] if isinstance(args[0], Windowed) else args[1]
    return result if result is NotImplemented else Windowed.wrap(result, owner.run)


def chosen(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`where` with three tensors, the last two of one dtype."""
    if len(args) != 3 or kwargs:
        return UNSUITABLE
    tensors = [value for value in args if isinstance(value, Tensor)]
    leaves = [value for value in tensors if isinstance(value, Windowed)]
    if len(tensors) < 3 or any(type(value) not in PLAIN and not isinstance(value, Windowed) for value in tensors):
        return UNSUITABLE
    if args[1].dtype != args[2].dtype:
        return UNSUITABLE
    run = common_run(leaves)
    rank = max(value.window.dim() - 1 if isinstance(value, Windowed) else value.dim() for value in tensors)
    parts = [
        value.window[(slice(None), *[None] * (rank + 1 - value.window.dim()))] if isinstance(value, Windowed) else value
        for value in tensors
    ]
    return Windowed.wrap(func(*parts), run)


def broadcast_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`broadcast` that writes to its first tensor."""
    if kwargs or len(args) != 2 or not isinstance(args[0], Windowed):
        return UNSUITABLE
    a, b = args
    if isinstance(b, Windowed):
        common_run([a, b])
        if b.window.dim() != a.window.dim():
            return UNSUITABLE
        b = b.window
    elif not (type(b) in PLAIN and b.dim() < a.window.dim()) and not isinstance(b, (int, float)):
        return UNSUITABLE
    func(a.window, b)
    return a


def axis(dim: Any, rank: int) -> int | None:
    """The window's axis for the visible axis `dim` of a tensor of visible rank `rank`; None if `dim` is out of range."""
    if type(dim) is not int or not -rank <= dim < rank:
        return None
    return dim + 1 if dim >= 0 else dim


def joined(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`cat` and `stack`, of windowed and plain tensors."""
    tensors = args[0] if args else None
    if not isinstance(tensors, (list, tuple)) or len(args) > 2 or kwargs.keys() - {"dim"}:
        return UNSUITABLE
    leaves = [tensor for tensor in tensors if isinstance(tensor, Windowed)]
    if not leaves:
        return UNSUITABLE
    run, first = common_run(leaves), leaves[0].window
    parts: list[Tensor] = []
    for tensor in tensors:
        if isinstance(tensor, Windowed):
            part = tensor.window
        elif type(tensor) in PLAIN:
            part = tensor.expand(len(first), *tensor.shape)
        else:
            return UNSUITABLE
        if part.dtype != first.dtype or part.dim() != first.dim():
            return UNSUITABLE
        parts.append(part)
    dim = axis(args[1] if len(args) == 2 else kwargs.get("dim", 0), first.dim() - 1 + (func is torch.stack))
    return UNSUITABLE if dim is None else Windowed.wrap(func(parts, dim=dim), run)


def parted(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`chunk`, `split` and `unbind`."""
    x, extra = args[0], 0 if func in (torch.unbind, Tensor.unbind) else 1
    if not isinstance(x, Windowed) or kwargs.keys() - {"dim"} or not extra < len(args) + 1 <= extra + 3:
        return UNSUITABLE
    sizes = args[1 : 1 + extra]
    dim = axis(args[1 + extra] if len(args) == 2 + extra else kwargs.get("dim", 0), x.window.dim() - 1)
    if dim is None or len(sizes) != extra or windowed_leaves(sizes):
        return UNSUITABLE
    return tuple([Windowed.wrap(part, x.run) for part in func(x.window, *sizes, dim=dim)])


def reduced(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`mean`, `std` and the like over named axes."""
    x, given = args[0], args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(x, Windowed) or (len(args) > 1 and "dim" in kwargs):
        return UNSUITABLE
    dims = [axis(dim, x.window.dim() - 1) for dim in (given if isinstance(given, (list, tuple)) else [given])]
    if not dims or any(dim is None for dim in dims):
        return UNSUITABLE
    rest = {name: value for name, value in kwargs.items() if name != "dim"}
    return Windowed.wrap(func(x.window, dims, *args[2:], **rest), x.run)


def rearranged(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`transpose`, `flatten`, `squeeze` and `unflatten` by axes."""
    x, name = args[0], func.__name__
    if not isinstance(x, Windowed) or kwargs or x.window.dim() < 2:
        return UNSUITABLE
    sizes = args[2:] if name == "unflatten" else ()
    dims = args[1:2] if name == "unflatten" else (*args[1:], *(0, -1)[len(args) - 1 :]) if name == "flatten" else args[1:]
    axes = [axis(dim, x.window.dim() - 1) for dim in dims]
    if not axes or any(dim is None for dim in axes):
        return UNSUITABLE
    return Windowed.wrap(func(x.window, *axes, *sizes), x.run)


def applied(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`linear` with plain weights, which acts on the last axis."""
    if windowed_leaves((args[1:], kwargs)) or args[0].window.dim() < 2:
        return UNSUITABLE
    return Windowed.wrap(func(args[0].window, *args[1:], **kwargs), args[0].run)


def whole(value: Any) -> Any:
    """A size or bound as a number; a windowed one must be equal for all states."""
    return operator.index(value) if isinstance(value, Windowed) and value.window.dim() == 1 else value


def basic(index: Any) -> tuple[Any, ...] | None:
    """An index of integers, slices, None and the ellipsis, with the window's axis in front; None for any other.

    Windowed bounds of slices are read.
    """
    parts = index if type(index) is tuple else (index,)
    if any(type(part) is slice for part in parts):
        parts = tuple([mapped(whole, part) if type(part) is slice else part for part in parts])
    for part in parts:
        if type(part) is slice:
            if any(type(bound) not in (int, type(None)) for bound in (part.start, part.stop, part.step)):
                return None
        elif type(part) not in (int, type(None), EllipsisType):
            return None
    return (slice(None), *parts)


def taken(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x[...]`, and `table[index]` with windowed whole numbers."""
    x, index = args
    if isinstance(x, Windowed):
        parts = basic(index)
        return UNSUITABLE if parts is None else Windowed.wrap(x.window[parts], x.run)
    if type(index) is tuple and len(index) == 1:  # As torch 2.4 hands on the index of `table[index]`.
        (index,) = index
    if type(x) in PLAIN and isinstance(index, Windowed) and index.window.dtype in (torch.int64, torch.int32):
        return Windowed.wrap(x[index.window.to(x.device, non_blocking=x.device.type != "cpu")], index.run)
    return UNSUITABLE


def put(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x[...] = y`."""
    x, index, value = args
    parts = basic(index) if isinstance(x, Windowed) else None
    if parts is None:
        return UNSUITABLE
    target = x.window[parts]
    if isinstance(value, Windowed):
        common_run([x, value])
        if value.window.dim() != target.dim():
            return UNSUITABLE
        value = value.window
    elif not (type(value) in PLAIN and value.dim() < target.dim()) and not isinstance(value, (int, float)):
        return UNSUITABLE
    x.window[parts] = value
    return None


def reshaped(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`view`, `reshape`, `expand`, `repeat` and `permute` by sizes, and `unsqueeze`."""
    x, sizes = args[0], args[1:]
    if kwargs:
        return UNSUITABLE
    if len(sizes) == 1 and isinstance(sizes[0], torch.dtype):  # Which torch 2.4 cannot map over states.
        alike = isinstance(x, Windowed) and sizes[0].itemsize == x.window.dtype.itemsize
        return Windowed.wrap(x.window.view(sizes[0]), x.run) if alike else UNSUITABLE
    if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        sizes = tuple(sizes[0])
    sizes = tuple([whole(size) for size in sizes])
    if not isinstance(x, Windowed):
        return func(x, *sizes)
    if any(type(size) is not int for size in sizes):
        return UNSUITABLE
    window, name = x.window, func.__name__
    rank, width = window.dim() - 1, len(window)
    if name == "unsqueeze":
        dim = axis(sizes[0], rank + 1) if len(sizes) == 1 else None
        return UNSUITABLE if dim is None else Windowed.wrap(window.unsqueeze(dim), x.run)
    if name == "permute":
        if sorted(size % max(rank, 1) for size in sizes) != list(range(rank)):
            return UNSUITABLE
        return Windowed.wrap(window.permute(0, *[size % rank + 1 for size in sizes]), x.run)
    if name in ("view", "reshape"):
        return UNSUITABLE if width == 0 else Windowed.wrap(getattr(window, name)(width, *sizes), x.run)
    if len(sizes) < rank:
        return UNSUITABLE
    window = window[(slice(None), *[None] * (len(sizes) - rank))]
    return Windowed.wrap(window.expand(width, *sizes) if name == "expand" else window.repeat(1, *sizes), x.run)


def both(names: str) -> list[Any]:
    """The functions of these names, of torch and of its tensors."""
    found = [getattr(place, name, None) for name in names.split() for place in (torch, Tensor)]
    return [func for func in found if func is not None]


def methods(names: str) -> list[Any]:
    """The tensor methods of these names."""
    return [getattr(Tensor, name) for name in names.split() if hasattr(Tensor, name)]


def getters(names: str) -> list[Any]:
    """The readers of these tensor attributes."""
    return [getattr(Tensor, name).__get__ for name in names.split() if hasattr(Tensor, name)]


RULES.update(
    {
        **dict.fromkeys(
            [
                *getters(
                    "shape dtype device layout ndim is_cuda is_cpu is_xpu is_mps is_meta is_sparse is_quantized is_mkldnn"
                ),
                *getters("is_nested requires_grad is_leaf grad grad_fn itemsize nbytes names output_nr retains_grad"),
                *both("numel is_floating_point is_complex is_signed is_conj is_neg is_inference is_same_size"),
                *methods("size dim nelement ndimension element_size __len__ stride get_device is_contiguous storage_offset"),
                *methods("dim_order is_pinned has_names __hash__ __dir__"),
            ],
            shown,
        ),
        **dict.fromkeys([*getters("data"), *both("detach"), *methods("requires_grad_ detach_")], unchanged),
        **dict.fromkeys(getters("_version"), version),
        **dict.fromkeys(methods("record_stream"), on_window),
        **dict.fromkeys(methods("data_ptr storage untyped_storage _storage __dlpack__ share_memory_ register_hook"), addressed),
        **dict.fromkeys(
            methods("to type type_as float double half bfloat16 int long short char byte bool cpu cuda xpu ipu pin_memory"),
            moved,
        ),
        **dict.fromkeys(methods("contiguous"), contiguous),
        **dict.fromkeys(
            [
                *methods("__bool__ __float__ __int__ __index__ __complex__ item tolist numpy __array__ __contains__"),
                *both("equal allclose is_nonzero"),
            ],
            read,
        ),
        **dict.fromkeys(
            [
                *both(
                    "abs neg negative exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square sin cos tan sinh cosh"
                ),
                *both(
                    "sigmoid tanh relu floor ceil round trunc frac sign isnan isfinite isinf nan_to_num clamp clip clamp_min"
                ),
                *both("clamp_max clone logical_not bitwise_not erf zeros_like ones_like full_like empty_like positive"),
                *methods(
                    "__neg__ __pos__ __abs__ __invert__ abs_ neg_ exp_ log_ sqrt_ rsqrt_ reciprocal_ square_ sin_ cos_ sigmoid_"
                ),
                *methods("tanh_ relu_ floor_ ceil_ round_ nan_to_num_ clamp_ clip_ clamp_min_ clamp_max_ zero_ fill_"),
                torch.nn.functional.silu,
                torch.nn.functional.gelu,
            ],
            elementwise,
        ),
        **dict.fromkeys(
            [
                *both(
                    "add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow maximum minimum eq ne"
                ),
                *both("lt le gt ge atan2 logical_and logical_or bitwise_and bitwise_or rsub"),
                *methods(
                    "__add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ __div__ __pow__"
                ),
                *methods("__rpow__ __floordiv__ __rfloordiv__ __mod__ __rmod__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__"),
                *methods("__and__ __or__ __rand__ __ror__"),
            ],
            broadcast,
        ),
        **dict.fromkeys(
            methods("add_ sub_ mul_ div_ copy_ __iadd__ __isub__ __imul__ __itruediv__ __idiv__"), broadcast_in_place
        ),
        torch.where: chosen,
        torch.nn.functional.linear: applied,
        **dict.fromkeys(both("mean sum std var amax amin"), reduced),
        **dict.fromkeys(both("transpose swapaxes flatten squeeze unflatten"), rearranged),
        **dict.fromkeys([torch.cat, torch.concat, torch.stack], joined),
        **dict.fromkeys(both("chunk split unbind"), parted),
        **dict.fromkeys(methods("__getitem__"), taken),
        **dict.fromkeys(methods("__setitem__"), put),
        **dict.fromkeys([*both("reshape permute unsqueeze"), *methods("view expand repeat")], reshaped),
    }
)

# SPDX-License-Identifier: Apache-2.0
"""What ranks have to agree on before they begin, as short texts: versions, weights, and the arguments of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import platform
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from paradiff.solver.sharded import BITS
from paradiff.version import __version__

DEPTH = 4
"""How deep a model is searched for networks and tensors."""


def versions(*packages: str) -> dict[str, str]:
    """The versions that samples depend on.

    Args:
        packages: Further packages; those that are not installed are left out.
    """
    found = {"paradiff": __version__, "torch": torch.__version__, "Python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {f"version of {name}": number for name, number in found.items()}


def weights_of(model: Any) -> dict[str, str]:
    """Sums over the bits of a model's weights, by name.

    Weights are those of a module, and the tensors within reach of a function, a partial, a method or an object,
    the module's names that a function uses among them.
    """
    return {f"weights {name}".strip(): of for name, of in sums_of(reach(model)).items()}


def sums_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Sums over the bits of tensors, by name; one wait for each device."""
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors.values():
        sums.setdefault(tensor.device, []).append(_sum(tensor))
    numbers = {device: iter(torch.stack(of).tolist()) for device, of in sums.items()}
    return {name: f"{next(numbers[tensor.device]):x}" for name, tensor in tensors.items()}


def reach(model: Any) -> dict[str, Tensor]:
    """The weights of a model by name, as `weights_of` has them."""
    return dict(_tensors(model, "", DEPTH, set()))


def _tensors(value: Any, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors within reach of a value, with names that tell where they are."""
    if id(value) in seen or depth < 0:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.layout is torch.strided and value.device.type != "meta":
            yield name, value
        return
    parts: list[tuple[str, Any]] = []
    if isinstance(value, nn.Module):
        every = [*value.named_parameters(), *value.named_buffers()]
        yield from ((f"{name}.{key}".strip("."), one) for key, one in every if one.device.type != "meta")
        return
    if isinstance(value, functools.partial):
        parts = [("", value.func), *((f"{k}", arg) for k, arg in enumerate(value.args)), *value.keywords.items()]
    elif isinstance(value, Mapping):
        parts = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(str(k), part) for k, part in enumerate(value)]
    elif isinstance(value, FunctionType | MethodType):
        code, cells = getattr(value, "__code__", None), getattr(value, "__closure__", None) or ()
        names = code.co_freevars if code is not None else ()
        parts = [(key, cell.cell_contents) for key, cell in zip(names, cells, strict=False) if _filled(cell)]
        known = getattr(value, "__globals__", {})
        used = [(key, known[key]) for key in (code.co_names if code is not None else ()) if key in known]
        parts += [(key, one) for key, one in used if isinstance(one, Tensor | nn.Module | FunctionType)]
        parts += [("", owner)] if (owner := getattr(value, "__self__", None)) is not None else []
    elif hasattr(value, "__dict__") and not isinstance(value, type) and type(value).__module__ != "builtins":
        parts = list(vars(value).items())
    for key, part in parts:
        yield from _tensors(part, f"{name}.{key}".strip("."), depth - 1, seen)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _sum(tensor: Tensor) -> Tensor:
    """Two sums over a tensor's bits in one: of all of it, and of every other entry."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8 if tensor.is_complex() else tensor.dtype)
    bits = flat.view(BITS[flat.dtype.itemsize])
    return bits.sum(dtype=torch.int64) + 31 * bits[::2].sum(dtype=torch.int64)


def described(value: Any, depth: int = DEPTH) -> str:
    """A value as a text that is the same for equal values in every process: no addresses, and of tensors a sum."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        return f"tensor {tuple(data.shape)} {data.dtype} {zlib.crc32(data.view(-1).view(torch.uint8).numpy().tobytes()):x}"
    if isinstance(value, torch.Generator):
        return f"generator {zlib.crc32(value.get_state().numpy().tobytes()):x}"
    if isinstance(value, str | int | float | bool | torch.dtype | torch.device | None):
        return repr(value)
    if depth <= 0:
        return type(value).__name__
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {described(part, depth - 1)}' for key, part in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(described(part, depth - 1) for part in value)}]"
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return value.__qualname__
    if (data := getattr(value, "tobytes", None)) is not None:  # of an array or a picture
        return f"{type(value).__name__} {getattr(value, 'shape', getattr(value, 'size', ''))} {zlib.crc32(data()):x}"
    if not type(value).__module__.startswith("paradiff."):
        return type(value).__name__
    compared = [f.name for f in dataclasses.fields(value) if f.compare] if dataclasses.is_dataclass(value) else None
    parts = None if compared is None else {name: getattr(value, name) for name in compared}
    parts = vars(value) if parts is None and hasattr(value, "__dict__") else parts
    return f"{type(value).__name__}({described(parts, depth - 1) if parts is not None else ''})"

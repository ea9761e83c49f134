# SPDX-License-Identifier: Apache-2.0
"""The weights of a call's networks: that a loop leaves them as they are, and what they were before a try.

A loop that scales, fuses, exchanges or trains weights from pass to pass has another network in each of them, and a parallel run
makes the passes together. So modules and parameters are compared by identity, memory and version at the loop's first step and
after each round. Writing through `.data` moves no version; where the pipeline's own functions name something that writes to
weights (`WRITERS`, or operations in place beside `WALKERS`), a stretch of each parameter is compared by value, too, and all
values are copied before a try. Without such a copy, values that were overwritten cannot be put back.

Networks that are offloaded, cast layer by layer or held elsewhere have weights that come and go, and are left out.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paradiff.errors import Unsupported
from paradiff.models.absent import is_absent
from paradiff.pipelines.network.origin import is_users
from paradiff.pipelines.network.reads import names

WRITERS = {
    "_parameters",
    "add_weighted_adapter",
    "bias",
    "copy_",
    "data",
    "fuse_lora",
    "load_lora_weights",
    "load_state_dict",
    "merge_adapter",
    "set_adapters",
    "unfuse_lora",
    "weight",
}
"""Names in functions that may write to weights."""

WALKERS = {"modules", "named_modules", "named_parameters", "parameters"}
"""Names in functions that may reach weights."""

STRETCH = 64
"""Numbers of a parameter that are compared by value."""

MOVING = ("_hf_hook", "_diffusers_hook")
"""Attributes of modules whose weights are moved between devices or dtypes by their calls."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter, and what it was.

    Attributes:
        path: Where it is, such as `unet.mid_block.weight`.
        parameter: The parameter.
        data: Its memory, shared.
        version: Its version.
        copy: A copy of its values; None if none is kept.
    """

    path: str
    parameter: Tensor
    data: Tensor
    version: int
    copy: Tensor | None


class Weights:
    """The weights of some networks at the time of its making.

    Args:
        networks: The networks by name.
        functions: The functions that may write to them: the pipeline's own, and callbacks.
    """

    def __init__(self, networks: Mapping[str, nn.Module], functions: Iterable[types.FunctionType]) -> None:
        self._copies = any(may_write(names(function.__code__)) for function in with_helpers(functions))
        self._parts: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._weights: list[Weight] = []
        self._seen: set[int] = set()
        self._marked: list[tuple[str, dict[str, Any], dict[str, Any]]] = []  # what `mark` saw
        self._states: list[tuple[int, int]] = []
        self._values: list[Tensor] = []
        for name, network in networks.items():
            modules = [] if is_absent(network) else list(network.named_modules())
            if not any(hasattr(module, moving) for _, module in modules for moving in MOVING):
                for path, module in modules:
                    self._record(f"{name}.{path}" if path else name, module)
        self.mark()

    def _record(self, path: str, module: nn.Module) -> None:
        """Records a module's parts and parameters."""
        for held in (module._modules, module._parameters):
            self._parts.append((path, held, dict(held)))
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in self._seen or parameter.is_meta or parameter.layout != torch.strided:
                continue
            self._seen.add(id(parameter))
            copy = parameter.detach().to("cpu", copy=True) if self._copies else None
            self._weights.append(Weight(f"{path}.{name}", parameter, parameter.data, version_of(parameter), copy))

    def mark(self) -> None:
        """Takes the weights as they are: what wrote to them until here is not the loop."""
        self._marked = [(path, held, dict(held)) for path, held, _ in self._parts]
        self._states = [(w.parameter.data_ptr(), version_of(w.parameter)) for w in self._weights]
        self._values = self._stretches()

    def check(self) -> None:
        """Checks that nothing wrote to the weights since `mark`. Waits for the device where values are compared.

        Raises:
            Unsupported: If something did.
        """
        for path, held, before in self._marked:
            if others(held, before):
                raise Unsupported(f"the call exchanges parts of {path} while its loop runs, so that passes have other networks")
        for weight, state in zip(self._weights, self._states, strict=True):
            if (weight.parameter.data_ptr(), version_of(weight.parameter)) != state:
                raise Unsupported(_written(weight))
        for weight, before, now in zip(self._weights, self._values, self._stretches(), strict=False):
            if not torch.equal(before, now):
                raise Unsupported(_written(weight))

    @torch.no_grad()
    def restore(self) -> str | None:
        """Puts modules, parameters and values back; the path of weights whose values are lost, or None."""
        for _, held, before in self._parts:
            if others(held, before):
                held.clear()
                held.update(before)
        lost = None
        for weight in self._weights:
            parameter = weight.parameter
            written = version_of(parameter) != weight.version
            if parameter.data_ptr() != weight.data.data_ptr():
                parameter.data = weight.data
            if weight.copy is None:
                lost = weight.path if lost is None and written else lost
            elif not torch.equal(weight.data.cpu(), weight.copy):
                weight.data.copy_(weight.copy)
        return lost

    def _stretches(self) -> list[Tensor]:
        """Copies of a stretch of each parameter; none where values are not compared."""
        return [w.parameter.detach().reshape(-1)[:STRETCH].clone() for w in self._weights] if self._copies else []


def may_write(found: set[str]) -> bool:
    """Whether a function with such names may write to weights."""
    in_place = any(name.endswith("_") and not name.startswith("_") for name in found)
    return bool(found & WRITERS) or (in_place and bool(found & WALKERS))


def with_helpers(functions: Iterable[types.FunctionType]) -> list[types.FunctionType]:
    """Functions, and those of no known library that they name."""
    found = list(functions)
    for function in list(found):
        named = (function.__globals__.get(name) for name in names(function.__code__))
        found += [other for other in named if isinstance(other, types.FunctionType) and is_users(other.__module__)]
    return found


def version_of(tensor: Tensor) -> int:
    """The version of a tensor; -1 of one that has none."""
    return -1 if tensor.is_inference() else tensor._version


def others(held: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a dict holds other things than it did."""
    return len(held) != len(before) or not all(map(operator.is_, held.values(), before.values()))


def _written(weight: Weight) -> str:
    return f"the call writes to the weights {weight.path} while its loop runs, so that passes have other networks"

# SPDX-License-Identifier: Apache-2.0
"""The weights of a call's networks: that a loop leaves them as they are, and what they were before a try.

A loop that scales, fuses, exchanges or trains weights from pass to pass has another network in each of them, and a parallel run
makes the passes together. So modules and parameters are compared by identity, memory and version at the loop's first step and
after each round. Writing through `.data` moves no version; where functions within reach of the loop name something that writes
to weights (`WRITERS`, or operations in place beside `WALKERS`), a stretch of each parameter is compared by value, too, and all
values are copied before a try. Without such a copy, values that were overwritten cannot be put back.

Parameters whose memory is another one are compared by value with the memory that they had at the loop's first step: SDXL's
image to image turns its autoencoder to float32 and back before its loop, and a run begins the call more than once.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from paradiff.errors import Unsupported
from paradiff.models.absent import is_absent
from paradiff.pipelines.network import offloaded
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
    "weights_map",
}
"""Names in functions that may write to weights."""

WALKERS = {"modules", "named_modules", "named_parameters", "parameters"}
"""Names in functions that may reach weights."""

STRETCH = 64
"""Numbers of a parameter that are compared by value, spread over it."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter, or the tensor that a hook makes one of, and what it was.

    Attributes:
        path: Where it is, such as `unet.mid_block.weight`.
        held: The dict that holds it.
        key: Its key there.
        tensor: What it was.
        version: Its version.
        moves: Whether its memory may be another one after a call.
        data: Its memory, shared; None if it moves.
        copy: A copy of its values; None if none is kept.
    """

    path: str
    held: dict[str, Any]
    key: str
    tensor: Tensor
    version: int
    moves: bool
    data: Tensor | None
    copy: Tensor | None


@dataclass(frozen=True, eq=False)
class Mark:
    """What a weight was when the loop began.

    Attributes:
        tensor: The parameter.
        place: Where its memory was.
        version: Its version.
        data: Its memory, shared, so that nothing else comes to be there; None if it may move.
        stretch: Some of its values, on the CPU; None if none are compared.
    """

    tensor: Tensor | None
    place: int
    version: int
    data: Tensor | None
    stretch: Tensor | None

    def is_held_by(self, tensor: Tensor | None) -> bool:
        """Whether a parameter is this one with the same values in other memory. Waits for the device."""
        data = self.data
        if data is None or tensor is None or tensor is not self.tensor or not has_values(tensor):
            return False
        alike = (tensor.shape, tensor.dtype, tensor.device) == (data.shape, data.dtype, data.device)
        return alike and same(data, tensor.detach())


class Weights:
    """The weights of some networks at the time of its making.

    Args:
        networks: The networks by name.
        functions: The functions that may write to them: the pipeline's own, callbacks, and those of objects within reach.
        operators: The names by which operators within their reach, such as `operator.methodcaller`, get or call something.
    """

    def __init__(
        self, networks: Mapping[str, nn.Module], functions: Iterable[types.FunctionType], operators: Iterable[str] = ()
    ) -> None:
        found = with_helpers(functions)
        apart, together = set(operators), [names(function.__code__) for function in found]
        self._copies = any(may_write(one | apart) for one in together) or may_write(apart)
        self._parts: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._weights: list[Weight] = []
        self._seen: set[int] = set()
        self._marked: list[tuple[str, dict[str, Any], dict[str, Any]]] = []  # what `mark` saw
        self._marks: list[Mark] = []
        self._written: set[str] = set()  # those that were seen by value alone
        for name, network in networks.items():
            if not is_absent(network):
                moves = offloaded.moves(network)
                self._seen.update(id(part) for module in network.modules() for part in offloaded.in_files(module))
                for path, module in network.named_modules():
                    self._record(f"{name}.{path}" if path else name, module, moves)

    def _record(self, path: str, module: nn.Module, moves: bool) -> None:
        """Records a module's parts and parameters."""
        if isinstance(module, torch.jit.ScriptModule):  # whose parts nobody exchanges, and whose dicts are none
            held = dict(module._parameters.items())
            for name in held:
                self._record_one(f"{path}.{name}", held, name, moves)
            return
        for held in (module._modules, *([] if moves else [module._parameters])):
            self._parts.append((path, held, dict(held)))
        for name in module._parameters:
            self._record_one(f"{path}.{name}", module._parameters, name, moves)
        for held, key, name in offloaded.mapped(module):
            self._record_one(f"{path}.{name}", held, key, False)

    def _record_one(self, path: str, held: dict[str, Any], key: str, moves: bool) -> None:
        """Records a parameter, unless it is a placeholder."""
        tensor = held[key]
        if not isinstance(tensor, Tensor) or tensor.is_meta or id(tensor) in self._seen:
            return
        self._seen.add(id(tensor))
        copy = tensor.detach().to("cpu", copy=True) if self._copies and has_values(tensor) else None
        data = None if moves else tensor.data
        self._weights.append(Weight(path, held, key, tensor, version_of(tensor), moves, data, copy))

    def mark(self) -> None:
        """Takes the weights as they are: what wrote to them until here is not the loop. Waits for the device where values are
        compared, or weights come and go."""
        self._marked = [(path, held, dict(held)) for path, held, _ in self._parts]
        now = [weight.held.get(weight.key) for weight in self._weights]
        compared = {
            i: tensor
            for i, (weight, tensor) in enumerate(zip(self._weights, now, strict=True))
            if (weight.moves or self._copies) and tensor is not None and has_values(tensor)
        }
        stretches = dict(zip(compared, stretches_of(list(compared.values())), strict=True))
        self._marks = [
            Mark(
                tensor=tensor,
                place=place_of(tensor),
                version=-1 if tensor is None else version_of(tensor),
                data=None if tensor is None or weight.moves or not has_values(tensor) else tensor.data,
                stretch=stretches.get(i),
            )
            for i, (weight, tensor) in enumerate(zip(self._weights, now, strict=True))
        ]

    def check(self) -> None:
        """Checks that nothing wrote to the weights since `mark`. Waits for the device where values are compared: those of
        functions that may write, and those whose memory is another one, which counts from here on.

        Raises:
            Unsupported: If something did.
        """
        for path, held, before in self._marked:
            if others(held, before):
                raise Unsupported(f"the call exchanges parts of {path} while its loop runs, so that passes have other networks")
        compared: list[tuple[Weight, Tensor, Tensor]] = []
        for i, (weight, mark) in enumerate(zip(self._weights, self._marks, strict=True)):
            tensor = weight.held.get(weight.key)
            if tensor is mark.tensor and (tensor is None or version_of(tensor) != mark.version):
                raise Unsupported(_written(weight))
            elsewhere = tensor is not mark.tensor or place_of(tensor) != mark.place
            if elsewhere and not weight.moves:
                if tensor is None or not mark.is_held_by(tensor):
                    raise Unsupported(_written(weight))
                self._marks[i] = replace(mark, place=place_of(tensor), data=tensor.data)
            if (elsewhere or self._copies) and mark.stretch is not None and tensor is not None and has_values(tensor):
                compared.append((weight, tensor, mark.stretch))
        now = stretches_of([tensor for _, tensor, _ in compared])
        for (weight, _, before), stretch in zip(compared, now, strict=True):
            if not same(before, stretch):
                self._written.add(weight.path)
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
            tensor = weight.tensor
            if weight.moves:
                tensor = weight.held.get(weight.key)
            elif weight.held.get(weight.key) is not tensor:
                weight.held[weight.key] = tensor
            if tensor is None or tensor.is_meta:
                continue
            written = weight.path in self._written or (tensor is weight.tensor and version_of(tensor) != weight.version)
            if weight.data is not None and place_of(tensor) != place_of(weight.data):
                tensor.data = weight.data
            if weight.copy is None:
                lost = weight.path if lost is None and written else lost
            elif not same(tensor.detach().cpu(), weight.copy):
                tensor.data.copy_(weight.copy)
        return lost


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


def has_values(tensor: Tensor) -> bool:
    """Whether a parameter has memory of its own whose values can be compared."""
    return not tensor.is_meta and tensor.layout == torch.strided and not is_traceable_wrapper_subclass(tensor)


def place_of(tensor: Tensor | None) -> int:
    """Where the memory of a parameter is; 0 if it has none."""
    return tensor.data_ptr() if tensor is not None and has_values(tensor) else 0


def stretches_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of some values of each tensor, spread over it, on the CPU. Waits once for each device and dtype."""
    found: dict[int, Tensor] = {}
    groups: dict[Any, list[tuple[int, Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append((place, _stretch(tensor.detach())))
    for group in groups.values():
        parts = [part for _, part in group]
        together = torch.cat([part.contiguous().view(torch.uint8) for part in parts]).cpu()
        sizes = [part.numel() * part.element_size() for part in parts]
        for (place, part), own in zip(group, together.split(sizes), strict=True):
            found[place] = own.clone().view(part.dtype)
    return [found[place] for place in range(len(tensors))]


def _stretch(tensor: Tensor) -> Tensor:
    """A view of some of its numbers, in the order in which they are in memory."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)[:: tensor.numel() // STRETCH | 1]


def same(before: Tensor, now: Tensor) -> bool:
    """Whether values on one device are the same, NaN included; those of another dtype where that holds them."""
    if before.dtype != now.dtype:
        return torch.equal(before.double(), now.double())
    return torch.equal(*(part.reshape(-1).contiguous().view(torch.uint8) for part in (before, now)))


def _written(weight: Weight) -> str:
    return f"the call writes to the weights {weight.path} while its loop runs, so that passes have other networks"

# SPDX-License-Identifier: Apache-2.0
"""Several devices in one process: a copy of the network on each, and a thread for each that evaluates its part of a round.

Of a round's R rows the device at place g evaluates the stretch that a rank at that place does (sharded.py), so that samples are
those of one device with `shares=G`, up to the rounding of the devices. The threads launch the calls side by side; the outputs
are moved to the first device, which holds the states. For many devices ranks are the faster way: threads of one process share
Python's interpreter, which launches one call's kernels at a time.
"""

from __future__ import annotations

import contextvars
import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from paradiff.errors import shown
from paradiff.solver import accelerator
from paradiff.solver.agreement import weights_of
from paradiff.solver.arguments import device_of
from paradiff.solver.crew import Bound, dealt
from paradiff.solver.sharded import taken


class Replicas:
    """The devices of one process; what a `RowBound` (evaluator.py) hands its items to.

    Args:
        devices: The devices; the first one holds the states.
        shares: Stretches that the items are cut into; as many as devices by default.

    Attributes:
        devices: As given.
        shares: As given.
    """

    def __init__(self, devices: Sequence[torch.device], shares: int | None = None) -> None:
        self.devices = list(devices)
        self.shares = len(devices) if shares is None else shares
        self._local = threading.local()

    @property
    def members(self) -> int:
        """How many devices there are."""
        return len(self.devices)

    @property
    def even(self) -> int:
        """Stretches of equal length that the items of a round are cut into."""
        return self.shares

    @property
    def place(self) -> int:
        """The place of the device that this thread evaluates on; 0, the first, in all other threads."""
        return getattr(self._local, "place", 0)

    def parts(
        self,
        bound: Bound,
        count: int,
        call: Callable[[slice], Any],
        device: torch.device,
        *,
        rows: int,
        widths: Sequence[int] | None,
        inputs: Sequence[Tensor],
        key: Hashable,
        mark: int,
        made: Callable[[int, int], None] | None = None,
    ) -> list[Any]:
        """The outputs for all items, in parts, on the first device. See `Crew`."""
        stretches = dealt(count, self.shares, len(self.devices))
        counts: list[tuple[int, int]] = []
        modes = _modes()

        def evaluated(place: int) -> list[Any]:
            self._local.place = place
            here = self.devices[place]
            with modes(), accelerator.current(here):
                return [
                    taken(part, items)
                    for stretch in stretches[place]
                    for part, items in bound.stretch(
                        stretch, call, here, rows=rows, widths=widths, made=lambda *told: counts.append(told)
                    )
                ]

        busy = [place for place, own in enumerate(stretches) if own]
        with ThreadPoolExecutor(len(busy), "paradiff-device") as pool:
            working: list[Future[list[Any]]] = [pool.submit(contextvars.copy_context().run, evaluated, place) for place in busy]
            found = [part for work in working for part in work.result()]
        if made is not None:
            for told in counts:
                made(*told)
        return [_pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), part) for part in found]


def devices_of(given: Any) -> list[torch.device]:
    """The devices that a process was given.

    Args:
        given: A list of devices; or `all`, those of this machine.

    Raises:
        ValueError: If one of them is not to be had, or there is none.
    """
    if given == "all":
        kind = accelerator.kind()
        if kind is None:
            raise ValueError("devices is 'all', but there is no accelerator here; leave it out, or give a list of devices")
        return [torch.device(kind, index) for index in range(accelerator.count(kind))]
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ValueError(f"devices is {shown(given)}; give 'all', or a list of devices such as ['cuda:0', 'cuda:1']")
    return [device_of(device) for device in given]


def replicas_of(model: Any, devices: Sequence[torch.device]) -> list[Any]:
    """A model on each of some devices: itself where it is there, and a copy elsewhere. Later changes of it reach no copy.

    Args:
        model: A module, an object that holds modules, or a function within whose reach there are no tensors.
        devices: The devices, the model's own first.

    Raises:
        ValueError: If it cannot be copied to another device.
    """
    made: dict[torch.device, Any] = {devices[0]: model}
    for device in devices[1:]:
        if device not in made:
            made[device] = _moved(model, device)
    return [made[device] for device in devices]


def _moved(model: Any, device: torch.device) -> Any:
    if isinstance(model, nn.Module):
        return copy.deepcopy(model).to(device)
    modules = {name: part for name, part in getattr(model, "__dict__", {}).items() if isinstance(part, nn.Module)}
    if modules:
        other = copy.copy(model)
        for name, module in modules.items():
            object.__setattr__(other, name, copy.deepcopy(module).to(device))
        return other
    if not weights_of(model):
        return model
    raise ValueError(
        f"the model is {shown(model)}, which holds tensors that cannot be moved to {device}; give a torch.nn.Module, or an "
        "object with modules as its attributes"
    )


def _modes() -> Callable[[], Any]:
    """Torch's modes of this thread, to be entered in another one: gradients, inference, autocast."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kinds = ["cpu", *([kind] if (kind := accelerator.kind()) is not None else [])]
    casts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]

    @contextmanager
    def entered() -> Iterator[None]:
        for kind, enabled, dtype in casts:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            yield

    return entered

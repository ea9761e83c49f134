# SPDX-License-Identifier: Apache-2.0
"""What torch offers of every kind of accelerator in the module of its name: `torch.cuda`, `torch.xpu`, `torch.mps`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.generators import HELD, borrowed


def empty_cache(device: torch.device) -> None:
    """Gives memory that torch keeps for later back to the device; nothing on the CPU."""
    release = getattr(_module(device.type), "empty_cache", None)
    if release is not None:
        release()


def read(numbers: Sequence[Tensor]) -> list[float]:
    """Tensors of one number each on the host, truth values as 0 and 1. Waits once for each device that they are on."""
    found = [0.0] * len(numbers)
    places: dict[torch.device, list[int]] = {}
    for place, number in enumerate(numbers):
        places.setdefault(number.device, []).append(place)
    for here in places.values():
        values = torch.cat([numbers[place].reshape(1) for place in here]).tolist()
        for place, value in zip(here, values, strict=True):
            found[place] = float(value)
    return found


def random_states() -> list[Tensor]:
    """The states of torch's own generators, that of the CPU first and then those of all accelerators that are in use, on the
    CPU. Does not wait for the accelerators."""
    module = _in_use()
    with HELD:
        return [torch.get_rng_state(), *([] if module is None else module.get_rng_state_all())]


def set_random_states(states: list[Tensor]) -> None:
    """Sets torch's own generators to what `random_states` returned."""
    module = _in_use()
    with HELD:
        torch.set_rng_state(states[0])
        if states[1:] and module is not None:
            module.set_rng_state_all(states[1:])


def forked_random_state(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Restores torch's own generators of the CPU and of a device at the end of a `with` block."""
    return borrowed(device if hasattr(_module(device.type), "get_rng_state_all") else None)


def kind() -> str | None:
    """The kind of this machine's accelerator, such as `cuda`; None where there is none."""
    present = getattr(torch, "accelerator", None)  # not in torch 2.4
    if present is None:
        return "cuda" if torch.cuda.is_available() else None
    return present.current_accelerator().type if present.is_available() else None


def count(kind: str) -> int:
    """The number of devices of a kind."""
    return _module(kind).device_count()


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a device the current one of its kind in a `with` block; without effect on the CPU."""
    enter = getattr(_module(device.type), "device", None)
    return contextlib.nullcontext() if enter is None or device.index is None else enter(device)


def _module(kind: str) -> Any:
    return None if kind == "cpu" else getattr(torch, kind, None)


def kinds() -> tuple[str, ...]:
    """The kinds of devices here: `cpu`, and that of the accelerators for which torch was built."""
    present = getattr(torch, "accelerator", None)  # not in torch 2.4
    found = present.current_accelerator() if present is not None else torch.device("cuda")
    return ("cpu",) if found is None else ("cpu", found.type)


def _in_use() -> Any:
    """The module of the accelerator that is in use, whose generators have states; None where there is none."""
    module = _module(kinds()[-1])
    return module if hasattr(module, "get_rng_state_all") and module.is_initialized() else None

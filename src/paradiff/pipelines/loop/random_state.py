# SPDX-License-Identifier: Apache-2.0
"""The random states at the start of a pipeline call, from which it can start again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Snapshot:
    """The states of the generators among a call's arguments, single or in lists, and of torch's global generators.

    Args:
        arguments: The call's arguments.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        found = [g for value in arguments.values() for g in (value if isinstance(value, list | tuple) else [value])]
        self._states = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
        self._host = torch.get_rng_state()
        self._devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        """Sets all generators to these states."""
        for generator, state in self._states:
            generator.set_state(state)
        torch.set_rng_state(self._host)
        if self._devices:
            torch.cuda.set_rng_state_all(self._devices)


def clone(generator: torch.Generator, state: Tensor | None = None) -> torch.Generator:
    """A generator on the device of `generator`, at this state, or at that of `generator`."""
    copied = torch.Generator(device=generator.device)
    copied.set_state(generator.get_state() if state is None else state)
    return copied

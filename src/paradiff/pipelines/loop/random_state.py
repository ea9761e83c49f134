# SPDX-License-Identifier: Apache-2.0
"""The random states at the start of a pipeline call, from which it can start again."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paradiff.solver.accelerator import random_states, set_random_states


class Snapshot:
    """The states of the generators among a call's arguments, and of the global ones of torch, numpy and Python.

    Args:
        arguments: The call's arguments.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        found = [g for value in arguments.values() for g in (value if isinstance(value, list | tuple) else [value])]
        self._states = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
        self._torch = random_states()
        self._others = np.random.get_state(legacy=False), random.getstate()

    @property
    def same(self) -> bool:
        """Whether all generators are in these states still, so that nothing was drawn."""
        now = [generator.get_state() for generator, _ in self._states]
        pairs = zip([state for _, state in self._states], now, strict=True)
        return (
            all(torch.equal(a, b) for a, b in pairs)
            and all(torch.equal(a, b) for a, b in zip(self._torch, random_states(), strict=False))
            and self._others[1] == random.getstate()
            and _same_state(self._others[0], np.random.get_state(legacy=False))
        )

    def restore(self) -> None:
        """Sets all generators to these states."""
        self.take(self.states)

    @property
    def states(self) -> tuple[Any, ...]:
        """The states, as another process can take them."""
        return [state for _, state in self._states], self._torch, *self._others

    def take(self, states: tuple[Any, ...]) -> None:
        """Sets all generators to states of another snapshot of such arguments."""
        own, torchs, numpy, python = states
        for (generator, _), state in zip(self._states, own, strict=True):
            generator.set_state(state)
        set_random_states(torchs)
        np.random.set_state(numpy)
        random.setstate(python)


def _same_state(a: Any, b: Any) -> bool:
    """Whether two states of numpy's global generator are equal."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same_state(a[name], b[name]) for name in a)
    return bool(np.array_equal(a, b))


def by_others() -> str:
    """What else may have advanced a generator that all threads share, as the end of a sentence; empty where there is none."""
    threads = [thread for thread in threading.enumerate() if type(thread).__module__.partition(".")[0] != "tqdm"]
    return "" if len(threads) == 1 else ", or another thread of this process draws meanwhile"


def drawn_by(network: str) -> str:
    """Why a network of this class that draws random numbers cannot be called in parallel."""
    return f"{network} draws random numbers in its call, whose order is the loop's; put it into eval() mode{by_others()}"


def clone(generator: torch.Generator, state: Tensor | None = None) -> torch.Generator:
    """A generator on the device of `generator`, at this state, or at that of `generator`."""
    copied = torch.Generator(device=generator.device)
    copied.set_state(generator.get_state() if state is None else state)
    return copied

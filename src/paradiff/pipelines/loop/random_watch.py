# SPDX-License-Identifier: Apache-2.0
"""A watch on random draws: within a pass, outside of its scheduler's step, no generator may advance.

A plain call draws pass by pass. A parallel run makes the passes in another order and number, and can repeat the scheduler's own
draws only. So all generators that can be found are compared before and after each pass: torch's global ones, numpy's and
Python's global ones, and those among the call's arguments.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from paradiff.errors import Unsupported
from paradiff.pipelines.loop.random_state import by_others, drawn_by
from paradiff.solver.accelerator import random_states

State = list[tuple[str, Any]]
"""The states of all generators, each with its name in a sentence."""
MERSENNE_BYTES = 4 * (624 + 1)
"""Of the state of an MT19937 in memory: 624 words, and the place of the next one."""


class RandomWatch:
    """The generators of one call and their states when they were last looked at.

    Args:
        generators: The generators among the call's arguments.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = list(generators)
        self._whole: bytes | None = None
        self._seen = self._now()

    def mark(self) -> None:
        """Takes the present states: draws until here are not the loop's."""
        self._seen = self._now()

    def check(self, network: str | None = None) -> None:
        """Checks that nothing was drawn since `mark`.

        Args:
            network: The class of a network that was seen to draw meanwhile.

        Raises:
            Unsupported: If a generator has advanced.
        """
        for (name, before), (_, now) in zip(self._seen, self._now(), strict=False):
            same = torch.equal(before, now) if isinstance(now, torch.Tensor) else before == now
            if not same:
                if network is not None:
                    raise Unsupported(drawn_by(network))
                raise Unsupported(
                    f"its loop draws random numbers besides its scheduler's, from {name}, in the order of its steps"
                    f"{by_others()}"
                )

    def _now(self) -> State:
        host, *devices = random_states()
        return [
            ("torch's generator", host),
            ("numpy's generator", self._numpys()),
            ("Python's generator", random.getstate()),
            *[("a generator among the call's arguments", g.get_state()) for g in self._generators],
            *[("torch's generator of a device", state) for state in devices],
        ]

    def _numpys(self) -> Any:
        """The state of numpy's global generator.

        `get_state` copies the words one by one (0.1 ms), so the words are read in memory. They are the whole state unless the
        second normal number of a pair is kept, and one that was not kept at these words cannot be without other words.
        """
        generator = np.random.get_bit_generator()  # pyright: ignore[reportAttributeAccessIssue]  (not in its stubs)
        if type(generator) is not np.random.MT19937:
            return _comparable(np.random.get_state(legacy=False))
        words = ctypes.string_at(generator.ctypes.state_address, MERSENNE_BYTES)
        if words != self._whole:
            state = np.random.get_state(legacy=False)
            if state["has_gauss"]:
                return words, state["gauss"]
            self._whole = words
        return words


def _comparable(state: Any) -> Any:
    """A state with bytes in place of its arrays."""
    if isinstance(state, dict):
        return {name: _comparable(value) for name, value in state.items()}
    return state.tobytes() if isinstance(state, np.ndarray) else state

# SPDX-License-Identifier: Apache-2.0
"""A watch on random draws: within a pass, outside of its scheduler's step, no generator may advance.

A plain call draws pass by pass. A parallel run makes the passes in another order and number, and can repeat the scheduler's own
draws only. So all generators that can be found are compared before and after each pass: torch's global ones, numpy's and
Python's global ones, and those among the call's arguments.
"""

from __future__ import annotations

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


class RandomWatch:
    """The generators of one call and their states when they were last looked at.

    Args:
        generators: The generators among the call's arguments.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self._generators = list(generators)
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
        kind, keys, *rest = np.random.get_state()
        host, *devices = random_states()
        return [
            ("torch's generator", host),
            ("numpy's generator", (kind, keys.tobytes() if isinstance(keys, np.ndarray) else keys, *rest)),
            ("Python's generator", random.getstate()),
            *[("a generator among the call's arguments", g.get_state()) for g in self._generators],
            *[("torch's generator of a device", state) for state in devices],
        ]

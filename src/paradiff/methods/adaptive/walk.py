# SPDX-License-Identifier: Apache-2.0
"""The rest of a chain, walked step by step, with no more beside each step than a loop written by hand has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.methods.window.march import AHEAD
from paradiff.methods.window.setup import WindowSetup


class Walk:
    """One sample's plain chain from a node on.

    Args:
        setup: What all samples share.
        noise: The noises.
        sample: The sample.
        node: The node.
        states: The states at the node and before it, the newest first, as many as a step reads.
        outputs: The network's outputs at the nodes before it, the newest first.

    Attributes:
        node: The node whose state is known.
        state: `[...]` that state.
    """

    def __init__(
        self, setup: WindowSetup, noise: Noise, sample: int, node: int, states: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> None:
        self._setup, self._noise, self._sample = setup, noise, sample
        self.node, self.state = node, states[0]
        self._before, self._outputs = [*states[1:]], [*outputs]
        self._drawn: tuple[int, Tensor] | None = None

    def ask(self) -> tuple[Tensor, Tensor]:
        """The node, and its state as the network sees it."""
        step = self._setup.step
        return torch.tensor([self.node]), step.seen(slice(self.node, self.node + 1), self.state[None])

    def tell(self, output: Tensor, state: Tensor | None) -> Tensor:
        """Takes the step; the mean square change `[1]` of the state.

        Args:
            output: `[...]` the network's output.
            state: `[...]` the state as the caller changed it before the network saw it; None where it left it alone.
        """
        setup, i = self._setup, self.node
        state = self.state if state is None else state
        m = setup.table.convert(torch.tensor([i]), state[None], output[None])[0]
        states = [one[None] for one in (state, *self._before)]
        outputs = [one[None] for one in (m, *self._outputs)]
        z = self._noise_of(i)[None] if setup.table.stochastic else None
        new = setup.step(slice(i, i + 1), states, outputs, z)[0]
        self._before = [state, *self._before][: setup.history]
        self._outputs = [m, *self._outputs][: setup.history]
        self.state, self.node = new, i + 1
        return setup.step.mean_square((new - state)[None])

    def _noise_of(self, node: int) -> Tensor:
        if self._drawn is None or not self._drawn[0] <= node < self._drawn[0] + len(self._drawn[1]):
            ahead = range(node, min(node + AHEAD, self._setup.table.steps))
            self._drawn = node, self._setup.move(self._noise.draw(self._sample, ahead))
        return self._drawn[1][node - self._drawn[0]]

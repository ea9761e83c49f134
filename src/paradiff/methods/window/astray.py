# SPDX-License-Identifier: Apache-2.0
"""Nodes of a window that went astray: evaluated on the way to another outcome than the one that the leading nodes come to.

Where several structures are possible, nodes far ahead settle on one of them before the leading nodes, which decide it, are
known. If these decide otherwise, every node after them is wrong by more than its noise, and neither its output nor the pairs
of its sweeps tell of the right outcome: the linearized steps hold it where it is. Then each sweep puts one node right, which
its step from the node before does, and a window is as slow as the chain in turn. It shows: a node near the window's front
changes by more than the part `astray` of its own noise, and by more than it did in the sweep before. The nodes after it are
dropped and filled afresh, as nodes that enter the window are, from the last node before whose output was made near its state.

It is looked at where a chain forgets (forgetting.py), which carries nothing of a wrong state along but what its outputs say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from paradiff.methods.window.control import WindowControl

LEADING = 4
"""Nodes at the window's front at which it is looked."""


class Row(NamedTuple):
    """What the last sweep knows of a node.

    Attributes:
        node: The node.
        state: `[...]` its state, in which the network was evaluated.
        output: `[...]` its output there.
        change: `[...]` the change that its state saw afterwards.
    """

    node: int
    state: Tensor
    output: Tensor
    change: Tensor


class Astray:
    """The leading nodes of one sample's window.

    Args:
        sigma: `[N+1]` noise levels of the nodes.
        control: The tuned numbers.
    """

    def __init__(self, sigma: Sequence[float], control: WindowControl) -> None:
        self._sigma, self._part = sigma, control.astray
        self._seen: tuple[Tensor, Tensor] | None = None
        self._changes: Tensor | None = None
        self._before: dict[int, float] = {}  # the changes of the nodes in the last sweep

    def observe(self, states: Tensor, outputs: Tensor) -> None:
        """Takes a sweep's states `[W, ...]` and outputs, from the window's first node on."""
        self._seen = states[:LEADING].clone(), outputs[:LEADING].clone()

    def follow(self, changes: Tensor) -> None:
        """Takes the changes `[W, ...]` of the nodes after the first."""
        self._changes = changes[: LEADING - 1].clone()

    def row(self, first: int, rms: Sequence[float]) -> Row | None:
        """The node after which all but the next one went astray; None where none did.

        Args:
            first: The window's first node.
            rms: `[W]` root mean square change of each node after it.
        """
        assert self._seen is not None
        assert self._changes is not None
        before, self._before = self._before, dict(enumerate(rms, first + 1))
        for k, change in enumerate(rms[:LEADING]):
            node = first + 1 + k
            if change > self._part * self._sigma[node] > 0 and change >= before.get(node, math.inf):
                self._before = dict(enumerate(rms[: k + 1], first + 1))  # the others are filled afresh
                states, outputs = self._seen
                moved = self._changes[k - 1] if k else states.new_zeros(states.shape[1:])
                return Row(first + k, states[k], outputs[k], moved)
        return None

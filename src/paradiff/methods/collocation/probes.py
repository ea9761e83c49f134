# SPDX-License-Identifier: Apache-2.0
"""Probes: evaluations at intervals of twice the length, which give one sample's defects at order 0 (defect.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.step import uploaded
from paradiff.methods.collocation.defect import DoubledIntervals
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.system import CollocationSystem, noise_states, weighted


class Probes:
    """The defects of one sample's mesh as far as they are evaluated; b members, d numbers each.

    Args:
        setup: What all samples share.
        noise: x[0] and the noises of every sample.
        sample: The sample.
        x0: `[b, d]` its state at node 0.
        system: The collocation system.
    """

    def __init__(self, setup: CollocationSetup, noise: Noise, sample: int, x0: Tensor, system: CollocationSystem) -> None:
        self._setup, self._noise, self._sample, self._x0, self._system = setup, noise, sample, x0, system
        self._doubled: DoubledIntervals | None = None
        self._noises: Tensor | None = None  # of the averaged states of the doubled intervals
        self._defects: dict[int, Tensor] = {}  # by the number of the doubled interval
        self._earlier: dict[tuple[int, int, int], Tensor] = {}  # by mesh points, of intervals that a refinement left alone

    def remesh(self, system: CollocationSystem) -> None:
        """Takes over a refined mesh; the defects of intervals that it shares with the one before are kept."""
        if self._doubled is not None:
            spans = self._doubled.spans
            self._earlier = {spans[j]: defect for j, defect in self._defects.items()}
        self._system, self._doubled, self._defects = system, None, {}

    def forget(self) -> None:
        """Drops all defects: forcings have another unit now."""
        self._doubled, self._defects, self._earlier = None, {}, {}

    def missing(self, settled: int, drawn: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
        """Numbers of the doubled intervals that are not evaluated yet and lie among the settled nodes.

        Args:
            settled: Number of nodes, from the first on, that are settled.
            drawn: The noises of all intervals (`system.draw`).
        """
        if not self._system.averaged:
            return []
        if self._doubled is None:
            self._doubled = self._setup.doubled(self._system)
            spans = self._doubled.spans
            self._defects = {j: self._earlier[span] for j, span in enumerate(spans) if span in self._earlier}
            if self._setup.table.stochastic and self._doubled.first:
                own = self._doubled.own(self._noise, self._sample) + noise_states(self._doubled.noise_weights, drawn)
                self._noises = self._setup.move(own).view(-1, *self._x0.shape)
        return [j for j, n in enumerate(self._doubled.first) if j not in self._defects and n + 1 < settled]

    def states(self, pairs: list[int], forcings: Tensor) -> tuple[Tensor, Tensor]:
        """Fine nodes `[R]` and averaged states `[R, b, d]` of doubled intervals, from the forcings `[M, b, d]`."""
        assert self._doubled is not None
        initial, influence = (self._setup.move(v[pairs]) for v in (self._doubled.initial, self._doubled.influence))
        found = initial[:, None, None] * self._x0 + weighted(influence, forcings)
        if self._noises is not None:
            found = found + self._noises[uploaded(pairs, self._noises.device)]
        return self._doubled.nodes[pairs], found

    def observe(self, pairs: list[int], evaluated: Tensor, forcings: Tensor) -> None:
        """Takes the forcings `[R, b, d]` evaluated at doubled intervals, beside those of all nodes, `[M, b, d]`."""
        assert self._doubled is not None
        weight, weights = (self._setup.move(v[pairs]) for v in (self._doubled.weight, self._doubled.weights))
        defects = weight[:, None, None] * evaluated - weighted(weights, forcings)
        self._defects.update(zip(pairs, defects, strict=True))

    @property
    def complete(self) -> bool:
        """Whether all defects are known; from order 1 the forcings give them."""
        return not self._system.averaged or (self._doubled is not None and len(self._defects) == len(self._doubled.first))

    def defects(self) -> tuple[DoubledIntervals, Tensor] | None:
        """The doubled intervals and their defects `[J, b, d]`; None from order 1, and where no interval has a defect."""
        if not self._system.averaged or self._doubled is None or not self._doubled.first:
            return None
        return self._doubled, torch.stack([self._defects[j] for j in range(len(self._doubled.first))])

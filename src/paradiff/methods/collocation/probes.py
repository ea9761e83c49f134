# SPDX-License-Identifier: Apache-2.0
"""Probes: evaluations at intervals of twice the length, which give one sample's defects at order 0 (defect.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.step import uploaded
from paradiff.methods.collocation.defect import DoubledIntervals
from paradiff.methods.collocation.sample_system import SampleSystem
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.system import noise_states, weighted


class Probes:
    """The defects of one sample's mesh as far as they are evaluated; b members, d numbers each.

    Args:
        setup: What all samples share.
        at: The sample's collocation system.
    """

    def __init__(self, setup: CollocationSetup, at: SampleSystem) -> None:
        self._setup, self._at = setup, at
        self._defects: dict[int, Tensor] = {}  # by the number of the doubled interval

    def remesh(self, at: SampleSystem, *, rescaled: bool = False) -> None:
        """Takes over another mesh; the defects of intervals that it shares with the one before are kept, unless forcings have
        another unit (`rescaled`)."""
        if self._at.doubled is not None and at.doubled is not None:
            places = {span: j for j, span in enumerate(at.doubled.spans)}
            spans = self._at.doubled.spans
            known = {} if rescaled else {spans[j]: defect for j, defect in self._defects.items()}
            self._defects = {places[span]: defect for span, defect in known.items() if span in places}
        self._at = at

    def missing(self, settled: int) -> list[int]:
        """Numbers of the doubled intervals that are not evaluated yet and lie among the settled nodes.

        Args:
            settled: Number of nodes, from the first on, that are settled.
        """
        first = [] if self._at.doubled is None else self._at.doubled.first
        return [j for j, n in enumerate(first) if j not in self._defects and n + 1 < settled]

    def states(self, pairs: list[int], forcings: Tensor) -> tuple[Tensor, Tensor]:
        """Fine nodes `[R]` and averaged states `[R, b, d]` of doubled intervals, from the forcings `[M, b, d]`."""
        doubled, noises = self._at.doubled, self._at.noises
        assert doubled is not None
        initial, influence = (self._setup.move(v[pairs]) for v in (doubled.initial, doubled.influence))
        found = initial[:, None, None] * self._at.x0 + weighted(influence, forcings)
        if noises is not None:
            weights = self._setup.move(doubled.noise_weights[pairs])
            found += noises.doubled[uploaded(pairs, found.device)] + noise_states(weights, noises.ends)
        return doubled.nodes[pairs], found

    def observe(self, pairs: list[int], evaluated: Tensor, forcings: Tensor) -> None:
        """Takes the forcings `[R, b, d]` evaluated at doubled intervals, beside those of all nodes, `[M, b, d]`."""
        doubled = self._at.doubled
        assert doubled is not None
        weight, weights = (self._setup.move(v[pairs]) for v in (doubled.weight, doubled.weights))
        defects = weight[:, None, None] * evaluated - weighted(weights, forcings)
        self._defects.update(zip(pairs, defects, strict=True))

    @property
    def complete(self) -> bool:
        """Whether all defects are known; from order 1 the forcings give them."""
        return self._at.doubled is None or len(self._defects) == len(self._at.doubled.first)

    def defects(self) -> tuple[DoubledIntervals, Tensor] | None:
        """The doubled intervals and their defects `[J, b, d]`; None from order 1, and where no interval has a defect."""
        doubled = self._at.doubled
        if doubled is None or not doubled.first:
            return None
        return doubled, torch.stack([self._defects[j] for j in range(len(doubled.first))])

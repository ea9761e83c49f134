# SPDX-License-Identifier: Apache-2.0
"""The noises of one sample's mesh: the weighted sums of the chain's own noises that its intervals need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.step import uploaded
from paradiff.chain.table import column
from paradiff.methods.collocation.defect import DoubledIntervals
from paradiff.methods.collocation.system import CollocationSystem
from paradiff.methods.stretch import NUMBERS, blocks, total


@dataclass(frozen=True, kw_only=True, eq=False)
class MeshNoises:
    """Weighted sums, in the dtype in which the system is solved; b members, d numbers each.

    Attributes:
        ends: `[M, P, b, d]` in the P states at the right end of each of M intervals.
        averaged: `[M, b, d]` in their averaged states.
        doubled: `[J, b, d]` in the averaged states of the doubled intervals.
        places: The number of each interval by its mesh points, and of each doubled interval by its three.
        drawn: `[N, b, d]` the chain's noises; None where they are too many to be kept.
    """

    ends: Tensor
    averaged: Tensor
    doubled: Tensor
    places: dict[tuple[int, ...], int]
    drawn: Tensor | None = None

    @staticmethod
    def of(
        system: CollocationSystem,
        doubled: DoubledIntervals | None,
        noise: Noise,
        sample: int,
        like: Tensor,
        before: MeshNoises | None = None,
    ) -> MeshNoises:
        """The noises of one sample. Each of the chain's is drawn once.

        Args:
            system: The collocation system.
            doubled: The doubled intervals; None where nodes are not averaged states.
            noise: The noises of every sample.
            sample: The sample.
            like: `[b, d]` a state, for shape, dtype and device.
            before: Those of another mesh with the same recurrence, from which intervals of both take theirs.
        """
        steps = system.recurrence.table.steps
        if steps * like.numel() <= NUMBERS:
            drawn = None if before is None else before.drawn
            drawn = noise.draw(sample, range(steps)).to(like).reshape(-1, *like.shape) if drawn is None else drawn
            return MeshNoises._of_all(system, doubled, drawn)
        count, band = len(system.intervals), system.recurrence.table.band
        spans = [] if doubled is None else doubled.spans
        part_of = {} if doubled is None else {n + i: j for j, n in enumerate(doubled.first) for i in (0, 1)}
        earlier = {} if before is None else before.places
        ends, averaged = like.new_empty(count, band, *like.shape), like.new_empty(count, *like.shape)
        of_doubled = like.new_zeros(len(spans), *like.shape)
        for k, interval in enumerate(system.intervals):
            j = part_of.get(k)
            fresh = doubled is not None and j is not None and spans[j] not in earlier
            known = earlier.get((interval.left, interval.right))
            if before is not None and known is not None:
                ends[k], averaged[k] = before.ends[known], before.averaged[known]
                if not fresh:
                    continue
            weights = [*interval.noise, interval.state_noise]
            if fresh and doubled is not None and j is not None:
                whole = doubled.intervals[j]
                weights.append(whole.state_noise[interval.left - whole.left : interval.right - whole.left])
            sums = _weighted_noises(noise, sample, interval.left, torch.stack(weights)).to(like).view(-1, *like.shape)
            ends[k], averaged[k] = sums[:band], sums[band]
            if fresh and j is not None:
                of_doubled[j] += sums[band + 1]
        for j, span in enumerate(spans):
            if before is not None and span in earlier:
                of_doubled[j] = before.doubled[earlier[span]]
        places: dict[tuple[int, ...], int] = {(g.left, g.right): k for k, g in enumerate(system.intervals)}
        places |= {span: j for j, span in enumerate(spans)}
        return MeshNoises(ends=ends, averaged=averaged, doubled=of_doubled, places=places)

    @staticmethod
    def _of_all(system: CollocationSystem, doubled: DoubledIntervals | None, drawn: Tensor) -> MeshNoises:
        """The sums of all intervals at once, from all of the chain's noises `[N, b, d]`."""
        lengths = uploaded([interval.right - interval.left for interval in system.intervals], drawn.device)

        def sums(weights: Tensor) -> Tensor:
            """`[M, b, d]`, by weights `[N]`."""
            return torch.segment_reduce(column(weights, drawn) * drawn, "sum", lengths=lengths, axis=0, unsafe=True)

        ends = torch.stack([sums(weights) for weights in torch.cat([g.noise for g in system.intervals], 1)], 1)
        averaged = sums(torch.cat([g.state_noise for g in system.intervals]))
        of_doubled = drawn.new_zeros(0, *drawn.shape[1:])
        if doubled is not None and doubled.first:
            weights = torch.zeros(len(drawn), dtype=torch.float64)
            for interval in doubled.intervals:
                weights[interval.left : interval.right] = interval.state_noise
            first = uploaded(doubled.first, drawn.device)
            of_intervals = sums(weights)
            of_doubled = of_intervals[first] + of_intervals[first + 1]
        return MeshNoises(ends=ends, averaged=averaged, doubled=of_doubled, places={}, drawn=drawn)


def _weighted_noises(noise: Noise, sample: int, first: int, weights: Tensor) -> Tensor:
    """`[K, ...]` weighted sums of the noises at n nodes from `first` on, by weights `[K, n]`."""
    parts = blocks(weights.shape[1], math.prod(noise.shape))
    drawn = ((part, noise.draw(sample, range(first + part.start, first + part.stop))) for part in parts)
    return total(weights[:, part].to(z.device, non_blocking=True) @ z.double().flatten(1) for part, z in drawn)

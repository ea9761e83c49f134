# SPDX-License-Identifier: Apache-2.0
"""The noise of plans that are made again and again: keyed by the episode, and held, or moving along with the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.noise import Keyed

EPISODE = 2**40
"""Blocks of counters that an episode may take; `Keyed` has 2^64 of them."""


@dataclass(frozen=True, eq=False)
class PlanNoise:
    """The noise of a plan from some step of its episode on. Noises are compared by identity.

    A number belongs to a seed, an episode, a node of the chain and a step of the episode. Two plans of one episode have the
    same numbers for the steps that both cover, so that the noise moves along where `firsts` does, and is held where it stays.
    That of a first plan is the keyed noise itself.

    Attributes:
        keyed: Draws of the shape of a plan `[H, ...]`, one sample an environment.
        nodes: Steps of the chain, N.
        episodes: `[B]` each environment's episode.
        firsts: `[B]` the episode's step that its plan begins with.
    """

    keyed: Keyed
    nodes: int
    episodes: Sequence[int]
    firsts: Sequence[int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a plan."""
        return self.keyed.shape

    @property
    def samples(self) -> int:
        """Number of environments B."""
        return len(self.episodes)

    def only(self, chosen: Sequence[int]) -> PlanNoise:
        """That of some environments."""
        keyed = Keyed(self.shape)
        keyed.keys = [self.keyed.keys[k] for k in chosen]
        return PlanNoise(keyed, self.nodes, [self.episodes[k] for k in chosen], [self.firsts[k] for k in chosen])

    def start(self, sample: int) -> Tensor:
        """The standard normal draw behind x[0], of shape `shape`."""
        return self.draw(sample, range(-1, 0))[0]

    def draw(self, sample: int, nodes: range) -> Tensor:
        """z at consecutive nodes, `[len(nodes), *shape]`."""
        chunk, inside = divmod(self.firsts[sample], self.shape[0])
        found = self._chunk(sample, chunk, nodes)
        if inside:
            found = torch.cat([found[:, inside:], self._chunk(sample, chunk + 1, nodes)[:, :inside]], 1)
        return found

    def _chunk(self, sample: int, chunk: int, nodes: range) -> Tensor:
        """The draws of as many steps of an episode as a plan has."""
        begin = self.episodes[sample] * EPISODE + chunk * (self.nodes + 1)
        return self.keyed.draw(sample, range(nodes.start + begin, nodes.stop + begin))

# SPDX-License-Identifier: Apache-2.0
"""The world of the bundled policy `points-policy`: a point mass that is to reach a goal in the plane, past two discs.

An action a is a place that the mass is drawn to. With its place p and its velocity v, a distance a step,

    v <- v + PULL (a - p - v) + push,      p <- p + v                                                            (1)

Whether a disc is passed on its left or on its right is free, so plans have several modes. Lengths are those of a plane that
the coordinates -1 ... 1 cover.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.errors import require_whole, shown

PULL = 0.5
"""The share of the way to an action by which the velocity changes in a step."""

DISCS = ((0.0, -0.35), (0.0, 0.35))
"""Their middles."""

RADIUS = 0.2
"""Of a disc."""

REACHED = 0.08
"""How near to its goal a mass has reached it."""

FAST = 20.0
"""What velocities are multiplied by in an observation, where a usual one is of size 1."""

OBSERVED = 6
"""Numbers of an observation: place, velocity times FAST, and goal."""


@dataclass(frozen=True, eq=False)
class Plane:
    """B point masses, each in a plane of its own. They are compared by identity.

    Attributes:
        place: `[B, 2]` p of (1).
        velocity: `[B, 2]` v of (1).
        goal: `[B, 2]` where the masses are to go.
        hit: `[B]` whether a mass has been within a disc.
    """

    place: Tensor
    velocity: Tensor
    goal: Tensor
    hit: Tensor

    def __repr__(self) -> str:
        return f"Plane({len(self.place)} masses, {int(self.reached.sum())} at their goals, {int(self.hit.sum())} hit a disc)"

    @classmethod
    @made_at_home
    def drawn(cls, seed: int, samples: int = 1) -> Plane:
        """Planes at random: the mass rests at the lower edge, its goal is at the upper one.

        Args:
            seed: What they are drawn from.
            samples: How many, B. The first ones are the same for any number.

        Raises:
            ValueError: If a number is out of range.
        """
        require_whole("the seed", seed, 0, most=2**63 - 1)
        require_whole("samples", samples, 1)
        place, goal = ends_of(torch.rand(samples, 4, generator=torch.Generator().manual_seed(seed)))
        return cls(place, torch.zeros_like(place), goal, torch.zeros(samples, dtype=torch.bool))

    @property
    def observation(self) -> Tensor:
        """`[B, OBSERVED]` what the policy is given."""
        return torch.cat([self.place, FAST * self.velocity, self.goal], 1)

    @property
    def distance(self) -> Tensor:
        """`[B]` from the goal."""
        return (self.goal - self.place).norm(dim=1)

    @property
    def reached(self) -> Tensor:
        """`[B]` whether the goal is reached, and no disc was hit."""
        return (self.distance < REACHED) & ~self.hit

    def after(self, action: Tensor, push: Tensor | float = 0.0) -> Plane:
        """The planes a step later.

        Args:
            action: `[B, 2]` a of (1).
            push: `[B, 2]` what is added to the velocities.

        Raises:
            ValueError: If the actions have another shape.
        """
        if not isinstance(action, Tensor) or action.shape != self.place.shape:
            raise ValueError(f"the action is {shown(action)}; give a tensor {list(self.place.shape)}, a place for each mass")
        velocity = self.velocity + PULL * (action - self.place - self.velocity) + push
        place = self.place + velocity
        return Plane(place, velocity, self.goal, self.hit | (clearance(place) < 0))


def ends_of(draw: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, 2]` places at the lower edge, and goals at the upper one, from numbers `[B, 4]` in 0 ... 1."""
    goal = torch.stack([draw[:, 0] - 0.5, 0.85 + 0.1 * draw[:, 1]], 1)
    return torch.stack([draw[:, 2] - 0.5, 0.1 * draw[:, 3] - 0.95], 1), goal


def clearance(place: Tensor) -> Tensor:
    """`[...]` distances of places `[..., 2]` from the nearest disc's edge, negative within."""
    return (place[..., None, :] - place.new_tensor(DISCS)).norm(dim=-1).amin(-1) - RADIUS

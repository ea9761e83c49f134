# SPDX-License-Identifier: Apache-2.0
"""A sample that begins from an earlier run's trajectory (solver/trajectory.py).

Where that run evaluated every node, u0[i], what is interpolated is the difference of the forcings to it,

    u[i] = u0[i] + sum_k interpolation[i, k] ( u[k] - u0[k] ),                                                    (1)

which is smaller and smoother than the forcings themselves, so that fewer nodes suffice, on stochastic chains, too, where u0
scatters with the noise. All else is as it is without a trajectory: the difference starts at zero, its defects give the
interpolation error, and its staleness the iteration error. Equation (2) of interval.py is linear, and the part of u0 in the
states at the mesh points is carried along the chain once.

Where that run evaluated the nodes of a mesh, these are evaluated again, and their forcings are what a first round would be
made with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.step import uploaded
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.system import CollocationSystem, weighted
from paradiff.methods.remembered import remembered
from paradiff.solver.trajectory import Part


@dataclass(frozen=True, eq=False)
class Carried:
    """The earlier run's forcings at all nodes, and what they make of the states.

    Attributes:
        forcings: `[N, b, d]` u0.
        points: `[M+1, P, b, d]` their part in the states at the mesh points and at the nodes before each that the chain reads.
    """

    forcings: Tensor
    points: Tensor

    @property
    def states(self) -> Tensor:
        """`[M+1, b d]` their part in the states at the left mesh points and, last, in the sample."""
        return self.points[:, 0].flatten(1)


class WarmStart:
    """What one sample begins from; b members, d numbers each.

    Args:
        setup: What all samples share.
        part: The trajectory.
        x0: `[b, d]` a state.

    Attributes:
        differs: Whether differences are interpolated, equation (1).
        points: The mesh points to begin with.
    """

    def __init__(self, setup: CollocationSetup, part: Part, x0: Tensor) -> None:
        self._setup, self._part, self._shape = setup, part, x0.shape
        every = whole_of(part)
        self.differs = every is not None and setup.order > 0
        self._every = every
        valid = part.points is not None and set(part.points[:-1]) <= set(setup.mesh.candidates)
        enough = valid and part.points is not None and setup.order < len(part.points) <= setup.most_nodes + 1
        self.points = list(part.points) if enough and part.points is not None and self._of_its_kind else setup.points

    @property
    def base(self) -> Part | None:
        """The evaluations of all nodes that differences are to; None where none are interpolated."""
        return self._every if self.differs else None

    @property
    def _of_its_kind(self) -> bool:
        """Whether the earlier run's mesh is one for the interpolation of this one."""
        points, nodes = self._part.points, self._part.nodes.tolist()
        assert points is not None
        return isinstance(self._setup.method.nodes, str) and (list(points[:-1]) == nodes) == (self._setup.order > 0)

    def forcings(self, recurrence: Recurrence) -> Tensor:
        """`[N, b, d]` of the earlier run: u0 of equation (1), or what it found."""
        part = self._every if self.differs and self._every is not None else self._part
        return self._of(part, recurrence)

    def begun(self, system: CollocationSystem) -> Tensor:
        """`[M, b, d]` the forcings, or their differences, of the nodes of a mesh before any is evaluated."""
        recurrence = system.recurrence
        found = self._of(self._part, recurrence)
        if system.averaged and self._part.points is None:
            spans = [range(interval.left, interval.right) for interval in system.intervals]
            return torch.stack([found[span.start : span.stop].mean(0) for span in spans])
        return (found - self.forcings(recurrence) if self.differs else found)[uploaded(system.nodes.tolist(), found.device)]

    def changes(self, system: CollocationSystem) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Changes of states and forcings `[R, b, d]` that the earlier run saw, the oldest first, and the numbers of their R
        nodes in a mesh."""
        part, recurrence, move = self._part, system.recurrence, self._setup.move
        chosen, at = self._places(system)
        if part.dx is None or part.dclean is None or not chosen:
            return
        nodes = system.nodes[chosen]
        nu, g = (move(v[nodes])[:, None, None] for v in (recurrence.nu, recurrence.g))
        rows = uploaded(at, part.dx.device)
        for slot in range(part.dx.shape[1]):
            dx, dclean = (move(v[rows, slot]).reshape(len(at), *self._shape) for v in (part.dx, part.dclean))
            yield chosen, dx, nu * (dclean - g * dx)

    def evaluated_at(self, system: CollocationSystem) -> Iterator[tuple[int, Tensor]]:
        """The nodes of a mesh that the earlier run evaluated, by their numbers, and the states `[b, d]` there."""
        if system.averaged and self._part.points is None:
            return
        for k, place in zip(*self._places(system), strict=True):
            yield k, self._setup.move(self._part.states[place]).reshape(self._shape)

    def _places(self, system: CollocationSystem) -> tuple[list[int], list[int]]:
        """The numbers of a mesh's nodes that the earlier run evaluated, and their places there."""
        places = {node: k for k, node in enumerate(self._part.nodes.tolist())}
        chosen = [k for k, node in enumerate(system.nodes.tolist()) if node in places]
        return chosen, [places[node] for node in system.nodes[chosen].tolist()]

    def _of(self, part: Part, recurrence: Recurrence) -> Tensor:
        found = remembered(part, recurrence.table, recurrence.variance, self._setup.move)
        return found.reshape(len(found), *self._shape)

    def carried(self, system: CollocationSystem) -> Carried | None:
        """The part of u0 in the states at the mesh points; None where no differences are interpolated."""
        if not self.differs:
            return None
        forcings, move = self.forcings(system.recurrence), self._setup.move
        found = forcings.new_zeros(len(system.points), system.recurrence.table.band, *self._shape)
        for k, interval in enumerate(system.intervals):
            first = max(interval.left - system.recurrence.table.band + 1, 0)
            inside = forcings[first : interval.right]
            own = weighted(move(interval.forcing[:, interval.forcing.shape[1] - len(inside) :]), inside)
            found[k + 1] = own + weighted(move(interval.carry), found[k])
        return Carried(forcings, found)


def whole_of(part: Part) -> Part | None:
    """The evaluations of all nodes, of a run that made them or of one that it began from; None where there are none."""
    if part.base is not None:
        return part.base
    return part if part.points is None else None

# SPDX-License-Identifier: Apache-2.0
"""What follows a round of one sample: more sweeps, probes, a refined mesh, or the end.

`decide` is a pure function of the state after the round. The interpolation error is estimated as soon as the iteration error
does not hide it. If both together are within the tolerance, the sample has converged. If the interpolation error alone exceeds
it, the mesh is refined at once, since to bring the nodes of the old mesh to rest would be lost work. A sample that would need a
large part of the chain's own nodes is handed over to the window method, and so is one that a narrow window leaves wholly open.

The defects of a mesh of few nodes, which the caller may give, tell little: where the path decides what it becomes, all of them
can lie on the wrong side. Such a mesh is refined before the sample is found, and where it must not be, its estimate says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from paradiff.methods.collocation.control import CollocationControl
from paradiff.methods.collocation.error import InterpolationError
from paradiff.methods.collocation.mesh import Mesh


@dataclass(frozen=True)
class Sweep:
    """Nodes that are stale or not evaluated are evaluated in the next round."""


@dataclass(frozen=True)
class Probe:
    """The nodes have converged; doubled intervals are evaluated in the next round."""


@dataclass(frozen=True)
class Rescale:
    """The data's variance is far from the one assumed and is replaced."""

    variance: float


@dataclass(frozen=True)
class Refine:
    """The mesh is replaced by a finer one, of these mesh points."""

    points: list[int]


@dataclass(frozen=True)
class Converged:
    """The estimated error is within the tolerance, or the window method verifies the sample in any case (`verify`)."""

    verify: bool


@dataclass(frozen=True)
class HandOver:
    """The window method takes over.

    Attributes:
        reason: Why, of several samples.
    """

    reason: str


@dataclass(frozen=True)
class Stop:
    """The tolerance is not reached, and the mesh cannot be refined further.

    Attributes:
        unresolved: Whether the mesh is too coarse to tell its own error.
    """

    unresolved: bool = False


@dataclass(frozen=True)
class GiveUp:
    """The sweeps do not converge."""


Decision = Sweep | Probe | Rescale | Refine | Converged | HandOver | Stop | GiveUp


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One sample after a round.

    Attributes:
        converged: Whether the nodes have converged.
        moved: Whether a node's state has moved farther since its evaluation than is trusted.
        iteration_error: Root mean square at the sample.
        sweeps: Sweeps made on this mesh.
        most_sweeps: Sweeps after which the sample is given up.
    """

    converged: bool
    moved: bool
    iteration_error: float
    sweeps: int
    most_sweeps: int


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a sample may cost, and shall reach.

    Attributes:
        tolerance: Root mean square error that the sample may have by estimate.
        exact: Whether the window method verifies the sample in any case.
        most_nodes: Most nodes of a mesh.
        resolving: The points of a mesh with the fewest nodes whose defects tell its error.
        may_hand_over: Whether a sample that needs many nodes may be handed over: the chain's own sample is sought, and the
            caller gave no bound on nodes.
        control: The tuned numbers.
    """

    tolerance: float
    exact: bool
    most_nodes: int
    resolving: list[int]
    may_hand_over: bool
    control: CollocationControl


def decide(
    progress: Progress,
    error: InterpolationError | None,
    points: list[int],
    mesh: Mesh,
    bounds: Bounds,
    *,
    spread: float = 1.0,
) -> Decision:
    """What follows a round.

    Args:
        progress: The sample after the round.
        error: Its calibrated interpolation error; None where it cannot be estimated yet.
        points: Its mesh points.
        mesh: How they are refined.
        bounds: What it may cost, and shall reach.
        spread: Its root mean square.
    """
    judged = None if error is None else _judge(progress, error, points, mesh, bounds, spread)
    if judged is not None:
        return judged
    return GiveUp() if progress.sweeps > progress.most_sweeps else Sweep()


def _judge(
    progress: Progress, error: InterpolationError, points: list[int], mesh: Mesh, bounds: Bounds, spread: float
) -> Refine | Converged | HandOver | Stop | None:
    """What follows from the estimate; None where the iteration error is too large to tell."""
    total, tolerance, control = error.total, bounds.tolerance, bounds.control
    if len(points) < len(bounds.resolving) and not bounds.exact:
        return _resolve(progress, points, mesh, bounds)
    if bounds.exact or (math.hypot(total, progress.iteration_error) <= tolerance and not progress.moved):
        return Converged(bounds.exact)
    if not progress.converged and total <= max(progress.iteration_error, tolerance):
        return None
    if bounds.may_hand_over and total > control.lost * spread:
        return HandOver("their meshes leave open what they become")
    far = max(total, tolerance) / tolerance
    refined = mesh.refine(
        points,
        shares=error.shares,
        groups=error.groups,
        wanted=control.refined_share * tolerance / far**control.refined_exponent,
        most=bounds.most_nodes,
        most_parts=control.most_parts,
    )
    too_many = bounds.may_hand_over and len(refined) - 1 > control.most_kept(len(mesh.candidates))
    if refined != points and not too_many:
        return Refine(refined)
    if not progress.converged:
        return None
    if not bounds.may_hand_over:
        return Stop()
    return HandOver("they would need most of the chain's nodes" if refined != points else "their meshes cannot be refined")


def _resolve(progress: Progress, points: list[int], mesh: Mesh, bounds: Bounds) -> Refine | HandOver | Stop | None:
    """What follows on a mesh that is too coarse to tell its own error."""
    refined = sorted({*points, *bounds.resolving})
    if bounds.may_hand_over and len(refined) - 1 > bounds.control.most_kept(len(mesh.candidates)):
        return HandOver("a mesh of so few nodes does not tell its own error")
    if len(refined) - 1 <= bounds.most_nodes:
        return Refine(refined)
    return Stop(unresolved=True) if progress.converged else None

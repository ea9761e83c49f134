# SPDX-License-Identifier: Apache-2.0
"""What all samples of a collocation run share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paradiff.chain.sensitivity import FITTED
from paradiff.chain.step import Step
from paradiff.chain.table import Table
from paradiff.methods.collocation.defect import DoubledIntervals
from paradiff.methods.collocation.error import InterpolationError
from paradiff.methods.collocation.handover import WindowLoop
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.mesh_store import node_counts
from paradiff.methods.collocation.options import CollocationOptions, mesh_on
from paradiff.methods.collocation.system import CollocationSystem
from paradiff.methods.secant import Symmetry


class CollocationSetup:
    """The table, the first mesh, the tuned numbers, and coefficients on the device.

    Args:
        table: The chain that is solved, of whose levels `unfit` finds nothing to say.
        method: The method.
        device: Where states live.
        dtype: Dtype in which the network is given its rows. The system is solved in float64 where the device has it, since a
            step with nearly parallel secant pairs loses digits.
        shared_window: Whether a state is a batch of members (solver/protocol.py).
        resolution: Relative precision of the network's outputs; that of `dtype` by default.
        symmetry: Of the window method that takes samples over; see `WindowLoop`.
        renewed: Likewise.
        elements: Likewise.

    Attributes:
        table: The chain that is solved.
        order: Degree of the interpolation.
        control: The tuned numbers.
        store: The mesh store's entry; None without a file.
        mesh: How mesh points are placed.
        points: The first mesh.
        most_nodes: Most nodes of a mesh.
        resolving: The points of a mesh with the fewest nodes whose defects tell its error; empty where every mesh is taken for
            good enough.
        recurrence: The chain's recurrence with the variance that samples start from.
        variance_margin: Factor by which it may be off before it is replaced; the square of the control's where the caller or
            the store gave it.
        window_loop: The window method that takes samples over.
    """

    def __init__(
        self,
        table: Table,
        method: CollocationOptions,
        *,
        device: torch.device,
        dtype: torch.dtype,
        shared_window: bool = False,
        resolution: float | None = None,
        symmetry: Symmetry | None = None,
        renewed: Tensor | None = None,
        elements: int = FITTED,
    ) -> None:
        self.table, self.method, self.device, self.dtype = table, method, device, dtype
        self.shared_window = shared_window
        self.resolution = torch.finfo(dtype).eps if resolution is None else resolution
        self.step = Step(table, device, dtype if device.type == "mps" else torch.float64, shared_window)
        self.t, self.move = self.step.t, self.step.move
        self.order, self.control = method.degree(table), method.control_on(table)
        self.store = method.store(table)
        stored = None if self.store is None else self.store.stored
        self.mesh = mesh_on(table, self.control, stored)
        self.most_nodes = min(method.max_nodes or table.steps, table.steps)
        fewest = math.ceil(min(self.control.resolved_share * method.usual(table), method.count(table, stored)))
        self.resolving = self.mesh.points(fewest) if self.control.error.safety > 0 else []
        self.recurrence = self.recurrence_of(method.variance_on(table))
        given = method.shift != "auto" or stored is not None
        self.variance_margin = self.control.variance_margin ** (2 if given else 1)
        self.points = method.edges(table, stored)
        self.window_loop = WindowLoop(
            table,
            method,
            self.control,
            variance=self.recurrence.variance,
            device=device,
            dtype=dtype,
            shared_window=shared_window,
            resolution=self.resolution,
            symmetry=symmetry,
            renewed=renewed,
            elements=elements,
        )

    def record(self, points: Sequence[int], error: InterpolationError, variance: float) -> None:
        """Records the nodes that a sample needed, if a file was given for it.

        Args:
            points: The sample's mesh points.
            error: Its interpolation error.
            variance: The data's variance.
        """
        shares = error.shares
        if self.store is None or not all(map(math.isfinite, shares)) or max(shares) == 0:
            return
        nodes, relative = torch.zeros(self.control.mesh.bins, dtype=torch.float64), self.method.relative(self.table)
        counts = node_counts(shares, self.control.store.target * self.method.tolerance)
        for count, group in zip(counts, error.groups, strict=True):
            nodes += count * len(group) / relative * self.mesh.in_bins(points[group[0]], points[group[-1] + 1])
        self.store.record(nodes.tolist(), variance)

    def save(self) -> None:
        """Writes what was recorded, if a file was given for it."""
        if self.store is not None:
            prior = self.method.usual(self.table) * mesh_on(self.table, self.control).in_bins()
            self.store.save(prior.tolist())

    def recurrence_of(self, variance: float) -> Recurrence:
        """The fine chain's recurrence with a data variance; made once for a table."""
        return self.table.cached(("recurrence", variance), lambda: Recurrence(self.table, variance))

    def system(self, recurrence: Recurrence, points: list[int]) -> CollocationSystem:
        """The collocation system of a mesh; that of the first mesh is made once for a table."""
        if points != self.points:
            return CollocationSystem(recurrence, points, self.order)
        key = ("system", recurrence.variance, self.order, tuple(points))
        return self.table.cached(key, lambda: CollocationSystem(recurrence, points, self.order))

    def pairs_of(self, system: CollocationSystem) -> int:
        """Secant pairs kept for each node of a system."""
        return min(self.method.secants, max(1, self.control.most_pairs // len(system.intervals)))

    def doubled(self, system: CollocationSystem) -> DoubledIntervals:
        """The doubled intervals of a system; those of the first mesh are made once for a table."""
        control = self.control.defect
        if system.points != self.points:
            return DoubledIntervals(system, control)
        key = ("doubled", system.recurrence.variance, control, tuple(system.points))
        return self.table.cached(key, lambda: DoubledIntervals(system, control))

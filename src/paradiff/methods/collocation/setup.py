# SPDX-License-Identifier: Apache-2.0
"""What all samples of a collocation run share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from paradiff.chain.slope import shifted
from paradiff.chain.step import Step
from paradiff.chain.table import Table
from paradiff.methods.collocation.defect import DoubledIntervals
from paradiff.methods.collocation.error import InterpolationError
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.mesh_store import node_counts
from paradiff.methods.collocation.options import CollocationOptions, mesh_on
from paradiff.methods.collocation.system import CollocationSystem
from paradiff.methods.window.options import WindowOptions
from paradiff.methods.window.setup import WindowSetup
from paradiff.samplers.continuum import continuum


class CollocationSetup:
    """The table, the first mesh, the tuned numbers, and coefficients on the device.

    Args:
        table: The sampler.
        method: The method.
        device: Where states live.
        dtype: Dtype in which the network is given its rows. The system is solved in float64 where the device has it, since a
            step with nearly parallel secant pairs loses digits.
        shared_window: Whether a state is a batch of members (solver/protocol.py).
        resolution: Relative precision of the network's outputs; that of `dtype` by default.

    Attributes:
        table: The chain that is solved; a fine grid of the equation for the targets `ode` and `sde`.
        order: Degree of the interpolation.
        control: The tuned numbers.
        store: The mesh store's entry; None without a file.
        mesh: How mesh points are placed.
        points: The first mesh.
        most_nodes: Most nodes of a mesh.
        recurrence: The chain's recurrence with the variance that samples start from.
        settled_shift: Whether that variance is given, by the caller or the store.
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
    ) -> None:
        if method.target != "chain":
            kind = method.target
            coarse = table
            table = coarse.cached(("continuum", kind), lambda: continuum(coarse, kind))
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
        usual = self.control.variance if stored is None else stored.variance
        self.recurrence = self.recurrence_of(usual if method.shift == "auto" else float(method.shift))
        self.settled_shift = method.shift != "auto" or stored is not None
        self.points = method.edges(table, stored)
        self._windows: dict[float, WindowSetup] = {}

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

    @staticmethod
    def tightening(amplification: float) -> float:
        """Power of 2 by which the window method's tolerance is divided for a sample that amplifies early errors so much more
        than the chain's linear part does; its estimate is multiplied by the same factor."""
        return 2.0 ** max(0, math.ceil(math.log2(amplification)))

    def verification(self, amplification: float) -> WindowSetup:
        """The window method over all nodes of the chain, for a sample of that amplification; made once for a tightening."""
        tightening = self.tightening(amplification)
        if tightening not in self._windows:
            method = self.method
            width = min(method.window or self.control.handover_window, self.table.steps)
            slope, tolerance = shifted(self.recurrence.variance), method.tolerance / tightening
            secants = self.control.handover_secants
            loop = WindowOptions(name="collocation", slope=slope, window=width, tolerance=tolerance, secants=secants)
            self._windows[tightening] = WindowSetup(
                self.table, loop, self.device, self.dtype, self.shared_window, self.resolution
            )
        return self._windows[tightening]

    def recurrence_of(self, variance: float) -> Recurrence:
        """The fine chain's recurrence with a data variance; made once for a table."""
        return self.table.cached(("recurrence", variance), lambda: Recurrence(self.table, variance))

    def system(self, recurrence: Recurrence, points: list[int]) -> CollocationSystem:
        """The collocation system of a mesh; that of the first mesh is made once for a table."""
        if points != self.points:
            return CollocationSystem(recurrence, points, self.order)
        key = ("system", recurrence.variance, self.order, tuple(points))
        return self.table.cached(key, lambda: CollocationSystem(recurrence, points, self.order))

    def doubled(self, system: CollocationSystem) -> DoubledIntervals:
        """The doubled intervals of a system; those of the first mesh are made once for a table."""
        control = self.control.defect
        if system.points != self.points:
            return DoubledIntervals(system, control)
        key = ("doubled", system.recurrence.variance, control, tuple(system.points))
        return self.table.cached(key, lambda: DoubledIntervals(system, control))

# SPDX-License-Identifier: Apache-2.0
"""Collocation: the frozen hyper-parameters of the solver that evaluates the network at few nodes (solver.py solves it)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from paradiff.chain.home import made_at_home
from paradiff.chain.shortfall import coldness
from paradiff.chain.table import Table
from paradiff.errors import are_whole, is_whole, require_kind, require_one_of, require_real, require_whole, shown
from paradiff.methods.collocation.conditions import too_cold, too_few_steps, too_rough, unfit_levels
from paradiff.methods.collocation.control import (
    DIFFERENCES,
    HIGHER_ORDER,
    NARROW,
    ORDER_ZERO,
    SHORT,
    SHORT_WIDE,
    CollocationControl,
)
from paradiff.methods.collocation.mesh import Mesh
from paradiff.methods.collocation.mesh_store import MeshStore, StoredMesh
from paradiff.methods.face import Face, settle
from paradiff.methods.secant import MOST_PAIRS
from paradiff.methods.tolerance import DEFAULT_TOLERANCE

Target = Literal["chain", "ode", "sde"]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class CollocationOptions(Face):
    """Hyper-parameters of collocation; see `methods.collocation`.

    Attributes:
        name: The method's name.
        nodes: Number of nodes of the first mesh, the fine nodes themselves, or `auto`.
        order: Degree of the interpolation between nodes; None for 0 on stochastic chains, at averaged states, and for 3 on
            deterministic ones.
        shift: Variance of the data, which sets the linear part of the forcing (interval.py); or `auto`: 1/4, replaced by the
            mean square of the first sample that has nearly converged, if that is far off. A given one is replaced
            where it is 256 times off.
        window: Most rows that a sample puts in one round; None for no bound.
        tolerance: Root mean square error that the sample may have by estimate, in the data's units.
        secants: Secant pairs kept for each node (methods/secant.py), 0 to 1000.
        max_nodes: Most nodes that a sample may have; None for as many as the chain has.
        exact: Whether the window method verifies the sample over all nodes of the chain.
        target: `chain`, the sample of the sequential chain, or that of the `ode` or `sde` which the chain discretizes.
        warm_start: File of a mesh store (mesh_store.py): where samples of this model needed their nodes, for later ones to
            start from; None for no file.
        control: The tuned numbers; None for one of the sets of control.py, by the interpolation's order, the chain's length and
            the window.

    Raises:
        ValueError: If a value is of the wrong kind or out of its range, or two of them contradict each other.
    """

    name: str = "collocation"
    nodes: int | Sequence[int] | Literal["auto"] = "auto"
    order: int | None = None
    shift: float | Literal["auto"] = "auto"
    window: int | None = None
    tolerance: float = DEFAULT_TOLERANCE
    secants: int = 4
    max_nodes: int | None = None
    exact: bool = False
    target: Target = "chain"
    warm_start: str | Path | None = None
    control: CollocationControl | None = None

    def __post_init__(self) -> None:
        self._refuse_nodes()
        if self.order is not None and not (is_whole(self.order) and 0 <= self.order <= 8):
            raise ValueError(
                f"the order is {shown(self.order)}; it must be a whole number, 0 (averages) to 8, or None for the chain's own"
            )
        if not (isinstance(self.shift, str) and self.shift == "auto"):
            require_real("the shift, a data variance,", self.shift, positive=True, otherwise=", or 'auto'")
        if self.window is not None:
            require_whole("the window", self.window, 1, ", or None for no bound on rows")
        require_real("the tolerance", self.tolerance, positive=True, otherwise=" (for the chain itself, use exact=True)")
        require_whole("secants", self.secants, 0, most=MOST_PAIRS)
        if self.max_nodes is not None:
            require_whole("max_nodes", self.max_nodes, 1, ", or None for as many as the chain has")
            least = 2 if isinstance(self.nodes, str) else self.nodes if is_whole(self.nodes) else len(self.nodes)
            if self.max_nodes < least:
                raise ValueError(f"max_nodes is {self.max_nodes}, below the {least} nodes to begin with; give at least that")
        if not isinstance(self.exact, bool):
            raise ValueError(f"exact is {shown(self.exact)}; it must be True or False")
        require_one_of("the target", self.target, get_args(Target))
        if self.exact and self.target != "chain":
            raise ValueError(
                f"exact=True was given with target={self.target!r}; only the chain's own sample can be verified step by step"
            )
        if self.warm_start is not None and not isinstance(self.warm_start, str | Path):
            raise ValueError(f"warm_start is {shown(self.warm_start)}; it must be the path of a file, or None for no file")
        if self.warm_start is not None and self.nodes != "auto":
            raise ValueError(
                f"warm_start was given with nodes={shown(self.nodes)}; it says where nodes go itself: leave one of them out"
            )
        if self.control is not None:
            require_kind("control", self.control, CollocationControl, ", or None for the order's own")
        settle(self, "nodes", "order", "window", "secants", "max_nodes", numbers=["tolerance"])
        if not isinstance(self.shift, str):
            settle(self, numbers=["shift"])

    def _refuse_nodes(self) -> None:
        """Refuses nodes of the wrong kind, too few, or out of order."""
        nodes = self.nodes
        if isinstance(nodes, str) and nodes == "auto":
            return
        if not is_whole(nodes) and not are_whole(nodes):
            raise ValueError(f"nodes is {shown(nodes)}; it must be a count, a sequence of fine nodes, or 'auto'")
        if is_whole(nodes):
            if nodes < 2:
                raise ValueError(f"{nodes} nodes were asked for; an interpolation needs at least 2")
            return
        places = [int(n) for n in nodes]
        if not places or places[0] != 0:
            raise ValueError(f"the nodes begin with {places[:1]}; the first must be node 0, where the chain starts")
        for before, after in itertools.pairwise(places):
            if after <= before:
                raise ValueError(f"node {after} follows node {before}; nodes must increase")
        if len(places) < 2:
            raise ValueError("1 node was given; an interpolation needs at least 2")

    def _refuse_beyond(self, table: Table) -> None:
        """Refuses nodes that a table does not have."""
        if isinstance(self.nodes, str):
            return
        if is_whole(self.nodes):
            if self.nodes > table.steps:
                raise ValueError(f"{self.nodes} nodes were asked for; the chain has {table.steps} steps: give at most that")
        elif self.nodes[-1] >= table.steps:
            raise ValueError(f"node {self.nodes[-1]} was given; the chain evaluates nodes 0 to {table.steps - 1}")

    def degree(self, table: Table) -> int:
        """Degree of the interpolation on a chain."""
        if self.order is not None:
            return self.order
        usual = self.control or (ORDER_ZERO if table.stochastic else HIGHER_ORDER)
        if levels_of(table) is not None:
            return usual.order
        return min(usual.order, len(mesh_on(table, usual).candidates) - 1)

    def control_on(self, table: Table) -> CollocationControl:
        """The tuned numbers for a chain."""
        if self.control is not None:
            return self.control
        if self.degree(table) == 0:
            return ORDER_ZERO
        if not self._is_short(table):
            return HIGHER_ORDER
        if self.window is None or self.window >= NARROW.wide:
            return SHORT_WIDE
        return NARROW if self._fits(HIGHER_ORDER, table) else SHORT

    def control_at_any_window(self, table: Table) -> CollocationControl:
        """The tuned numbers of narrow windows, which hold at wide ones too: for runs whose rows change from round to round."""
        return replace(self, window=1).control_on(table)

    def _is_short(self, table: Table) -> bool:
        """Whether a chain is too short for the first mesh of `HIGHER_ORDER`, and not for that of `NARROW`; or so short that the
        estimates of `HIGHER_ORDER` do not hold at a narrow window. At a first node of pure noise there is no level to begin
        from (interval.py), which counts on a short chain."""
        given = not isinstance(self.nodes, str) or self.max_nodes is not None or self.target != "chain" or self.exact
        if given or table.stochastic or float(table.alpha[0]) <= 0:
            return False
        narrow = self.window is not None and self.window < NARROW.narrow and table.steps <= NARROW.narrow_steps
        return self._fits(NARROW, table) and (narrow or not self._fits(HIGHER_ORDER, table))

    def _fits(self, control: CollocationControl, table: Table) -> bool:
        """Whether the first mesh by some tuned numbers is small enough a part of a chain."""
        share = max(self._relative(control), control.least_nodes)
        return round(nodes_on(table, control) * share) <= control.first_share * table.steps

    def _relative(self, control: CollocationControl) -> float:
        """Ratio of node counts: at this tolerance over at the reference tolerance."""
        return (control.reference_tolerance / self.tolerance) ** control.node_exponent

    def relative(self, table: Table) -> float:
        """Ratio of node counts: at this tolerance over at the reference tolerance."""
        return self._relative(self.control_on(table))

    def usual(self, table: Table) -> int:
        """Nodes of the default mesh at the reference tolerance."""
        return nodes_on(table, self.control_on(table))

    def store(self, table: Table) -> MeshStore | None:
        """The mesh store's entry of a table; None without a file.

        Raises:
            ValueError: If the file is no mesh store.
        """
        return (
            None
            if self.warm_start is None
            else MeshStore(Path(self.warm_start), table, self.control_on(table), self.degree(table), self.target)
        )

    def count(self, table: Table, stored: StoredMesh | None = None) -> int:
        """Nodes of the first mesh at this tolerance, where the caller gave none; more, maybe, than the chain has."""
        control = self.control_on(table)
        share, least = max(self.relative(table), control.least_nodes), self.degree(table) + 1
        if stored is not None:
            return max(round(sum(stored.nodes) * share), least)
        usual, most = round(self.usual(table) * share), math.floor(control.first_share * table.steps / 2)
        cold = round(usual * (1 + control.cold_nodes * coldness(table)))
        return max(usual, min(cold, most), least)

    def of_differences(self, table: Table) -> CollocationOptions:
        """The method for samples that begin from an earlier run's states at all nodes, and whose forcings' difference to it is
        interpolated (warm.py): by the nodes of `DIFFERENCES`, as many as fill a round, or all of a short chain, unless the
        caller chose."""
        found = DIFFERENCES
        if self.control is not None or levels_of(table) is not None or not isinstance(self.nodes, str):
            return self
        candidates = mesh_on(table, found).candidates
        every = table.restarts[:-1]
        if len(every) < 2:
            return self  # nothing lies between nodes
        at_once = table.stochastic or self.window is None or self.window >= len(every)
        most = min(self.max_nodes or found.all_nodes, found.all_nodes if at_once else found.few_nodes)
        if candidates == every and len(every) <= most:
            return replace(self, nodes=every, order=min(self.order or 1, len(every) - 1), warm_start=None, control=found)
        if table.stochastic or self.order == 0:
            return self
        nodes = min(max(self.window or found.round_nodes, found.nodes), found.round_nodes)
        return replace(self, warm_start=None, control=replace(found, nodes=nodes))

    def unfit(self, table: Table, stored: StoredMesh | None = None) -> str | None:
        """Why a chain is left to the window method from the first round on (conditions.py); None where it is not.

        Args:
            table: The chain that is solved.
            stored: The mesh store's entry of it.
        """
        control, averaged = self.control_on(table), self.degree(table) == 0
        found = (
            levels_of(table)
            or too_rough(table, control.most_volatility)
            or too_cold(table, control.most_shortfall, control.most_other_shortfall, averaged=averaged)
        )
        if found is None and isinstance(self.nodes, str) and self.max_nodes is None and self.target == "chain":
            found = too_few_steps(table, self.count(table, stored), control.first_share)
        return found

    def stored(self, table: Table) -> StoredMesh | None:
        """What the mesh store holds of a table; None without a file or an entry.

        Raises:
            ValueError: If the file is no mesh store.
        """
        store = self.store(table)
        return None if store is None else store.stored

    def variance_on(self, table: Table) -> float:
        """The data's variance that samples of a chain start from."""
        if not isinstance(self.shift, str):
            return float(self.shift)
        stored = self.stored(table)
        return self.control_on(table).variance if stored is None else stored.variance

    @made_at_home
    def edges(self, table: Table, stored: StoredMesh | None = None) -> list[int]:
        """The points of the first mesh, 0 and N included; all nodes of a chain that is left to the window method.

        Args:
            table: The sampler.
            stored: The mesh store's entry of it.

        Raises:
            ValueError: If nodes are out of range, no candidates of the mesh, or too few for the order.
        """
        self._refuse_beyond(table)
        if self.unfit(table, stored) is not None:
            return list(range(table.steps + 1))
        order, control = self.degree(table), self.control_on(table)
        mesh = mesh_on(table, control, stored)
        if isinstance(self.nodes, str) or is_whole(self.nodes):
            if isinstance(self.nodes, str):
                count = min(self.count(table, stored), table.steps, self.max_nodes or table.steps)
            else:
                count = self.nodes
            points = mesh.points(count)
        else:
            points = [int(n) for n in self.nodes]
            strange = sorted(set(points) - set(mesh.candidates))
            if strange:
                raise ValueError(
                    f"node {strange[0]} was given; table {table.name!r} does not start afresh there, or has another node at "
                    "the same level: leave it out"
                )
            points = [*points, table.steps]
        if len(points) - 1 < order + 1:
            raise ValueError(
                f"the nodes are {len(points) - 1}, for interpolation of order {order}; it needs at least {order + 1}: give "
                "more nodes, or a lower order"
            )
        return points


def nodes_on(table: Table, control: CollocationControl) -> int:
    """Nodes of the default mesh of a chain at the reference tolerance."""
    return round(control.nodes * (table.steps / control.reference_steps) ** control.steps_exponent)


def levels_of(table: Table) -> str | None:
    """`unfit_levels` of a table; found once."""
    return table.cached(("unfit levels",), lambda: unfit_levels(table))


def mesh_on(table: Table, control: CollocationControl, stored: StoredMesh | None = None) -> Mesh:
    """The mesh of a chain; made once for a table."""
    nodes = None if stored is None else stored.nodes
    return table.cached(("mesh", control.mesh, nodes), lambda: Mesh(table, control.mesh, nodes))

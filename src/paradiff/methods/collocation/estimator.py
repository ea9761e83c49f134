# SPDX-License-Identifier: Apache-2.0
"""The interpolation error of one sample, estimated anew after rounds and calibrated by its refinements (error.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from paradiff.methods.collocation.defect import DoubledIntervals
from paradiff.methods.collocation.error import Calibration, InterpolationError, Propagation, interpolation_error
from paradiff.methods.collocation.linearization import Linearization
from paradiff.methods.collocation.pairs import PairStore
from paradiff.methods.collocation.sample_system import SampleSystem
from paradiff.methods.collocation.setup import CollocationSetup


class Estimator:
    """The estimates of one sample; b members, d numbers each.

    Args:
        setup: What all samples share.

    Attributes:
        interpolation_error: Estimate accepted last, root mean square at the sample; infinite before.
        amplification: Largest amplification of defects observed, 1 or more.
    """

    def __init__(self, setup: CollocationSetup) -> None:
        self._setup = setup
        self.interpolation_error = math.inf
        self.amplification = 1.0
        self._calibration = Calibration()
        self._undecided = False  # whether a mesh did not tell which side of a decision the sample is on
        self._first: Linearization | None = None  # when the first estimate was accepted

    @property
    def sample(self) -> Tensor | None:
        """The sample when an estimate was accepted last; None before."""
        return self._calibration.sample

    @property
    def seen(self) -> bool:
        """Whether the amplification was observed: an estimate was accepted."""
        return self._first is not None

    @property
    def compared(self) -> bool:
        """Whether the mesh was refined after an estimate, by which the next ones are measured."""
        return math.isfinite(self._calibration.predicted)

    def estimate(
        self,
        at: SampleSystem,
        linearization: Linearization,
        states: Tensor,
        forcings: Tensor,
        probed: tuple[DoubledIntervals, Tensor] | None,
        moved: float,
        tolerance: float,
        pairs: PairStore | None = None,
    ) -> tuple[InterpolationError, float]:
        """The calibrated estimate, and its calibration factor; the amplification that it shows is kept. Waits for the device.

        Args:
            at: The sample's collocation system.
            linearization: The same, linearized.
            states: `[M, b, d]` states at which the network was evaluated.
            forcings: `[M, b, d]` the forcings there.
            probed: Order 0: the doubled intervals and their defects (`Probes.defects`).
            moved: Root mean square distance of the sample from `sample`; 0 where that is None.
            tolerance: Root mean square error that the sample may have.
            pairs: The secant pairs, for those of neighbours to count too.
        """
        control = self._setup.control
        if control.spread and not at.system.averaged and pairs is not None:
            linearization = self._spread(at, pairs)
        propagation = Propagation(system=at.system, influence=at.influence, now=linearization, first=self._first)
        error = interpolation_error(
            propagation, states, forcings, probed, amplification=self.amplification, control=control, move=self._setup.move
        )
        self.amplification = error.amplification
        if self._undecided:
            error = error.doubted(control.error.decided_again)
        if not error.decided:
            self._undecided, self.amplification = True, max(self.amplification, control.unseen_amplification)
        error, factor = self._calibration.apply(error, moved, averaged=at.system.averaged, control=control)
        return error.cautious(tolerance), factor

    def _spread(self, at: SampleSystem, pairs: PairStore) -> Linearization:
        """The linearized system in which nodes with few pairs of their own answer as their neighbours do, too.

        In a small window a node is evaluated again once or twice, and its pairs cover few directions; what grows may lie in
        those that only its neighbours saw. In a wider one most nodes have pairs enough, and nearly parallel pairs of different
        nodes would pass for growth that is not there.
        """
        nodes, control = at.system.nodes, self._setup.control
        store = pairs.spread(control.spread, at.system.recurrence.evidence[nodes].tolist(), control.enough_pairs)
        reach = -at.influence[:-1].repeat_interleave(store.most, 0).repeat_interleave(store.most, 1)
        return Linearization(at.influence, reach, nodes, store.newest(), control.pair_uncertainty, causal=False)

    def accept(
        self,
        error: InterpolationError,
        factor: float,
        *,
        linearization: Linearization,
        iteration_error: float,
        sample: Tensor,
    ) -> None:
        """The estimate counts, and the next refinement is measured by it."""
        self.interpolation_error, self._first = error.total, self._first or linearization.kept()
        self._calibration = self._calibration.accept(error, factor, iteration_error=iteration_error, sample=sample)

    def distrust(self, least: float) -> None:
        """No estimate is below `least`: the defects do not tell the error."""
        self.interpolation_error = max(self.interpolation_error, least)

    def refined(self, parts: Sequence[int]) -> None:
        """The intervals were subdivided into `parts` each."""
        self._calibration = self._calibration.refined(parts, self._setup.control.mesh.subdivision_exponent)

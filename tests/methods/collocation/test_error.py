# SPDX-License-Identifier: Apache-2.0
"""Estimates of the interpolation error are calibrated by how far refinements moved the sample."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from paradiff import Keyed, Schedule, collocation, sample
from paradiff.methods.collocation.control import HIGHER_ORDER, ORDER_ZERO
from paradiff.methods.collocation.defect import DoubledIntervals
from paradiff.methods.collocation.error import Calibration, InterpolationError, Propagation, interpolation_error, told
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.linearization import Linearization
from paradiff.methods.collocation.pairs import PairStore
from paradiff.methods.collocation.system import CollocationSystem
from paradiff.models.exact import Empirical
from paradiff.samplers import ddpm


def test_what_a_refinement_taught_of_estimates_is_told_from_amplification_and_fades() -> None:
    error = InterpolationError([3e-3, 4e-3], [(0, 1), (2, 3)])
    before = torch.zeros(())

    def calibrated(calibration: Calibration, error: InterpolationError) -> tuple[InterpolationError, float]:
        return calibration.apply(error, 0.06, averaged=True, control=ORDER_ZERO)

    assert calibrated(Calibration(), error) == (error, 1.0)  # no refinement yet
    accepted = Calibration().accept(InterpolationError([0.01], [(0,)]), 1.0, iteration_error=0.0, sample=before)
    assert calibrated(accepted, error)[1] == pytest.approx(6.0)
    amplified = replace(error, amplification=2.0)  # the pairs have observed some of it since
    found, factor = calibrated(accepted, amplified)
    assert factor == pytest.approx(3.0)
    assert found.shares == pytest.approx([9e-3, 12e-3])
    later = accepted.accept(InterpolationError([1.0], [(0,)], 2.0), 9.0, iteration_error=0.0, sample=before)
    assert calibrated(later, amplified)[1] == pytest.approx(3.0)  # at a later refinement the sample hardly moves


def test_a_small_move_relaxes_estimates_of_benign_samples_at_higher_orders_only() -> None:
    error = InterpolationError([3e-3, 4e-3], [(0, 1), (2, 3)])
    accepted = Calibration().accept(InterpolationError([0.02], [(0,)]), 1.0, iteration_error=0.0, sample=torch.zeros(()))
    refined = accepted.refined([4], 1.5)
    assert refined.predicted == pytest.approx(0.02 / 8)

    def total(error: InterpolationError, *, averaged: bool, move: float) -> float:
        return refined.apply(error, move, averaged=averaged, control=HIGHER_ORDER)[0].total

    assert total(error, averaged=True, move=0.01) == pytest.approx(error.total)
    assert total(replace(error, amplification=1.6), averaged=False, move=0.01) == pytest.approx(error.total)
    ratio = HIGHER_ORDER.error.safety * refined.predicted * 0.01 / 0.02 / error.total
    assert total(error, averaged=False, move=0.01) == pytest.approx(math.sqrt(ratio) * error.total)
    assert total(error, averaged=False, move=1e-6) == pytest.approx(HIGHER_ORDER.error.least_relaxation * error.total)


def test_a_sample_whose_error_was_never_known_teaches_nothing() -> None:
    unknown = Calibration().accept(InterpolationError([math.inf], [(0, 1)]), 1.0, iteration_error=0.0, sample=torch.zeros(()))
    error = InterpolationError([3e-3], [(0, 1)])
    assert unknown.apply(error, 0.06, averaged=False, control=HIGHER_ORDER) == (error, 1.0)


def test_a_state_that_is_off_in_the_midst_of_the_decision_counts_beside_the_sample() -> None:
    """Its error exceeds the tolerance as the state's exceeds what it may be, and comes from the same groups."""
    error = InterpolationError([1e-4, 2e-4], [(0, 1), (2, 3)], deciding=[0.6, 0.7])
    assert error.decided
    assert error.cautious(4e-3) is error
    off = error.doubted(2.0)
    assert not off.decided
    assert off.cautious(4e-3).shares == pytest.approx([4e-3 * 1.2, 4e-3 * 1.4])
    assert replace(off, shares=[1.0, 1.0]).cautious(4e-3).shares == [1.0, 1.0]


def test_an_estimate_is_told_larger_up_to_the_tolerance() -> None:
    for total, expected in ((2e-3, 2.6e-3), (3.5e-3, 4e-3), (4e-3, 4e-3), (1.0, 1.0), (0.0, 0.0), (math.inf, math.inf)):
        assert told(total, 4e-3, 1.3) == pytest.approx(expected)
    assert told(3.9e-3, 4e-3, 1.3) == 4e-3, "to the last digit, since the status compares"
    table, noise = ddpm(Schedule.linear(), 200), Keyed((2,), 0, 4)
    network = Empirical(torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)).denoiser(table)
    plain = replace(ORDER_ZERO, error=replace(ORDER_ZERO.error, told=1.0))
    usual, bare = (sample(network, table, noise, collocation(control=c)).error_estimates for c in (ORDER_ZERO, plain))
    for one, other in zip(usual, bare, strict=True):
        factor = told(other.estimated_error, 4e-3, ORDER_ZERO.error.told) / other.estimated_error
        assert (one.estimated_error, one.interpolation_error, one.iteration_error) == pytest.approx(
            (factor * other.estimated_error, factor * other.interpolation_error, factor * other.iteration_error)
        )


def test_a_defect_beside_the_direction_that_grows_counts_as_its_neighbours_along_it() -> None:
    """All defects but every second one lie across the direction that grows, by chance."""
    system = CollocationSystem(Recurrence(ddpm(Schedule.linear(), 200), 0.25), list(range(0, 201, 10)), 0)
    doubled, count = DoubledIntervals(system, ORDER_ZERO.defect), len(system.intervals)
    along = torch.eye(2, dtype=torch.float64)
    store, dx = PairStore(count, 1, along[:1], along.dtype), along[0].expand(count - 1, 1, 2)
    large = torch.ones(count - 1, 1, dtype=torch.bool)
    store.observe(range(1, count), dx, 5 * dx, large)  # forcings follow their states along one direction alone
    now = Linearization(system.influence, -system.influence[:-1], system.nodes, store.newest(), 0.0, causal=True)
    defects = 1e-3 * torch.stack([along[j % 2] for j in range(len(doubled.first))])[:, None]

    def shares(neighbours: int | None) -> torch.Tensor:
        defect = ORDER_ZERO.defect if neighbours is None else replace(ORDER_ZERO.defect, neighbours=neighbours)
        found = interpolation_error(
            Propagation(system=system, influence=system.influence, now=now, first=None),
            torch.zeros(count, 1, 2, dtype=torch.float64),
            torch.zeros(count, 1, 2, dtype=torch.float64),
            (doubled, defects),
            amplification=1.0,
            control=replace(ORDER_ZERO, defect=defect),
            move=lambda values: values,
        )
        return torch.tensor(found.shares, dtype=torch.float64)

    alone, usual = shares(0), shares(None)
    assert torch.equal(usual, shares(2))
    across = torch.arange(1, len(alone) - 1, 2)
    assert (usual[across][:3] > 1.5 * alone[across][:3]).all(), usual / alone

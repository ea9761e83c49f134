# SPDX-License-Identifier: Apache-2.0
"""What follows a round is a pure function of the sample's errors, its mesh and its bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from paradiff import Schedule
from paradiff.methods.collocation.control import HIGHER_ORDER, SHORT, SHORT_WIDE
from paradiff.methods.collocation.error import InterpolationError
from paradiff.methods.collocation.mesh import Mesh
from paradiff.methods.collocation.refine import (
    Bounds,
    Converged,
    Decision,
    GiveUp,
    HandOver,
    Progress,
    Refine,
    Stop,
    Sweep,
    decide,
)
from paradiff.samplers import ddim

TOLERANCE = 1e-2
MESH = Mesh(ddim(Schedule.linear(), 200), HIGHER_ORDER.mesh)
POINTS = MESH.points(12)
BOUNDS = Bounds(tolerance=TOLERANCE, exact=False, most_nodes=200, resolving=[], may_hand_over=True, control=HIGHER_ORDER)


def error(total: float) -> InterpolationError:
    """An error of which all intervals but the last have equal shares."""
    count = len(POINTS) - 2
    return InterpolationError([total / math.sqrt(count)] * count, [(n,) for n in range(count)])


def decided(
    found: InterpolationError | None,
    *,
    converged: bool = True,
    moved: bool = False,
    iteration_error: float = 1e-4,
    sweeps: int = 3,
    spread: float = 1.0,
    **bounds: object,
) -> Decision:
    progress = Progress(converged=converged, moved=moved, iteration_error=iteration_error, sweeps=sweeps, most_sweeps=20)
    return decide(progress, found, POINTS, MESH, replace(BOUNDS, **bounds), spread=spread)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("sweeps", "decision"), [(3, Sweep()), (20, Sweep()), (21, GiveUp())])
def test_without_an_estimate_sweeps_go_on_up_to_their_bound(sweeps: int, decision: Decision) -> None:
    assert decided(None, converged=False, sweeps=sweeps) == decision


def test_within_the_tolerance_a_sample_has_converged_even_if_its_sweeps_have_not() -> None:
    assert decided(error(0.9 * TOLERANCE)) == Converged(verify=False)
    assert decided(error(0.7 * TOLERANCE), converged=False, iteration_error=0.7 * TOLERANCE) == Converged(verify=False)


def test_a_sample_whose_nodes_moved_since_they_were_evaluated_has_not_converged() -> None:
    assert decided(error(0.1 * TOLERANCE), converged=False, moved=True) == Sweep()
    assert decided(error(0.1 * TOLERANCE), converged=False, moved=True, sweeps=21) == GiveUp()


def test_an_exact_sample_is_verified_whatever_its_error() -> None:
    assert decided(error(9 * TOLERANCE), exact=True) == Converged(verify=True)


def test_an_iteration_error_that_hides_the_estimate_is_swept_down_first() -> None:
    assert decided(error(2 * TOLERANCE), converged=False, iteration_error=3 * TOLERANCE) == Sweep()
    assert decided(error(2 * TOLERANCE), converged=False, iteration_error=3 * TOLERANCE, sweeps=21) == GiveUp()


@pytest.mark.parametrize("converged", [True, False])
def test_an_interpolation_error_above_the_tolerance_refines_the_mesh_at_once(converged: bool) -> None:
    decision = decided(error(4 * TOLERANCE), converged=converged, iteration_error=2 * TOLERANCE)
    assert isinstance(decision, Refine)
    assert set(POINTS) < set(decision.points)


def test_a_sample_that_needs_most_nodes_is_handed_over_once_its_sweeps_have_converged() -> None:
    few = replace(HIGHER_ORDER, handover_share=0.05, handover_least=0)
    assert decided(error(4 * TOLERANCE), control=few) == HandOver("they would need most of the chain's nodes")
    assert decided(error(4 * TOLERANCE), control=few, converged=False) == Sweep()
    assert isinstance(decided(error(4 * TOLERANCE), control=few, may_hand_over=False), Refine)


def test_a_sample_that_is_open_in_a_narrow_window_is_handed_over_at_once() -> None:
    for spread in (1.0, 30.0):
        lost = decided(error(1.1 * spread), converged=False, control=SHORT, spread=spread)
        assert lost == HandOver("their meshes leave open what they become")
        assert isinstance(decided(error(0.9 * spread), converged=False, control=SHORT, spread=spread), Refine)
        assert isinstance(decided(error(1.1 * spread), converged=False, control=SHORT_WIDE, spread=spread), Refine)
        assert isinstance(decided(error(1.1 * spread), control=SHORT, spread=spread, may_hand_over=False), Refine)


def test_what_is_solved_is_kept_where_the_whole_chain_is_short() -> None:
    few = replace(HIGHER_ORDER, handover_share=0.05)
    assert isinstance(decided(error(4 * TOLERANCE), control=few), Refine)
    assert few.most_kept(100) == 100
    assert few.most_kept(10_000) == 500


def test_a_sample_without_a_node_to_spare_stops() -> None:
    most = len(POINTS) - 1
    assert decided(error(4 * TOLERANCE), most_nodes=most, may_hand_over=False) == Stop()
    assert decided(error(4 * TOLERANCE), most_nodes=most) == HandOver("their meshes cannot be refined")
    assert decided(error(4 * TOLERANCE), most_nodes=most, converged=False) == Sweep()


def test_a_mesh_too_coarse_to_tell_its_own_error_is_refined_handed_over_or_distrusted() -> None:
    finer = MESH.points(2 * len(POINTS))
    small = error(0.1 * TOLERANCE)
    assert decided(small, resolving=POINTS) == Converged(verify=False)
    assert decided(small, resolving=finer) == Refine(sorted({*POINTS, *finer}))
    assert decided(small, resolving=finer, exact=True) == Converged(verify=True)
    few = replace(HIGHER_ORDER, handover_share=0.05, handover_least=0)
    assert decided(small, resolving=finer, control=few) == HandOver("a mesh of so few nodes does not tell its own error")
    bounded = {"resolving": finer, "may_hand_over": False, "most_nodes": len(POINTS)}
    assert decided(small, **bounded) == Stop(unresolved=True)
    assert decided(small, **bounded, converged=False) == Sweep()

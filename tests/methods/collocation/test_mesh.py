# SPDX-License-Identifier: Apache-2.0
"""Mesh points begin at node 0, increase, end with a step of their own, and lie where an interval may begin."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from paradiff import Schedule
from paradiff.methods.collocation.control import MeshControl
from paradiff.methods.collocation.interval import finite_log_snr
from paradiff.methods.collocation.mesh import Mesh, monitor
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler_ancestral, flow_euler, heun

TABLES = {
    "ddim": ddim(Schedule.linear(), 200),
    "ddim pure noise": ddim(Schedule.linear(rescale_zero_snr=True), 200, spacing="trailing", prediction="v"),
    "ddpm": ddpm(Schedule.linear(), 200),
    "euler_ancestral": euler_ancestral(Schedule.scaled_linear(), 200),
    "heun": heun(Schedule.scaled_linear(), 100),
    "dpmpp_2m": dpmpp_2m(Schedule.linear(), 200),
    "flow_euler": flow_euler(200),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("count", [2, 8, 20, 56])
def test_points_increase_from_the_start_to_the_end_at_candidates(name: str, count: int) -> None:
    table = TABLES[name]
    mesh = Mesh(table, MeshControl())
    points = mesh.points(count)
    assert points[0] == 0
    assert points[-1] == table.steps
    assert all(a < b for a, b in itertools.pairwise(points))
    assert set(points[:-1]) <= set(mesh.candidates)
    assert len(points) - 1 <= count
    assert points[-2] == mesh.candidates[-1]


@pytest.mark.parametrize("name", TABLES)
def test_candidates_are_at_increasing_levels(name: str) -> None:
    table = TABLES[name]
    candidates = Mesh(table, MeshControl()).candidates
    assert candidates[0] == 0
    assert (finite_log_snr(table)[candidates].diff() > 0).all()


def test_intervals_of_a_two_stage_sampler_begin_where_it_starts_afresh() -> None:
    table = TABLES["heun"]
    assert set(Mesh(table, MeshControl()).candidates) <= set(table.restarts)


def test_deterministic_points_are_even_in_log_snr_but_for_the_middle() -> None:
    table = TABLES["ddim"]
    place = finite_log_snr(table)
    points = place[Mesh(table, MeshControl()).points(16)[1:-2]]  # node 0 is far off already
    step, wide, middle = float(place.diff()[20:-3].max()), points.diff(), (points[1:] + points[:-1]) / 2
    tails = wide[(middle + 0.3).abs() > 4]
    assert tails.max() - tails.min() < 2 * step
    assert wide[(middle + 0.3).abs() < 1].max() < 0.5 * tails.min()


def test_stochastic_points_are_denser_where_the_sample_is_decided() -> None:
    table = TABLES["ddpm"]
    place = finite_log_snr(table)[Mesh(table, MeshControl()).points(40)[:-1]]
    intervals, middle = place.diff(), (place[1:] + place[:-1]) / 2
    decided = intervals[(middle - -1.2).abs() < 1]
    late = intervals[(middle > 2) & (middle < 5)]
    assert float(decided.mean()) < 0.7 * float(late.mean())
    assert monitor(torch.tensor([-1.2]), True, MeshControl()) > 2 * monitor(torch.tensor([4.0]), True, MeshControl())


@pytest.mark.parametrize("count", [4, 6, 7, 9])
def test_deterministic_intervals_of_several_steps_hold_as_little_as_can_be(count: int) -> None:
    table, control = ddim(Schedule.linear(), 10), MeshControl()
    mesh, place = Mesh(table, control), finite_log_snr(table)
    held = (monitor((place[1:] + place[:-1]) / 2, False, control) * place.diff()).tolist()

    def most(points: Sequence[int]) -> float:
        return max((sum(held[a:b]) for a, b in itertools.pairwise(points) if b - a > 1), default=0.0)

    found = mesh.points(count)
    others = itertools.combinations(range(1, table.steps - 1), count - 2)
    assert len(found) - 1 <= count
    assert most(found) == pytest.approx(min(most([0, *inner, table.steps - 1, table.steps]) for inner in others), rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_a_subdivided_interval_has_at_most_so_many_parts(parts: int) -> None:
    mesh = Mesh(TABLES["ddpm"], MeshControl())
    found = mesh.subdivide(50, 110, parts)
    assert len(found) == parts
    assert found[0] == 50
    assert all(a < b < 110 for a, b in itertools.pairwise(found))


def test_a_single_step_is_not_subdivided() -> None:
    assert Mesh(TABLES["ddpm"], MeshControl()).subdivide(50, 51, 4) == [50]


def test_an_interval_of_two_steps_is_subdivided_once() -> None:
    assert Mesh(TABLES["ddpm"], MeshControl()).subdivide(50, 52, 4) == [50, 51]


def test_errors_that_are_all_zero_ask_for_no_more_points() -> None:
    mesh = Mesh(TABLES["ddim"], MeshControl())
    points = mesh.points(8)
    groups = [[n] for n in range(len(points) - 1)]
    for shares in ([0.0] * len(groups), [0] * len(groups)):
        assert mesh.refine(points, shares=shares, groups=groups, wanted=1e-3, most=100, most_parts=8) == points
    assert len(mesh.refine(points, shares=[1.0] * len(groups), groups=groups, wanted=1e-3, most=100, most_parts=8)) > len(
        points
    )

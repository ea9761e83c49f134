# SPDX-License-Identifier: Apache-2.0
"""Short deterministic chains: the head of a mesh is refined before the rest is evaluated, and neighbours' pairs count."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from paradiff import Keyed, Recorded, Schedule, Solution, collocation, quasi_newton, sample, sequential
from paradiff.methods.collocation.control import HIGHER_ORDER, NARROW, SHORT
from paradiff.methods.collocation.head import head_error
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.options import mesh_on
from paradiff.methods.collocation.pairs import PairStore
from paradiff.methods.collocation.system import CollocationSystem
from paradiff.models import load
from paradiff.samplers import ddim
from paradiff.solver import CollocationRecord

TABLE = ddim(Schedule.linear(), 50)
LONG = ddim(Schedule.linear(), 200)


def test_a_short_chain_takes_fewer_rounds_and_evaluations_than_the_window_method() -> None:
    model = load("digits")
    table, seeds = model.table("ddim", 50), range(4)

    def noise() -> Recorded:
        return Recorded(model.shape, [torch.Generator().manual_seed(seed) for seed in seeds])

    exact = sample(model, table, noise(), sequential()).sample
    sparse, whole = (sample(model, table, noise(), method) for method in (collocation(window=3), quasi_newton(3)))
    assert (sparse.sample - exact).flatten(1).square().mean(1).sqrt().max() < 4e-3
    few, many = ([e.evaluations for e in found.error_estimates] for found in (sparse, whole))
    assert sum(few) < 0.85 * sum(many)
    assert max(e.estimated_error for e in sparse.error_estimates) <= 4e-3


def test_a_mesh_is_not_refined_for_what_only_neighbours_saw_of_nodes_with_pairs_of_their_own() -> None:
    model = load("digits")
    table = model.table("ddim", 50)

    def found(enough: int) -> Solution:
        noise = Recorded(model.shape, [torch.Generator().manual_seed(seed) for seed in (307, 312)])
        return sample(model, table, noise, collocation(window=8, control=replace(NARROW, enough_pairs=enough)))

    few, many = found(2), found(0)
    exact = sample(model, table, Recorded(model.shape, [torch.Generator().manual_seed(s) for s in (307, 312)]), sequential())
    assert {r.of for r in few.history if isinstance(r, CollocationRecord)} == {21}  # the first mesh
    for own, theirs in zip(few.error_estimates, many.error_estimates, strict=True):
        assert own.rounds <= 10 < theirs.rounds
        assert own.evaluations < 0.7 * theirs.evaluations
    errors = (few.sample - exact.sample).flatten(1).square().mean(1).sqrt()
    assert all(error < e.estimated_error <= 4e-3 for error, e in zip(errors.tolist(), few.error_estimates, strict=True))


def test_after_a_refinement_new_nodes_come_first() -> None:
    model = load("digits")
    table = model.table("ddim", 100)

    def noise() -> Recorded:
        return Recorded(model.shape, [torch.Generator().manual_seed(302)])

    found = sample(model, table, noise(), collocation(window=3))
    records = [r for r in found.history if isinstance(r, CollocationRecord)]
    grown = (n for n in range(1, len(records)) if records[n].of > records[n - 1].of)
    first = next(n for n in grown if records[n - 1].interpolation_error < 1)  # after an estimate: no head
    old, new = {node for r in records[:first] for node in r.nodes}, records[first].of - records[first - 1].of
    assert new >= 12
    assert not any(old & set(r.nodes) for r in records[first : first + new // 3])
    error = (found.sample - sample(model, table, noise(), sequential()).sample).square().mean().sqrt()
    assert error < found.error_estimates[0].estimated_error <= 4e-3


def bent(x: Tensor, t: Tensor) -> Tensor:
    """A network whose answer turns fast in time while all is noise."""
    return 0.2 * x + (t[:, None] / 1000) ** 4 * torch.sin(t[:, None] / 15) * torch.ones_like(x) * 4


def test_the_head_of_a_mesh_is_refined_before_later_nodes_are_evaluated() -> None:
    noise = Keyed((2,), 0, 1)
    found, late = (
        sample(bent, TABLE, noise, collocation(window=3, control=replace(SHORT, head_share=share))) for share in (0.5, 0.0)
    )
    records = [r for r in found.history if isinstance(r, CollocationRecord)]
    first = next(n for n, r in enumerate(records) if r.of > records[0].of)
    assert max(max(r.nodes) for r in records[:first]) < 40
    assert found.rounds < late.rounds
    exact = sample(bent, TABLE, noise, sequential()).sample
    assert (found.sample - exact).abs().max() < 4e-3


def test_a_mesh_of_which_all_nodes_are_in_a_round_is_refined_before_its_sweeps_converge() -> None:
    noise = Keyed((2,), 0, 1)

    def found(**numbers: float | int) -> tuple[Solution, list[int]]:
        control = replace(HIGHER_ORDER, nodes=16, least_nodes=0.0, **numbers)
        solution = sample(bent, LONG, noise, collocation(window=None, control=control))
        return solution, [r.of for r in solution.history if isinstance(r, CollocationRecord)]

    early, sizes = found()
    late, unrefined = found(whole_share=0.0)
    assert len(set(sizes[:3])) == 1 < len(set(sizes[:4]))
    assert len(set(unrefined[:4])) == 1
    assert early.rounds < late.rounds
    second, grown = found(whole_sweeps=2)
    assert grown[1] == grown[0] < grown[2]
    exact = sample(bent, LONG, noise, sequential()).sample
    for solution in (early, second):
        assert (solution.sample - exact).abs().max() < 4e-3
    fine, same = found(whole_share=1e6)
    assert same == unrefined
    assert torch.equal(fine.sample, late.sample)


def test_a_window_wider_than_the_mesh_takes_the_rounds_of_one_without_bound() -> None:
    model = load("digits")
    table, seeds = model.table("ddim", 100), range(4)

    def found(window: int | None) -> Solution:
        noise = Recorded(model.shape, [torch.Generator().manual_seed(seed) for seed in seeds])
        return sample(model, table, noise, collocation(window=window))

    wide, free = found(64), found(None)
    assert all(isinstance(record, CollocationRecord) for record in wide.history)  # none is handed over
    assert [e.rounds for e in wide.error_estimates] == [e.rounds for e in free.error_estimates]
    assert max(e.rounds for e in wide.error_estimates) > 6


def test_the_error_of_a_head_is_that_of_its_nodes_alone() -> None:
    system = CollocationSystem(Recurrence(TABLE, 0.25), mesh_on(TABLE, SHORT).points(20), 3)
    count = len(system.intervals)
    forcings = torch.randn(count, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert head_error(system, system.influence, forcings, 4, SHORT) is None
    found = head_error(system, system.influence, forcings, 9, SHORT)
    assert found is not None
    other = torch.cat([forcings[:9], torch.full_like(forcings[9:], 1e6)])
    assert head_error(system, system.influence, other, 9, SHORT) == found
    (group, share), nodes = (found.groups[0], found.shares[0]), system.recurrence.log_snr[system.nodes]
    left_out = group[1]
    kept = [n for n in range(0, 8, 2)]
    place, wanted = nodes[kept], torch.zeros(5, dtype=torch.float64)
    for k, n in enumerate(kept):  # Lagrange's polynomial through every second node
        others = [j for j in range(4) if j != k]
        wanted += forcings[n, 0] * ((nodes[left_out] - place[others]) / (place[k] - place[others])).prod()
    defect = (forcings[left_out, 0] - wanted).square().mean().sqrt()
    assert abs(share - 0.5 * float(system.influence[-1, left_out].abs() * defect)) < 1e-9 * share


def test_neighbours_newest_pairs_are_scaled_to_a_nodes_level() -> None:
    store = PairStore(4, 2, torch.zeros(1, 3, dtype=torch.float64), torch.float64)
    generator = torch.Generator().manual_seed(0)
    given = {}
    for node in (0, 2, 2):
        dx, du = torch.randn(2, 1, 1, 3, generator=generator, dtype=torch.float64)
        store.observe([node], dx, du, torch.ones(1, 1, dtype=torch.bool))
        given[node] = dx[0, 0], du[0, 0]
    spread = store.spread(1, [1.0, 2.0, 4.0, 8.0], 3)
    found = spread.padded([0, 1, 2, 3])
    assert found is not None
    dx, du = found
    assert torch.equal(dx[0, -1, 0], given[0][0])
    assert torch.equal(dx[1, -2, 0], given[0][0] * 0.5)
    assert torch.equal(dx[1, -1, 0], given[2][0] * 2)
    assert torch.equal(du[1, -1, 0], given[2][1])
    assert torch.equal(dx[3, -1, 0], given[2][0] * 0.5)
    assert not dx[0, :-1].any()


def test_a_node_with_pairs_enough_takes_none_of_its_neighbours() -> None:
    store, given = PairStore(3, 2, torch.zeros(1, 3, dtype=torch.float64), torch.float64), []
    generator = torch.Generator().manual_seed(0)
    for node in (0, 1, 1, 1):  # the third pair of node 1 takes the place of its first
        dx, du = torch.randn(2, 1, 1, 3, generator=generator, dtype=torch.float64)
        store.observe([node], dx, du, torch.ones(1, 1, dtype=torch.bool))
        given.append((dx[0, 0], du[0, 0]))
    found = store.spread(1, [1.0, 2.0, 4.0], 2).padded([0, 1, 2])
    assert found is not None
    dx, du = found
    assert torch.equal(dx[1, -1, 0], given[3][0])
    assert torch.equal(dx[1, -2, 0], given[2][0])
    assert torch.equal(du[1, -1, 0], given[3][1])
    assert torch.equal(du[1, -2, 0], given[2][1])
    assert torch.equal(dx[0, -2, 0], given[3][0] * 2)
    assert torch.equal(dx[0, -1, 0], given[0][0])
    assert torch.equal(dx[2, -1, 0], given[3][0] * 0.5)
    assert not dx[2, -2].any()
    found = store.spread(1, [1.0, 1.0, 1.0]).padded([1])
    assert found is not None
    assert torch.equal(found[0][0, -2:, 0], torch.stack([given[0][0], given[3][0]]))

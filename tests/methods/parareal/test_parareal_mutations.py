# SPDX-License-Identifier: Apache-2.0
"""Faults are planted in Parareal, and the check that should see each one is shown to see it, and to pass without it.

With as many iterations as blocks a sample is made of fine steps alone, so that faults of the coarse propagator and of the
correction are invisible to the chain: what sees them is the textbook loop, at fewer iterations. A comparison counts as failed
when it is off by more than 1e-3: far above rounding, and small beside any visible error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import pytest
import torch
from problems import EXACT, SHAPE, TABLES, chains, gap, network
from test_parareal import EDGES, to_textbook
from torch import Tensor

import paradiff.methods.parareal.options
from paradiff import Keyed, Table, sample, srds
from paradiff.chain import Noise
from paradiff.methods.parareal.coarse import Coarse, one_step
from paradiff.methods.parareal.queue import PararealQuery
from paradiff.methods.parareal.solver import PararealSolver
from paradiff.methods.parareal.steps import FineSteps
from paradiff.methods.parareal.stopping import BlockRun, EdgeUpdate, StoppingRule
from paradiff.solver.solution import Status

SEEN = 1e-3
BLOCKS = EDGES["even"]


def to_chain(name: str) -> float:
    """Check: as many iterations as blocks against the plain loop over the same table."""
    noise = Keyed(SHAPE, 0, 2)
    method = srds(BLOCKS, iterations=len(BLOCKS) - 1)
    found = sample(network, TABLES[name], noise, method, dtype=torch.float64)
    return gap(found.sample, chains(network, TABLES[name], noise))


def to_book(name: str, iterations: int) -> float:
    """Check: a few forced iterations against the textbook loop."""
    return to_textbook(name, BLOCKS, iterations, "pipelined")


# -- the coarse propagator ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("field", ["state", "clean"])
def test_a_wrong_coarse_coefficient_is_seen_by_the_textbook_alone(
    name: str, field: Literal["state", "clean"], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert to_book(name, 1) < EXACT

    def wrong(table: Table, nodes: Sequence[int]) -> Coarse:
        found = one_step(table, nodes)
        bent = getattr(found, field).clone()
        bent[1] *= 1.2
        return dataclasses.replace(found, **{field: bent})

    monkeypatch.setattr(paradiff.methods.parareal.options, "one_step", wrong)
    assert to_book(name, 1) > SEEN
    assert to_chain(name) < EXACT


class Later:
    """The fault: the noise of the node after the one asked for."""

    def __init__(self, noise: Noise) -> None:
        self.noise, self.shape, self.samples = noise, noise.shape, noise.samples

    def start(self, sample: int) -> Tensor:
        return self.noise.start(sample)

    def draw(self, sample: int, nodes: range) -> Tensor:
        return self.noise.draw(sample, range(nodes.start + 1, nodes.stop + 1))


@pytest.mark.parametrize("fault", ["missing", "of the node after", "of the gap before", "of another sample"])
def test_a_wrong_aggregate_of_noise_is_seen_by_the_textbook_alone(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_book("ddpm", 0) < EXACT
    assert to_book("ddpm", 1) < EXACT
    right = Coarse.aggregate
    wrong: dict[str, Callable[[Coarse, Noise, int, int], Tensor]] = {
        "missing": lambda self, noise, k, n: torch.zeros_like(right(self, noise, k, n)),
        "of the node after": lambda self, noise, k, n: right(self, Later(noise), k, n),
        "of the gap before": lambda self, noise, k, n: right(self, noise, k, max(n - 1, 0)),
        "of another sample": lambda self, noise, k, n: right(self, Keyed(SHAPE, 1), 0, n),
    }
    monkeypatch.setattr(Coarse, "aggregate", wrong[fault])
    assert to_book("ddpm", 0) > SEEN
    assert to_book("ddpm", 1) > SEEN
    assert to_chain("ddpm") < EXACT


# -- the correction ----------------------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[PararealSolver, EdgeUpdate, BlockRun], None]) -> None:
    """Spoils every corrected value once it is made; `spoil` gets it and the run of the iteration before."""
    assign = PararealSolver._assign

    def wrong(self: PararealSolver, update: EdgeUpdate) -> None:
        assign(self, update)
        if update.kind == "corrected":
            spoil(self, update, self.runs.at[update.run.block - 1][update.run.level - 1])

    monkeypatch.setattr(PararealSolver, "_assign", wrong)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "flow_euler", "dpmpp_2m"])
@pytest.mark.parametrize("fault", ["without the old value", "without the new value", "with its sign turned"])
def test_a_correction_of_a_wrong_difference_is_seen_by_the_textbook_alone(
    name: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert to_book(name, 1) < EXACT

    def spoil(self: PararealSolver, update: EdgeUpdate, old: BlockRun) -> None:
        new, before = self.runs.pool.states[update.source.end], self.runs.pool.states[old.end]
        more = {"without the old value": before, "without the new value": -new, "with its sign turned": 2 * (before - new)}
        self.runs.pool.states[update.run.start] += more[fault]

    plant(monkeypatch, spoil)
    assert to_book(name, 1) > SEEN
    assert to_chain(name) < EXACT


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m"])
def test_a_fine_value_of_the_iteration_before_is_seen_by_the_textbook_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_book(name, 2) < EXACT
    kept: dict[int, Tensor] = {}

    def spoil(self: PararealSolver, update: EdgeUpdate, old: BlockRun) -> None:
        now = self.runs.pool.states[old.running].clone()
        self.runs.pool.states[update.run.start] += kept.get(old.block, now) - now if old.level else 0
        kept[old.block] = now

    plant(monkeypatch, spoil)
    assert to_book(name, 1) < EXACT  # the first correction has no iteration before
    kept.clear()
    assert to_book(name, 2) > SEEN
    kept.clear()
    assert to_chain(name) < EXACT


@pytest.mark.parametrize("part", ["state", "output", "both"])
def test_a_history_that_is_not_corrected_is_seen_by_the_textbook_alone(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_book("dpmpp_2m", 2) < EXACT
    places = {"state": slice(1, 2), "output": slice(2, 3), "both": slice(1, 3)}[part]

    def spoil(self: PararealSolver, update: EdgeUpdate, old: BlockRun) -> None:
        self.runs.pool.states[update.run.start, places] = self.runs.pool.states[old.running, places]

    plant(monkeypatch, spoil)
    assert to_book("dpmpp_2m", 2) > SEEN
    assert to_chain("dpmpp_2m") < EXACT


# -- fine steps and edges that settle ----------------------------------------------------------------------------------


def test_a_fine_step_with_the_next_nodes_noise_is_seen_by_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_chain("ddpm") < EXACT
    step = FineSteps.__call__

    def wrong(self: FineSteps, query: PararealQuery, rows: list[int], m: Tensor) -> None:
        noise, self._noise = self._noise, Later(self._noise)
        step(self, query, rows, m)
        self._noise = noise

    monkeypatch.setattr(FineSteps, "__call__", wrong)
    assert to_chain("ddpm") > SEEN
    assert to_book("ddpm", 0) < EXACT  # no fine step in it


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m"])
def test_an_edge_settled_one_iteration_too_early_is_seen_by_the_chain(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_chain(name) < EXACT
    monkeypatch.setattr(StoppingRule, "passes", lambda self, run, size: 1 <= run.block - 1 <= run.level)
    assert to_chain(name) > SEEN


def test_an_edge_settled_too_early_is_seen_by_nothing_that_the_run_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    # Why the check above is needed: what settles counts as the estimate says, and an estimate of nothing is exact.
    monkeypatch.setattr(StoppingRule, "passes", lambda self, run, size: 1 <= run.block - 1 <= run.level)
    monkeypatch.setattr(StoppingRule, "estimate", lambda self, run, size: 0.0)
    found = sample(network, TABLES["ddpm"], Keyed(SHAPE), srds(BLOCKS, iterations=4), dtype=torch.float64)
    assert found.estimated_error == 0
    assert found.status is Status.EXACT
    assert to_chain("ddpm") > SEEN

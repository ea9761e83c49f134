# SPDX-License-Identifier: Apache-2.0
"""Faults are planted, and the check that should see each one is shown to see it, and to pass without it.

A comparison counts as failed when it is off by more than 1e-3: far above rounding, and small beside any visible error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from problems import EXACT, SHAPE, SLOPES, TABLES, chain, chains, gap, network, run
from textbook import betas_of, dpm_nodes, landings, start_and_noise, textbook_ddim, textbook_dpmpp_2m, times_of, walk
from torch import Tensor

from paradiff import Evaluator, Keyed, Schedule, Table, jacobi, paradigms, parasolver, sample, sequential
from paradiff.chain.slope import Inverses
from paradiff.methods import WindowMethod
from paradiff.methods.window.budget import ErrorBudget
from paradiff.methods.window.control import WindowControl
from paradiff.methods.window.fill import PredictedFill
from paradiff.methods.window.solver import WindowQuery, WindowSolver
from paradiff.samplers import ddim, dpmpp_2m
from paradiff.solver import Batch
from paradiff.solver.protocol import Query

SEEN = 1e-3
BAR = np.cumprod(1 - betas_of("linear"))


def to_chain(method: WindowMethod, table: Table) -> float:
    """Check: the solver against the plain loop over the same table."""
    found = sample(network, table, Keyed(SHAPE, 0, 2), method, dtype=torch.float64)
    return gap(found.sample, chains(network, table, Keyed(SHAPE, 0, 2)))


# -- coefficients ------------------------------------------------------------------------------------------------------


def to_textbook_ddim(table: Table) -> float:
    """Check: the table against the textbook loop of DDIM with the noise of DDPM."""
    x, noise = start_and_noise(table.steps)
    times = times_of(table.steps, "leading", 0)
    landed = landings(BAR, times, "next", True)
    wanted = textbook_ddim(BAR, times, landed, x, noise, "epsilon", 1.0, None, False)
    return gap(torch.stack(walk(table, x, noise)), torch.stack(wanted))


def to_textbook_dpmpp_2m(table: Table) -> float:
    """Check: the table against the textbook loop of DPM-Solver++(2M)."""
    x, noise = start_and_noise(table.steps)
    times, ratio = dpm_nodes(BAR, table.steps, "linspace", 0, False, "zero")
    wanted = textbook_dpmpp_2m(times, ratio, x, "epsilon", {0, table.steps - 1}, lambda clean: clean)
    return gap(torch.stack(walk(table, x, noise)), torch.stack(wanted))


def test_a_consistent_wrong_coefficient_is_seen_by_the_textbook_alone() -> None:
    table = ddim(Schedule.linear(), 20, eta=1.0)
    # Less noise in one step, and the network's output weighed so that variances still add up.
    c, b = table.c.clone(), table.b.clone()
    c[8] *= 0.5
    direction = math.sqrt(float(table.sigma[9]) ** 2 - float(c[8]) ** 2)
    b[8, 0] = direction - table.a[8, 0] * table.sigma[8]
    wrong = dataclasses.replace(table, b=b, c=c)  # The table's guards let it pass.
    assert to_textbook_ddim(table) < EXACT
    assert to_textbook_ddim(wrong) > SEEN
    assert to_chain(parasolver(tolerance=0.0), wrong) < EXACT


def test_the_outputs_of_two_steps_swapped_are_seen_by_the_textbook_alone() -> None:
    table = dpmpp_2m(Schedule.linear(), 20)
    b = table.b.clone()
    b[9] = b[9].flip(0)
    wrong = dataclasses.replace(table, b=b)
    assert to_textbook_dpmpp_2m(table) < EXACT
    assert to_textbook_dpmpp_2m(wrong) > SEEN
    assert to_chain(parasolver(tolerance=0.0), wrong) < EXACT


# -- the window --------------------------------------------------------------------------------------------------------


def test_a_window_slid_one_too_far_is_seen_by_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_chain(paradigms(5, 0.0), TABLES["ddpm"]) < EXACT
    advance = WindowSolver.advance
    monkeypatch.setattr(WindowSolver, "advance", lambda self, norms, round: advance(self, [0.0, *norms[1:]], round))
    assert to_chain(paradigms(5, 0.0), TABLES["ddpm"]) > SEEN


@pytest.mark.parametrize("slope", [slope for slope in SLOPES if slope != "zero"])
def test_an_update_that_adds_the_residual_once_more_is_seen_by_the_chain(slope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = WindowMethod("", SLOPES[slope], 5, predictor="copy", tolerance=0.0)
    assert to_chain(method, TABLES["ddpm"]) < EXACT
    monkeypatch.setattr(Inverses, "strict", Inverses.moved)  # with the diagonal of ones
    assert to_chain(method, TABLES["ddpm"]) > SEEN


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("name", ["dpmpp_2m", "heun"])
def test_a_history_shifted_by_one_is_seen_by_the_chain(name: str, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = parasolver(3, 0.0, stride=stride)
    assert to_chain(method, TABLES[name]) < EXACT
    ask = WindowSolver.ask

    def shifted(self: WindowSolver) -> Query:
        query = ask(self)
        assert isinstance(query, WindowQuery)
        return dataclasses.replace(query, places=[query.places[0]] * len(query.places))

    monkeypatch.setattr(WindowSolver, "ask", shifted)
    assert to_chain(method, TABLES[name]) > SEEN


# -- noise -------------------------------------------------------------------------------------------------------------


class InCallOrder(Keyed):
    """The fault: every draw is the next of one generator, whichever node asks."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, sample: int, nodes: range) -> Tensor:
        return torch.randn(len(nodes), *self.shape, generator=self.generator)


def test_noise_drawn_in_call_order_is_seen_by_another_window() -> None:
    def apart(source: Callable[..., Keyed]) -> float:
        """Check: two samples with windows of one node and of five."""
        one, five = (
            sample(network, TABLES["ddpm"], source(SHAPE, 0, 2), method, dtype=torch.float64).sample
            for method in (sequential(), parasolver(5, 0.0))
        )
        return gap(five, one)

    assert apart(Keyed) < EXACT
    assert apart(InCallOrder) > SEEN


# -- the evaluator -----------------------------------------------------------------------------------------------------

SHIFTS = torch.tensor([0.0, 1.0, -0.7])


def shifted_network(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
    return network(x + shift.view(-1, 1, 1), t)


def to_lone_chains(rows: int | None = None) -> float:
    """Check: three samples with conditioning, solved together, against a plain loop for each."""
    table, noise = TABLES["ddim"], Keyed(SHAPE, 0, 3)
    evaluator = Evaluator(shifted_network, conditioning={"shift": SHIFTS}, max_rows=rows)
    found = sample(evaluator, table, noise, parasolver(5, 0.0), dtype=torch.float64, check="off")
    wanted = [chain(shifted_network, table, noise, k, shift=SHIFTS[k : k + 1])[-1] for k in range(3)]
    return gap(found.sample, torch.stack(wanted))


@pytest.mark.parametrize("order", ["first rows of the conditioning", "rows by place in the batch", "samples reversed"])
def test_conditioning_rows_in_another_order_are_seen_by_lone_chains(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_lone_chains() < EXACT
    call = Evaluator._call

    def wrong(self: Evaluator, batch: Batch, part: slice) -> Tensor:
        rows = torch.arange(len(batch.samples))
        samples = {
            "first rows of the conditioning": torch.zeros_like(rows),
            "rows by place in the batch": rows % 3,
            "samples reversed": 2 - batch.samples,
        }[order]
        return call(self, dataclasses.replace(batch, samples=samples), part)

    monkeypatch.setattr(Evaluator, "_call", wrong)
    assert to_lone_chains() > SEEN


def test_rows_permuted_across_chunks_are_seen_by_lone_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_lone_chains(rows=4) < EXACT
    call = Evaluator.__call__

    def wrong(self: Evaluator, batch: Batch) -> Tensor:
        return torch.cat(call(self, batch).split(self.max_rows)[::-1])

    monkeypatch.setattr(Evaluator, "__call__", wrong)
    assert to_lone_chains(rows=4) > SEEN


def test_conditioning_indexed_over_the_whole_batch_in_every_chunk_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_lone_chains(rows=4) < EXACT
    call = Evaluator._call

    def wrong(self: Evaluator, batch: Batch, part: slice) -> Tensor:
        # Each chunk is handed the conditioning of the first one.
        count = len(batch.samples[part])
        return call(self, dataclasses.replace(batch, samples=batch.samples.roll(part.start)[: part.start + count]), part)

    monkeypatch.setattr(Evaluator, "_call", wrong)
    assert to_lone_chains(rows=4) > SEEN


def test_a_tolerance_that_lets_everything_pass_is_seen_by_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    assert to_chain(jacobi(5, 0.0), TABLES["ddpm"]) < EXACT
    monkeypatch.setattr(ErrorBudget, "cost_of", lambda self, passed: 0.0)
    assert to_chain(jacobi(5, 0.0), TABLES["ddpm"]) > SEEN
    assert run(TABLES["ddpm"], jacobi(5, 0.0)).estimated_error > 0  # And by the errors that nodes were seen to carry on.


# -- first guesses and estimates ---------------------------------------------------------------------------------------


def rounds_of_constant_data(stride: int) -> int:
    """Check: rounds of DPM-Solver++(2M) with a stride on data of one point, which frozen clean data fill exactly."""
    table = dpmpp_2m(Schedule.linear(), 24)
    clean = torch.ones(SHAPE, dtype=torch.float64)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        places = [int((table.t[:-1] - time).abs().argmin()) for time in t]
        p, q = (values[places].view(-1, 1, 1) for values in (table.p, table.q))
        return (clean - p * x) / q

    found = sample(denoiser, table, Keyed(SHAPE), parasolver(3, 1e-6, stride=stride), dtype=torch.float64)
    assert gap(found.sample[0], chain(denoiser, table, Keyed(SHAPE))[-1]) < EXACT * 1e6
    return found.rounds


def test_filled_outputs_of_the_wrong_sign_are_seen_by_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rounds_of_constant_data(2)
    outputs = PredictedFill._outputs

    def wrong(self: PredictedFill, steps: slice, states: Tensor) -> Tensor:
        return outputs(self, steps, -states)  # (D + p x) / q in place of (D - p x) / q

    monkeypatch.setattr(PredictedFill, "_outputs", wrong)
    assert rounds_of_constant_data(2) > right


def contraction(passed: int) -> float:
    """Check: the contraction seen where all that stays changes by exactly what a contraction of 1 predicts."""
    error, change = [1.0, 0.5, 0.5, 0.25, 0.25], [0.4, 0.2, 0.1, 0.08]
    budget = ErrorBudget(error, [1.0] * 6, WindowControl())
    budget.observe(0, change)
    budget.accept(passed)
    budget.observe(passed, [sum(error[k + 1] * change[k] for k in range(passed - 1, n)) for n in range(passed, 4)])
    return budget.theta


def test_predictions_not_reduced_by_the_node_that_passed_are_seen_by_the_contraction(monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(contraction(2) - 1) < EXACT
    accept = ErrorBudget.accept

    def wrong(self: ErrorBudget, passed: int) -> None:
        accept(self, passed)
        self._predicted = self._errors[passed:]

    monkeypatch.setattr(ErrorBudget, "accept", wrong)
    assert abs(contraction(2) - 1) > SEEN

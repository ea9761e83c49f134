# SPDX-License-Identifier: Apache-2.0
"""Observers see every round and may end the run; evaluators of any kind drive it; what is handed over is what is expected."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import SHAPE, TABLES, chains, gap, network
from torch import Tensor

from paradiff import (
    Evaluator,
    Keyed,
    Schedule,
    Solution,
    Table,
    collocation,
    parasolver,
    piadm_ode,
    sample,
    sequential,
    solve,
    srds,
)
from paradiff.samplers import ddim
from paradiff.solver import Batch, Method, Round, Status, drive

METHODS: dict[str, Callable[[], Method]] = {
    "window": lambda: parasolver(8, 1e-3),
    "strides": lambda: parasolver(4, 1e-3, stride=3),
    "blocks": lambda: piadm_ode(4, tolerance=1e-3),
    "parareal": lambda: srds(6, tolerance=1e-3),
    "collocation": lambda: collocation(12, tolerance=1e-3),
}
TABLE = ddim(Schedule.linear(), 40)
each_method = pytest.mark.parametrize("method", METHODS)


def run(method: Method, table: Table = TABLE, **options: Any) -> Solution:
    return sample(network, table, Keyed(SHAPE, [3, 4]), method, dtype=torch.float64, **options)


@each_method
def test_an_observer_is_shown_every_record_once_and_changes_nothing(method: str) -> None:
    seen: list[Round] = []
    found = run(METHODS[method](), observer=seen.append)
    assert [record for round in seen for record in round.records] == found.history
    assert [round.number for round in seen] == list(range(1, found.rounds + 1))
    assert found == run(METHODS[method]())


@each_method
def test_the_newest_states_end_as_the_samples(method: str) -> None:
    seen: list[Tensor] = []
    found = run(METHODS[method](), observer=lambda round: seen.append(round.states()))
    assert all(states.shape == (2, *SHAPE) and torch.isfinite(states).all() for states in seen)
    assert torch.equal(seen[-1], found.sample)
    assert not torch.equal(seen[0], found.sample)


@each_method
def test_an_observer_ends_the_run_and_the_samples_are_not_trusted(method: str) -> None:
    found = run(METHODS[method](), observer=lambda round: round.number == 2)
    assert (found.rounds, found.status) == (2, Status.STOPPED)
    assert found.message == "stopped: the observer asked for it after round 2"
    assert [e.estimated_error for e in found.error_estimates] == [math.inf, math.inf]
    assert found.sample.shape == (2, *SHAPE)
    assert torch.isfinite(found.sample).all()


def test_a_sample_that_was_found_before_the_end_keeps_its_estimate() -> None:
    noise, method = Keyed(SHAPE, list(range(8))), parasolver(8, 1e-3)
    done: list[bool] = []

    def one_is_done(round: Round) -> bool:
        done[:] = [solver.done for solver in round.solvers]
        return any(done)

    found = sample(network, TABLE, noise, method, dtype=torch.float64, observer=one_is_done)
    whole = sample(network, TABLE, noise, method, dtype=torch.float64)
    assert set(done) == {False, True}
    for k in range(8):
        assert math.isinf(found.error_estimates[k].estimated_error) != done[k]
        if done[k]:
            assert torch.equal(found.sample[k], whole.sample[k])
            assert found.error_estimates[k] == whole.error_estimates[k]


def test_an_observer_that_asks_to_stop_in_the_last_round_is_too_late() -> None:
    whole = run(METHODS["window"]())
    assert run(METHODS["window"](), observer=lambda round: round.number == whole.rounds) == whole


class Own:
    """An evaluator of the user's."""

    device, dtype = torch.device("cpu"), None

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, batch: Batch) -> Tensor:
        self.batches.append(batch)
        return network(batch.x, batch.t)


@each_method
def test_anything_with_the_members_of_an_evaluator_is_one(method: str) -> None:
    own = Own()
    found = sample(own, TABLE, Keyed(SHAPE, [3, 4]), METHODS[method](), dtype=torch.float64)
    assert found == run(METHODS[method]())
    assert len(own.batches) == found.rounds
    assert sum(len(batch.x) for batch in own.batches) == found.evaluations


class Module(torch.nn.Module):
    """A model with a device and a dtype, as diffusers' models have them."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return network(x, t)


def test_a_model_with_a_device_and_a_dtype_is_a_model() -> None:
    found = sample(Module(), TABLE, Keyed(SHAPE), parasolver(8, 1e-3))
    assert found.status is Status.CONVERGED


@pytest.mark.parametrize("name", ["ddpm", "dpmpp_2m", "heun"])
def test_drive_takes_any_function_of_batches(name: str) -> None:
    table, noise = TABLES[name], Keyed(SHAPE, [1, 2])
    found = drive(solve(table, noise, sequential(), dtype=torch.float64), lambda batch: network(batch.x, batch.t))
    assert gap(found.sample, chains(network, table, noise)) < 1e-12


def test_a_model_that_raises_stop_iteration_is_named() -> None:
    with pytest.raises(RuntimeError, match="the model raised StopIteration; catch it in the model"):
        sample(lambda x, t: next(iter([])), TABLE, Keyed(SHAPE), parasolver())


WRONG = {
    "method as a name": ({"method": "parasolver"}, "the method is 'parasolver'; give one of the presets"),
    "method not called": ({"method": parasolver}, "the method is the function parasolver, which has to be called; give one"),
    "method's class": ({"method": type(parasolver())}, "the method is the class WindowMethod, which has to be called"),
    "noise as a seed": ({"noise": 0}, "the noise is 0; give a Noise, such as paradiff.Keyed"),
    "noise as a tensor": ({"noise": torch.zeros(2, 3)}, "the noise is a Tensor; give a Noise"),
    "table as steps": ({"table": 50}, "the table is a int; give a Table"),
    "start of another shape": ({"start": torch.zeros(3)}, r"start has shape \(3,\); the noise has \(1, 2, 3\)"),
    "states in half precision": ({"dtype": torch.float16}, "states were asked for in torch.float16; they are kept in"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_of_another_kind_are_refused_by_name(case: str) -> None:
    wrong, sentence = WRONG[case]
    given: dict[str, Any] = {"table": TABLE, "noise": Keyed(SHAPE), "method": parasolver()} | wrong
    with pytest.raises(ValueError, match=sentence):
        sample(network, **given)
    with pytest.raises(ValueError, match=sentence):
        solve(**given)


def test_a_model_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"the model is a str; give a function of states \[R, ...\] and times \[R\]"):
        sample("digits", TABLE, Keyed(SHAPE), parasolver())  # pyright: ignore[reportArgumentType]


@each_method
def test_solutions_are_short_to_read_flat_to_store_and_equal_to_their_copies(method: str) -> None:
    found = run(METHODS[method]())
    assert len(repr(found).splitlines()) <= 3
    assert found.message in repr(found)
    assert pickle.loads(pickle.dumps(found)) == found
    assert found != run(METHODS[method](), TABLES["ddim"])
    assert found != 3
    stats = found.stats
    assert all(isinstance(value, str | int | float) for value in stats.values())
    assert (stats["status"], stats["rounds"], stats["samples"]) == (found.status.code, found.rounds, 2)


def test_evaluators_and_batches_are_short_to_read() -> None:
    evaluator, own = Evaluator(network, max_rows=4), Own()
    sample(own, TABLE, Keyed(SHAPE), parasolver(8))
    evaluator(own.batches[0])
    assert repr(evaluator).splitlines() == [
        "Evaluator(network on cpu, the states' dtype, at most 4 rows a call;",
        "          1 rounds, 8 evaluations)",
    ]
    assert repr(own.batches[0]) == "Batch(8 rows of 2x3, torch.float32, nodes 0 to 7)"
    assert own.batches[0] != own.batches[1]

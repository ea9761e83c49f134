# SPDX-License-Identifier: Apache-2.0
"""Observers see every round and may end the run; evaluators of any kind drive it; what is handed over is what is expected."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from types import SimpleNamespace
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
    chords,
    collocation,
    parasolver,
    piadm_ode,
    quasi_deer,
    sample,
    sequential,
    solve,
    srds,
)
from paradiff.methods import underdamped_langevin
from paradiff.samplers import ddim
from paradiff.solver import Batch, Deadline, EditedOutputs, Method, Problem, Query, Round, Status, drive

METHODS: dict[str, Callable[[], Method]] = {
    "window": lambda: parasolver(8, 1e-3),
    "strides": lambda: parasolver(4, 1e-3, stride=3),
    "blocks": lambda: piadm_ode(4, tolerance=1e-3),
    "parareal": lambda: srds(6, tolerance=1e-3),
    "collocation": lambda: collocation(12, tolerance=1e-3),
    "quasi-DEER": lambda: quasi_deer(8, 1e-3),
    "chords": lambda: chords(4, tolerance=0.2),
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


@pytest.mark.parametrize("method", ["window", "parareal", "collocation"])
def test_a_deadline_ends_a_run_after_the_first_round_that_is_late(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))  # a second for each look at it: one at the start, one after each round
    monkeypatch.setattr("paradiff.solver.deadline.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    deadline = Deadline(3)
    for _ in range(2):
        deadline.start()
        found = run(METHODS[method](), observer=deadline)
        assert (found.rounds, found.status) == (3, Status.STOPPED)
        assert math.isinf(found.estimated_error)
    assert deadline.stopped == 2


def test_a_deadline_that_is_far_away_changes_nothing() -> None:
    deadline = Deadline(3600)
    assert run(METHODS["window"](), observer=deadline) == run(METHODS["window"]())
    assert (deadline.stopped, repr(deadline)) == (0, "Deadline(3600)")


@pytest.mark.parametrize("seconds", [0, -1.0, math.inf, math.nan, True, "2", None])
def test_a_deadline_is_a_positive_number_of_seconds(seconds: Any) -> None:
    with pytest.raises(ValueError, match=r"the deadline, in seconds, is .*; it must be a number, positive, and finite"):
        Deadline(seconds)


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
    found = sample(own, TABLE, Keyed(SHAPE, [3, 4]), METHODS[method](), dtype=torch.float64, check="off")
    assert found == run(METHODS[method]())
    assert len(own.batches) == found.rounds
    assert sum(len(batch.x) for batch in own.batches) == found.evaluations


class Module(torch.nn.Module):
    """A model with a device and a dtype, as diffusers' models have them."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return network(x, t)


@pytest.mark.usefixtures("samples_of_any_size")
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


@pytest.mark.parametrize("call", range(1, 15))
def test_a_model_that_raises_stop_iteration_in_a_later_call_is_named(call: int) -> None:
    """Some of the calls are those of the check, which asks for outputs within generators."""
    left = [call]

    def stopping(x: Tensor, t: Tensor) -> Tensor:
        left[0] -= 1
        return network(x, t) if left[0] else next(iter([]))

    with pytest.raises(RuntimeError, match="the model raised StopIteration; catch it in the model"):
        sample(stopping, TABLE, Keyed(SHAPE), srds())


WRONG = {
    "method as a name": ({"method": "parasolver"}, "the method is 'parasolver'; give one of the presets"),
    "method not called": ({"method": parasolver}, "the method is the function parasolver, which has to be called; give one"),
    "method's class": (
        {"method": type(parasolver())},
        "the method is the class WindowMethod, which has to be called",
    ),
    "noise as a seed": ({"noise": 0}, "the noise is 0; give a Noise, such as paradiff.Keyed"),
    "noise as a tensor": (
        {"noise": torch.zeros(2, 3)},
        r"the noise is a Tensor of shape \(2, 3\) and torch.float32; give",
    ),
    "table as steps": ({"table": 50}, "the table is 50; give a Table"),
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
    with pytest.raises(ValueError, match=r"the model is 'digits'; give a function of states \[R, ...\] and times \[R\]"):
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


@each_method
def test_records_and_rounds_are_short_to_read(method: str) -> None:
    seen: list[Round] = []
    run(METHODS[method](), observer=seen.append)
    assert all(len(repr(record)) < 160 and "\n" not in repr(record) for round in seen for record in round.records)
    assert repr(seen[0]) == "Round(number=1)"


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


# -- what a solver is sent ----------------------------------------------------------------------------------------------

SENT: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a row fewer": (lambda m: m[:-1], r"the outputs have shape \(7, 2, 3\) for rows of shape \(8, 2, 3\); send one entry"),
    "one column": (lambda m: m[..., :1], r"the outputs have shape \(8, 2, 1\) for rows of shape \(8, 2, 3\)"),
    "nothing": (lambda m: None, "the outputs of 8 rows are None; send one tensor, one entry for each row"),
    "a list": (lambda m: [*m], r"the outputs of 8 rows are .tensor.*; send one tensor"),
    "another dtype": (lambda m: m.double(), "the outputs are torch.float64 on cpu for rows of torch.float32 on cpu"),
    "whole numbers": (lambda m: m.long(), "the outputs are torch.int64 on cpu for rows of torch.float32 on cpu"),
    "no states": (lambda m: EditedOutputs(m, None), "the edited states of 8 rows are None; send one tensor"),
    "fewer states": (lambda m: EditedOutputs(m, m[1:]), r"the edited states have shape \(7, 2, 3\)"),
}


@pytest.mark.parametrize("case", SENT)
def test_outputs_that_are_not_one_a_row_are_refused(case: str) -> None:
    sent, sentence = SENT[case]
    with pytest.raises(ValueError, match=sentence):
        drive(solve(TABLE, Keyed(SHAPE), parasolver(8)), lambda batch: sent(network(batch.x, batch.t)))


@each_method
def test_outputs_of_another_shape_are_refused_whatever_the_method(method: str) -> None:
    with pytest.raises(ValueError, match="send one entry for each row, of its shape"):
        drive(solve(TABLE, Keyed(SHAPE), METHODS[method]()), lambda batch: network(batch.x, batch.t)[..., :1])


class Changed:
    """A method whose solvers are those of another after a change."""

    def __init__(self, change: Callable[[Any], Any]) -> None:
        self._of, self._change = parasolver(8), change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def prepare(self, problem: Problem) -> Any:
        run = self._of.prepare(problem)
        solver = run.solver
        run.solver = lambda sample: self._change(solver(sample))
        return run


def silent(solver: Any) -> Any:
    solver.tell = lambda query, outputs, states=None: None
    return solver


ANSWERS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "no query": ("ask", lambda query: None, "`ask` of a solver of parasolver returned None; return a Query of nodes"),
    "an empty query": (
        "ask",
        lambda query: Query(query.nodes[:0], query.rows[:0]),
        r"returned nodes of shape \(0,\) with rows of shape \(0, 2, 3\); return nodes \[R\] with rows \[R, ...\], R at least 1",
    ),
    "a row too few": ("ask", lambda query: Query(query.nodes, query.rows[1:]), r"rows of shape \(7, 2, 3\)"),
    "a list of norms": (
        "tell",
        lambda norms: norms.tolist(),
        r"`tell` of a solver of parasolver returned \[.*; return a tensor",
    ),
    "no record": (
        "advance",
        lambda record: None,
        "`advance` .* returned None, which has no round, sample, passed, to_json, trace",
    ),
    "half a record": (
        "advance",
        lambda record: SimpleNamespace(round=1, sample=0, passed=1),
        "has no to_json, trace; return a Rec",
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_solver_whose_answer_is_of_another_kind_is_refused_in_a_sentence(case: str) -> None:
    name, changed, sentence = ANSWERS[case]

    def wrong(solver: Any) -> Any:
        right = getattr(solver, name)
        setattr(solver, name, lambda *given: changed(right(*given)))
        return solver

    with pytest.raises(ValueError, match=sentence):
        sample(network, TABLE, Keyed(SHAPE), Changed(wrong))


def test_a_solver_that_ends_no_sweep_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiff.solver.loop.IDLE", 1000)
    with pytest.raises(RuntimeError, match="the solvers of parasolver ended no sweep in 1041 rounds"):
        sample(network, TABLE, Keyed(SHAPE), Changed(silent))


def test_a_corrector_of_many_sweeps_is_not_taken_for_one_that_ends_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiff.solver.loop.IDLE", 100)  # a thousandth of the bound, above the 94 rounds here
    method = piadm_ode(2, 4, underdamped_langevin(90, 90))
    assert sample(network, ddim(Schedule.linear(), 4), Keyed(SHAPE), method).status is Status.EXACT


class Half:
    name, tolerance = "half", 0.1


class Sized:
    """Noise of a number of samples and a shape."""

    def __init__(self, samples: Any, shape: Any) -> None:
        self.samples, self.shape = samples, shape

    def start(self, sample: int) -> Tensor:
        return torch.zeros(2, 3)

    def draw(self, sample: int, nodes: range) -> Tensor:
        return torch.zeros(len(nodes), 2, 3)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "half a method": (
        {"method": Half()},
        "the method is a Half, which has no dense_output, solves_chain, follows_edits",
    ),
    "the noise's class": ({"noise": Keyed}, "the noise is the class Keyed; give a Noise"),
    "start as a long text": (
        {"start": "x" * 5000},
        r"the trajectory .*\.\.\. cannot be read \(File name too long\); give its file",
    ),
    "start as a text": ({"start": "zeros"}, "the trajectory 'zeros' is not there; give its file"),
    "complex start": ({"start": torch.zeros(1, 2, 3) * 1j}, "start is a Tensor of shape \\(1, 2, 3\\) and torch.complex64"),
    "no samples": ({"noise": Sized(0, (2, 3))}, "the noise's samples is 0; it must be a whole number, at least 1"),
    "one and no whole number of samples": ({"noise": Sized(1.0, (2, 3))}, "the noise's samples is 1.0; it must be a whole"),
    "no number of samples": ({"noise": Sized(None, (2, 3))}, "the noise's samples is None; it must be a whole number"),
    "no shape": ({"noise": Sized(1, None)}, "the noise's shape is None; it must be a sequence of whole numbers"),
    "a size as shape": ({"noise": Sized(1, 6)}, "the noise's shape is 6; it must be a sequence of whole numbers"),
    "an axis of nothing": ({"noise": Sized(1, (2, 0))}, r"the noise's shape is \(2, 0\); .* each at least 1"),
    "observer as a number": ({"observer": 5}, "the observer is 5; give a function of a round"),
}
SOLVE: dict[str, tuple[dict[str, Any], str]] = {
    "device as a name": ({"device": "abacus"}, "the device is 'abacus', which is not available here"),
    "no device": ({"device": 2.5}, "the device is 2.5, which is not available here"),
    "meta": ({"device": "meta"}, "the device is 'meta', which holds no numbers"),
    "resolution as a text": ({"resolution": "fine"}, "the resolution is 'fine'; it must be a number, positive, and finite"),
    "shared_window as a text": ({"shared_window": "no"}, "shared_window is 'no'; give True or False"),
    "on_final as a number": ({"on_final": 5}, "on_final is 5; give a function of a fine node and states"),
    "on_final of several": (
        {"on_final": print, "noise": Keyed(SHAPE, samples=2)},
        "on_final was given with 2 samples, which end at rounds of their own; solve one at a time",
    ),
}


@pytest.mark.parametrize("case", OPTIONS | SOLVE)
def test_options_of_another_kind_are_refused_by_name(case: str) -> None:
    wrong, sentence = (OPTIONS | SOLVE)[case]
    given: dict[str, Any] = {"table": TABLE, "noise": Keyed(SHAPE), "method": parasolver()} | wrong
    with pytest.raises(ValueError, match=sentence):
        solve(**given)
    if case in OPTIONS:
        with pytest.raises(ValueError, match=sentence):
            sample(network, **given)


@pytest.mark.parametrize("wish", ["no", 1, torch.ones(2), float("nan")])
def test_an_observer_says_true_or_nothing(wish: Any) -> None:
    with pytest.raises(ValueError, match=r"the observer returned .*; return True to stop, None or False to go on"):
        run(METHODS["window"](), observer=lambda round: wish)


def test_an_observer_may_empty_what_it_is_shown() -> None:
    def observer(round: Round) -> None:
        for shown in (round.records, round.solvers):
            if isinstance(shown, list):
                shown.clear()

    found, expected = (run(METHODS["window"](), observer=of) for of in (observer, None))
    assert torch.equal(found.sample, expected.sample)


def test_conditioning_without_a_row_for_a_sample_is_refused_in_the_call() -> None:
    evaluator = Evaluator(lambda x, t, y: network(x, t), conditioning={"y": torch.zeros(2, 4)})
    with pytest.raises(
        ValueError, match=r"^the conditioning 'y' has 2 rows, and sample 2 was asked for; each sample needs one row"
    ):
        drive(solve(TABLE, Keyed(SHAPE, samples=3), parasolver()), evaluator)


EVALUATORS: dict[str, tuple[dict[str, Any], str]] = {
    "rows as a text": ({"max_rows": "a"}, "max_rows is 'a'; it must be a whole number"),
    "half a row": ({"max_rows": 2.5}, "max_rows is 2.5; it must be a whole number"),
    "conditioning as a number": ({"conditioning": 5}, "the conditioning is 5; give tensors by name"),
    "a number as conditioning": ({"conditioning": {"y": 5}}, "the conditioning 'y' is 5; give a tensor with a row for each"),
    "sparse conditioning": (
        {"conditioning": {"y": torch.zeros(1, 2).to_sparse()}},
        r"the conditioning 'y' is a Tensor of shape \(1, 2\) and torch.float32, sparse_coo; give a tensor with a row for each",
    ),
    "conditioning on no device": (
        {"conditioning": {"y": torch.zeros(1, 2, device="meta")}},
        r"the conditioning 'y' is a Tensor of shape .*, on the meta device; give a tensor with a row for each sample, a dense",
    ),
    "dtype as a text": ({"dtype": "float32"}, "the network's dtype is 'float32'; give one of torch"),
    "whole numbers": ({"dtype": torch.int64}, "the network's dtype is torch.int64; give one of torch"),
    "a device of another world": ({"device": "abacus"}, "the device is 'abacus', which is not available here"),
}


@pytest.mark.parametrize("case", EVALUATORS)
def test_evaluators_refuse_options_of_another_kind(case: str) -> None:
    wrong, sentence = EVALUATORS[case]
    with pytest.raises(ValueError, match=sentence):
        Evaluator(network, **wrong)


@pytest.mark.parametrize("given", ["digits", 5, None, int, Keyed])
def test_evaluators_refuse_what_is_no_model(given: Any) -> None:
    with pytest.raises(ValueError, match=r"the model is .*; give a function of states"):
        Evaluator(given)


def test_drive_takes_what_solve_returns() -> None:
    with pytest.raises(ValueError, match=r"drive was given 'abc'; give what paradiff\.solve returns"):
        drive("abc", network)

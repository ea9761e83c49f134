# SPDX-License-Identifier: Apache-2.0
"""The step-level contract: requests of many kinds share network calls, and each has its own sequential sample."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from served import alone, chain, model, network, rms

from paradiff.methods.collocation.control import NARROW
from paradiff.methods.collocation.method import CollocationMethod
from paradiff.methods.collocation.solver import CollocationSolver
from paradiff.methods.presets import collocation, quasi_newton
from paradiff.methods.window.budget import ErrorBudget
from paradiff.serving import Finished, SampleRequest, Stepwise
from paradiff.serving.state import RequestState
from paradiff.solver.protocol import Resizes, Walks

ROUNDING = 2e-5  # of float32 states, which a chain of 40 steps amplifies
KINDS = [(s, n, y) for s in ("ddim", "ddpm", "dpmpp_2m", "halves") for n, y in ((20, 0), (30, 3))]


def run(
    stepwise: Stepwise, states: Sequence[RequestState], rows: Callable[[RequestState], int]
) -> dict[RequestState, Finished | str]:
    """Solves requests together; each is asked for its rows before each round."""
    found: dict[RequestState, Finished | str] = {}
    for _ in range(1000):
        for state in states:
            state.resize(rows(state))
        merged = stepwise.gather(states)
        for part in (part for parts in merged.parts for part in parts):
            free = part.query is None or (isinstance(part.states[0].solver, Resizes) and part.states[0].solver.resizable)
            assert not free or all(part.count <= max(len(part.states), one.rows) for one in part.states)
        if not merged.count and not merged.failed:
            return found
        for state in stepwise.scheduler_step(merged, stepwise.denoise_step(merged)):
            found[state] = stepwise.decode(state) if state.error is None else state.error
    raise AssertionError("the requests do not end")


def requests(method: str, seed: int = 0) -> list[SampleRequest]:
    return [
        SampleRequest(seed=seed + k, sampler=s, steps=n, method=method, conditioning={"y": y})
        for k, (s, n, y) in enumerate(KINDS)
    ]


def test_single_steps_of_mixed_chains_give_each_its_own_sequential_sample() -> None:
    stepwise = Stepwise(model(), len(KINDS))
    states = [stepwise.prepare(request) for request in requests("auto")]
    found = run(stepwise, states, lambda state: 1)
    for state in states:
        finished = found[state]
        assert isinstance(finished, Finished)
        assert rms(finished.sample, alone(state.request)) < ROUNDING
        assert finished.estimate.rounds == finished.estimate.evaluations == state.chain.table.steps
        assert (finished.status.code, finished.estimate.estimated_error, finished.widest) == ("exact", 0.0, 1)


@pytest.mark.parametrize(("sampler", "noise"), [("ddpm", "recorded"), ("ddpm", "keyed"), ("dpmpp_2m", "recorded")])
def test_single_steps_of_one_chain_keep_their_own_noises_though_others_come_and_go(sampler: str, noise: str) -> None:
    choice, stepwise, states = random.Random(2), Stepwise(model(), 12), list[RequestState]()
    found = dict[RequestState, Finished | str]()
    for round in range(120):
        if round % 3 == 0 and round < 36:
            request = SampleRequest(seed=round, sampler=sampler, steps=20, noise=noise, conditioning={"y": round % 4})
            states.append(stepwise.prepare(request))
        if round in (10, 23):  # one that is cancelled
            stepwise.release(states.pop(1))
        if round == 15:  # one that is asked where it is, and one whose window opens and closes
            assert states[0].stand() is not None
            states[2].resize(4)
        if round == 17:
            states[2].resize(1)
        choice.shuffle(states)
        merged = stepwise.gather(states)
        for state in stepwise.scheduler_step(merged, stepwise.denoise_step(merged)):
            found[state] = stepwise.decode(state)
            states.remove(state)
    assert not states
    assert len(found) == 10
    for state, finished in found.items():
        assert isinstance(finished, Finished)
        assert rms(finished.sample, alone(state.request)) < max(2 * finished.estimate.estimated_error, ROUNDING)
    assert sum(finished.widest == 1 for finished in found.values() if isinstance(finished, Finished)) == 9


@pytest.mark.parametrize("method", ["auto", "quasi_newton", "jacobi", "collocation"])
def test_windows_that_shrink_and_grow_at_random_give_the_sequential_sample(method: str) -> None:
    choice = random.Random(1)
    stepwise = Stepwise(model(), len(KINDS))
    states = [stepwise.prepare(request) for request in requests(method, seed=40)]
    found = run(stepwise, states, lambda state: choice.choice([1, 1, 2, 3, 8, 16]))
    for state in states:
        finished = found[state]
        assert isinstance(finished, Finished)
        assert finished.widest > 1
        assert rms(finished.sample, alone(state.request)) < max(2 * finished.estimate.estimated_error, ROUNDING)
        assert finished.estimate.estimated_error <= state.request.allowed


def test_errors_that_windows_left_are_told_though_single_steps_end_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    carried: list[float] = []
    monkeypatch.setattr(ErrorBudget, "carry", lambda self, size, tolerance, decides: carried.append(size))
    request = SampleRequest(seed=3, sampler="ddim", steps=30, tolerance=0.05)
    stepwise = Stepwise(model(), 1)
    state = stepwise.prepare(request)
    (found,) = run(stepwise, [state], lambda state: 8 if (state.node or 0) == 0 and state.rounds < 3 else 1).values()
    assert isinstance(found, Finished)
    assert state.widest > 1
    error = rms(found.sample, alone(request))
    assert 0 < error < 2 * found.estimate.estimated_error
    assert error / 3 < carried[-1] < 30 * error


def test_what_is_solved_stays_when_the_window_changes() -> None:
    stepwise = Stepwise(model(), 1)
    state = stepwise.prepare(SampleRequest(seed=5, sampler="ddpm", steps=40, method="quasi_newton"))
    nodes = []
    for rows in (1, 1, 8, 8, 1, 1, 4, 2, 1):
        state.resize(rows)
        node = state.node
        nodes.append(state.solver.place().node if node is None and isinstance(state.solver, Walks) else node)
        merged = stepwise.gather([state])
        assert merged.count <= rows
        stepwise.scheduler_step(merged, stepwise.denoise_step(merged))
    assert all(after > before for before, after in itertools.pairwise(nodes))  # each round makes one final at least


def test_collocation_keeps_to_the_rows_of_each_round() -> None:
    request, choice = SampleRequest(seed=1, sampler="ddpm", steps=200, method="collocation"), random.Random(0)
    stepwise = Stepwise(model(), 1)
    state = stepwise.prepare(request)
    (found,) = run(stepwise, [state], lambda state: choice.choice([1, 3, 16, 40])).values()
    assert isinstance(found, Finished)
    assert isinstance(state.solver, CollocationSolver)
    assert state.solver.handed_over is None
    assert found.estimate.rounds < 50
    assert rms(found.sample, alone(request)) < 2 * found.estimate.estimated_error


@pytest.mark.parametrize("method", ["srds", "chords", "parataa", "quasi_deer", "paradigms"])
def test_methods_with_rows_of_their_own_share_the_calls_too(method: str) -> None:
    stepwise = Stepwise(model(), 2)
    tight = None if method == "chords" else 1e-3
    asked = [SampleRequest(seed=s, sampler="ddim", steps=20, method=method, tolerance=tight) for s in (1, 2)]
    states = [stepwise.prepare(request) for request in asked]
    for state, finished in run(stepwise, states, lambda state: 2).items():
        assert isinstance(finished, Finished)
        assert rms(finished.sample, alone(state.request)) < 5e-3


def test_only_windows_of_single_steps_can_be_resized() -> None:
    table = chain(SampleRequest())
    stepwise = Stepwise(model(), 1)
    kept = stepwise.chains.of(SampleRequest())
    for method, free in ((quasi_newton(4), True), (quasi_newton(4, tolerance=0.0), True)):
        solver = method.prepare(kept.problem(model().noise(SampleRequest(), torch.device("cpu")))).solver(0)
        assert isinstance(solver, Resizes)
        assert solver.resizable is free
    assert table.steps == 20


def test_a_sample_that_is_not_finite_fails_alone() -> None:
    def broken(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(y[:, None, None, None] == 7, torch.nan, network(x, t, y))

    stepwise = Stepwise(model(denoiser=broken), 4)
    asked = [SampleRequest(seed=s, method=m, conditioning={"y": y}) for s, (m, y) in enumerate(MIXED)]
    states = [stepwise.prepare(request) for request in asked]
    found = run(stepwise, states, lambda state: 4 if state.request.seed > 1 else 1)
    for state in states:
        if state.request.conditioning["y"] == 7:
            assert "NaN" in str(found[state])
        else:
            finished = found[state]
            assert isinstance(finished, Finished)
            assert rms(finished.sample, alone(state.request)) < 4e-3


MIXED = [("sequential", 7), ("sequential", 1), ("quasi_newton", 7), ("quasi_newton", 2)]


def test_slots_are_given_back() -> None:
    stepwise = Stepwise(model(), 1)
    state = stepwise.prepare(SampleRequest())
    with pytest.raises(RuntimeError, match="all slots are taken"):
        stepwise.prepare(SampleRequest())
    stepwise.release(state)
    stepwise.release(state)
    assert stepwise.free == 1


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"seed": -1}, "the seed is -1"),
        ({"seed": 2**63}, "the seed is 9223372036854775808"),
        ({"steps": 2.5}, "steps is 2.5; it must be a whole number"),
        ({"method": "quasi-newton"}, "did you mean 'quasi_newton'"),
        ({"sede": 1}, "did you mean 'seed'"),
        ({"window": 0}, "the window is 0"),
        ({"deadline": 0}, "the deadline, in seconds, is 0"),
        ({"tolerance": float("inf")}, "the tolerance is inf"),
        ({"eta": "a"}, "eta is 'a'"),
        ({"noise": "white"}, "noise is 'white'; it must be one of recorded, keyed"),
        ({"sampler": 3}, "the sampler is 3; give its name"),
        ({"sampler": "euler"}, "sampler is 'euler'; it must be one of"),
        ({"method": "chords", "window": 3}, "method 'chords' has none"),
        ({"method": "chords", "tolerance": 1e-3, "steps": 20, "window": 2}, "method 'chords' has none"),
        ({"conditioning": {"z": 1}}, "a name of the conditioning is 'z'; it must be one of y"),
        ({"conditioning": {"y": [1, 2]}}, "the conditioning 'y' is [1, 2]; give numbers of shape ()"),
        ({"conditioning": {"y": "a"}}, "the conditioning 'y' is 'a'; give numbers of shape ()"),
        ({"conditioning": {"y": float("nan")}}, "the conditioning 'y' has an entry that is not finite"),
        ({"conditioning": 3}, "the conditioning is 3; give values by name"),
        ([], "the request is []; give a JSON object"),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_a_sentence(given: object, sentence: str) -> None:
    stepwise = Stepwise(model(), 1)
    with pytest.raises(ValueError, match=re.escape(sentence)) as refused:
        stepwise.method(SampleRequest.of_json(given))
    assert "\n" not in str(refused.value)


def test_collocation_takes_the_numbers_of_the_narrowest_window_that_it_may_be_given() -> None:
    chain = Stepwise(model(), 1).chains.of(SampleRequest(steps=100))
    method, _ = chain.method("collocation", None, None)
    assert isinstance(method, CollocationMethod)
    assert method.control_on(chain.table) == collocation(window=3).control_on(chain.table) == NARROW


def test_a_request_is_its_json() -> None:
    request = SampleRequest(seed=3, sampler="ddim", method="srds", window=4, conditioning={"y": 2})
    assert SampleRequest.of_json(request.to_json()) == request

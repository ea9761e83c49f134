# SPDX-License-Identifier: Apache-2.0
"""A served model that heeds more than a row: refused before anything is served, or found by a row of each request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from served import FLAT, alone, chain, model, network, rms
from torch import Tensor

from paradiff.serving import Engine, SampleRequest, Stepwise
from paradiff.serving.witness import Witness

ROUNDING = 2e-5  # of float32 states along a chain


class Tired:
    """A network that answers otherwise after some calls."""

    def __init__(self, calls: int) -> None:
        self.left, self.rows = calls, 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.left -= 1
        self.rows += len(x)
        assert t.dtype == torch.int64  # as every chain of whole times has it
        return network(x, t, y) + 0.2 * (self.left < 0)


def served(denoiser: Callable[..., Tensor]) -> Engine:
    return Engine(model(denoiser=denoiser), curve=FLAT, active=12)


def asked(engine: Engine, count: int) -> tuple[list[str], list[float], set[str]]:
    """How requests end, the errors of those that are done beyond what is told, and what the others say."""
    methods = ("auto", "quasi_newton", "parasolver", "sequential")
    jobs = [engine.submit(SampleRequest(seed=k, steps=10 + 5 * (k % 3), method=methods[k % 4])) for k in range(count)]
    assert all(engine.wait(job, 60) for job in jobs)
    done = [job for job in jobs if job.finished is not None]
    errors = [rms(job.finished.sample, alone(job.request)) for job in done if job.finished is not None]
    told = [job.finished.estimate.estimated_error for job in done if job.finished is not None]
    off = [error for error, bound in zip(errors, told, strict=True) if error > max(2 * bound, ROUNDING)]
    return [job.state for job in jobs], off, {job.message for job in jobs if job.finished is None}


@pytest.mark.parametrize("calls", [8, 20, 40])
def test_a_model_that_answers_otherwise_while_it_serves_is_found_before_a_wrong_sample_is_told(calls: int) -> None:
    network = Tired(10**9)
    engine = served(network)
    network.left = calls
    states, off, messages = asked(engine, 40)
    assert not off
    assert "failed" in states
    (message,) = messages
    assert message.startswith("the model answered node ")
    states, _, again = asked(engine, 3)
    assert (states, again) == (["failed"] * 3, messages)
    engine.close()


def test_what_is_found_is_wrong_without_it() -> None:
    network = Tired(10**9)
    engine = Engine(model(denoiser=network), curve=FLAT, active=12, check=False)
    network.left = 20
    states, off, _ = asked(engine, 40)
    assert off
    assert set(states) == {"done"}
    engine.close()


def test_calls_of_more_rows_are_looked_at_before_anything_is_served() -> None:
    def padded(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return network(x, t, y) * (1.2 if len(x) > 8 else 1.0)

    with pytest.raises(ValueError, match=r"otherwise in a call of \d+ rows than by itself: .* the number of rows"):
        served(padded)


def test_a_row_of_each_request_is_evaluated_once_more_and_counted_apart() -> None:
    network = Tired(10**9)
    stepwise = Stepwise(model(denoiser=network), 4)
    states = [stepwise.prepare(SampleRequest(seed=k, steps=6 + k, method="sequential")) for k in range(4)]
    finished = []
    while not all(state.done for state in states):
        rows = stepwise.gather(states)
        finished += [stepwise.decode(state) for state in stepwise.scheduler_step(rows, stepwise.denoise_step(rows))]
    assert sorted((one.estimate.rounds, one.estimate.evaluations) for one in finished) == [(n, n) for n in (6, 7, 8, 9)]
    assert network.rows == 6 + 7 + 8 + 9 + 4
    assert all(chain(state.request).steps == state.evaluations for state in states)


def test_a_model_that_raises_stop_iteration_is_named() -> None:
    def ended(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if bool((t < 300).any()):
            raise StopIteration
        return network(x, t, y)

    engine = Engine(model(denoiser=ended), curve=FLAT, check=False)
    job = engine.submit(SampleRequest(seed=0, method="sequential"))
    assert engine.wait(job, 60)
    assert job.message == "RuntimeError: the model raised StopIteration; catch it in the model"
    engine.close()


def test_a_fault_ends_requests_without_rows_too() -> None:
    network = Tired(10**9)
    stepwise = Stepwise(model(denoiser=network), 2)
    short, long = (stepwise.prepare(SampleRequest(seed=n, steps=n, method="sequential")) for n in (4, 9))
    for _ in range(4):
        rows = stepwise.gather([short, long])
        assert not stepwise.scheduler_step(rows, stepwise.denoise_step(rows))
    network.left = 0
    rows = dataclasses.replace(stepwise.gather([short]), failed=[long])
    done = stepwise.scheduler_step(rows, stepwise.denoise_step(rows))
    assert sorted(state.request.seed for state in done) == [4, 9]
    assert short.error == long.error == stepwise.fault


def test_memory_that_runs_out_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Witness, "compare", full)
    engine = served(Tired(10**9))
    states, _, messages = asked(engine, 1)
    assert (states, messages) == (["failed"], {"OutOfMemoryError: no memory"})
    assert engine.stepwise.fault is None
    monkeypatch.undo()
    assert asked(engine, 1)[0] == ["done"]
    engine.close()

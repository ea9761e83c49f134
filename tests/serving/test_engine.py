# SPDX-License-Identifier: Apache-2.0
"""The reference engine: what was accepted has an end, samples are those of the sequential chain, rows follow the load."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch
from served import FLAT, SHAPE, STEEP, alone, chain, engine, model, network, rms

from paradiff import by_row, samplers
from paradiff.planning.latency import LatencyCurve
from paradiff.samplers.schedule import Schedule
from paradiff.serving import Engine, Full, Job, SampleRequest, ServedModel
from paradiff.serving.engine import ENDS
from paradiff.serving.metrics import Metrics
from paradiff.serving.widths import Widths

ROUNDING = 2e-5  # of float32 states along a chain


class Gate:
    """A network that waits until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.called = threading.Event()

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.called.set()
        assert self.open.wait(30)
        return network(x, t, y)


def ended(found: Engine, jobs: list[Job]) -> list[str]:
    for job in jobs:
        assert found.wait(job, 60)
    return [job.state for job in jobs]


def test_two_hundred_requests_of_mixed_steps_and_seeds_have_each_their_own_sequential_sample() -> None:
    draw, found = random.Random(0), engine(LatencyCurve({1: 1.0, 2: 1.1, 8: 1.5, 64: 8.0}), active=16)
    requests = [
        SampleRequest(
            seed=seed,
            sampler=draw.choice(["ddim", "ddpm", "dpmpp_2m", "halves"]),
            steps=draw.choice([5, 10, 16, 20, 30]),
            method=draw.choice(["auto", "auto", "quasi_newton", "sequential"]),
            noise=draw.choice(["recorded", "keyed"]),
            conditioning={"y": draw.choice([0, 1, 2])},
        )
        for seed in range(200)
    ]
    jobs = [found.submit(request) for request in requests]
    assert ended(found, jobs) == ["done"] * 200
    widest = 0
    for job in jobs:
        assert job.finished is not None
        estimate = job.finished.estimate
        assert rms(job.finished.sample, alone(job.request)) < max(2 * estimate.estimated_error, ROUNDING)
        widest = max(widest, job.finished.widest)
        if job.request.method == "sequential":
            assert (estimate.rounds, estimate.evaluations) == (chain(job.request).steps,) * 2
    assert widest > 1
    assert found.metrics.value("ended_total", "done") == 200
    assert found.close() == []


def test_rows_of_a_request_fall_as_the_load_rises_and_rise_again() -> None:
    widths = Widths(LatencyCurve({1: 1.0, 8: 1.0, 16: 2.0, 64: 8.0}))
    stepwise = engine().stepwise
    state = stepwise.prepare(SampleRequest(sampler="ddpm", steps=100, method="parasolver"))
    rows = [widths.rows(state, load) for load in (1, 2, 4, 16, 64)]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] >= 8
    assert rows[-1] == 1
    assert widths.rows(state, 1) == rows[0]


def test_a_full_device_walks_and_an_empty_one_does_not() -> None:
    for curve, wide in ((STEEP, False), (FLAT, True)):
        found = engine(curve)
        job = found.submit(SampleRequest(sampler="ddpm", steps=100, method="parasolver"))
        assert ended(found, [job]) == ["done"]
        assert job.finished is not None
        assert (job.finished.widest > 1) is wide
        assert (job.finished.estimate.rounds < 50) is wide
        found.close()


def test_rounds_that_pass_fewer_nodes_than_foretold_close_a_window() -> None:
    widths = Widths(LatencyCurve({1: 1.0, 4: 1.2, 64: 19.2}))
    state = engine().stepwise.prepare(SampleRequest(sampler="ddpm", steps=100, method="parasolver"))
    wide = widths.rows(state, 1)
    assert wide > 1
    state.rows = wide
    for _ in range(2000):
        for width in (2, 4, 8, 16, 32):
            widths.saw(state, width, 1)
    assert [widths.rows(state, 1) for _ in range(600)][-1] == 1


def test_requests_wait_in_turn_and_one_too_many_is_refused() -> None:
    gate = Gate()
    found = engine(served=model(denoiser=gate), active=1, queue=2)
    first = found.submit(SampleRequest(seed=0))
    assert gate.called.wait(30)
    others = [found.submit(SampleRequest(seed=s)) for s in (1, 2)]
    with pytest.raises(Full, match="3 requests run or wait, the most that may"):
        found.submit(SampleRequest(seed=3))
    assert [job.state for job in (first, *others)] == ["running", "queued", "queued"]
    gate.open.set()
    assert ended(found, [first, *others]) == ["done"] * 3
    ends = [job.ended for job in (first, *others) if job.ended is not None]
    assert ends == sorted(ends)
    assert found.metrics.value("refused_total") == 1
    found.close()


def test_a_cancelled_request_ends_at_once_and_no_other_does() -> None:
    gate = Gate()
    found = engine(served=model(denoiser=gate), active=2)
    jobs = [found.submit(SampleRequest(seed=s, steps=20, method="sequential")) for s in range(4)]
    assert gate.called.wait(30)
    assert found.cancel(jobs[0].id)
    assert found.cancel(jobs[3].id)
    gate.open.set()
    assert ended(found, jobs) == ["cancelled", "done", "done", "cancelled"]
    assert not found.cancel(jobs[0].id)
    assert not found.cancel(jobs[1].id)
    assert not found.cancel("f" * 16)
    for job in jobs[1:3]:
        assert job.finished is not None
        assert rms(job.finished.sample, alone(job.request)) < ROUNDING
    found.close()


def test_a_request_whose_deadline_passes_ends_late_whether_it_runs_or_waits() -> None:
    gate = Gate()
    found = engine(served=model(denoiser=gate), active=1)
    jobs = [found.submit(SampleRequest(seed=s, deadline=limit)) for s, limit in ((0, 0.05), (1, 0.05), (2, None))]
    assert gate.called.wait(30)
    time.sleep(0.1)
    gate.open.set()
    assert ended(found, jobs) == ["late", "late", "done"]
    assert jobs[0].message == "its deadline of 0.05 s passed before its sample was found"
    found.close()


def test_a_drain_solves_what_was_accepted_and_what_it_cannot_is_named_as_lost() -> None:
    found = engine(active=2)
    jobs = [found.submit(SampleRequest(seed=s)) for s in range(5)]
    assert found.close(drain=30) == []
    assert ended(found, jobs) == ["done"] * 5
    with pytest.raises(Full, match="about to end"):
        found.submit(SampleRequest())

    gate = Gate()
    found = engine(served=model(denoiser=gate), active=2)
    jobs = [found.submit(SampleRequest(seed=s)) for s in range(5)]
    assert gate.called.wait(30)
    threading.Timer(0.2, gate.open.set).start()
    lost = found.close(hurry=lambda: True)
    assert set(lost) == {job for job in jobs if job.state == "lost"}
    assert {job.state for job in jobs} <= {*ENDS}
    assert len(lost) >= 3


def test_an_engine_that_fails_itself_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    found = engine()
    monkeypatch.setattr(found, "_begin", None)
    job = found.submit(SampleRequest())
    assert ended(found, [job]) == ["lost"]
    assert "the server failed (TypeError" in job.message
    assert not found.ready
    with pytest.raises(Full):
        found.submit(SampleRequest())
    assert found.close() == [job]


def test_a_model_that_fails_fails_the_requests_of_its_call_and_the_engine_goes_on() -> None:
    broken = threading.Event()
    broken.set()

    def denoiser(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if broken.is_set():
            raise RuntimeError("no such kernel")
        return network(x, t, y)

    found = engine(served=model(denoiser=denoiser))
    jobs = [found.submit(SampleRequest(seed=s)) for s in range(2)]
    assert ended(found, jobs) == ["failed"] * 2
    assert jobs[0].message == "RuntimeError: no such kernel"
    broken.clear()
    assert ended(found, [found.submit(SampleRequest())]) == ["done"]
    assert found.ready
    found.close()


def test_a_model_whose_rows_influence_each_other_is_not_served() -> None:
    def denoiser(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return network(x - x.mean(0), t, y)

    with pytest.raises(ValueError, match="row"):
        Engine(model(denoiser=denoiser), curve=FLAT)
    Engine(model(), curve=FLAT).close()


def test_of_what_has_ended_a_number_is_kept() -> None:
    found = engine(active=4, keep=3)
    jobs = [found.submit(SampleRequest(seed=s, steps=5)) for s in range(8)]
    assert ended(found, jobs) == ["done"] * 8
    assert sum(found.job(job.id) is not None for job in jobs) == 3
    found.close()
    found = engine(active=1, keep_bytes=2 * 4 * 16)
    jobs = [found.submit(SampleRequest(seed=s, steps=5)) for s in range(8)]
    assert ended(found, jobs) == ["done"] * 8
    assert [found.job(job.id) is not None for job in jobs] == [False] * 6 + [True] * 2
    found.close()


def test_an_end_is_kept_before_it_is_told() -> None:
    kept: list[tuple[str, str]] = []

    def sink(job: Job) -> None:
        time.sleep(0.02)
        kept.append((job.id, job.state))
        if job.request.seed == 1:
            raise ValueError("the disk is full")

    found = engine(sink=sink)
    jobs = [found.submit(SampleRequest(seed=s, steps=5)) for s in range(2)]
    for job in jobs:
        assert found.wait(job, 30)
        assert (job.id, "done") in kept
    assert jobs[1].message.endswith("it is kept in memory alone, since the disk is full")
    found.close()


@pytest.mark.parametrize("options", [{"active": 0}, {"queue": -1}, {"keep": 0}, {"keep_bytes": 0}])
def test_numbers_out_of_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="it must be a whole number, at least"):
        engine(**options)


def test_a_denoiser_that_knows_its_row_is_not_served() -> None:
    table = samplers.ddim(Schedule.linear(), 5)
    with pytest.raises(ValueError, match="a server merges rows of many chains"):
        ServedModel(denoiser=by_row(lambda x, rows: x, table), shape=SHAPE, chain=lambda request: table)


def test_metrics_are_prometheus_text() -> None:
    metrics = Metrics()
    metrics.count("ended_total", how="done")
    metrics.time("request_seconds", 0.2)
    lines = metrics.text({"queued": 3}).splitlines()
    assert "paradiff_queued 3" in lines
    assert 'paradiff_ended_total{how="done"} 1' in lines
    assert 'paradiff_request_seconds_bucket{le="0.1"} 0' in lines
    assert 'paradiff_request_seconds_bucket{le="0.25"} 1' in lines
    assert "paradiff_request_seconds_count 1" in lines
    assert all(line.startswith(("# HELP paradiff_", "# TYPE paradiff_", "paradiff_")) for line in lines)

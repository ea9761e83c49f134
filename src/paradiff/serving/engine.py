# SPDX-License-Identifier: Apache-2.0
"""A small reference engine: a queue of requests, and one thread that solves as many of them at once as there are slots.

In every round the rows of all running requests are one network call (stepwise.py), and each request has as many rows as the
load allows (widths.py). Between two rounds requests end, are cancelled, come to their deadline, and others are begun, in the
order in which they came.

What was accepted has an end: `done`, `failed`, `cancelled`, `late`, or, where the engine is closed before, `lost`.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Literal

from paradiff.chain.noise import Keyed
from paradiff.errors import require_real, require_whole
from paradiff.planning.latency import LatencyCurve, measure_latency
from paradiff.serving.metrics import Metrics
from paradiff.serving.model import ServedModel
from paradiff.serving.request import SampleRequest
from paradiff.serving.state import RequestState
from paradiff.serving.stepwise import Finished, Stepwise
from paradiff.serving.widths import Widths

State = Literal["queued", "running", "done", "failed", "cancelled", "late", "lost"]

ENDS: tuple[State, ...] = ("done", "failed", "cancelled", "late", "lost")
"""How a request may end."""

CHECKED = 4
"""Steps of the chain on which the model is checked, and rows of a sample there."""


class Full(Exception):
    """A request that was refused, since the queue is full or the engine is closed. The text is a sentence."""


@dataclass(eq=False, kw_only=True)
class Job:
    """An accepted request. Jobs are compared by identity.

    Attributes:
        id: Its name.
        request: What was asked for.
        state: Where it is.
        message: A sentence on how it ended; empty before.
        finished: Its sample, once it is done and as long as it is kept.
        accepted: When it was accepted, in seconds of the monotonic clock; `begun` and `ended` likewise, None before.
        cancelled: Whether its end was asked for.
        leaving: Whether how it ends is settled.
        running: Its state between rounds, while it runs.
    """

    id: str
    request: SampleRequest
    state: State = "queued"
    message: str = ""
    finished: Finished | None = None
    accepted: float = field(default_factory=time.monotonic)
    begun: float | None = None
    ended: float | None = None
    cancelled: bool = False
    leaving: bool = False
    running: RequestState | None = field(default=None, repr=False)

    @property
    def due(self) -> float:
        """When its deadline passes, in seconds of the monotonic clock; infinite where it has none."""
        limit = self.request.deadline
        return math.inf if limit is None else self.accepted + limit

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""
        return time.monotonic() >= self.due

    def to_json(self) -> dict[str, Any]:
        """What is told of it."""
        found: dict[str, Any] = {"id": self.id, "state": self.state, "request": self.request.to_json()}
        if self.message:
            found["message"] = self.message
        if self.finished is not None:
            estimate = self.finished.estimate
            found |= {
                "status": self.finished.status.code,
                "method": self.finished.family if self.finished.widest > 1 else "sequential",
                "estimated_error": estimate.estimated_error if math.isfinite(estimate.estimated_error) else None,
                "rounds": estimate.rounds,
                "evaluations": estimate.evaluations,
                "widest": self.finished.widest,
            }
        end = time.monotonic() if self.ended is None else self.ended
        found["seconds"] = round(end - self.accepted, 6)
        if self.begun is not None:
            found["waited"] = round(self.begun - self.accepted, 6)
        return found


Sink = Callable[[Job], None]
"""Keeps a job that has ended, before it is told that it has; it may raise ValueError with a sentence."""


class Engine:
    """Solves requests.

    Args:
        model: The model.
        active: Requests that are solved at once, at most.
        queue: Requests that wait, at most.
        keep: Ended requests that are kept, at most; the oldest go.
        keep_bytes: Bytes of samples that are kept, at most; the oldest go.
        curve: Seconds of a network call by its rows; None to measure them.
        probe: A request whose chain the measurement and the check of the model take; None for the model's own.
        sink: Keeps what has ended elsewhere; called by a thread of its own.
        check: Whether it is looked that the model's rows do not depend on one another: before anything is served, and of each
            request once its sample is found (stepwise.py).

    Attributes:
        stepwise: The contract that it calls.
        widths: What chooses rows.
        metrics: What it counts.

    Raises:
        ValueError: If an argument is out of its range, or the model fails the check.
    """

    def __init__(
        self,
        model: ServedModel,
        *,
        active: int = 64,
        queue: int = 1024,
        keep: int = 4096,
        keep_bytes: int = 2**30,
        curve: LatencyCurve | None = None,
        probe: SampleRequest | None = None,
        sink: Sink | None = None,
        check: bool = True,
    ) -> None:
        require_whole("the requests at once", active, 1)
        require_whole("the requests that wait", queue, 0)
        require_whole("the requests that are kept", keep, 1)
        require_whole("the bytes that are kept", keep_bytes, 1)
        self.stepwise = Stepwise(model, active, check=check)
        table = self.stepwise.chains.of(SampleRequest() if probe is None else probe).table
        if check and table.steps > 1:
            model.check(table, min(CHECKED, table.steps), active)
        if curve is None:
            curve = measure_latency(self.stepwise.evaluator, table, Keyed(model.shape, [0]))
        self.widths, self.metrics = Widths(curve), Metrics()
        self._active, self._most, self._keep, self._keep_bytes, self._sink = active, queue, keep, keep_bytes, sink
        self._changed = threading.Condition()
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._ended: deque[Job] = deque()
        self._bytes = self._open = 0  # bytes of samples that are kept, and requests that have not ended
        self._closed = self._stop = False
        self._window, self._look = 0.0, False
        self._due: list[float] = []  # when requests will be late, a heap
        self._fault: str | None = None
        self._ends: SimpleQueue[Ended | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=run, name=f"paradiff-{name}", daemon=True)
            for name, run in (("engine", self._run), ("keeper", self._keep_ended))
        ]
        for thread in self._threads:
            thread.start()

    # -- what any thread may call ------------------------------------------------------------------------------------------

    def submit(self, request: SampleRequest, id: str | None = None, *, anew: bool = False) -> Job:
        """Accepts a request.

        Args:
            request: The request.
            id: Its name; None for a fresh one.
            anew: Whether it was accepted before, by an engine that ended: it waits however many do.

        Raises:
            ValueError: If it does not fit the model.
            Full: If the queue is full, or the engine is closed.
        """
        job = Job(id=secrets.token_hex(8) if id is None else id, request=request)
        with self._changed:
            self._refuse_where_full(anew)
        self.stepwise.method(request)
        with self._changed:
            self._refuse_where_full(anew)
            self._queue.append(job)
            self._jobs[job.id] = job
            self._open += 1
            if request.deadline is not None:
                heapq.heappush(self._due, job.due)
            self.metrics.count("accepted_total")
            self._changed.notify_all()
        return job

    def _refuse_where_full(self, anew: bool) -> None:
        if self._closed or self._fault is not None:
            self.metrics.count("refused_total")
            raise Full("the server is about to end, and accepts nothing; send the request to another one")
        if not anew and self._open >= self._most + self._active:
            self.metrics.count("refused_total")
            raise Full(f"{self._open} requests run or wait, the most that may; send the request again later")

    def job(self, id: str) -> Job | None:
        """A request by its name; None where there is none, or it is no longer kept."""
        with self._changed:
            return self._jobs.get(id)

    def cancel(self, id: str) -> bool:
        """Asks for the end of a request; whether there is one that has not ended.

        It ends between two rounds, as `cancelled`; one whose sample is found by then is `done`.
        """
        with self._changed:
            job = self._jobs.get(id)
            if job is None or job.ended is not None:
                return False
            job.cancelled = self._look = True
            self._changed.notify_all()
            return True

    def wait(self, job: Job, seconds: float | None = None) -> bool:
        """Waits until a request has ended; whether it has.

        Args:
            job: The request.
            seconds: How long at most; None for no bound.
        """
        with self._changed:
            return self._changed.wait_for(lambda: job.ended is not None, seconds)

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return not self._closed and self._fault is None

    @property
    def fault(self) -> str | None:
        """Why the engine ended by itself; None where it did not."""
        return self._fault

    def text(self) -> str:
        """What it counts, in the text format of Prometheus."""
        with self._changed:
            gauges = {"queued": len(self._queue), "running": len(self._running), "window": self._window}
        self.metrics.count(
            "network_seconds_total", self.stepwise.evaluator.seconds - self.metrics.value("network_seconds_total")
        )
        return self.metrics.text(gauges)

    def close(self, drain: float = 0.0, *, hurry: Callable[[], bool] = lambda: False) -> list[Job]:
        """Accepts no more requests, solves what was accepted as far as time allows, and ends.

        Args:
            drain: Seconds for what was accepted.
            hurry: Whether it should end at once after all; called a few times a second.

        Returns:
            The requests that are lost.
        """
        require_real("the seconds to drain", drain)
        end = time.monotonic() + drain
        with self._changed:
            self._closed = True
            while self._open and self._fault is None:
                left = end - time.monotonic()
                if left <= 0 or hurry():
                    break
                self._changed.wait(min(left, 0.1))
            self._stop = True
            self._changed.notify_all()
        self._threads[0].join()
        self._ends.put(None)
        self._threads[1].join()
        return [job for job in self._jobs.values() if job.state == "lost"]

    # -- the engine's own thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Rounds until it is closed."""
        try:
            while self._turn():
                pass
        except BaseException as error:  # of the engine itself: nothing that waits may wait for ever
            self._fault = f"the server failed ({type(error).__name__}: {error})"
            raise
        finally:
            with self._changed:
                self._running, self._queue = [], deque()
                rest = [job for job in self._jobs.values() if not job.leaving]
            for job in rest:
                self._end(job, "lost", self._fault or "the server ended before it was solved")

    def _turn(self) -> bool:
        """One round; whether there is another."""
        with self._changed:
            self._changed.wait_for(lambda: self._stop or self._running or self._queue)
            if self._stop:
                return False
            gone = self._sifted()
            begun = [self._queue.popleft() for _ in range(min(len(self._queue), self._active - len(self._running)))]
        for job in gone:
            self._end_early(job)
        for job in begun:
            self._begin(job, len(self._running) + len(begun))
        if self._running:
            self._round()
        return True

    def _sifted(self) -> list[Job]:
        """Takes those out that were cancelled or are late."""
        now, look, self._look = time.monotonic(), self._look, False
        while self._due and self._due[0] <= now:
            heapq.heappop(self._due)
            look = True
        if not look:
            return []
        gone = [job for job in (*self._running, *self._queue) if job.cancelled or job.late]
        if gone:
            self._running = [job for job in self._running if job not in gone]
            self._queue = deque(job for job in self._queue if job not in gone)
        return gone

    def _end_early(self, job: Job) -> None:
        if job.cancelled:
            self._end(job, "cancelled", "it was cancelled, as asked")
        else:
            self._end(job, "late", f"its deadline of {job.request.deadline:g} s passed before its sample was found")

    def _begin(self, job: Job, load: int) -> None:
        """Prepares a request."""
        if job.cancelled or job.late:
            self._end_early(job)
            return
        stepwise, request = self.stepwise, job.request
        try:
            family = self.widths.family(request, stepwise.chains.of(request).table, load)
            try:
                job.running = stepwise.prepare(request, family=family)
            except ValueError:
                if family == request.method:
                    raise
                job.running = stepwise.prepare(request)  # collocation does not fit every chain
        except Exception as error:
            self._end(job, "failed", _said(error))
            return
        with self._changed:
            job.state, job.begun = "running", time.monotonic()
            self._running.append(job)
        self.metrics.time("queue_seconds", job.begun - job.accepted)

    def _round(self) -> None:
        """Rows, a network call, and their outputs."""
        stepwise, load = self.stepwise, len(self._running)
        states = {job.running: job for job in self._running if job.running is not None}
        try:
            for state in states:
                if (count := self.widths.rows(state, load)) != state.rows:
                    state.resize(count)
            rows = stepwise.gather([*states])
            outputs = stepwise.denoise_step(rows)
            done = stepwise.scheduler_step(rows, outputs)
        except Exception as error:
            with self._changed:
                self._running = []
            for job in states.values():
                self._end(job, "failed", _said(error))
            return
        self.metrics.count("rounds_total")
        self.metrics.count("rows_total", rows.count)
        self._window = rows.count / load
        self.widths.took(stepwise.beside, stepwise.asked)
        for state, record in stepwise.records:
            if state.walks:
                self.widths.saw(state, state.rows, record.passed)
        for state in done:
            self._finish(states[state], state)

    def _finish(self, job: Job, state: RequestState) -> None:
        """Ends a request whose sample is found, or cannot be."""
        with self._changed:
            self._running.remove(job)
        if state.error is not None:
            self._end(job, "failed", state.error)
            return
        try:
            job.finished = self.stepwise.decode(state)
        except Exception as error:
            self._end(job, "failed", _said(error))
            return
        self._end(job, "done", job.finished.message)

    def _end(self, job: Job, state: State, message: str) -> None:
        """Gives a request's slot to others, and hands it to the keeper."""
        if job.running is not None:
            self.stepwise.release(job.running)
            job.running = None
        job.message, job.leaving = message, True
        self._ends.put(Ended(job, state))

    # -- the keeper's thread -----------------------------------------------------------------------------------------------

    def _keep_ended(self) -> None:
        """Keeps what has ended, and then tells that it has."""
        while (ended := self._ends.get()) is not None:
            job, state, now = ended.job, ended.state, time.monotonic()
            if self._sink is not None:
                try:
                    self._sink(dataclasses.replace(job, state=state, ended=now))
                except Exception as error:
                    job.message = f"{job.message}; it is kept in memory alone, since {_said(error)}"
            with self._changed:
                job.state, job.ended = state, now
                self._ended.append(job)
                self._bytes += _bytes(job)
                self._open -= 1
                while len(self._ended) > 1 and (len(self._ended) > self._keep or self._bytes > self._keep_bytes):
                    old = self._ended.popleft()
                    self._bytes -= _bytes(old)
                    self._jobs.pop(old.id, None)
                self.metrics.count("ended_total", how=state)
                self.metrics.time("request_seconds", now - job.accepted)
                self._changed.notify_all()


@dataclass(frozen=True)
class Ended:
    """A request at its end.

    Attributes:
        job: The request.
        state: How.
    """

    job: Job
    state: State


def _bytes(job: Job) -> int:
    return 0 if job.finished is None else job.finished.sample.nbytes


def _said(error: Exception) -> str:
    """The sentence of an error."""
    line = next(iter(str(error).splitlines()), "")
    return line if isinstance(error, ValueError) and line else f"{type(error).__name__}: {line}"

# SPDX-License-Identifier: Apache-2.0
"""The step-level contract: a solver turned inside out, so that an engine merges the rows of many requests into network calls.

    state = stepwise.prepare(request)                        # once a request
    rows = stepwise.gather(states)                           # of all requests of a round, W rows each
    outputs = stepwise.denoise_step(rows)                    # one network call
    done = stepwise.scheduler_step(rows, outputs)            # the requests that this brought to their end
    finished = stepwise.decode(state)                        # once a request

Between two rounds a request's rows are bounded anew by `state.resize(W)`, down to 1 as load rises, and up again.

A request is no thread and no greenlet: the solvers' protocol (solver/protocol.py) is one of questions and answers, so that a
request is an object that is asked for its rows and told their outputs. The numbers by which all of them advance are moved to
the host in one transfer a round. Requests that take single steps are stepped together (walkers.py).

A request whose sample is found is in one more round, by one row: of its first round, with the same output, or the model is none
that rows of many requests may be merged for (witness.py). Then every request of the round ends with an error.

The names are those of engines that execute diffusion step by step; there a request has one row a step, here a window of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.home import at_home
from paradiff.serving.chains import Chain, Chains
from paradiff.serving.model import ServedModel
from paradiff.serving.request import AUTO, SampleRequest
from paradiff.serving.state import RequestState
from paradiff.serving.walkers import Walkers
from paradiff.serving.witness import Witness
from paradiff.solver.arguments import norms_of, query_of, record_of
from paradiff.solver.judge import STOPPED, Judge, taken
from paradiff.solver.protocol import Batch, Place, Query, Run, Solver
from paradiff.solver.records import Record
from paradiff.solver.solution import ErrorEstimate, Status

WALKED = "parasolver"
"""The method whose windows a request may grow into that was begun by single steps, where `auto` chooses."""


@dataclass(frozen=True, eq=False)
class Part:
    """Whose some rows of a round are.

    Attributes:
        states: One request with a solver, all that walk one chain, or those that are in one more round.
        count: How many rows.
        query: What the solver asked for; None of those that walk.
        again: Whether they are rows of a first round, one of each request, whose samples are found.
    """

    states: Sequence[RequestState]
    count: int
    query: Query | None = None
    again: bool = False


@dataclass(frozen=True, eq=False)
class MergedRows:
    """The rows of a round. One batch, or two where some chains have whole times and others have not.

    Attributes:
        batches: The rows; their `samples` are slots of the conditioning.
        parts: Whose they are, of each batch, in order.
        failed: Requests whose solver had no rows to ask for.
    """

    batches: Sequence[Batch]
    parts: Sequence[Sequence[Part]]
    failed: Sequence[RequestState] = ()

    @property
    def count(self) -> int:
        """Rows of the round."""
        return sum(len(batch.x) for batch in self.batches)


@dataclass(frozen=True, eq=False, kw_only=True)
class Finished:
    """A sample and how it came about.

    Attributes:
        sample: What the model's `decode` made of it.
        status: How the run ended.
        message: The same as a sentence.
        estimate: How far to trust the sample, with its rounds and evaluations.
        family: The name of the method that solved it.
        widest: The most rows of one of its rounds.
    """

    sample: Tensor
    status: Status
    message: str
    estimate: ErrorEstimate
    family: str
    widest: int


class Stepwise:
    """The contract on one model. Everything is called by one thread.

    Args:
        model: The model.
        slots: Requests at once, at most.
        check: Whether a row of each request is evaluated once more.

    Attributes:
        model: As given.
        evaluator: What calls the network.
        chains: The chains of requests so far.
        beside: Seconds that solvers took beside the network in the last round; `asked` how many of them there were.
        records: What the solvers of the last round did, by request.
        fault: What the model was found to do; None as long as it was not. Nothing is prepared from then on.
    """

    def __init__(self, model: ServedModel, slots: int = 64, *, check: bool = True) -> None:
        self.model, self.evaluator = model, model.evaluator(slots)
        self.chains = Chains(model, self.evaluator.device)
        self._free = [*range(slots)][::-1]
        self._walkers: dict[Chain, Walkers] = {}
        self._check, self._judge = check, Judge(self.evaluator.evaluate_again, model.dtype)
        self.fault: str | None = None
        self.beside, self.asked = 0.0, 0
        self.records: list[tuple[RequestState, Record]] = []

    @property
    def free(self) -> int:
        """Requests that can be prepared beside those that are."""
        return len(self._free)

    def method(self, request: SampleRequest, family: str | None = None) -> tuple[Chain, str]:
        """The chain of a request, and the name of the method that is to solve it.

        Args:
            request: The request.
            family: What `auto` stands for; None for the one that single steps may grow into.

        Raises:
            ValueError: If the model has no such chain, or the method does not fit it.
        """
        with at_home():
            chain = self.chains.of(request)
            self.model.given_rows(request)
            if chain.table.draws is not None:
                self.model.noise(request, self.evaluator.device, chain.table)
            name = (family or WALKED) if request.method == AUTO else request.method
            chain.method(name, self._window(request, chain), request.tolerance)
        return chain, name

    def _window(self, request: SampleRequest, chain: Chain) -> int | None:
        return None if request.window is None else min(request.window, chain.table.steps)

    @torch.inference_mode()
    def prepare(self, request: SampleRequest, *, family: str | None = None) -> RequestState:
        """Begins a request, with one row a round.

        Args:
            request: The request.
            family: The name of the method that `auto` stands for.

        Raises:
            ValueError: If the request does not fit the model, or the model is at fault.
            RuntimeError: If no slot is free.
        """
        if self.fault is not None:
            raise ValueError(self.fault)
        chain, name = self.method(request, family)
        if not self._free:
            raise RuntimeError("all slots are taken; release a request first")
        with at_home():
            method, walks = chain.method(name, self._window(request, chain), request.tolerance)
            noise = self.model.noise(request, self.evaluator.device, chain.table)
            rows = self.model.rows_of(request)
            most = method.width(chain.table)

            def make() -> tuple[Run, Solver[Any]]:
                run = method.prepare(chain.problem(noise))
                return run, run.solver(0)

            state = RequestState(
                request=request,
                chain=chain,
                noise=noise,
                slot=self._free.pop(),
                family=name,
                most=most,
                make=None if most == 1 and walks else make,
                walks=walks,
                kind=(chain, name, request.allowed, most),
            )
            if walks:
                x = chain.step.move(noise.start(0)) * chain.table.start_scale
                state.place = Place(0, [x], [])
            else:
                state.begin()
                state.rows = most
                state.resize(1)
            for key, value in rows.items():
                self.evaluator.conditioning[key][state.slot] = value
        return state

    @torch.inference_mode()
    def gather(self, states: Sequence[RequestState]) -> MergedRows:
        """The rows that requests want evaluated in this round. Requests that are done have none.

        Args:
            states: The requests of the round.
        """
        walking: dict[Chain, list[RequestState]] = {}
        asking: list[RequestState] = []
        again: dict[Witness, list[RequestState]] = {}
        for state in states:
            if state.done:
                continue
            if state.walk is not None and not state.arrived:
                walking.setdefault(state.chain, []).append(state)
            elif state.found:
                assert state.witness is not None
                again.setdefault(state.witness, []).append(state)
            elif state.place is not None:
                walking.setdefault(state.chain, []).append(state)
            else:
                asking.append(state)
        found: dict[torch.dtype, list[tuple[Part, Tensor, Tensor, Tensor]]] = {}
        with at_home():
            for chain in [chain for chain in self._walkers if chain not in walking]:
                del self._walkers[chain]
            for chain, members in walking.items():
                walkers = self._walkers.setdefault(chain, Walkers(chain))
                x, times, slots = walkers.rows(members)
                part = Part(walkers.members, len(slots))
                found.setdefault(times.dtype, []).append((part, x, times, slots))
            asked = time.perf_counter()
            failed: list[RequestState] = []
            for state in asking:
                solver, run = state.solver, state.run
                assert solver is not None
                assert run is not None
                query = self._asked(state, solver)
                if query is None:
                    failed.append(state)
                    continue
                times = run.t[query.nodes]
                slots = torch.full((len(query.nodes),), state.slot)
                found.setdefault(times.dtype, []).append((Part([state], len(slots), query), query.rows, times, slots))
            for witness, members in again.items():
                rows = taken(witness.rows, [state.witnessed for state in members])
                part = Part(members, len(members), again=True)
                found.setdefault(rows.t.dtype, []).append((part, rows.x, rows.t, rows.samples))
            batches = [self._merged([rows[1:] for rows in of]) for of in found.values()]
        self.asked = len(asking)
        self.beside = time.perf_counter() - asked if asking else 0.0
        return MergedRows(batches, [[rows[0] for rows in of] for of in found.values()], failed)

    @staticmethod
    def _asked(state: RequestState, solver: Solver[Any]) -> Query | None:
        try:
            return query_of(solver.ask(), state.family)
        except ValueError as error:
            state.error = str(error)
            return None

    @staticmethod
    def _merged(rows: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Batch:
        x, t, slots = (of[0] if len(of) == 1 else torch.cat(of) for of in zip(*rows, strict=True))
        return Batch(x, t, torch.zeros_like(slots), slots, None, len(x))

    @torch.inference_mode()
    def denoise_step(self, rows: MergedRows) -> list[Tensor]:
        """The network's outputs for the rows of a round, of each batch `[R, ...]`.

        Raises:
            ValueError: As the evaluator does, and whatever the model raises.
            RuntimeError: If the model raises StopIteration.
        """
        try:
            with at_home():
                return [self.evaluator(batch) for batch in rows.batches]
        except StopIteration as error:
            raise RuntimeError(STOPPED) from error

    @torch.inference_mode()
    def scheduler_step(self, rows: MergedRows, outputs: Sequence[Tensor]) -> list[RequestState]:
        """Takes the outputs of a round, and moves every request of it on.

        Waits for the device once, where a request has a window, and where one comes to its end.

        Args:
            rows: What `gather` returned.
            outputs: What `denoise_step` returned.

        Returns:
            The requests that are done by it: those whose sample is found, and those with an `error`.
        """
        told: list[tuple[RequestState, Tensor]] = []
        seen, self.records = [*rows.failed], []
        begin, walked = time.perf_counter(), 0.0
        with at_home():
            for batch, parts, values in zip(rows.batches, rows.parts, outputs, strict=True):
                first = 0
                for part, m in zip(parts, values.split([part.count for part in parts]), strict=True):
                    place, first = first, first + part.count
                    if part.again:
                        self._seen_again(part.states, (batch, values, range(place, first)))
                        seen += part.states
                        continue
                    self._keep(part, batch, place, values)
                    if part.query is None:
                        since = time.perf_counter()
                        seen += self._walkers[part.states[0].chain].step(m)
                        for state in part.states:
                            state.rounds, state.evaluations = state.rounds + 1, state.evaluations + 1
                            state.widest = state.widest or 1
                        walked += time.perf_counter() - since
                        continue
                    state = part.states[0]
                    seen.append(state)
                    state.rounds, state.evaluations = state.rounds + 1, state.evaluations + part.count
                    state.widest = max(state.widest, part.count)
                    norms = self._told(state, part.query, m)
                    if norms is not None:
                        told.append((state, norms))
            numbers: list[float] = torch.cat([norms for _, norms in told]).tolist() if told else []
            for state, norms in told:
                self._advanced(state, numbers[: len(norms)])
                numbers = numbers[len(norms) :]
            self._found([state for state in seen if state.error is None and not state.confirmed and state.found])
            if self.fault is not None:
                seen = [*rows.failed, *(one for parts in rows.parts for part in parts for one in part.states)]
                for state in seen:
                    state.error = state.error or self.fault
            done = [state for state in seen if state.done]
        self.beside += time.perf_counter() - begin - walked if self.asked else 0.0
        return done

    @staticmethod
    def _found(states: Sequence[RequestState]) -> None:
        """Looks whether samples that were found are finite. Waits for the device once."""
        if not states:
            return
        finite = torch.stack([state.sample for state in states]).isfinite().flatten(1).all(1).tolist()
        for state, fine in zip(states, finite, strict=True):
            if not fine:
                state.error = "the sample is not finite: the model returned NaN or infinity"
            state.confirmed = state.witness is None

    def _keep(self, part: Part, batch: Batch, first: int, outputs: Tensor) -> None:
        """Keeps a row of each request whose first round this is: of a window the middle one."""
        new = [k for k, state in enumerate(part.states) if state.rounds == 0] if self._check else []
        if new:
            places = [first + (k if part.query is None else part.count // 2) for k in new]
            witness = Witness.of(batch, places, outputs)
            for row, k in enumerate(new):
                part.states[k].witness, part.states[k].witnessed = witness, row

    def _seen_again(self, states: Sequence[RequestState], call: tuple[Batch, Tensor, Sequence[int]]) -> None:
        """Compares rows of requests with what they were at first."""
        witness = states[0].witness
        assert witness is not None
        try:
            witness.compare(self._judge, [state.witnessed for state in states], call)
        except ValueError as error:
            self.fault = str(error)
        for state in states:
            state.confirmed = True

    @staticmethod
    def _told(state: RequestState, query: Query, outputs: Tensor) -> Tensor | None:
        assert state.solver is not None
        try:
            return norms_of(state.solver.tell(query, outputs, None), state.family)
        except ValueError as error:
            state.error = str(error)
            return None

    def _advanced(self, state: RequestState, norms: list[float]) -> None:
        assert state.solver is not None
        try:
            self.records.append((state, record_of(state.solver.advance(norms, state.rounds), state.family)))
        except ValueError as error:
            state.error = str(error)

    @torch.inference_mode()
    def decode(self, state: RequestState) -> Finished:
        """The sample of a request that is done without an error, on the CPU.

        Raises:
            Exception: What the model's `decode` raises.
        """
        with at_home():
            status, message, estimate = state.ended()
            x = state.sample.detach().clone()
        with torch.inference_mode(False), torch.no_grad():
            sample = self.model.decode(x.clone()).detach().cpu()
        return Finished(
            sample=sample, status=status, message=message, estimate=estimate, family=state.family, widest=state.widest
        )

    def release(self, state: RequestState) -> None:
        """Gives a request's slot to others; of one that is not done, what it has found is dropped."""
        if state.slot >= 0:
            self._free.append(state.slot)
            state.slot = -1

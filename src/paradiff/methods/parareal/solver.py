# SPDX-License-Identifier: Apache-2.0
"""One sample's run of Parareal: the rows that it asks for in a round, and the edge values that their outputs make.

Write x[n, p] for block edge n after p iterations, F(i, p) and G(i, p) for the fine and the coarse propagator of block i from
x[i, p]. Then

    x[n, 0] = G(n-1, 0),        x[n, p] = F(n-1, p-1) + ( G(n-1, p) - G(n-1, p-1) ),                               (1)

and nothing else orders the work: a run of block i starts in the round after x[i, p] is known, with no barrier between
iterations (queue.py). Its first row serves as fine step and as coarse step (steps.py); so G costs nothing, and for B equal
blocks of S steps

    x[n, p] is known after max( rounds of x[n-1, p-1] + S, rounds of x[n-1, p] + 1 ) = n + p (S - 1) rounds       (n > p).

An edge is settled once its value is final: edge 0; an edge whose predecessor was settled before its fine run began
(x[n] = F(n-1), the chain's own steps); and an edge that the stop rule lets pass (stopping.py), in order along the chain.
Blocks before a settled edge are done with, and what still runs in them stops. The `batched` ordering takes the same steps
with a barrier after every sweep, all blocks in every one of them, and shares nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paradiff.chain.data_scale import unusual
from paradiff.chain.noise import Noise
from paradiff.errors import NotFinite
from paradiff.methods.parareal.pool import BlockRuns
from paradiff.methods.parareal.queue import BatchedQueue, PararealQuery, PipelinedQueue, Queue, Row
from paradiff.methods.parareal.setup import PararealSetup
from paradiff.methods.parareal.steps import CoarseSteps, FineSteps
from paradiff.methods.parareal.stopping import BlockRun, EdgeUpdate
from paradiff.solver.records import PararealRecord
from paradiff.solver.solution import ErrorEstimate

GREY = 127.5  # grey levels in one unit of data in -1 ... 1


class PararealSolver:
    """The run of one sample.

    Args:
        setup: What all samples share.
        noise: The noises.
        sample: The sample.
        start: `[...]` the state at node 0; None for the noise's.

    Attributes:
        sample: The sample.
        done: Whether the sample is found.
        rounds: Rounds in which the sample took part.
        evaluations: Its rows.
        runs: The block runs, their states, and the last edge whose value is final.
        updates: The edge values made in the last round.
        result: The run that holds the sample once it is found.
    """

    def __init__(self, setup: PararealSetup, noise: Noise, sample: int, start: Tensor | None) -> None:
        self.setup, self.sample = setup, sample
        x0 = setup.move(noise.start(sample)) * setup.table.start_scale if start is None else setup.move(start)
        self.runs = BlockRuns(setup, x0)
        self.result = self.runs.begin_from_noise(0)
        self.runs.pool.states[self.result.start, 0] = x0
        self.done = False
        self.rounds = self.evaluations = 0
        self.updates: list[EdgeUpdate] = []
        self.fine_steps = FineSteps(setup, self.runs, noise, sample)
        self.coarse_steps = CoarseSteps(setup, self.runs, noise, sample)
        queue = BatchedQueue if setup.method.ordering == "batched" else PipelinedQueue
        self._queue: Queue = queue(setup, self.runs)
        self._asked: list[Row] = []  # in the last round
        self._used_up: list[BlockRun] = []  # whose values are part of newer ones, and no longer needed
        self._size = 1.0  # the data's mean square as far as it is seen
        self._final_square = 0.0  # that of the sample, once the run is done
        self._counted = False  # whether that is the sample's own
        self._judged: BlockRun | None = None  # the newest run of the last edge that the stopping rule has seen

    @property
    def final(self) -> Tensor:
        """The value of the last edge, the sample once the run is done."""
        return self.runs.pool.states[self.result.start, 0]

    @property
    def newest(self) -> Tensor:
        """The newest value of the last edge, or of the edge furthest along the chain that has one."""
        if self.done:
            return self.final
        runs = self.runs
        reached = max(n for n, level in enumerate(runs.level) if level >= 0 and level in runs.at[n])
        return runs.pool.states[runs.at[reached][runs.level[reached]].start, 0]

    @property
    def error_estimate(self) -> ErrorEstimate:
        """How far to trust the sample."""
        if self.done and not self._counted:
            self._counted = True
            self._size = unusual(self._final_square)
        estimated = self.setup.stopping.estimate(self.result, self._size)
        return ErrorEstimate(self.result.residual, estimated, self.rounds, self.evaluations)

    def ask(self) -> PararealQuery:
        """The rows wanted now."""
        setup, pool = self.setup, self.runs.pool
        rows, slots = self._queue.ready(), []
        for row in rows:
            reached = row.run.running if row.fine else row.run.end
            slots.append(row.run.start if reached < 0 else reached)
        nodes = torch.tensor([row.node for row in rows])
        at = nodes.to(setup.device, non_blocking=True)
        states = pool.states[pool.index(slots)]
        return PararealQuery(nodes, setup.step.seen(at, states[:, 0]), rows, at, states)

    def tell(self, query: PararealQuery, outputs: Tensor, states: Tensor | None = None) -> Tensor:
        """Takes the outputs of a query.

        Returns:
            Mean square change of each edge value that the round made, on the device.

        Raises:
            ValueError: If the caller changed states before the network saw them.
        """
        setup = self.setup
        assert states is None, "the loop refuses changed states, since follows_edits is False"
        self._asked = query.steps
        self.rounds += 1
        self.evaluations += len(outputs)
        m = setup.table.convert(query.nodes, query.states[:, 0], outputs)
        coarse = [k for k, row in enumerate(query.steps) if row.coarse]
        if coarse:
            self.coarse_steps(query, coarse, outputs)
        fine = [k for k, row in enumerate(query.steps) if row.fine]
        if fine:
            self.fine_steps(query, fine, m)
        self.updates = self._form()
        self._queue.turn()
        change = self._changes(self.updates)
        for run in self._used_up:
            self.runs.drop(run)
        return change

    def _form(self) -> list[EdgeUpdate]:
        """Makes every edge value that can be made: equation (1)."""
        updates: list[EdgeUpdate] = []
        self._used_up = []
        for block in self.runs.in_flight:
            while (found := self._formable(block + 1)) is not None:
                self._assign(found)
                updates.append(found)
                if found.kind == "exact":
                    break
        return updates

    def _formable(self, n: int) -> EdgeUpdate | None:
        """The next value of edge n, if what it is made of is known.

        With forced iterations every value of equation (1) is made, in order. Otherwise the chain's own steps come first,
        where both are known in one round.
        """
        setup, method, runs = self.setup, self.setup.method, self.runs
        before, newest, level = runs.at[n - 1], runs.level[n - 1], runs.level[n]
        if newest < 0:
            return None
        known, source = runs.at[n].get(level), before.get(newest)
        settled = n - 1 == runs.settled and method.ordering == "pipelined"
        exact = settled and source is not None and source.fine == setup.fine_steps(source)
        if source is not None and exact and method.iterations is None:
            return EdgeUpdate(runs.begin(n, max(newest, level) + 1), source, "exact", known)
        if level < 0 and setup.slope is None:
            first = before.get(newest if method.iterations is None else min(before, default=newest))
            if first is not None and first.coarse == setup.coarse_steps(first):
                return EdgeUpdate(runs.begin(n, first.level), first, "coarse")
        old, new = before.get(level), before.get(level + 1)
        if level >= 0 and old is not None and new is not None:
            coarse = setup.slope is not None or new.coarse == setup.coarse_steps(new)
            if coarse and old.fine == setup.fine_steps(old):
                return EdgeUpdate(runs.begin(n, level + 1), new, "corrected", known)
        if source is not None and exact:
            return EdgeUpdate(runs.begin(n, max(newest, level) + 1), source, "exact", known)
        return None

    def _assign(self, update: EdgeUpdate) -> None:
        """Writes an edge value into the slot of the run that it starts."""
        run, source, runs, pool = update.run, update.source, self.runs, self.runs.pool
        if source.clean >= 0 and run.block < self.setup.intervals:
            run.clean_before = pool.take()
            pool.states[run.clean_before, 0] = pool.states[source.clean, 0]
        states = pool.states
        if update.kind == "exact":
            states[run.start] = states[source.running]
        elif update.kind == "coarse":
            states[run.start] = states[source.end]
        else:
            old = runs.at[run.block - 1][run.level - 1]
            if self.setup.slope is None:
                states[run.start] = states[old.running] + (states[source.end] - states[old.end])
            else:
                gain = self.setup.slope[run.block - 1]
                states[run.start] = states[old.running] + gain * (states[source.start] - states[old.start])
            self._used_up.append(old)

    def _changes(self, updates: list[EdgeUpdate]) -> Tensor:
        """Mean square changes of the values just made; for the image rule, the last edge's mean difference in grey levels."""
        setup, pool = self.setup, self.runs.pool
        if not updates:
            return pool.states.new_empty(0)
        new = pool.states[pool.index([u.run.start for u in updates]), 0]
        old = pool.states[pool.index([(u.previous or u.run).start for u in updates]), 0]
        found = setup.step.mean_square(new - old)
        if setup.method.rule == "image" and updates[-1].run.block == setup.intervals:
            found[-1] = ((new - old)[-1].abs().mean() * GREY).square()
        # a value that is new to its edge has no change; its own size tells whether it is finite
        fresh = pool.index([u.previous is None for u in updates])
        return torch.where(fresh, new.flatten(1).square().mean(1), found)

    def advance(self, norms: list[float], round: int) -> PararealRecord:
        """Judges the values made in this round, settles edges, and stops what is no longer needed.

        Args:
            norms: What `tell` returned, on the host.
            round: The round's number, for the record.

        Raises:
            ValueError: If a state of the sequential chain is not finite.
        """
        setup, runs, stopping, first = self.setup, self.runs, self.setup.stopping, self.runs.settled
        record: list[tuple[int, int, float]] = []
        for update, value in zip(self.updates, norms, strict=True):
            stopping.observe(update, value, self.sample)
            record.append((update.run.block, update.run.level, update.run.change))
            if update.kind == "coarse" and update.run.block == setup.intervals:
                self._size = unusual(value)
        for update in self.updates:
            if update.kind == "exact" and update.run.block == runs.settled + 1:
                self._settle(update.run)
        while not self.done and (candidate := self._candidate()) is not None and stopping.passes(candidate, self._size):
            self._settle(candidate)
        last = runs.at[-1].get(runs.level[-1])
        if not self.done and last is not None and last is not self._judged:
            self._judged = last
            if stopping.converged([at[last.level] for at in runs.at if last.level in at], self._size):
                self.result, self.done = last, True
        if self.done:
            self._final_square = float(self.setup.step.mean_square(self.final[None]))
        if self.done and not math.isfinite(self._final_square) and not torch.isfinite(self.final).all():
            raise NotFinite(
                f"sample {self.sample} is not finite after {self.result.level} iterations: the model returned NaN or infinity, "
                "or overflowed its dtype, on the chain itself or in a coarse step; method sequential tells which"
            )
        for update in self.updates:
            self._forget(update)
        rows = [(row.run.block, row.run.level) for row in self._asked]
        return PararealRecord(round, self.sample, rows, record, (setup.intervals if self.done else runs.settled) - first)

    def _candidate(self) -> BlockRun | None:
        """The newest value of the first edge that is not settled, if it is as new as the settled one before it."""
        n, runs = self.runs.settled + 1, self.runs
        return runs.at[n].get(runs.level[n]) if runs.level[n] >= runs.level[n - 1] else None

    def _settle(self, run: BlockRun) -> None:
        """The value that starts a run is final: whatever runs in the blocks before it stops."""
        n, setup = run.block, self.setup
        for old in list(self.runs.at[n - 1].values()):
            self.runs.drop(old)
        self.coarse_steps.forget(range(setup.first_step[n - 1], setup.first_step[n]))
        self.runs.settled = n
        if n == setup.intervals:
            self.result, self.done = run, True

    def _forget(self, update: EdgeUpdate) -> None:
        """Lets go of the value before: where the edge's block does not run, and where it has not begun to and a final value
        has come."""
        n, old, setup, settled = update.run.block, update.previous, self.setup, self.runs.settled
        idle = n == setup.intervals or n >= settled + setup.width
        late = n == settled and setup.method.iterations is None
        if old is not None and (idle or (late and old.fine == old.coarse == 0)):
            self.runs.drop(old)

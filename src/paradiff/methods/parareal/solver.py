"""One sample's run of Parareal: which rows it asks for in a round, and what it makes of the answers.

Write x[n, p] for block edge n after p iterations, F(i, p) and G(i, p) for the fine and the coarse propagator of block i from
x[i, p]. Then

    x[n, 0] = G(n-1, 0),        x[n, p] = F(n-1, p-1) + ( G(n-1, p) - G(n-1, p-1) ),                               (1)

and nothing else orders the work: a solve of block i starts in the round after x[i, p] is known, with no barrier between
iterations. Its first row serves as fine step and as coarse step; so G costs nothing, and for B equal blocks of S steps

    x[n, p] is known after max( rounds of x[n-1, p-1] + S, rounds of x[n-1, p] + 1 ) = n + p (S - 1) rounds       (n > p).

An edge is settled once its value is final: edge 0; an edge whose predecessor was settled before its fine solve began
(x[n] = F(n-1), the chain's own steps); and an edge that the stop rule lets pass (stopping.py), in order along the chain.
Blocks before a settled edge are done with, and what still runs in them stops. The `batched` schedule takes the same steps
with a barrier after every sweep, all blocks in every one of them, and shares nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.table import column
from paradiff.methods.parareal.setup import PararealSetup
from paradiff.methods.parareal.stopping import BlockRun, EdgeUpdate
from paradiff.solver.protocol import Query
from paradiff.solver.records import PararealRecord
from paradiff.solver.solution import ErrorEstimate

GREY = 127.5  # grey levels in one unit of data in -1 ... 1


@dataclass
class Row:
    """One row of a round: a step of a solve, fine, coarse, or both at once."""

    solve: BlockRun
    node: int
    fine: bool
    coarse: bool


@dataclass(frozen=True, eq=False)
class PararealQuery(Query):
    """The rows of one round.

    Attributes:
        steps: What each row is: a step of a block's run.
        at: The nodes, as an index on the device.
        states: `[R, 2P-1, ...]` the states that each step reads, not scaled, then the outputs.
    """

    steps: list[Row]
    at: Tensor
    states: Tensor


class PararealSolver:
    """The run of one sample.

    Attributes:
        sample: The sample.
        rounds: Rounds in which the sample took part.
        evaluations: Its rows.
        settled: The last edge whose value is final.
    """

    def __init__(self, course: PararealSetup, noise: Noise, sample: int, start: Tensor | None) -> None:
        self.course, self.noise, self.sample = course, noise, sample
        table, band = course.table, course.table.band
        x0 = course.move(noise.start(sample)) * table.start_scale if start is None else course.move(start)
        self.pool = x0.new_zeros(4 * course.width + 2, 2 * band - 1, *x0.shape)
        self.free = list(range(len(self.pool)))
        self.noises: dict[int, Tensor] = {}
        self.solves: list[dict[int, BlockRun]] = [{} for _ in range(course.intervals + 1)]
        self.level = [-1] * (course.intervals + 1)
        self.settled = 0
        self.rounds = self.evaluations = 0
        self.done = False
        self.asked: list[Row] = []  # in the last round
        self.formed: list[EdgeUpdate] = []
        self.spent: list[BlockRun] = []  # whose values are part of newer ones, and no longer needed
        self.sweeping, self.sweep = True, 0  # the batched schedule's phase
        first = self._new_solve(0, 0)
        self.pool[first.start, 0] = x0
        first.change = first.error = first.estimate = first.residual = 0.0
        self.result = first
        self.judged: BlockRun | None = None

    @property
    def final(self) -> Tensor:
        """The value of the last edge, the sample once the run is done."""
        return self.pool[self.result.start, 0]

    @property
    def newest(self) -> Tensor:
        """The newest value of the last edge, or of the edge furthest along the chain that has one."""
        if self.done:
            return self.final
        reached = max(n for n, level in enumerate(self.level) if level >= 0 and level in self.solves[n])
        return self.pool[self.solves[reached][self.level[reached]].start, 0]

    @property
    def error_estimate(self) -> ErrorEstimate:
        """How far to trust the sample."""
        return ErrorEstimate(self.result.residual, self.course.judge.estimate(self.result), self.rounds, self.evaluations)

    def ask(self) -> PararealQuery:
        """The rows wanted now."""
        course = self.course
        steps = self._batched_rows() if course.method.schedule == "batched" else self._pipelined_rows()
        slots = []
        for row in steps:
            solve = row.solve
            running = solve.run if row.fine else solve.end
            slots.append(solve.start if running < 0 else running)
        nodes = torch.tensor([row.node for row in steps])
        at = nodes.to(course.device, non_blocking=True)
        states = self.pool[self._index(slots)]
        return PararealQuery(nodes, course.step.seen(at, states[:, 0]), steps, at, states)

    def _row(self, solve: BlockRun, fine: bool, coarse: bool) -> Row:
        course = self.course
        left = course.edges[solve.block]
        node = left + solve.fine if fine else course.coarse.nodes[course.gaps[solve.block] + solve.coarse]
        return Row(solve, node, fine, coarse)

    def _length(self, solve: BlockRun) -> int:
        return self.course.edges[solve.block + 1] - self.course.edges[solve.block]

    def _coarse_steps(self, solve: BlockRun) -> int:
        if self.course.slope is not None:
            return int(solve.block == 0 and solve.level == 0)
        return self.course.gaps[solve.block + 1] - self.course.gaps[solve.block]

    def _pipelined_rows(self) -> list[Row]:
        """Every row that is ready, in the order of the round in which it would be taken without a row bound."""
        course, method, rows = self.course, self.course.method, []
        for block in range(self.settled, min(self.settled + course.width, course.intervals)):
            for solve in self.solves[block].values():
                wanted = method.iterations is None or solve.level < method.iterations
                due = solve.level * (course.longest - 1) + block
                if solve.fine == 0 and solve.coarse == 0 < self._coarse_steps(solve):
                    rows.append((due, solve.level, self._row(solve, wanted, True)))
                    continue
                if solve.coarse < self._coarse_steps(solve):
                    rows.append((due + solve.coarse, solve.level, self._row(solve, False, True)))
                if wanted and solve.fine < self._length(solve):
                    rows.append((due + solve.fine, solve.level, self._row(solve, True, False)))
        if method.rows is not None:
            rows.sort(key=lambda r: (r[0], r[1], r[2].solve.block, r[2].fine))
            rows = rows[: method.rows]
        return [row for _, _, row in rows]

    def _batched_rows(self) -> list[Row]:
        """The next row of the coarse sweep, or the next of every fine solve."""
        solves = [self.solves[i][self.sweep] for i in range(self.course.intervals) if self.sweep in self.solves[i]]
        if self.sweeping:
            return [self._row(next(s for s in solves if s.coarse < self._coarse_steps(s)), False, True)]
        return [self._row(s, True, False) for s in solves if s.fine < self._length(s)]

    def tell(self, query: PararealQuery, outputs: Tensor, states: Tensor | None = None) -> Tensor:
        """Takes the outputs of a query.

        Returns:
            Mean square change of each edge value that the round made, on the device.

        Raises:
            ValueError: If the caller changed states before the network saw them.
        """
        if states is not None:
            raise ValueError(
                f"the states were changed between steps, and {self.course.method.name}'s coarse steps cannot follow that; use "
                "parasolver"
            )
        course, table = self.course, self.course.table
        self.asked = query.steps
        self.rounds += 1
        self.evaluations += len(outputs)
        m = table.convert(query.nodes, query.states[:, 0], outputs)
        coarse = [k for k, row in enumerate(query.steps) if row.coarse]
        if coarse:
            self._coarse_step(query, coarse, outputs)
        fine = [k for k, row in enumerate(query.steps) if row.fine]
        if fine:
            self._fine_step(query, fine, m)
        self.formed = self._form()
        if course.method.schedule == "batched":
            self._turn()
        change = self._changes(self.formed)
        for solve in self.spent:
            self._drop(solve)
        return change

    def _fine_step(self, query: PararealQuery, rows: list[int], m: Tensor) -> None:
        """Takes one fine step of each of these rows."""
        course, band = self.course, self.course.table.band
        everything = len(rows) == len(query.steps)
        chosen = slice(None) if everything else self._index(rows)
        at, states, m = query.at[chosen], query.states[chosen], m[chosen]
        past = states.unbind(1)
        z = None
        if course.table.stochastic:
            z = course.move(torch.cat([self.noise.draw(self.sample, range(n, n + 1)) for n in query.nodes[rows].tolist()]))
        x = course.step(at, past[:band], [m, *past[band:]], z)
        slots = []
        for k in rows:
            solve = query.steps[k].solve
            solve.fine += 1
            if solve.run < 0:
                solve.run = self._slot()
            slots.append(solve.run)
        new = x[:, None] if band == 1 else torch.stack([x, *past[: band - 1], m, *past[band : 2 * band - 2]], 1)
        self.pool[self._index(slots)] = new

    def _coarse_step(self, query: PararealQuery, rows: list[int], outputs: Tensor) -> None:
        """Takes one coarse step of each of these rows: equation (1) of coarse.py, from the estimate that a limit was put on."""
        course = self.course
        chosen = self._index(rows)
        x, m, at = query.states[chosen, 0], outputs[chosen], query.at[chosen]
        clean = column(course.p[at], x) * x + column(course.q[at], x) * m
        if course.table.clip is not None:
            clean = course.table.clip(clean)
        if course.slope is not None:
            self._open_by_slope(query.steps[rows[0]].solve, clean[0])
            return
        solves = [query.steps[k].solve for k in rows]
        gaps = [course.gaps[s.block] + s.coarse for s in solves]
        led = self._led(solves, gaps, clean) if course.leads else clean
        for solve in solves:
            solve.coarse += 1
            if solve.end < 0:
                solve.end = self._slot()
        self.pool[self._index([s.end for s in solves])] = self._reached(gaps, x, led)

    def _reached(self, gaps: list[int], x: Tensor, clean: Tensor) -> Tensor:
        """`[R, 2P-1, ...]` states after coarse steps over `gaps`: those that the next block reads, then their outputs."""
        course, band = self.course, self.course.table.band
        shape = (len(gaps), band, *[1] * (x.ndim - 1))
        chosen = self._index(gaps)
        state, gain = course.state[chosen].view(shape), course.clean[chosen].view(shape)
        new = state * x[:, None] + gain * clean[:, None]
        if course.table.stochastic:
            for gap in gaps:
                if gap not in self.noises:
                    self.noises[gap] = course.move(course.coarse.aggregate(self.noise, self.sample, gap))
            new += torch.stack([self.noises[gap] for gap in gaps])
        if band == 1:
            return new
        ends = torch.tensor([course.coarse.nodes[gap + 1] for gap in gaps])[:, None] - torch.arange(1, band)
        ends = ends.clamp(min=0).to(course.device)
        shape = (*ends.shape, *[1] * (x.ndim - 1))
        past = (clean[:, None] - course.p[ends].view(shape) * new[:, 1:]) / course.q[ends].view(shape)
        return torch.cat([new, past], 1)

    def _led(self, solves: list[BlockRun], gaps: list[int], clean: Tensor) -> Tensor:
        """The clean-data estimates led by their trend, where there is one before; remembers them for the next step."""
        led = clean.clone()
        for k, (solve, gap) in enumerate(zip(solves, gaps, strict=True)):
            before = solve.before if solve.coarse == 0 else solve.lead
            if before >= 0 and self.course.lead[gap]:
                led[k].add_(clean[k] - self.pool[before, 0], alpha=self.course.lead[gap])
            if solve.lead < 0:
                solve.lead = self._slot()
            self.pool[solve.lead, 0] = clean[k]
        return led

    def _open_by_slope(self, first: BlockRun, clean: Tensor) -> None:
        """All starts at once, from the first clean-data estimate: the propagator that needs no network."""
        first.coarse += 1
        state = self.pool[first.start, 0]
        for gap in range(min(self.settled + self.course.width, self.course.intervals)):
            reached = self._reached([gap], state[None], clean[None])[0]
            solve = self._new_solve(gap + 1, 0)
            self.pool[solve.start] = reached
            state = reached[0]

    def _form(self) -> list[EdgeUpdate]:
        """Makes every edge value that can be made: equation (1)."""
        course = self.course
        formed: list[EdgeUpdate] = []
        last = min(self.settled + course.width, course.intervals)
        self.spent = []
        for n in range(self.settled + 1, last + 1):
            while (found := self._formable(n)) is not None:
                self._assign(found)
                formed.append(found)
                if found.kind == "exact":
                    break
        return formed

    def _formable(self, n: int) -> EdgeUpdate | None:
        """The next value of edge n, if what it is made of is known.

        With forced iterations every value of equation (1) is made, in order. Otherwise the chain's own steps come first,
        where both are known in one round.
        """
        course, method, before = self.course, self.course.method, self.solves[n - 1]
        newest, level = self.level[n - 1], self.level[n]
        if newest < 0:
            return None
        known, source = self.solves[n].get(level), before.get(newest)
        settled = n - 1 == self.settled and method.schedule == "pipelined"
        exact = settled and source is not None and source.fine == self._length(source)
        if source is not None and exact and method.iterations is None:
            return EdgeUpdate(self._new_solve(n, max(newest, level) + 1), source, "exact", known)
        if level < 0 and course.slope is None:
            first = before.get(newest if method.iterations is None else min(before, default=newest))
            if first is not None and first.coarse == self._coarse_steps(first):
                return EdgeUpdate(self._new_solve(n, first.level), first, "coarse")
        old, new = before.get(level), before.get(level + 1)
        if level >= 0 and old is not None and new is not None:
            coarse = course.slope is not None or new.coarse == self._coarse_steps(new)
            if coarse and old.fine == self._length(old):
                return EdgeUpdate(self._new_solve(n, level + 1), new, "corrected", known)
        if source is not None and exact:
            return EdgeUpdate(self._new_solve(n, max(newest, level) + 1), source, "exact", known)
        return None

    def _assign(self, formed: EdgeUpdate) -> None:
        """Puts the value where it belongs."""
        solve, source = formed.solve, formed.source
        if source.lead >= 0 and solve.block < self.course.intervals:
            solve.before = self._slot()
            self.pool[solve.before, 0] = self.pool[source.lead, 0]
        pool, before = self.pool, self.solves[solve.block - 1]
        if formed.kind == "exact":
            pool[solve.start] = pool[source.run]
        elif formed.kind == "coarse":
            pool[solve.start] = pool[source.end]
        else:
            old = before[solve.level - 1]
            if self.course.slope is None:
                pool[solve.start] = pool[old.run] + (pool[source.end] - pool[old.end])
            else:
                gain = self.course.slope[solve.block - 1]
                pool[solve.start] = pool[old.run] + gain * (pool[source.start] - pool[old.start])
            self.spent.append(old)

    def _turn(self) -> None:
        """The batched schedule: from the coarse sweep to the fine solves and back."""
        course = self.course
        solves = [self.solves[i].get(self.sweep) for i in range(course.intervals)]
        if self.sweeping and all(s is not None and s.coarse == self._coarse_steps(s) for s in solves):
            self.sweeping = False
        elif not self.sweeping and all(s is not None and s.fine == self._length(s) for s in solves):
            self.sweeping, self.sweep = True, self.sweep + 1
            old = self.solves[0][self.sweep - 1]
            again = self._new_solve(0, self.sweep)
            self.pool[again.start] = self.pool[old.start]
            again.change = again.error = again.estimate = again.residual = 0.0

    def _changes(self, formed: list[EdgeUpdate]) -> Tensor:
        """Mean square changes of the values just made; for the image rule, the last edge's mean difference in grey levels."""
        course = self.course
        if not formed:
            return self.pool.new_empty(0)
        new = self.pool[self._index([f.solve.start for f in formed]), 0]
        old = self.pool[self._index([(f.previous or f.solve).start for f in formed]), 0]
        found = course.step.mean_square(new - old)
        if course.method.rule == "image" and formed[-1].solve.block == course.intervals:
            found[-1] = ((new - old)[-1].abs().mean() * GREY).square()
        # a value that is new to its edge has no change; its own size tells whether it is finite
        fresh = self._index([f.previous is None for f in formed])
        return torch.where(fresh, new.flatten(1).square().mean(1), found)

    def advance(self, norms: list[float], round: int) -> PararealRecord:
        """Judges the values made in this round, settles edges, and stops what is no longer needed.

        Args:
            norms: What `tell` returned, on the host.
            round: The round's number, for the record.

        Raises:
            ValueError: If a state of the sequential chain is not finite.
        """
        course, first = self.course, self.settled
        record: list[tuple[int, int, float]] = []
        judge = course.judge
        for made, value in zip(self.formed, norms, strict=True):
            judge.judge(made, value, self.sample)
            record.append((made.solve.block, made.solve.level, made.solve.change))
        for made in self.formed:
            if made.kind == "exact" and made.solve.block == self.settled + 1:
                self._settle(made.solve)
        while not self.done and (candidate := self._candidate()) is not None and judge.passes(candidate):
            self._settle(candidate)
        last = self.solves[-1].get(self.level[-1])
        if not self.done and last is not None and last is not self.judged:
            self.judged = last
            known = [solves[last.level] for solves in self.solves if last.level in solves]
            if judge.converged(known):
                self.result, self.done = last, True
        if self.done and not torch.isfinite(self.final).all():
            raise ValueError(
                f"sample {self.sample} is not finite after {self.result.level} iterations: the model returned NaN or infinity, "
                "or overflowed its dtype, on the chain itself or in a coarse step; method sequential tells which"
            )
        for made in self.formed:
            self._forget(made)
        rows = [(row.solve.block, row.solve.level) for row in self.asked]
        return PararealRecord(round, self.sample, rows, record, (course.intervals if self.done else self.settled) - first)

    def _candidate(self) -> BlockRun | None:
        """The newest value of the first edge that is not settled, if it is as new as the settled one before it."""
        n = self.settled + 1
        return self.solves[n].get(self.level[n]) if self.level[n] >= self.level[n - 1] else None

    def _settle(self, solve: BlockRun) -> None:
        """The value is final: whatever runs in the blocks before it stops."""
        n = solve.block
        for old in list(self.solves[n - 1].values()):
            self._drop(old)
        for gap in range(self.course.gaps[n - 1], self.course.gaps[n]):
            self.noises.pop(gap, None)
        self.settled = n
        if n == self.course.intervals:
            self.result, self.done = solve, True

    def _forget(self, made: EdgeUpdate) -> None:
        """Lets go of the value before: where the edge's block does not run, and where it has not begun to and a final value
        has come."""
        n, old, course = made.solve.block, made.previous, self.course
        idle = n == course.intervals or n >= self.settled + course.width
        late = n == self.settled and course.method.iterations is None
        if old is not None and (idle or (late and old.fine == old.coarse == 0)):
            self._drop(old)

    def _new_solve(self, block: int, level: int) -> BlockRun:
        solve = BlockRun(block, level, self._slot())
        self.solves[block][level] = solve
        self.level[block] = level
        return solve

    def _drop(self, solve: BlockRun) -> None:
        if self.solves[solve.block].pop(solve.level, None) is solve:
            self.free += [slot for slot in (solve.start, solve.run, solve.end, solve.lead, solve.before) if slot >= 0]

    def _index(self, values: list[int]) -> Tensor:
        """Whole numbers on the device, without waiting for it."""
        return torch.tensor(values).to(self.course.device, non_blocking=True)

    def _slot(self) -> int:
        if not self.free:
            size = len(self.pool)
            self.pool = torch.cat([self.pool, torch.zeros_like(self.pool)])
            self.free = list(range(size, 2 * size))
        return self.free.pop()

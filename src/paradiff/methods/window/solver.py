# SPDX-License-Identifier: Apache-2.0
"""One sample's window of states: the rows that it asks for, the sweep that their outputs make, its advance.

A window of sub-intervals n = lo ... hi - 1 is solved at once. One sweep evaluates the network at every state of the window
(S rounds for sub-intervals of S steps, each round one batch; substeps.py), takes the residual

    r[n] = Phi_n(x) - x[n+1],                                                                                   (1)

and updates all nodes by an approximate Newton step with the slope G (chain/slope.py, update.py),

    x[n+1] <- Phi_n(x) + sum_{k<n} L[n,k] r[k],        I + L = (I - G)^-1.                                      (2)

Written so, a node whose predecessors do not change gets exactly Phi_n: after k sweeps the first k nodes of a window are
exact, whatever G. Then the leading nodes whose change is within the tolerance pass, with the one after them (passing.py), and
the window slides; nodes that enter it are filled by the method's predictor (fill.py). A method may cut the chain into blocks
(blocks.py), which the window enters one after the other, and follow each by a corrector (corrector.py). A sweep in which a
state overflowed keeps its finite nodes (salvage.py).

Fine nodes are those of the table; sub-interval n runs from fine node edges[n] to edges[n+1]. The window holds the fine states
from P - 1 nodes before its first edge (the history that a multistep sampler reads; zeros at the chain's start) to its last
edge, the outputs at all of them but the last where the table reads earlier outputs (past_outputs.py), and the noises from its
first edge on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.slope import DATA_VARIANCE
from paradiff.errors import NotFinite
from paradiff.methods.remembered import remembered
from paradiff.methods.window.anderson import AndersonUpdate
from paradiff.methods.window.astray import Astray
from paradiff.methods.window.carried_error import CarriedError
from paradiff.methods.window.corrector import Correction
from paradiff.methods.window.edits import Edits
from paradiff.methods.window.fill import Fill, Guide, GuidedFill, PredictedFill, RememberedFill
from paradiff.methods.window.keeper import Keeper
from paradiff.methods.window.members import Members
from paradiff.methods.window.salvage import finite_nodes
from paradiff.methods.window.setup import WindowSetup
from paradiff.methods.window.substeps import Rounds, SingleSteps, Substeps, WindowQuery
from paradiff.methods.window.update import NewtonUpdate, SecantUpdate, Update
from paradiff.solver.protocol import OnFinal, Place, Problem, Query
from paradiff.solver.records import WindowRecord
from paradiff.solver.solution import ErrorEstimate
from paradiff.solver.trajectory import Part

FILL = 64  # nodes filled by one matrix product
KEPT = 8  # changes of each node in a trajectory, as many as collocation has secant pairs


class WindowSolver:
    """The window of one sample.

    Args:
        setup: What all samples share.
        noise: The noises.
        sample: The sample.
        start: `[...]` the state at node 0; None for the noise's.
        on_final: Called with every stretch of states that became final.
        guide: The initial guess for nodes that enter the window; None for the method's predictor.
        begin: The trajectory that gives it; None for none.
        keep: Whether the trajectory is kept.

    Attributes:
        sample: The sample.
        members: What the errors of its accepted nodes have used of its members' budgets.
        rounds: Rounds in which the sample took part.
        evaluations: Its rows.
        lo: The window's first sub-interval.
        hi: The sub-interval after its last.
        x: The window's fine states; `m` the outputs there, `z` the noises.
        ages: Sweeps that each node after the first has seen.
        phi: Steps from the nodes of the last sweep.
        update: Equation (2) for this sample.
        edits: What the caller did to its states.
        correction: The corrector's run, while one is made.
    """

    def __init__(
        self,
        setup: WindowSetup,
        noise: Noise,
        sample: int,
        start: Tensor | None,
        on_final: OnFinal | None = None,
        guide: Guide | None = None,
        begin: Part | None = None,
        keep: bool = False,
    ) -> None:
        self.setup, self.noise, self.sample = setup, noise, sample
        x0 = setup.move(noise.start(sample)) * setup.table.start_scale if start is None else setup.move(start)
        past = torch.zeros_like(x0).expand(setup.history, *x0.shape)
        self.x = torch.cat([past, x0[None]])
        self.m = past.clone()
        self.z = x0.new_empty(0, *x0.shape)
        self.lo = self.hi = 0
        self.ages: list[int] = []
        self.phi = x0.new_empty(0)
        self._furthest = 0  # the last node of the last sweep, and the mean squares of the clean-data estimate there
        self._count = len(setup.step.members(x0[None])[0])
        nothing = x0.new_empty(0, self._count)
        self._clean_square = nothing  # [1, b] in each sweep with a tolerance of the estimated error
        self._answers = nothing  # [W, b] of its nodes, where they are looked at
        self.members = Members(setup, self._count)
        self.update: Update = update_of(setup)
        self._carried = CarriedError(setup, self.update) if setup.by_error and setup.single else None
        self._changes = x0.new_empty(0)  # [W, ...] those that nodes saw in the last sweep, where errors are carried
        self._moved = x0.new_empty(0)  # [W, ...] changes of their states, where later steps read outputs of nodes that passed
        self.edits = Edits(setup.step.mean_squares)
        self.correction: Correction | None = None
        self.rounds = self.evaluations = 0
        self._final_squares: list[float] | None = None  # those of the sample, where the last sweep made it
        self._counted = False  # whether the budgets were counted for the sample's own size
        self._rounds: Rounds = SingleSteps(setup) if setup.single else Substeps(setup)
        self._fill = fill_of(setup, x0, guide, begin)
        self._keeper = Keeper(setup.table, x0, KEPT) if keep else None
        looks = setup.forgetting is not None and guide is None and setup.method.predictor == "clean"
        self._astray = Astray(setup.table.sigma.tolist(), setup.method.control) if looks else None
        self._held = setup.method.predictor == "held" and begin is None  # whether the window's end is no known state
        self._on_final = _unheard if on_final is None else on_final
        self._block = 1  # the window may reach to this block edge
        self._most = setup.intervals  # sub-intervals of the window at most, by whoever resizes it
        self._open()

    @property
    def done(self) -> bool:
        """Whether the window has passed the last node, and any correction there is made."""
        return self.lo == self.setup.intervals and self.correction is None

    @property
    def final(self) -> Tensor:
        """The state at the window's first node, which is the sample once the window is done."""
        return self.x[self.setup.history]

    @property
    def newest(self) -> Tensor:
        """The state furthest along the chain; the sample itself once the window reaches the end."""
        if self.done:
            return self.final
        return self.x[-2 if self._held and self.hi > self.lo else -1]

    @property
    def reaches_end(self) -> bool:
        """Whether `newest` is the sample as far as it is known: whether the window reaches the chain's end."""
        return self.hi == self.setup.intervals

    @property
    def error_estimate(self) -> ErrorEstimate:
        """How far to trust the sample."""
        if self.done and not self._counted:
            squares = self._final_squares
            self.members.recount(self.setup.step.mean_squares(self.final[None])[0].tolist() if squares is None else squares)
            self._counted = True
        return ErrorEstimate(self.members.residual, self.members.estimated_error, self.rounds, self.evaluations)

    def ask(self) -> Query:
        """The rows wanted now; those of the correction, while one is made."""
        return self._rounds.ask(self.lo, self.hi, self.x) if self.correction is None else self.correction.ask()

    def tell(self, query: Query, outputs: Tensor, states: Tensor | None = None) -> Tensor | None:
        """Takes the outputs of a query.

        Args:
            query: What `ask` returned.
            outputs: `[R, ...]` outputs.
            states: `[R, ...]` the states as the caller changed them before the network saw them, not scaled; None where it
                left them alone.

        Returns:
            For each of b members, one after the other in each row, mean square change of each of W nodes after the first,
            where that ended a sweep; with the rule `residual`, followed by W mean squares of the residuals; with a tolerance of
            the estimated error, followed by the mean square of the clean-data estimate at the last node, and in narrow windows
            by how the W nodes answer (path_answer.py), on chains with churn by what forgetting.py sees; where that is the
            chain's end, by that of its state, and of what errors of nodes that passed become there (carried_error.py), once
            there are some, and by how far another sample is that they may have made of it. `[K b]`; the corrector's own, where
            one runs.

        Raises:
            ValueError: If states were changed and the method solves sub-intervals of several steps.
        """
        setup, table = self.setup, self.setup.table
        self.rounds += 1
        self.evaluations += len(outputs)
        if self.correction is not None:
            assert states is None
            return self.correction.tell(query, outputs)
        assert isinstance(query, WindowQuery)
        asked, places = query.states, query.places
        if states is not None or self.edits.seen:
            states = asked if states is None else states
            self._edit(asked, states)
            self.x[places[0]] = asked = states
        m = table.convert(query.nodes, asked, outputs)
        if setup.path is not None:
            self._answers = setup.path(self.lo, asked, m)
        elif setup.forgetting is not None:
            self._answers = setup.forgetting(self.lo, asked, m)
        if self._keeper is not None:
            self._keeper.take(query.nodes, asked, m)
        if query.running[-1] == self.hi - 1:
            node = int(query.nodes[-1])
            self._fill.observe(node, asked[-1], m[-1])
            if setup.by_error:
                self._furthest = node
                clean = table.p[self._furthest].item() * asked[-1:] + table.q[self._furthest].item() * m[-1:]
                self._clean_square = setup.step.mean_squares(clean)
        if setup.history:
            self.m[places[0]] = m
        self.update.observe(asked, m)
        if self._carried is not None:
            self._carried.observe(asked, m)
        if self._astray is not None:
            self._astray.observe(asked, m)
        read = [asked, *(self.x[place] for place in places[1:])]
        outputs_read = [m, *(self.m[place] for place in places[1:])]
        z = self.z[query.noise_place] if table.stochastic else None
        phi = self._rounds.tell(query, setup.step(query.at, read, outputs_read, z), self.x)
        return None if phi is None else self._sweep(phi)

    def part(self) -> Part:
        """The trajectory of the sample."""
        assert self._keeper is not None, "the run was asked to keep trajectories"
        return self._keeper.part()

    def _edit(self, asked: Tensor, states: Tensor) -> None:
        """Notes which states the caller changed (edits.py); steps are then taken from the changed ones."""
        assert self.setup.single, "the loop refuses changed states, since follows_edits is False"
        self.edits.take(self.lo, asked, states, self.x[self._rounds.ends(self.lo, self.hi)])

    def _sweep(self, phi: Tensor) -> Tensor:
        """Updates all nodes of the window by equation (2); what `tell` returns.

        The clean-data estimate that fills new nodes was made from the last state before its update, and follows it.
        """
        self.phi, ends = phi, self._rounds.ends(self.lo, self.hi)
        old = self.edits.handed_out(self.x[ends])
        new = self.edits.spare(self.update(self.lo, self.hi, phi, old), phi)
        distance = self.update.distance(new, phi, old)
        judged = [self.setup.step.mean_squares(self.edits.spare(phi - old, 0.0))] if self.setup.by_residual else []
        if len(phi) > 1:
            distance = self.edits.spare(distance, 0.0)
            if self.setup.single:
                self._fill.follow(self.hi - 1, new[-2] - old[-2])
        if self._carried is not None:
            self._changes = distance
        if self._astray is not None:
            self._astray.follow(new - old)
        if self.setup.past_outputs is not None:
            self._moved = self.edits.spare(new - old, 0.0)
        self.x[ends] = new
        self.ages = [age + 1 for age in self.ages]
        mean_squares, ending = self.setup.step.mean_squares, list[Tensor]()
        if self.hi == self.setup.intervals:
            carried = None if self._carried is None else self._carried.look(self.lo, self.hi)
            ending = [mean_squares(new[-1:]), *([] if carried is None else [carried])]
        edited = [self.edits.shares] if self.edits.seen else []
        return torch.cat([mean_squares(distance), *judged, *edited, self._clean_square, self._answers, *ending]).flatten()

    def advance(self, norms: list[float], round: int) -> WindowRecord:
        """Accepts the leading nodes (at least one) and slides the window: new nodes get an initial guess, or, at a block's
        end, the corrector starts.

        Args:
            norms: What `tell` returned, on the host.
            round: The round's number, for the record.

        Raises:
            ValueError: If the state after the first node is not finite, or a state overflowed under a fixed number of sweeps.
        """
        if self.correction is not None:
            return self._corrected(norms, round)
        setup, first, passed = self.setup, self.lo, 1
        width, count = self.hi - first, self._count
        rows = [norms[begin : begin + count] for begin in range(0, len(norms), count)]
        changes, rest = rows[:width], rows[width:]
        judged, rest = (rest[:width], rest[width:]) if setup.by_residual else (changes, rest)
        edited, rest = (rest[:width], rest[width:]) if self.edits.seen else ([], rest)
        if setup.by_error:
            self.members.see(rest.pop(0), self._furthest, first)
        answers, ending = rest[: len(self._answers)], rest[len(self._answers) :]
        if all(map(math.isfinite, norms[: width * count])):
            self._final_squares = ending[0] if ending else None
            rms = [math.sqrt(max(row)) for row in changes]
            each, of_rule, shares = (
                _columns([[math.sqrt(v) for v in row] for row in part], count) for part in (changes, judged, edited)
            )
            passed = self.members.judge(first, each, of_rule, _columns(answers, count), self.ages, shares)
            errors = self.members.last_errors
            if ending and first + passed == self.hi:
                squares, apart = ending[1:] or ([0.0] * count, [0.0] * count)
                self.members.carry(squares, apart, errors)
        else:
            self._final_squares = None
            rms, errors = [math.inf] * self._salvage(), list[float]()
            self._changes, self._moved = (torch.zeros_like(v) for v in (self._changes, self._moved))
            self.members.forget()
        if self._carried is not None:
            self._carried.advance(first, self._changes[:passed], errors, self.edits)
            self._changes = self._changes[:0]
        if setup.past_outputs is not None:
            outputs = self.m[setup.history + 1 : setup.history + passed]
            setup.past_outputs.follow(first + 1, outputs, self._moved[: len(outputs)])
            self._moved = self._moved[:0]
        self._slide(passed)
        if self._astray is not None:
            self._drop_astray(first, rms)
        if setup.method.corrector is not None and self.lo in setup.blocks and setup.table.sigma[self.lo] > 0:
            place = setup.blocks.index(self.lo) - 1
            state = (self.noise, self.sample, self.final)
            self.correction = Correction(setup.step, setup.method.corrector, self.lo, place, *state)
        else:
            self._open()
        return WindowRecord(round, self.sample, first, rms, passed)

    def _corrected(self, change: list[float], round: int) -> WindowRecord:
        """Takes over the corrected state of a block's end."""
        assert self.correction is not None
        if not all(map(math.isfinite, change)):
            raise NotFinite(
                f"sample {self.sample} is not finite after the correction at node {self.lo} (time "
                f"{float(self.setup.table.t[self.lo]):g}): the model returned NaN or infinity, or the corrector's step is too "
                "long for it; give its Lipschitz constant, or no corrector"
            )
        self.x[self.setup.history] = self.correction.state
        self.correction, self._final_squares = None, None
        self._open()
        return WindowRecord(round, self.sample, self.lo, [math.sqrt(change[0])], 0)

    def _slide(self, passed: int) -> None:
        """Drops the states of `passed` nodes, which are final."""
        setup = self.setup
        begin, shift = setup.edges[self.lo], setup.edges[self.lo + passed] - setup.edges[self.lo]
        self._on_final(begin + 1, self.x[setup.history + 1 : setup.history + 1 + shift])
        self.edits.advance(passed, self.x[setup.history :])
        self.update.advance(passed)
        self.x, self.z = self.x[shift:], self.z[shift:]
        if setup.history:
            self.m = self.m[shift:]
        self.lo += passed
        self.ages = self.ages[passed:]

    def _drop_astray(self, first: int, rms: list[float]) -> None:
        """Drops the nodes that went astray, so that they are filled afresh.

        Args:
            first: The window's first node in the last sweep.
            rms: `[W]` root mean square change of each node after it.
        """
        assert self._astray is not None
        row = self._astray.row(first, rms) if math.isfinite(sum(rms)) else None
        if row is None or row.node + 2 >= self.hi:
            return
        self._fill.observe(row.node, row.state, row.output)
        self._fill.follow(row.node, row.change)
        count = max(row.node + 1 - self.lo, 0)
        self.update.keep(count)
        if self._carried is not None:
            self._carried.keep(count)
        self.members.keep(count)
        self._shorten(count)

    def _salvage(self) -> int:
        """Keeps the finite head of a window in which some state overflowed or some output was not finite; how many nodes that
        is. The rest is filled afresh, from nothing that was observed, as the newest output may have overflowed."""
        setup = self.setup
        count = finite_nodes(setup, self.phi, self.sample, self.lo, self.ages[0])
        self.x[self._rounds.ends(self.lo, self.hi)] = self.phi
        self._fill.forget()
        self.narrow(count)
        return count

    def narrow(self, width: int) -> None:
        """Drops the nodes of the window beyond its first ones, between two sweeps; pairs of earlier sweeps are dropped, too.

        Args:
            width: Nodes that stay, one at least.
        """
        self.update.forget()
        if self._carried is not None:
            self._carried.forget()
        self._shorten(width)

    def _shorten(self, width: int) -> None:
        """Drops the nodes of the window beyond its first ones."""
        setup = self.setup
        self.hi = min(self.hi, self.lo + width)
        self.ages = self.ages[: self.hi - self.lo]
        keep = setup.edges[self.hi] - setup.edges[self.lo]
        self.x, self.z = self.x[: setup.history + keep + 1], self.z[:keep]
        if setup.history:
            self.m = self.m[: setup.history + keep]

    @property
    def resizable(self) -> bool:
        """Whether the window's width is free: its sub-intervals are single steps, in no blocks, and are not swept by number."""
        method = self.setup.method
        return self.setup.single and method.blocks is None and method.sweeps is None and method.predictor != "held"

    def resize(self, rows: int) -> None:
        """Bounds the window's nodes, between two sweeps. Those beyond are dropped, and filled afresh when the window comes to
        them.

        Args:
            rows: Nodes at most, one at least; the method's own window is kept to as well.
        """
        if not self.resizable or self.done or rows == self._most:
            return
        self._most = rows
        if self.hi - self.lo > rows:
            self.narrow(rows)
        else:
            self._open()

    def place(self) -> Place:
        """The window's first node, and what its step reads."""
        at = self.setup.history
        return Place(self.lo, [self.x[at - j] for j in range(at + 1)], [self.m[at - 1 - j] for j in range(at)])

    def resume(self, place: Place) -> None:
        """Goes on from a place that single steps came to from the window's first node. They add no error; those of nodes before
        are carried along by the slope, as in a window of one node.

        Waits for the device where that is the chain's end.
        """
        assert self.resizable, "whoever walks asks whether the solver is resizable"
        setup, passed = self.setup, place.node - self.lo
        self.narrow(1)
        self.members.forget()
        self._final_squares = None
        if self._carried is not None:
            for first in range(self.lo, place.node, FILL):
                steps = min(FILL, place.node - first)
                self._carried.advance(first, self.x.new_zeros(steps, *self.x.shape[1:]), [], self.edits)
            squares = self._carried.squares
            if place.node == setup.intervals and passed and squares is not None:
                self.members.carry(squares, self._carried.apart.expand(self._count).tolist(), [0.0] * self._count)
        past = setup.history - min(place.node, setup.history)
        zero = torch.zeros_like(place.states[0])
        self.x = torch.stack([*[zero] * past, *reversed(place.states[: setup.history - past + 1])])
        if setup.history:
            self.m = torch.stack([*[zero] * past, *reversed(place.outputs[: setup.history - past])])
        if place.node and place.outputs:
            self._fill.observe(place.node - 1, place.states[1], place.outputs[0])
        self.z, self.ages = self.z[:0], []
        self.rounds += passed
        self.evaluations += passed
        self.lo = self.hi = place.node
        self._open()

    def heard(self, node: int, states: Tensor) -> None:
        """Hands on states `[n, ...]` from a node on that became final elsewhere."""
        self._on_final(node, states)

    def _open(self) -> None:
        """Widens the window to its full width and fills the nodes that enter it."""
        setup = self.setup
        width = 1 if self.lo < setup.method.warmup else min(setup.width, self._most)
        hi = min(self.lo + width, self._reach())
        if self._held and self.hi > self.lo:
            self.x[-1] = self.x[-2]
            self._held = self.hi < setup.intervals
        begin, first, last = setup.edges[self.lo], setup.edges[self.hi], setup.edges[hi]
        if setup.table.stochastic and last > first:
            drawn = setup.move(self.noise.draw(self.sample, range(first, last)))
            self.z = torch.cat([self.z, drawn])
        for left in range(first, last, FILL):
            right = min(left + FILL, last)
            states, outputs = self._fill(slice(left, right), self.x, self.z[left - begin : right - begin])
            self.x = torch.cat([self.x, states])
            if setup.history:
                self.m = torch.cat([self.m, outputs])
        self.ages += [0] * (hi - self.hi)
        if self._held and last > first:
            self._held = self.lo + width <= hi  # until the window hangs over what is left
            self.x[-1] = torch.zeros_like(self.x[-1]) if self._held else self.x[-2]
        self.hi = hi

    def _reach(self) -> int:
        """The block edge to which the window may reach: one further once the newest block has passed, or been swept as often
        as the stagger says."""
        blocks, edges = self.setup.method.blocks, self.setup.blocks
        if self.hi == edges[self._block] < self.setup.intervals:
            stagger = None if blocks is None else blocks.stagger
            if self.lo == self.hi or (stagger is not None and self.ages[-1] >= stagger):
                self._block += 1
        return edges[self._block]


def fill_of(setup: WindowSetup, x0: Tensor, guide: Guide | None, begin: Part | None) -> Fill:
    """The initial guess of one sample: a guide's, that from a trajectory, or the method's predictor."""
    if guide is not None:
        return GuidedFill(guide)
    if begin is not None:
        return RememberedFill(setup.remembered, remembered(begin, setup.table, DATA_VARIANCE, setup.move))
    return PredictedFill(setup.recurrence, x0)


def window_of(setup: WindowSetup, problem: Problem, sample: int) -> WindowSolver:
    """The window of one sample of a problem."""
    return WindowSolver(
        setup,
        problem.noise,
        sample,
        problem.start_of(sample),
        problem.on_final,
        begin=problem.part_of(sample),
        keep=problem.keep,
    )


def update_of(setup: WindowSetup) -> Update:
    """The update that a method names, for one sample."""
    if setup.method.anderson is not None:
        return AndersonUpdate(setup)
    return SecantUpdate(setup) if setup.method.secants else NewtonUpdate(setup)


def _columns(rows: Sequence[Sequence[float]], count: int) -> list[list[float]]:
    """The numbers of each of `count` members, of rows that have one for each."""
    return [[row[k] for row in rows] for k in range(count)]


def _unheard(first: int, states: Tensor) -> None:
    """No one listens to the states that became final."""

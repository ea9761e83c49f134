"""One sample's collocation system (system.py): what it asks for, what it makes of the answers, where it adds nodes.

A round evaluates the network at some of the nodes, the **active** ones: those not seen yet, and those whose state has moved so
far since they were evaluated that the sample may tell; the first of them along the chain if there are more than the window
allows. Their forcings u[k], and the differences to what they were at other states, give all states anew by Newton's step on
equation (1) of system.py,

    y = f x[0] + R (u + du) + n,      du[k] = DU[k] K[k] DX[k]^T (y[k] - y[k] evaluated),                        (1)

with the pairs DX, DU of earlier rounds as a model of the forcing's derivative (methods/secant.py). What the pairs do not know
is small already, since the forcing is what answers least to the state (interval.py).

What a node **holds back** is the most that its forcing can have changed since it was evaluated: its state's change, times the
steepest answer that the node has given so far, or that a clean-data estimate would. A node that was evaluated once has shown
no answer, and its neighbours stand for it: in units of the network's output the answer changes little from a node to the next,
and at the noisy end a trained network's can be far above any clean-data estimate's. What is held back is carried to the sample
by equation (1), pairs included. Where the sample is about to decide what it will be, the pairs know, and a change that the
chain's linear part would forget is seen to grow. Carried together, the changes of all nodes tell how far the sample may move
still; when that is small enough, the sample is at rest.

The interpolation error is estimated (error.py) with the same propagation, as soon as what the sweeps leave does not hide it. If
both errors together are below the tolerance, the sample is found. If the interpolation error alone exceeds it, the intervals
that matter most are cut, their nodes begin with the forcings and pairs of the old ones, and the rounds go on; to bring the
nodes to rest before would be lost work. A sample that would need a good part of the chain's own nodes is handed to the window
loop, which begins with what was found if that is near. Memory is O(nodes) states.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.methods.collocation.dense_output import DenseOutput
from paradiff.methods.collocation.error import Estimate, weighted
from paradiff.methods.collocation.linearization import Linearization
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.system import CollocationSystem, draw, noise_states
from paradiff.methods.window.solver import WindowSolver
from paradiff.solver.protocol import Query
from paradiff.solver.records import CollocationRecord, WindowRecord
from paradiff.solver.solution import ErrorEstimate


@dataclass(frozen=True, eq=False)
class CollocationQuery(Query):
    """The rows of one round: nodes of the mesh, then pairs of intervals.

    Attributes:
        chosen: The numbers of the mesh's nodes.
        pairs: The numbers of the intervals of twice the length, whose outputs tell the interpolation's error.
        handed: `[R, b, d]` the states to the last digit of the dtype in which the network is given them.
    """

    chosen: list[int]
    pairs: list[int]
    handed: Tensor


class CollocationSolver:
    """The system of one sample. Tensors of states are `[M, b, d]`, b the members.

    Attributes:
        sample: The sample.
        done: Whether the sample is found.
        estimate: Of the root mean square error from interpolation.
        iteration_error: That from sweeps not made.
        rounds: Rounds in which the sample took part.
        evaluations: Its rows.
    """

    def __init__(self, setup: CollocationSetup, noise: Noise, sample: int, start: Tensor | None) -> None:
        self.control = setup.control
        self.setup, self.noise, self.sample = setup, noise, sample
        x0 = setup.move(noise.start(sample)) * setup.table.start_scale if start is None else setup.move(start)
        self.shape = tuple(x0.shape)
        self._x0 = x0.reshape(x0.shape[0], -1) if setup.members and x0.ndim > 1 else x0.reshape(1, -1)
        self.rounds = self.evaluations = 0
        self.done = False
        self._final = x0
        self._visited = torch.zeros(0, dtype=torch.int64)  # fine nodes of the last round
        self.iteration_error = self.residual = math.inf
        self._recurrence, self._settled_shift = setup.recurrence, setup.settled_shift
        self._drawn: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._window: WindowSolver | None = None
        self.estimate = Estimate(setup, noise, sample, self._x0, self.shape)
        self._begin(setup.system(setup.recurrence, setup.points))
        count = len(self.system.intervals)
        self._u = self._x0.new_zeros(count, *self._x0.shape)
        self._y = self._u.clone()
        self._dx = self._x0.new_zeros(count, setup.method.secants, *self._x0.shape)
        self._du = self._dx.clone()
        self._known, self._guessed = [False] * count, [False] * count
        self._solve()

    # -- the system ---------------------------------------------------------------------------------------------------

    def _begin(self, system: CollocationSystem) -> None:
        """Takes over a collocation system: coefficients on the device, and the noises of its intervals."""
        setup, table, rec = self.setup, self.setup.table, system.recurrence
        self.system = system
        nodes = system.nodes
        self._influence, self._initial = setup.move(system.influence), setup.move(system.initial)
        if table.stochastic:
            kept, self._drawn = self._drawn, {}
            for interval in system.intervals:
                place = (interval.left, interval.right)
                self._drawn[place] = kept[place] if place in kept else draw(interval, self.noise, self.sample)
            self._share = self._moved(system.noises([*self._drawn.values()]))
        else:
            self._share = self._x0.new_zeros(1)
        steep = torch.minimum(
            1 / table.alpha[nodes].clamp(min=1e-12),
            self.control.lipschitz_cap * rec.variance * table.alpha[nodes] / table.sigma[nodes] ** 2,
        )
        span = torch.maximum(rec.g[nodes], steep - rec.g[nodes])
        self._least = setup.move(rec.nu[nodes] * span)  # that a forcing answers to its state; and what was seen
        self._seen = torch.zeros_like(self._least)
        self._q_u = setup.move(rec.q_u[nodes].abs().clamp(min=1e-300))
        self.estimate.begin(system)
        self._sweeps = 0
        self.active = list(range(len(system.intervals)))

    def _moved(self, noises: Tensor) -> Tensor:
        """Noises as states."""
        return self.setup.move(noises).view(-1, *self._x0.shape)

    def _solve(self) -> None:
        """All states anew, from forcings and pairs: equation (1)."""
        base = self._initial[:, None, None] * self._x0 + self._share + weighted(self._influence, self._u)
        kept = max(1, self.control.most_pairs // len(self._u))
        self._response = Linearization(
            self._influence, self.system.nodes, self._dx[:, :kept], self._du[:, :kept], self.control.pair_uncertainty
        )
        base = self._response.states(base, self._y)
        self._states, self._final = base[:-1], base[-1].view(self.shape)

    def _mean_squares(self, changes: Tensor) -> Tensor:
        """`[J]` of changes `[J, b, d]` of the sample."""
        return self.setup.step.mean_square(changes.view(-1, *self.shape))

    # -- the solver's protocol ----------------------------------------------------------------------------------------

    @property
    def final(self) -> Tensor:
        """The sample as far as it is known."""
        return self._final.to(self.setup.dtype) if self._window is None else self._window.final

    @property
    def error_estimate(self) -> ErrorEstimate:
        """How far to trust the sample."""
        if self._window is not None:
            verified, allowed = self._window.error_estimate, self.setup.strictness(self.estimate.growth)
            error = verified.estimated_error * allowed
            return dataclasses.replace(verified, estimated_error=error, rounds=self.rounds, evaluations=self.evaluations)
        interpolation_error = self.estimate.interpolation_error
        total = math.hypot(interpolation_error, self.iteration_error)
        return ErrorEstimate(self.residual, total, self.rounds, self.evaluations, interpolation_error)

    @property
    def newest(self) -> Tensor:
        """The sample as far as it is known."""
        return self._final.to(self.setup.dtype) if self._window is None else self._window.newest

    def ask(self) -> Query:
        """The rows wanted now."""
        setup = self.setup
        if self._window is not None:
            return self._window.ask()
        window = setup.method.window or len(self.system.intervals) * 2
        chosen = self.active[:window]
        pairs = self._ready()[: window - len(chosen)]
        nodes, states = self.system.nodes[chosen], self._states[chosen]
        if pairs:
            more = self.estimate.asked(pairs, self._u)
            nodes, states = torch.cat([nodes, more[0]]), torch.cat([states, more[1]])
        handed = states.to(setup.dtype).to(states.dtype)  # what the network is asked for, to the last digit
        rows = setup.step.seen(nodes.to(setup.device), handed.view(-1, *self.shape)).to(setup.dtype)
        return CollocationQuery(nodes, rows, chosen, pairs, handed)

    def _ready(self) -> list[int]:
        """Intervals of twice the length that are to be asked still, as far as the nodes are settled."""
        return self.estimate.wanted(min(self.active, default=len(self._known)), [*self._drawn.values()])

    def tell(self, query: Query, outputs: Tensor, states: Tensor | None = None) -> Tensor | None:
        """Takes the outputs of a query.

        Args:
            query: What `ask` returned.
            outputs: `[R, ...]` outputs.
            states: States as the caller changed them, which this method cannot follow.

        Returns:
            Mean squares: what each node may still move the sample by, how far each is from where it was evaluated, what all
            nodes together may move the sample by, how far the round moved it, its size; and whether all outputs are finite.

        Raises:
            ValueError: If states were changed.
        """
        if states is not None:
            raise ValueError(
                f"the states were changed between steps, and {self.setup.method.name} visits a few of the chain's states "
                "only; use quasi_newton or parasolver"
            )
        self.rounds += 1
        self.evaluations += len(outputs)
        if self._window is not None:
            return self._window.tell(query, outputs)
        assert isinstance(query, CollocationQuery)
        self._visited = query.nodes
        table, y, before = self.setup.table, query.handed, self._final
        m = table.convert(query.nodes, y.view(-1, *self.shape), outputs.to(y.dtype)).reshape(y.shape)
        rec, move = self.system.recurrence, self.setup.move
        p_u, q_u = (move(v[query.nodes])[:, None, None] for v in (rec.p_u, rec.q_u))
        u = p_u * y + q_u * m
        count = len(query.chosen)
        if query.pairs:
            self.estimate.take(query.pairs, u[count:], self._u)
        if count:
            self._observe(query.chosen, y[:count], u[:count])
            self._fill(query.chosen[0])
            self._solve()
        changes = self._states - self._y
        least = (self.control.rounding_share * self.setup.resolution) ** 2 * self._y.square().sum(2)
        told = changes.square().sum(2) > least
        unknown = torch.where(told[..., None], self._response.unknown(changes), 0.0)
        on_sample = self._response.on_sample(self._steepness() * unknown, self._influence)
        held, together = self._mean_squares(on_sample), self._mean_squares(on_sample.sum(0, keepdim=True))
        away = self.setup.step.mean_square(changes.view(-1, *self.shape))
        moved = self._mean_squares((self._final - before).view(1, *self._x0.shape))[0]
        finite = torch.isfinite(m).all().to(held.dtype)
        return torch.cat([held, away, together, torch.stack([moved, self._final.square().mean(), finite])])

    def _steepness(self) -> Tensor:
        """`[M, 1, 1]`: how strongly forcings may answer to their states; nodes evaluated again speak for the others."""
        count, asked = len(self._seen), self._seen > 0
        index = torch.arange(count, device=self._seen.device)
        before = torch.where(asked, index, -1).cummax(0).values
        after = count - 1 - torch.where(asked.flip(0), index, -1).cummax(0).values.flip(0)
        answers = torch.cat([self._seen / self._q_u, self._seen.new_zeros(1)])  # the network's; none beyond the ends
        near = torch.maximum(answers[torch.where(before < 0, count, before)], answers[after])
        return torch.maximum(self._least, near * self._q_u)[:, None, None]

    def _observe(self, chosen: list[int], y: Tensor, u: Tensor) -> None:
        """Keeps the outputs of the nodes `chosen`, and what changed since they were last evaluated."""
        at = torch.tensor(chosen, device=y.device)
        if self._dx.shape[1]:
            old = torch.tensor([self._known[n] for n in chosen], device=y.device)[:, None]
            moved, told = y - self._y[at], u - self._u[at]
            large = moved.square().sum(2) > (self.control.pair_rounding * self.setup.resolution) ** 2 * y.square().sum(2)
            large = large & old
            answer = told.square().sum(2) / moved.square().sum(2).clamp(min=1e-300)
            seen = torch.where(large, answer, 0.0).amax(1).sqrt()
            self._seen[at] = torch.maximum(self._seen[at], seen)
            large = large[:, None, :, None]
            for kept, fresh in ((self._dx, moved), (self._du, told)):
                pushed = torch.cat([fresh[:, None], kept[at, :-1]], dim=1)
                kept[at] = torch.where(large, pushed, kept[at])
        self._y[at], self._u[at] = y, u
        for n in chosen:
            self._known[n] = self._guessed[n] = True

    def _fill(self, first: int) -> None:
        """Nodes of which nothing is known yet get the forcing of the last one before them that was evaluated."""
        unknown, source, last = [], [], first
        for n, (known, guessed) in enumerate(zip(self._known, self._guessed, strict=True)):
            last = n if known else last
            if not guessed:
                unknown.append(n)
                source.append(last)
        if unknown:
            self._u[unknown] = self._u[source]
            self._y[unknown] = self._states[unknown]

    def advance(self, norms: list[float], round: int) -> CollocationRecord | WindowRecord:
        """Judges the round: which nodes are active now, or whether the sample is at rest; then whether it needs more nodes.

        Args:
            norms: What `tell` returned, on the host.
            round: The round's number, for the record.

        Raises:
            ValueError: If the model returned NaN or infinity.
        """
        if self._window is not None:
            sweep = self._window.advance(norms, round)
            self.done = self._window.done
            return dataclasses.replace(sweep, passed=int(self.done))
        *nodes, together, moved, size, finite = norms
        visited, count = self._visited.tolist(), len(nodes) // 2
        held, away = nodes[:count], nodes[count:]
        if not finite or not all(map(math.isfinite, nodes)):
            raise ValueError(
                f"sample {self.sample} is not finite after round {round} (times {float(self.setup.table.t[visited[0]]):g} "
                f"to {float(self.setup.table.t[visited[-1]]):g}): the model returned NaN or infinity, or overflowed its "
                "dtype; check its weights, its dtype and the times it was trained on, or use quasi_newton, which takes the "
                "chain's own steps"
            )
        tolerance = self.setup.method.tolerance
        rest = self.control.iteration_share * tolerance
        limit = (self.control.node_share * rest / count) ** 2
        self._sweeps += 1
        self.active = [n for n, e in enumerate(held) if not self._known[n] or e > limit]
        self.iteration_error, self.residual = math.sqrt(max(together, sum(held))), math.sqrt(max(away))
        most = self.control.most_sweeps * (
            1 + count // (self.setup.method.window or count)
        )  # even if a few nodes keep the others unseen
        known = all(self._known)
        at_rest = known and (self.iteration_error <= rest or not self.active)  # nothing is worth asking again
        near = at_rest or (known and self.iteration_error <= self.control.early_factor * tolerance)
        if at_rest:
            self.active = []
        if near and self._shift_wanted(size):
            self._reshift(size)
        elif at_rest and self._ready():
            pass
        elif not (near and self._judge(at_rest)) and self._sweeps > most:
            self._give_up()
        return CollocationRecord(
            round,
            self.sample,
            visited,
            count,
            math.sqrt(moved),
            self.estimate.interpolation_error,
            self.iteration_error,
            int(self.done),
        )

    # -- the interpolation error --------------------------------------------------------------------------------------

    def _judge(self, at_rest: bool) -> bool:
        """Ends the sample, or cuts the intervals that leave out too much; whether it could tell."""
        method, system, mesh, estimate = self.setup.method, self.system, self.setup.mesh, self.estimate
        if not at_rest and (method.exact or not estimate.ready):
            return False
        (shares, groups), amplified = estimate.shares(self._response, self._influence, self._u, self._final)
        interpolation_error = math.sqrt(sum(e * e for e in shares))
        enough = method.exact or math.hypot(interpolation_error, self.iteration_error) <= method.tolerance
        if not at_rest and not enough and interpolation_error <= max(self.iteration_error, method.tolerance):
            return False
        points = system.points
        if not enough:
            far = max(interpolation_error, method.tolerance) / method.tolerance
            share = self.control.refined_share * method.tolerance / far**self.control.refined_exponent
            points = mesh.refine(
                points,
                shares=shares,
                groups=groups,
                wanted=share,
                most=self.setup.most_nodes,
                most_parts=self.control.most_parts,
            )
        too_many = (
            method.max_nodes is None
            and len(points) - 1 > self.control.handover_share * len(mesh.candidates)
            and method.target == "chain"
        )
        stuck = not enough and (points == system.points or too_many)
        if stuck and not at_rest:
            return False
        estimate.judge(interpolation_error, amplified, self._response, self._final, self.iteration_error)
        if enough:
            self.setup.note(system.points, shares, groups, self._recurrence.variance)
            self._finish(method.exact)
        elif stuck:
            self._finish(points != system.points)  # else nothing is left to cut, or no node to spare
        else:
            parts = [bisect_left(points, right) - bisect_left(points, left) for left, right in pairwise(system.points)]
            estimate.cut((shares, groups), parts)
            self._remesh(self.setup.system(self._recurrence, points))
        return True

    def _remesh(self, new: CollocationSystem) -> None:
        """Takes over a finer collocation system; new nodes begin with what the old ones nearest to them know."""
        old, rec, count = self.system, self._recurrence, len(new.intervals)
        known, near, ratio = [], [], []
        for n, interval in enumerate(new.intervals):
            if new.averaged:
                k = bisect_right(old.points, interval.left) - 1
                same = old.points[k : k + 2] == [interval.left, interval.right]
            else:
                k = int((rec.log_snr[old.nodes] - rec.log_snr[new.nodes[n]]).abs().argmin())
                same = bool(old.nodes[k] == new.nodes[n])
            level = rec.evidence[old.nodes[k]] / rec.evidence[new.nodes[n]]
            known.append(same and self._known[k])
            near.append(k)
            ratio.append(1.0 if same or not 0 < level < math.inf else float(level))
        at, factor = torch.tensor(near, device=self.setup.device), self.setup.move(torch.tensor(ratio))[:, None, None]
        self._y, self._dx, self._du = self._y[at] * factor, self._dx[at] * factor[:, None], self._du[at].clone()
        seen = self._seen[at] / factor[:, 0, 0]
        self._u = self._u[at] if new.averaged else weighted(self.setup.move(old.interpolation[new.nodes]), self._u)
        self._known, self._guessed = known, [True] * count
        self._begin(new)
        self._seen = seen
        if not new.averaged:  # guessed forcings go with the states that they give
            base = self._initial[:, None, None] * self._x0 + self._share + weighted(self._influence, self._u)
            guessed = [n for n, k in enumerate(known) if not k]
            self._y[guessed] = base[guessed]
        self._solve()
        self.active = [n for n, k in enumerate(known) if not k]

    def _shift_wanted(self, size: float) -> bool:
        """Whether the data's variance, as the first sample at rest has it, is far from the one assumed."""
        if self._settled_shift:
            return False
        self._settled_shift, far = True, self.control.variance_margin
        return size > 0 and not 1 / far <= size / self._recurrence.variance <= far

    def _reshift(self, variance: float) -> None:
        """Begins anew with another variance; what was evaluated is kept."""
        rounded = 2.0 ** round(math.log2(variance))
        before, self._recurrence = self._recurrence, self.setup.recurrence_of(rounded)
        nodes = self.system.nodes
        nu, g = (self.setup.move(v[nodes])[:, None, None] for v in (before.nu, before.g))
        clean = self._u / nu + g * self._y
        self._drawn = {}  # their weights depend on the variance
        self.estimate.forget()
        self._begin(self.setup.system(self._recurrence, self.system.points))
        nu, g = (self.setup.move(v[nodes])[:, None, None] for v in (self._recurrence.nu, self._recurrence.g))
        self._u = nu * (clean - g * self._y)
        self._dx, self._du = torch.zeros_like(self._dx), torch.zeros_like(self._du)
        self._solve()

    def _give_up(self) -> None:
        """It did not come to rest."""
        self.iteration_error = math.inf
        self._finish(self.setup.method.target == "chain" and self.setup.method.max_nodes is None)

    def _finish(self, verify: bool) -> None:
        """The sample is found; or the window loop begins to verify it, from the states that were found."""
        if not verify:
            self.done = True
            return
        setup, method = self.setup, self.setup.method
        near = (
            math.hypot(self.estimate.interpolation_error, self.iteration_error)
            <= self.control.handover_error * method.tolerance
        )
        x0 = self._x0.view(self.shape).to(setup.dtype)
        guide = self._trajectory() if near else None  # far off, what was found misleads
        self._window = WindowSolver(setup.verify(self.estimate.growth), self.noise, self.sample, x0, guide=guide)

    def _trajectory(self) -> DenseOutput:
        """The states of all nodes of the chain, as far as they are known."""
        setup, system = self.setup, self.system
        initial, influence = setup.move(system.point_initial[:-1]), setup.move(system.point_influence[:-1])
        states = initial[..., None, None] * self._x0 + weighted(influence.flatten(0, 1), self._u).view(
            *initial.shape, *self._x0.shape
        )
        if setup.table.stochastic:
            noises = noise_states(system.point_noise_weights[:-1].flatten(0, 1), [*self._drawn.values()])
            states = states + self._moved(noises).view_as(states)
        states, forcings = states.view(*initial.shape, *self.shape), self._u.view(-1, *self.shape)
        return DenseOutput(system, forcings, states, self.noise, self.sample, setup.move)

"""One sample's sparse system (sparse.py): what it asks for, what it makes of the answers, where it adds nodes.

A round evaluates the network at some of the nodes, the **active** ones: those not seen yet, and those whose state has moved so
far since they were evaluated that the sample may tell; the first of them along the chain if there are more than the window
allows. Their drives u[k], and the differences to what they were at other states, give all states anew by Newton's step on
equation (1) of sparse.py,

    y = f x[0] + R (u + du) + n,      du[k] = DU[k] K[k] DX[k]^T (y[k] - y[k] evaluated),                        (1)

with the pairs DX, DU of earlier rounds as a model of the drive's derivative (secant.py). What the pairs do not know is small
already, since the drive is what answers least to the state (gap.py).

When a sample has come to rest, its interpolation error is estimated (defect.py). If both errors together exceed the tolerance,
the gaps that matter most are cut, their nodes begin with the drives and pairs of the old ones, and the rounds go on. Memory
is O(nodes) states.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right

import torch
from torch import Tensor

from paradiff.collocation import VARIANCE, Collocation, placement_on
from paradiff.continuum import continuum
from paradiff.defect import CAUTION, REDUCTION, Merged, left_out, merged
from paradiff.gap import Gap, Recurrence
from paradiff.method import Method
from paradiff.noise import Noise
from paradiff.secant import Model
from paradiff.slope import shifted
from paradiff.solution import Certificate, Sweep, Visit
from paradiff.sparse import Sparse, draw
from paradiff.step import Step
from paradiff.table import Table
from paradiff.trajectory import Trajectory
from paradiff.window import Plan, Window

STEEPEST = 4.0  # the clean-data estimate answers at most so many times as strongly as that of Gaussian data
VERIFY_SECANTS = 1
ACTIVE = 0.06  # share of the tolerance, over the root of the nodes, that a node may hold back without being evaluated again
CLOSED = 0.5  # share of the tolerance that the closing sweep may move the sample
CLOSING = 30.0  # a node that holds back so much less than what makes it active is not asked again at the close
STRICTER = 4.0
REST = 0.3  # share of the tolerance that sweeps may leave
GAPS = 0.3  # share of the tolerance to which gaps are cut when they must be
LEAST_THETA, MOST_THETA = 0.3, 0.9
MOST_SWEEPS = 100  # times the rounds that a sweep takes, after which a sample that finds no rest is given up
MOST_PAIRS = 600  # in the system of a round: with more nodes than a few hundred, each has fewer pairs
MOST_PARTS = 4  # into which a gap is cut at once
FAR = 4.0  # factor by which the data's variance may be off


class Ground:
    """What all samples of a run share.

    Args:
        table: The sampler.
        method: The method.
        device: Where states live.
        dtype: Their dtype.
        members: Whether a state is a batch of members (solve.py).
        resolution: Relative precision of the network's outputs.
    """

    def __init__(
        self,
        table: Table,
        method: Collocation,
        device: torch.device,
        dtype: torch.dtype,
        members: bool = False,
        resolution: float | None = None,
    ) -> None:
        if method.target != "chain":
            kind = method.target
            coarse = table
            table = coarse.derived(("continuum", kind), lambda: continuum(coarse, kind))
        self.table, self.method, self.device, self.dtype, self.members = table, method, device, dtype, members
        work = dtype if device.type == "mps" else torch.float64  # a step with nearly parallel pairs loses digits
        self.resolution = torch.finfo(dtype).eps if resolution is None else resolution
        self.step = Step(table, device, work, members)
        self.t, self.move = self.step.t, self.step.move
        self.order = method.degree(table)
        self.most_nodes = min(method.max_nodes or table.steps, table.steps)
        self.recurrence = self.recurrence_of(VARIANCE if method.shift == "auto" else float(method.shift))
        self.verify = None
        if method.exact:
            slope = shifted(self.recurrence.variance)
            loop = Method("collocation", slope, method.window, tolerance=method.tolerance, secants=VERIFY_SECANTS)
            self.verify = Plan(table, loop, device, dtype, members, resolution)
        self.placement = placement_on(table)
        self.edges = method.edges(table)

    def recurrence_of(self, variance: float) -> Recurrence:
        """The fine chain's recurrence with a data variance; made once for a table."""
        return self.table.derived(("recurrence", variance), lambda: Recurrence(self.table, variance))

    def sparse(self, recurrence: Recurrence, edges: list[int]) -> Sparse:
        """The sparse table with such edges; those to begin with are made once for a table."""
        if edges != self.edges:
            return Sparse(recurrence, edges, self.order)
        key = ("sparse", recurrence.variance, self.order, tuple(edges))
        return self.table.derived(key, lambda: Sparse(recurrence, edges, self.order))


class Implicit:
    """The system of one sample. Tensors of states are `[M, b, d]`, b the members.

    Attributes:
        sample: The sample.
        change: What `slide` wants to know of the last round, on the device: mean squares.
        done: Whether the sample is found.
        gap_error: Estimated root mean square error from interpolation; infinite before it was estimated.
        sweep_error: That from sweeps not made.
        rounds: Rounds in which the sample took part.
        evaluations: Its rows.
    """

    def __init__(self, ground: Ground, noise: Noise, sample: int, start: Tensor | None) -> None:
        self.ground, self.noise, self.sample = ground, noise, sample
        x0 = ground.move(noise.start(sample)) * ground.table.start_scale if start is None else ground.move(start)
        self.shape = tuple(x0.shape)
        self._x0 = x0.reshape(x0.shape[0], -1) if ground.members and x0.ndim > 1 else x0.reshape(1, -1)
        self.rounds = self.evaluations = 0
        self.done = False
        self._final = x0
        self.gap_error = self.sweep_error = math.inf
        self.residual = math.inf
        self._closing: list[int] | None = None  # nodes that the closing sweep still has to evaluate
        self._mark, self._strictness = x0, 1.0
        self._recurrence, self._settled_shift = ground.recurrence, ground.method.shift != "auto"
        self._drawn: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._merged: list[Merged] | None = None  # asked for now
        self._window: Window | None = None  # verifies
        self._rested: Tensor | None = None
        self._amplified = 1.0
        self._begin(ground.sparse(ground.recurrence, ground.edges))
        count = len(self.sparse.gaps)
        self._u = self._x0.new_zeros(count, *self._x0.shape)
        self._y = self._u.clone()
        self._dx = self._x0.new_zeros(count, ground.method.secants, *self._x0.shape)
        self._dm = self._dx.clone()
        self._known, self._guessed = [False] * count, [False] * count
        self._solve()

    # -- the system ---------------------------------------------------------------------------------------------------

    def _begin(self, sparse: Sparse) -> None:
        """Takes over a sparse table: coefficients on the device, and the noises of its gaps."""
        ground, table, rec = self.ground, self.ground.table, sparse.recurrence
        self.sparse = sparse
        nodes = sparse.nodes
        self._reach, self._start = ground.move(sparse.reach), ground.move(sparse.start)
        of_state, of_output = rec.nu * (table.p - rec.g), rec.nu * table.q
        self._of_state, self._of_output = (ground.move(v[nodes])[:, None, None] for v in (of_state, of_output))
        if table.stochastic:
            kept = self._drawn
            self._drawn = {}
            for gap in sparse.gaps:
                place = (gap.left, gap.right)
                self._drawn[place] = kept[place] if place in kept else self._draw_gap(gap)
            drawn = [self._drawn[gap.left, gap.right] for gap in sparse.gaps]
            self._share = sparse.noises(drawn).view(-1, *self._x0.shape)
        else:
            self._share = self._x0.new_zeros(1)
        steep = torch.minimum(
            1 / table.alpha[nodes].clamp(min=1e-12), STEEPEST * rec.variance * table.alpha[nodes] / table.sigma[nodes] ** 2
        )
        span = torch.maximum(rec.g[nodes], steep - rec.g[nodes])
        self._effect = (sparse.reach[-1].abs() * rec.nu[nodes] * span).tolist()
        self._totals: list[float] = []
        self._closing = None
        self.active = list(range(len(sparse.gaps)))

    def _draw_gap(self, gap: Gap) -> tuple[Tensor, Tensor]:
        ends, own = draw(gap, self.noise, self.sample)
        return self.ground.move(ends), self.ground.move(own)

    def _solve(self) -> None:
        """All states anew, from drives and pairs: equation (1)."""
        base = self._start[:, None, None] * self._x0 + self._share + self._times(self._reach, self._u)
        if self._dx.shape[1]:
            self._pairs = slice(max(1, min(self._dx.shape[1], MOST_PAIRS // len(self._u))))
            dx, dm = self._dx[:, self._pairs], self._dm[:, self._pairs]
            self._model = Model(dx, [(self._reach[:-1], dm)])
            base = base + self._times(self._reach, (dm * self._model(base[:-1] - self._y)).sum(1))
        self._states, before = base[:-1], self._final
        self._final = base[-1].view(self.shape)
        self._moved = self.ground.step.mean_square((self._final - before)[None])

    @staticmethod
    def _times(matrix: Tensor, values: Tensor) -> Tensor:
        return (matrix @ values.flatten(1)).view(-1, *values.shape[1:])

    # -- the solver's protocol ----------------------------------------------------------------------------------------

    @property
    def final(self) -> Tensor:
        """The sample as far as it is known."""
        return self._final.to(self.ground.dtype) if self._window is None else self._window.final

    @property
    def certificate(self) -> Certificate:
        """How far to trust the sample."""
        if self._window is not None:
            verified = self._window.certificate
            return dataclasses.replace(verified, rounds=self.rounds, evaluations=self.evaluations)
        total = math.hypot(self.gap_error, self.sweep_error)
        return Certificate(self.residual, total, self.rounds, self.evaluations, self.gap_error)

    def rows(self) -> tuple[Tensor, Tensor]:
        """The rows wanted now: fine nodes `[R]` and states `[R, ...]` as the network expects them."""
        ground = self.ground
        if self._window is not None:
            return self._window.rows()
        if self._merged is not None:
            self._asked = self._merged[len(self._found) :][: ground.method.window]
            self.nodes = torch.tensor([m.gap.node for m in self._asked])
            states = torch.stack([self._merged_state(m) for m in self._asked])
        else:
            self._chosen = self.active[: ground.method.window]
            self._at = torch.tensor(self._chosen, device=ground.device)
            self.nodes = self.sparse.nodes[self._chosen]
            states = self._states[self._at]
        self._handed = states.to(ground.dtype).to(states.dtype)  # what the network is asked for, to the last digit
        return self.nodes, ground.step.seen(self.nodes.to(ground.device), self._handed.view(-1, *self.shape)).to(ground.dtype)

    def absorb(self, outputs: Tensor, states: Tensor | None = None) -> bool:
        """Takes the outputs of the rows last asked for; whether `change` is new.

        Args:
            outputs: `[R, ...]` outputs.
            states: States as the caller changed them, which this method cannot follow.

        Raises:
            ValueError: If states were changed.
        """
        if states is not None:
            raise ValueError(
                f"the states were changed between steps, and {self.ground.method.name} visits a few of the chain's states "
                "only; use quasi_newton or parasolver"
            )
        self.rounds += 1
        self.evaluations += len(outputs)
        if self._window is not None:
            self._window.absorb(outputs)
            self.change = self._window.change
            return True
        outputs = outputs.to(self._handed.dtype)
        m = self.ground.table.convert(self.nodes, self._handed.view(-1, *self.shape), outputs).reshape(self._handed.shape)
        if self._merged is not None:
            return self._absorb_merged(m)
        at, y = self._at, self._handed
        u = self._of_state[at] * y + self._of_output[at] * m
        self._observe(at, y, u)
        self._fill()
        self._solve()
        away = self.ground.step.mean_square((self._states - self._y).view(-1, *self.shape))
        finite = torch.isfinite(m).flatten(1).all(1).to(away.dtype)
        clean = (
            m[-1] * self.ground.table.q[self.nodes[-1]].item() + y[-1] * self.ground.table.p[self.nodes[-1]].item()
        ).square()
        since = self.ground.step.mean_square((self._final - self._mark)[None])
        self.change = torch.cat([away, self._moved, since, clean.mean()[None], finite.prod()[None]])
        return True

    def _observe(self, at: Tensor, y: Tensor, u: Tensor) -> None:
        """Keeps what the nodes `at` answered, and what changed since they were last evaluated."""
        if self._dx.shape[1]:
            old = torch.tensor([self._known[n] for n in self._chosen], device=y.device)[:, None]
            moved, told = y - self._y[at], u - self._u[at]
            large = moved.square().sum(2) > (64 * self.ground.resolution) ** 2 * y.square().sum(2)
            large = (large & old)[:, None, :, None]
            for kept, fresh in ((self._dx, moved), (self._dm, told)):
                pushed = torch.cat([fresh[:, None], kept[at, :-1]], dim=1)
                kept[at] = torch.where(large, pushed, kept[at])
        self._y[at], self._u[at] = y, u
        for n in self._chosen:
            self._known[n] = self._guessed[n] = True

    def _fill(self) -> None:
        """Nodes of which nothing is known yet get the drive of the last one before them that was evaluated."""
        unknown, source, last = [], [], self._chosen[0]
        for n, (known, guessed) in enumerate(zip(self._known, self._guessed, strict=True)):
            last = n if known else last
            if not guessed:
                unknown.append(n)
                source.append(last)
        if unknown:
            self._u[unknown] = self._u[source]
            self._y[unknown] = self._states[unknown]

    def slide(self, change: list[float], round: int) -> Visit | Sweep:
        """Judges the round: which nodes are active now, or whether the sample is at rest; then whether it needs more nodes.

        Args:
            change: `change` on the host.
            round: The round's number, for the record.

        Raises:
            ValueError: If the model returned NaN or infinity.
        """
        if self._window is not None:
            sweep = self._window.slide(change, round)
            self.done = self._window.done
            return dataclasses.replace(sweep, passed=int(self.done))
        visited = self.nodes.tolist()
        if self._merged is not None:
            if len(self._found) == len(self._merged):
                groups = [(pair.first, pair.first + 1) for pair in self._merged]
                self._merged = None
                self._judge(change, groups)
            return self._visit(round, visited, 0.0)
        *away, total, since, clean, finite = change
        if not finite or not all(map(math.isfinite, (*away, total))):
            raise ValueError(
                f"sample {self.sample} is not finite after round {round} (times {float(self.ground.table.t[visited[0]]):g} "
                f"to {float(self.ground.table.t[visited[-1]]):g}): the model returned NaN or infinity, or overflowed its "
                "dtype; check its weights, its dtype and the times it was trained on, or use quasi_newton, which takes the "
                "chain's own steps"
            )
        total = math.sqrt(total)
        self._totals.append(total)
        method = self.ground.method
        limit = self._strictness * ACTIVE * method.tolerance / math.sqrt(len(away))
        effects = [e * math.sqrt(v) for e, v in zip(self._effect, away, strict=True)]
        unseen = [n for n, known in enumerate(self._known) if not known]
        self.active = [n for n, e in enumerate(effects) if not self._known[n] or e > limit]
        theta = MOST_THETA
        if len(self._totals) > 1 and self._totals[-2] > 0:
            theta = min(max(total / self._totals[-2], LEAST_THETA), MOST_THETA)
        self.sweep_error = total * theta / (1 - theta)
        self.residual = max(map(math.sqrt, away))
        if len(self._totals) > MOST_SWEEPS * (1 + len(away) // (method.window or len(away))):
            self.sweep_error = math.inf  # it did not come to rest
            self._finish()
        elif self._closing is not None:
            self._close(math.sqrt(since))
        elif unseen:
            pass
        elif self._shift_wanted(clean):
            self._reshift(clean)
        elif not self.active or (self.sweep_error <= REST * method.tolerance and set(self.active) <= set(self._chosen)):
            self._closing = [n for n, e in enumerate(effects) if e > limit / CLOSING]
            self._mark = self._final
            if self._closing:
                self.active = self._closing
            else:
                self._rest()
        return self._visit(round, visited, total)

    def _close(self, moved: float) -> None:
        """Goes on with the closing sweep, which evaluates once more what was held back, however little it seemed to matter: a
        sample about to decide what it will be tells more of it than any estimate knows. If it moved, sweeps go on, and hold
        back less."""
        assert self._closing is not None
        self._closing = [n for n in self._closing if n not in self._chosen]
        if self._closing:
            self.active = self._closing
            return
        self._closing = None
        self.sweep_error = moved
        if moved <= CLOSED * self.ground.method.tolerance:
            self._rest()
        else:
            self._strictness /= STRICTER
            self.active = self.active or self._chosen

    def _visit(self, round: int, visited: list[int], total: float) -> Visit:
        count = len(self.sparse.gaps)
        return Visit(round, self.sample, visited, count, total, self.gap_error, self.sweep_error, int(self.done))

    # -- the interpolation error --------------------------------------------------------------------------------------

    def _rest(self) -> None:
        """The sweeps are at rest: begins the estimate of what the gaps leave out."""
        if self.sparse.averaged:
            self._merged, self._found = merged(self.sparse), []
            self._edge_states = self._at_edges()
            if not self._merged:
                self._merged, self.gap_error = None, 0.0
                self._finish()
            return
        if all(gap.right - gap.left == 1 for gap in self.sparse.gaps):
            self.gap_error = 0.0
            self._finish()
            return
        gone, weights = left_out(self.sparse)
        if not gone:
            self._judge([math.inf], [tuple(range(len(self.sparse.gaps)))])
            return
        defects = self._times(self.ground.move(weights), self._u)
        effects = self._effects(defects, self._reach[:, gone]).tolist()
        self._judge(effects, [(n - 1, n) for n in gone])

    def _at_edges(self) -> Tensor:
        """`[M, P, b, d]` states at the left edge of every gap and at the nodes before it that the chain reads."""
        table, sparse = self.ground.table, self.sparse
        state = torch.cat([self._x0[None], self._x0.new_zeros(table.band - 1, *self._x0.shape)])
        found = []
        for gap in sparse.gaps:
            found.append(state)
            first = max(gap.left - table.band + 1, 0)
            drives = gap.drive[:, -(gap.right - first) :] @ sparse.interpolation[first : gap.right]
            state = self._times(self.ground.move(gap.carry), state) + self._times(self.ground.move(drives), self._u)
            if table.stochastic:
                state = state + self._drawn[gap.left, gap.right][0].view(-1, *self._x0.shape)
        return torch.stack(found)

    def _merged_state(self, pair: Merged) -> Tensor:
        """The averaged state of two gaps as one, with their mean drive."""
        n, gap, (first, second) = pair.first, pair.gap, pair.weights
        drive = (first * self._u[n] + second * self._u[n + 1]) / (first + second)
        own = self._draw_gap(gap)[1].view(self._x0.shape)
        carried = self._times(self.ground.move(gap.state_carry)[None], self._edge_states[n])[0]
        return carried + gap.state_drive * drive + own

    def _absorb_merged(self, m: Tensor) -> bool:
        """Takes the outputs at merged states: the defects of gaps of twice the length."""
        rec, table, move = self._recurrence, self.ground.table, self.ground.move
        of_state, of_output = (move(v[self.nodes])[:, None, None] for v in (rec.nu * (table.p - rec.g), rec.nu * table.q))
        u = of_state * self._handed + of_output * m
        for pair, drive in zip(self._asked, u, strict=True):
            n, (first, second) = pair.first, pair.weights
            self._found.append(pair.weight * drive - first * self._u[n] - second * self._u[n + 1])
        assert self._merged is not None
        if len(self._found) == len(self._merged):
            ends = [pair.first + 1 for pair in self._merged]
            spread = move(self.sparse.spread[:, ends, 0])
            self.change = self._effects(torch.stack(self._found), spread)
        else:
            self.change = self._x0.new_zeros(1)
        return True

    def _effects(self, defects: Tensor, reach: Tensor) -> Tensor:
        """`[J]` mean square effect on the sample of each of J defects `[J, b, d]`, which reach the states by `[M+1, J]`."""
        effects = reach[-1][:, None, None] * defects
        if self._dx.shape[1]:
            onto = torch.einsum("nkbd,jbd->bnkj", self._dx[:, self._pairs], defects) * reach[:-1, None]
            y = self._model.solve(onto)
            effects = effects + torch.einsum("n,nkbd,bnkj->jbd", self._reach[-1], self._dm[:, self._pairs], y)
        return self.ground.step.mean_square(effects.view(-1, *self.shape))

    def _judge(self, effects: list[float], groups: list[tuple[int, ...]]) -> None:
        """Ends the sample, or cuts the gaps that leave out too much.

        Args:
            effects: Mean square effect on the sample of the defect of each group of gaps, had they been one gap.
            groups: The numbers of the gaps of each group.
        """
        tolerance = self.ground.method.tolerance
        shares = [CAUTION * math.sqrt(e) / REDUCTION[self.sparse.averaged] for e in effects]
        if self._rested is not None:
            moved = math.sqrt(float(self.ground.step.mean_square((self._final - self._rested)[None])))
            self._amplified = max(self._amplified, moved / self.gap_error)
        shares = [self._amplified * e for e in shares]
        self._rested = self._final
        self.gap_error = math.sqrt(sum(e * e for e in shares))
        if math.hypot(self.gap_error, self.sweep_error) <= tolerance:
            self._finish()
            return
        edges = self._cut(shares, groups, GAPS * tolerance)
        if edges == self.sparse.edges:  # nothing is left to cut, or no node to spare
            self._finish()
            return
        self._regrid(self.ground.sparse(self._recurrence, edges))

    def _cut(self, shares: list[float], groups: list[tuple[int, ...]], wanted: float) -> list[int]:
        """The edges with the gaps cut as they need it: into n parts of which each leaves out 1/n^2 as much, so that n goes as
        the root of a group's share, and errors in sum are as wanted. Fewer where nodes run out."""
        low, high = 0.0, max(min(max(shares), 1e6), 1e-30)
        for _ in range(40):  # the level to which all shares are brought: the highest that suffices
            level = (low + high) / 2
            parts = [_parts(e, level) for e in shares]
            left = math.sqrt(sum((e / n**1.5) ** 2 for e, n in zip(shares, parts, strict=True)))
            low, high = (level, high) if left <= wanted else (low, level)
        level = low if low > 0 else high
        if math.isinf(max(shares)):
            shares, level = [1.0 if math.isinf(e) else e for e in shares], 0.2
        while level <= max(shares) * 1.01:
            cuts = [1] * len(self.sparse.gaps)
            for share, group in zip(shares, groups, strict=True):
                for n in group:
                    cuts[n] = max(cuts[n], _parts(share, level))
            edges = [
                edge
                for gap, parts in zip(self.sparse.gaps, cuts, strict=True)
                for edge in self.ground.placement.split(gap.left, gap.right, parts)
            ]
            if len(edges) <= self.ground.most_nodes:
                return [*edges, self.ground.table.steps]
            level *= 1.3
        return self.sparse.edges

    def _regrid(self, new: Sparse) -> None:
        """Takes over a finer sparse table; new nodes begin with what the old ones nearest to them know."""
        old, rec, count = self.sparse, self._recurrence, len(new.gaps)
        known, near, ratio = [], [], []
        for n, gap in enumerate(new.gaps):
            if new.averaged:
                k = bisect_right(old.edges, gap.left) - 1
                same = old.edges[k : k + 2] == [gap.left, gap.right]
            else:
                k = int((rec.log_snr[old.nodes] - rec.log_snr[new.nodes[n]]).abs().argmin())
                same = bool(old.nodes[k] == new.nodes[n])
            level = rec.evidence[old.nodes[k]] / rec.evidence[new.nodes[n]]
            known.append(same and self._known[k])
            near.append(k)
            ratio.append(1.0 if same or not 0 < level < math.inf else float(level))
        at, factor = torch.tensor(near, device=self.ground.device), self.ground.move(torch.tensor(ratio))[:, None, None]
        self._y, self._dx, self._dm = self._y[at] * factor, self._dx[at] * factor[:, None], self._dm[at].clone()
        self._u = self._u[at] if new.averaged else self._times(self.ground.move(old.interpolation[new.nodes]), self._u)
        self._known, self._guessed = known, [True] * count
        self._begin(new)
        if not new.averaged:  # guessed drives go with the states that they give
            base = self._start[:, None, None] * self._x0 + self._share + self._times(self._reach, self._u)
            guessed = [n for n, k in enumerate(known) if not k]
            self._y[guessed] = base[guessed]
        self._solve()
        self.active = [n for n, k in enumerate(known) if not k]

    def _shift_wanted(self, clean: float) -> bool:
        """Whether the data's variance, from the first clean-data estimate of the whole chain, is far from the one assumed."""
        if self._settled_shift:
            return False
        self._settled_shift = True
        return clean > 0 and not 1 / FAR <= clean / self._recurrence.variance <= FAR

    def _reshift(self, variance: float) -> None:
        """Begins anew with another variance; what was evaluated is kept."""
        rounded = 2.0 ** round(math.log2(variance))
        before, self._recurrence = self._recurrence, self.ground.recurrence_of(rounded)
        nodes = self.sparse.nodes
        nu, g = (self.ground.move(v[nodes])[:, None, None] for v in (before.nu, before.g))
        clean = self._u / nu + g * self._y
        self._begin(self.ground.sparse(self._recurrence, self.sparse.edges))
        nu, g = (self.ground.move(v[nodes])[:, None, None] for v in (self._recurrence.nu, self._recurrence.g))
        self._u = nu * (clean - g * self._y)
        self._dx, self._dm = torch.zeros_like(self._dx), torch.zeros_like(self._dm)
        self._solve()

    def _finish(self) -> None:
        """The sample is found; or the window loop begins to verify it, from the states that were found."""
        if self.ground.verify is None:
            self.done = True
            return
        states = self._at_edges().view(len(self.sparse.gaps), -1, *self.shape)
        drives = self._u.view(-1, *self.shape)
        guide = Trajectory(self.sparse, drives, states, self.noise, self.sample, self.ground.move)
        x0 = self._x0.view(self.shape).to(self.ground.dtype)
        self._window = Window(self.ground.verify, self.noise, self.sample, x0, guide=guide)


def _parts(share: float, level: float) -> int:
    return MOST_PARTS if share == math.inf else max(1, min(MOST_PARTS, math.ceil(math.sqrt(share / level) - 1e-9)))

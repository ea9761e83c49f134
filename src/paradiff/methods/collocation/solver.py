# SPDX-License-Identifier: Apache-2.0
"""One sample's iteration: which nodes are evaluated in a round, and the quasi-Newton step that follows.

A round evaluates the network at some of the nodes, the **active** ones: those that were not evaluated yet, and those whose
staleness (staleness.py) exceeds their part of the tolerance; the first of them along the chain if there are more than the
window allows. On a refined mesh those not evaluated yet may come first, then those whose staleness moves the sample most
(`by_effect`). Rows that the window leaves idle go to probes (probes.py). The forcings u[k], and secant pairs of earlier
evaluations, give all states anew by a quasi-Newton step on equation (1) of system.py,

    y = f x[0] + R (u + du) + n,      du[k] = DU[k] K[k] DX[k]^T (y[k] - y[k] evaluated),                        (1)

with the pairs DX, DU as a low-rank Jacobian of the forcing (methods/secant.py). The rest of the Jacobian is small, since the
forcing is what responds least to the state (interval.py).

The staleness of all nodes, propagated to the sample together, is the iteration error. Where the sample is about to decide what
it will be, secant pairs have observed that early changes grow, which the chain's linear part would damp. When the iteration
error is a small part of the tolerance, the nodes have converged. What follows then, and what the interpolation error has to do
with it, is decided in refine.py. Memory is O(nodes) states.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from paradiff.chain.data_scale import held_to, unusual
from paradiff.chain.noise import Noise
from paradiff.chain.step import uploaded
from paradiff.errors import NotFinite
from paradiff.methods.collocation.error import told
from paradiff.methods.collocation.estimator import Estimator
from paradiff.methods.collocation.evaluations import Evaluations
from paradiff.methods.collocation.handover import Handover
from paradiff.methods.collocation.head import head_error
from paradiff.methods.collocation.linearization import Linearization, Moves
from paradiff.methods.collocation.probes import Probes
from paradiff.methods.collocation.refine import (
    Bounds,
    Converged,
    Decision,
    GiveUp,
    HandOver,
    Probe,
    Progress,
    Refine,
    Rescale,
    Stop,
    Sweep,
    decide,
)
from paradiff.methods.collocation.sample_system import SampleSystem
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.methods.collocation.staleness import beyond_rounding, lipschitz
from paradiff.methods.collocation.system import CollocationSystem
from paradiff.methods.collocation.warm import WarmStart
from paradiff.methods.stretch import blocks
from paradiff.solver.protocol import Query
from paradiff.solver.records import CollocationRecord, WindowRecord
from paradiff.solver.solution import ErrorEstimate
from paradiff.solver.trajectory import Part


@dataclass(frozen=True, eq=False)
class CollocationQuery(Query):
    """The rows of one round: nodes of the mesh, then doubled intervals.

    Attributes:
        chosen: The numbers of the mesh's nodes.
        pairs: The numbers of the doubled intervals.
        evaluated_at: `[R, b, d]` the states, in the dtype in which the network is given them.
    """

    chosen: list[int]
    pairs: list[int]
    evaluated_at: Tensor


class CollocationSolver:
    """The iteration of one sample. Tensors of states are `[M, b, d]`, b the members.

    Args:
        setup: What all samples share.
        noise: x[0] and the noises of every sample.
        sample: The sample.
        start: Its state at node 0, in place of the noise's.
        begin: The trajectory that it begins from; None for none.
        keep: Whether its own is kept.

    Attributes:
        sample: The sample.
        done: Whether the sample is found.
        estimator: Its interpolation error.
        iteration_error: Root mean square at the sample that the staleness of all nodes may amount to.
        residual: Largest root mean square distance of a node's state from that of its evaluation.
        rounds: Rounds in which the sample took part, before any handover.
        evaluations: Its rows in these.
        active: Numbers of the nodes to evaluate next, those first that come first.
    """

    def __init__(
        self,
        setup: CollocationSetup,
        noise: Noise,
        sample: int,
        start: Tensor | None,
        begin: Part | None = None,
        *,
        keep: bool = False,
    ) -> None:
        self.setup, self.control, self.noise, self.sample = setup, setup.control, noise, sample
        x0 = setup.move(noise.start(sample)) * setup.table.start_scale if start is None else setup.move(start)
        self.shape = tuple(x0.shape)
        self._x0 = x0.reshape(x0.shape[0], -1) if setup.shared_window and x0.ndim > 1 else x0.reshape(1, -1)
        self.rounds = self.evaluations = self._sweeps = self._heads = 0
        self.done = False
        self.iteration_error = self.residual = math.inf
        method = setup.method
        self._bounds = Bounds(
            tolerance=method.tolerance,
            exact=method.exact,
            most_nodes=setup.most_nodes,
            resolving=setup.resolving,
            may_hand_over=method.target == "chain" and method.max_nodes is None,
            control=setup.control,
        )
        self._keep, self._warm = keep, None if begin is None else WarmStart(setup, begin, self._x0)
        system = setup.system(setup.recurrence, setup.points if self._warm is None else self._warm.points)
        self._recurrence, self._settled_shift = setup.recurrence, False
        self._at = SampleSystem.of(setup, system, self._x0, noise, sample, warm=self._warm)
        self._probes = Probes(setup, self._at)
        self.estimator = Estimator(setup)
        self._handover: Handover | None = None
        self._window = method.window  # most rows of a round; None for no bound
        self._visited: list[int] = []  # fine nodes of the last round
        self._nodes = Evaluations(len(system.intervals), setup.pairs_of(system), self._x0, setup.dtype)
        self.active = list(range(len(system.intervals)))
        if self._warm is not None:
            self._begin_warm(self._warm)
        self._linearization, self._states, self._final = self._stepped()

    # -- the system ---------------------------------------------------------------------------------------------------

    @property
    def system(self) -> CollocationSystem:
        """The collocation system of the present mesh."""
        return self._at.system

    def _stepped(self) -> tuple[Linearization, Tensor, Tensor]:
        """The quasi-Newton step, equation (1): the linearization, the states of all nodes, and the sample."""
        nodes, at, uncertainty = self._nodes, self._at, self.control.pair_uncertainty
        linearization = Linearization(
            at.influence, at.reach, at.system.nodes, nodes.pairs.newest(), uncertainty, causal=at.system.averaged
        )
        found = linearization.follow(at.states(nodes.forcings), nodes.states)
        return linearization, found[:-1], found[-1].clone().view(self.shape)

    def _begin_warm(self, warm: WarmStart) -> None:
        """Takes the forcings of an earlier run, the states at which they were evaluated, and what was seen of their changes."""
        nodes, found = self._nodes, warm.begun(self.system)
        nodes.forcings, nodes.states = found, self._at.states(found)[:-1].clone()
        nodes.assigned = [bool(v) for v in found.flatten(1).any(1).tolist()]
        sigma = self.setup.table.sigma[self.system.nodes].tolist()
        for k, states in warm.evaluated_at(self.system):
            near = (nodes.states[k] - states).abs() <= self.control.near * sigma[k]
            nodes.states[k] = torch.where(near, states, nodes.states[k])
        for k, dx, du in warm.changes(self.system):
            nodes.learn(k, dx, du, self.control.pair_rounding * self.setup.resolution)

    def part(self) -> Part:
        """The trajectory of the sample: the nodes of its mesh, or all that the window method evaluated."""
        if self._handover is not None:
            return self._handover.part()
        nodes, rec, at = self.system.nodes, self._recurrence, self._at
        known = [k for k, evaluated in enumerate(self._nodes.evaluated) if evaluated]
        places = uploaded(known, self._nodes.states.device)
        states, forcings = self._nodes.states[places], self._nodes.forcings[places]
        if at.carried is not None:
            forcings = forcings + at.carried.forcings[nodes[known]]
        nu, g = (self.setup.move(v[nodes[known]])[:, None, None] for v in (rec.nu, rec.g))
        clean = forcings / nu + g * states
        states, clean = (v.view(-1, *self.shape).to(self.setup.dtype) for v in (states, clean))
        every = len(known) == self.setup.table.steps
        base = None if self._warm is None or every else self._warm.base
        found = Part(nodes[known], states, clean, None if every else tuple(self.system.points), base)
        pairs = self._nodes.pairs.padded(known)
        if pairs is None:
            return found
        dx, du = pairs
        dclean = du / nu[..., None] + g[..., None] * dx
        dx, dclean = (v.view(*v.shape[:2], *self.shape).to(self.setup.dtype) for v in (dx, dclean))
        return replace(found, dx=dx, dclean=dclean)

    def _go_over(self, system: CollocationSystem, *, rescaled: bool = False) -> None:
        """Takes over another collocation system; noises of intervals that it shares with the one before are kept, unless their
        weights changed with the variance."""
        before = None if rescaled else self._at.noises
        self._at = SampleSystem.of(self.setup, system, self._x0, self.noise, self.sample, before=before, warm=self._warm)
        self._probes.remesh(self._at, rescaled=rescaled)
        self._sweeps = 0

    # -- the solver's protocol ----------------------------------------------------------------------------------------

    @property
    def final(self) -> Tensor:
        """The sample as far as it is known."""
        return self._final.to(self.setup.dtype) if self._handover is None else self._handover.final

    @property
    def newest(self) -> Tensor:
        """The sample as far as it is known."""
        return self._final.to(self.setup.dtype) if self._handover is None else self._handover.newest

    @property
    def reaches_end(self) -> bool:
        """Whether `newest` is the sample as far as it is known: before a handover it always is."""
        return self._handover is None or self._handover.reaches_end

    @property
    def handed_over(self) -> str | None:
        """Why the window method took the sample over; None where it did not, or was asked to."""
        return None if self._handover is None else self._handover.reason

    @property
    def resizable(self) -> bool:
        """Whether rows can be bounded anew: of any mesh they can."""
        return True

    def resize(self, rows: int) -> None:
        """Bounds the rows of the rounds to come; the method's own window is kept to as well."""
        self._window = rows if self.setup.method.window is None else min(rows, self.setup.method.window)
        if self._handover is not None:
            self._handover.resize(rows)

    @property
    def error_estimate(self) -> ErrorEstimate:
        """How far to trust the sample."""
        if self._handover is not None:
            return self._handover.error_estimate
        interpolation_error = self.estimator.interpolation_error
        total = math.hypot(interpolation_error, self.iteration_error)
        error = self.control.error
        factor = error.told * (error.refined_told if self.estimator.compared else 1.0)
        factor *= 1 + error.cold_told * self._recurrence.coldness
        cautious = told(total, self._bounds.tolerance, factor)
        share = interpolation_error / total if 0 < total < math.inf else 1.0
        return ErrorEstimate(self.residual, cautious, self.rounds, self.evaluations, share * cautious)

    def ask(self) -> Query:
        """The rows wanted now."""
        if self._handover is not None:
            return self._handover.ask()
        setup = self.setup
        window = self._window or len(self.system.intervals) * 2
        chosen = sorted(self.active[:window])
        pairs = self._unprobed()[: window - len(chosen)]
        nodes, states = self.system.nodes[chosen], self._states[uploaded(chosen, self._states.device)]
        if pairs:
            more = self._probes.states(pairs, self._nodes.forcings)
            nodes, states = torch.cat([nodes, more[0]]), torch.cat([states, more[1]])
        evaluated_at = states.to(setup.dtype)
        rows = evaluated_at.view(-1, *self.shape)
        if setup.step.scaled:
            rows = setup.step.seen(nodes.to(setup.device, non_blocking=True), rows.to(states.dtype)).to(setup.dtype)
        return CollocationQuery(nodes, rows, chosen, pairs, evaluated_at)

    def _unprobed(self) -> list[int]:
        """Doubled intervals to evaluate still: among the nodes before the first active one; and in a window that holds fewer
        than all nodes, all once the iteration error is small. Active nodes are evaluated in the same round then, so that
        defects compare forcings of one sweep."""
        count = len(self.system.intervals)
        early = self._window is not None and self._window < count and self._within
        return self._probes.missing(count if early else min(self.active, default=count))

    @property
    def _within(self) -> bool:
        """Whether all nodes were evaluated, and the iteration error no longer hides the interpolation error."""
        return not self._nodes.missing and self.iteration_error <= self.control.early_factor * self._bounds.tolerance

    def tell(self, query: Query, outputs: Tensor, states: Tensor | None = None) -> Tensor | None:
        """Takes the outputs of a query.

        Args:
            query: What `ask` returned.
            outputs: `[R, ...]` outputs.
            states: States as the caller changed them, which this method cannot follow.

        Returns:
            Mean squares `[2 M + 5]`: for each node the change of the sample by its staleness, and the distance of its state
            from that of its evaluation; the change by the staleness of all nodes together; the sample's move in this round,
            and since an estimate was accepted last; its size; and a number that is finite where all outputs are.
        """
        assert states is None, "the loop refuses changed states, since follows_edits is False"
        if self._handover is not None:
            return self._handover.tell(query, outputs)
        self.rounds += 1
        self.evaluations += len(outputs)
        assert isinstance(query, CollocationQuery)
        self._visited = query.nodes.tolist()
        before, count, sums = self._final, len(query.chosen), list[Tensor]()
        if count:
            self._nodes.reserve(query.chosen)
            for part, y, u in self._forcings(query, outputs, range(count)):
                self._nodes.observe(query.chosen[part], y, u, self.control.pair_rounding * self.setup.resolution)
                sums.append(u.sum())
        for part, _, u in self._forcings(query, outputs, range(count, len(outputs))):
            self._probes.observe(query.pairs[part.start - count : part.stop - count], u, self._nodes.forcings)
            sums.append(u.sum())
        if count:
            self._nodes.fill(query.chosen[0], self._states, self.system, self.control.extrapolation)
            del self._states  # before others take their room
            self._linearization, self._states, self._final = self._stepped()
        each, away, together = self._staleness()
        moved, accepted = mean_square((self._final - before).view_as(self._x0)), self.estimator.sample
        since = torch.zeros_like(moved) if accepted is None else mean_square((self._final - accepted).view_as(self._x0))
        ends = [moved, since, self._final.square().mean(), sums[0] if len(sums) == 1 else torch.stack(sums).sum()]
        return torch.cat([each, away, together, torch.stack(ends)])

    def _forcings(self, query: CollocationQuery, outputs: Tensor, rows: range) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """States `[r, b, d]` and forcings of some rows of a query, of which there may be too many to be worked on at once."""
        table, recurrence, kind = self.setup.table, self._recurrence, self._x0.dtype
        for block in blocks(len(rows), self._x0.numel()):
            part = slice(rows.start + block.start, rows.start + block.stop)
            nodes, y = query.nodes[part], query.evaluated_at[part].to(kind)
            m = table.convert(nodes, y.view(-1, *self.shape), outputs[part].to(kind)).reshape(y.shape)
            p_u, q_u = (self.setup.move(v[nodes])[:, None, None] for v in (recurrence.p_u, recurrence.q_u))
            u = torch.addcmul(p_u * y, q_u, m)
            if self._at.carried is not None:
                u = u - self._at.carried.forcings[nodes.to(u.device, non_blocking=True)]
            yield part, y, u

    def _staleness(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squares: `[M]` the change of the sample by the staleness of each node, `[M]` the distance of its state from that
        of its evaluation, and `[1]` the change by all together."""
        nodes, moved = self._nodes, Moves(self._states, self._nodes.states)
        squares = moved.squares
        real = beyond_rounding(squares, nodes.states, self.control.rounding_share * self.setup.resolution)
        constants = lipschitz(nodes.quotients, self._at.q_u, self._at.lipschitz_floor)
        each, together = self._linearization.staleness(moved, torch.where(real, constants[:, None], 0.0))
        return each, (squares / self._x0.shape[1]).amax(1), together

    def advance(self, norms: list[float], round: int) -> CollocationRecord | WindowRecord:
        """Judges the round: which nodes are active now, whether they have converged, and what follows.

        Args:
            norms: What `tell` returned, on the host.
            round: The round's number, for the record.

        Raises:
            ValueError: If the model returned NaN or infinity.
        """
        if self._handover is not None:
            record = self._handover.advance(norms, round)
            self.done = self._handover.done
            return record
        *nodes, together, moved, since, size, finite = norms
        visited, count = self._visited, len(nodes) // 2
        if not all(map(math.isfinite, (finite, *nodes))):
            raise NotFinite(
                f"sample {self.sample} is not finite after round {round} (times {float(self.setup.table.t[visited[0]]):g} "
                f"to {float(self.setup.table.t[visited[-1]]):g}): the model returned NaN or infinity, or overflowed its "
                "dtype; check its weights, its dtype and the times it was trained on, or use quasi_newton, which takes the "
                "chain's own steps"
            )
        self.residual = math.sqrt(max(nodes[count:]))
        progress = self._progress(nodes[:count], nodes[count:], together)
        self._follow(self._decision(progress, size, math.sqrt(since)))
        return CollocationRecord(
            round=round,
            sample=self.sample,
            nodes=visited,
            of=count,
            change=math.sqrt(moved),
            interpolation_error=self.estimator.interpolation_error,
            iteration_error=self.iteration_error,
            passed=int(self.done),
        )

    # -- what follows a round -----------------------------------------------------------------------------------------

    def _progress(self, each: list[float], away: list[float], together: float) -> Progress:
        """The sample after a sweep.

        Args:
            each: Mean square effects of each node's staleness on the sample.
            away: Mean square distances of the nodes' states from those of their evaluations.
            together: That of all nodes together.
        """
        count = len(each)
        rounds = 1 + count // min(self._window or count, count)  # of a sweep, and one more
        rest = self.control.iteration_share * self._bounds.tolerance
        limit = (self.control.node_share * rest / count) ** 2
        self._sweeps += 1
        self.active = [n for n, e in enumerate(each) if not self._nodes.evaluated[n] or e > limit]
        self.iteration_error = math.sqrt(max(together, sum(each)))
        settled = not self._nodes.missing and (self.iteration_error <= rest or not self.active)
        moved = [n for n, (d, most) in enumerate(zip(away, self._at.trusted, strict=True)) if d > most]
        if settled:  # what is at rest by its staleness is found once its evaluations are near its states
            self.active = moved
        elif self.iteration_error <= self._bounds.tolerance:
            self.active = sorted({*self.active, *moved})
        passed = self._sweeps / rounds
        if self.estimator.seen and passed <= self.control.by_effect:
            self.active.sort(key=lambda n: -each[n] if self._nodes.evaluated[n] else -math.inf)
        return Progress(
            converged=settled and not moved,
            moved=bool(moved),
            iteration_error=self.iteration_error,
            sweeps=self._sweeps,
            most_sweeps=self.control.most_sweeps * rounds,
        )

    def _decision(self, progress: Progress, size: float, moved: float) -> Decision:
        """What follows the round. Waits for the device where the interpolation error is estimated.

        Args:
            progress: The sample after the round.
            size: Its mean square.
            moved: Root mean square distance from what it was when an estimate was accepted last.
        """
        near = progress.converged or self._within
        if near and not self._settled_shift:
            self._settled_shift, far = True, self.setup.variance_margin
            if unusual(size) > self.control.most_square and self._bounds.may_hand_over:
                return HandOver("they are far above the size of data for which its estimates were measured")
            if unusual(size) < 1:
                if self._bounds.may_hand_over:
                    return HandOver("they are far below the size of data for which its estimates were measured")
                self._bounds = replace(self._bounds, tolerance=held_to(self._bounds.tolerance, unusual(size)))
            if size > 0 and not 1 / far <= size / self._recurrence.variance <= far:
                return Rescale(size)
        if progress.converged and self._unprobed():
            return Probe()
        early = near and not self._bounds.exact and self._probes.complete
        if not progress.converged and not early:
            if (refined := self._refined_head()) is not None:
                return refined
            return decide(progress, None, self.system.points, self.setup.mesh, self._bounds)
        error, factor = self.estimator.estimate(
            self._at,
            self._linearization,
            self._nodes.states,
            self._nodes.forcings,
            self._probes.defects(),
            moved,
            self._bounds.tolerance,
            self._nodes.pairs,
        )
        decision = decide(progress, error, self.system.points, self.setup.mesh, self._bounds, spread=math.sqrt(size))
        if not isinstance(decision, Sweep | GiveUp):
            self.estimator.accept(
                error,
                factor,
                linearization=self._linearization,
                iteration_error=self.iteration_error,
                sample=self._final,
            )
        if decision == Stop(unresolved=True):
            self.estimator.distrust(math.sqrt(2 * size))
        if isinstance(decision, Converged):
            self.setup.record(self.system.points, error, self._recurrence.variance)
        return decision

    def _refined_head(self) -> Refine | None:
        """A finer mesh between the nodes that have settled while later ones were not evaluated yet, or between all after a few
        sweeps of whole meshes (head.py); None where theirs is fine enough. Waits for the device."""
        control, tolerance, count = self.control, self._bounds.tolerance, len(self.system.intervals)
        if self._bounds.exact or self._heads >= control.most_heads:
            return None
        share, settled = control.head_share, min(self.active, default=count)
        if not self._nodes.missing:
            whole = self._window is None or self._window >= count
            share, settled = control.whole_share, count
            if not whole or self.setup.table.stochastic or self._heads or self._sweeps != control.whole_sweeps:
                return None
        if not share:
            return None
        error = head_error(self.system, self._at.influence, self._nodes.forcings, settled, control)
        if error is None or error.total <= share * tolerance:
            return None
        points, mesh = self.system.points, self.setup.mesh
        most = min(self._bounds.most_nodes, control.most_kept(len(mesh.candidates)))
        wanted = control.head_wanted * tolerance
        refined = mesh.refine(
            points, shares=error.shares, groups=error.groups, wanted=wanted, most=most, most_parts=control.most_parts
        )
        if refined == points:
            return None
        self._heads += 1
        return Refine(refined)

    def _follow(self, decision: Decision) -> None:
        """Does what was decided."""
        match decision:
            case Rescale(variance):
                self._rescale(variance)
            case Refine(points):
                self._refine(points)
            case HandOver() | Converged(verify=True):
                self._hand_over(decision.reason if isinstance(decision, HandOver) else None)
            case Converged() | Stop():
                self.done = True
            case GiveUp():
                self.iteration_error = math.inf
                if self._bounds.may_hand_over:
                    self._hand_over("their sweeps did not converge")
                else:
                    self.done = True
            case Sweep() | Probe():
                pass

    def _refine(self, points: list[int]) -> None:
        """Goes over to a finer mesh."""
        old, new = self.system, self.setup.system(self._recurrence, points)
        parts = [bisect_left(points, right) - bisect_left(points, left) for left, right in pairwise(old.points)]
        if self.estimator.seen:
            self.estimator.refined(parts)
        self._nodes.remesh(old, new, self.setup.pairs_of(new), self.setup.move)
        self._go_over(new)
        self.active = self._nodes.missing
        if not new.averaged:  # guessed forcings go with the states that they give
            at = uploaded(self.active, self._nodes.states.device)
            self._nodes.states[at] = self._at.states(self._nodes.forcings)[at]
        self._linearization, self._states, self._final = self._stepped()

    def _rescale(self, variance: float) -> None:
        """Goes over to another data variance, rounded to a power of 2; evaluations are kept."""
        before, self._recurrence = self._recurrence, self.setup.recurrence_of(2.0 ** round(math.log2(variance)))
        nodes, differs = self.system.nodes, self._warm is not None and self._warm.differs
        if differs and self._warm is not None:
            self._nodes.forcings = self._nodes.forcings + self._warm.forcings(before)[nodes]
        self._nodes.rescale(nodes, before, self._recurrence, self.setup.move)
        if differs and self._warm is not None:
            self._nodes.forcings = self._nodes.forcings - self._warm.forcings(self._recurrence)[nodes]
        self._go_over(self.setup.system(self._recurrence, self.system.points), rescaled=True)
        self.active = list(range(len(self.system.intervals)))
        self._linearization, self._states, self._final = self._stepped()

    def _hand_over(self, reason: str | None) -> None:
        """The window method takes over, from the sample's states if their error is not too large; `reason` None where that was
        asked for."""
        setup = self.setup
        error = math.hypot(self.estimator.interpolation_error, self.iteration_error)
        guide = None
        if error <= self.control.handover_error * self._bounds.tolerance:
            guide = self._at.dense_output(setup, self._nodes.forcings, self.shape, self.noise, self.sample)
        x0 = self._x0.view(self.shape).to(setup.dtype)
        sensitive = setup.table.stochastic or math.isinf(self.iteration_error)  # whose sweeps did not converge
        unseen = self.control.unseen_amplification if sensitive and not self.estimator.seen else 1.0
        self._handover = setup.window_loop.take_over(
            self.noise,
            self.sample,
            x0,
            amplification=max(self.estimator.amplification, unseen),
            guide=guide,
            reason=reason,
            rounds=self.rounds,
            evaluations=self.evaluations,
            keep=self._keep,
        )
        if self._window is not None:
            self._handover.resize(self._window)


def mean_square(change: Tensor) -> Tensor:
    """Mean square of a change `[b, d]` of the sample; of several members that of the one which changed most."""
    return change.square().mean(1).amax()

"""One sample's window of states: what it asks for, what it makes of the outputs, how it slides.

A window of sub-intervals n = lo ... hi - 1 is solved at once. One sweep evaluates the network at every state of the window
(S rounds for sub-intervals of S steps, each round one batch), takes the residual

    r[n] = Phi_n(x) - x[n+1],                                                                                   (1)

and updates all nodes by an approximate Newton step with the slope G (chain/slope.py),

    x[n+1] <- Phi_n(x) + sum_{k<n} L[n,k] r[k],        I + L = (I - G)^-1.                                      (2)

Written so, a node whose predecessors do not change gets exactly Phi_n: after k sweeps the first k nodes of a window are
exact, whatever G. Then the leading nodes whose change is within the tolerance pass, with the one after them, and the window
slides; nodes that enter it are filled as the method's `start` says. A method may cut the chain into blocks (blocks.py), which
the window enters one after the other, and follow each by a corrector (corrector.py).

Fine nodes are those of the table; sub-interval n runs from fine node edges[n] to edges[n+1]. The window holds the fine states
from P - 1 nodes before its first edge (the history that a multistep sampler reads; zeros at the chain's start) to its last
edge, the outputs at all of them but the last where the table reads earlier outputs, and the noises from its first edge on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.slope import inverse
from paradiff.chain.table import column
from paradiff.methods.secant import Secants
from paradiff.methods.window.budget import ErrorBudget
from paradiff.methods.window.corrector import Correction
from paradiff.methods.window.edits import Edits
from paradiff.methods.window.setup import WindowSetup
from paradiff.solver.protocol import OnFinal, Query
from paradiff.solver.records import WindowRecord
from paradiff.solver.solution import ErrorEstimate

FILL = 64  # nodes filled by one matrix product
STRETCH = 256  # nodes swept by one matrix product

Guide = Callable[[slice], tuple[Tensor, Tensor]]
"""What nodes that enter the window are filled with instead of the method's start: for some steps, the states after them and
the outputs where they begin, each `[n, ...]`."""


@dataclass(frozen=True, eq=False)
class WindowQuery(Query):
    """The rows of one round of a sweep.

    Attributes:
        at: The nodes, as an index on the device.
        places: Where the states at the nodes, and those j steps before them, stand in the window's states, for j < P.
        noise_place: Where the noises of the steps from the nodes stand in the window's noises.
        running: The numbers of the sub-intervals that the rows belong to; None where all have a single step.
        states: `[R, ...]` the states at the nodes, not scaled.
    """

    at: slice | Tensor
    places: list[slice | Tensor]
    noise_place: slice | Tensor
    running: list[int] | None
    states: Tensor


class WindowSolver:
    """The window of one sample.

    Attributes:
        sample: The sample.
        ledger: The running account of the error let pass.
        rounds: Rounds in which the sample took part.
        evaluations: Its rows.
    """

    def __init__(
        self,
        plan: WindowSetup,
        noise: Noise,
        sample: int,
        start: Tensor | None,
        on_final: OnFinal | None = None,
        guide: Guide | None = None,
    ) -> None:
        self.plan, self.noise, self.sample, self.on_final, self.guide = plan, noise, sample, on_final, guide
        x0 = plan.move(noise.start(sample)) * plan.table.start_scale if start is None else plan.move(start)
        past = torch.zeros_like(x0).expand(plan.history, *x0.shape)
        self.x = torch.cat([past, x0[None]])
        self.m = past.clone()
        self.z = x0.new_empty(0, *x0.shape)
        self.clean = torch.zeros_like(x0)
        self.lo = self.hi = self.substep = 0
        self.ages: list[int] = []  # sweeps that each node after the first has seen
        self.block = 1  # the window may reach to this block edge
        self.correction: Correction | None = None
        self.edits: Edits | None = None
        self.secants: Secants | None = None
        self.rounds = self.evaluations = 0
        self.ledger = ErrorBudget(plan.slope_error, plan.factor, plan.least_theta)
        self.phi = x0.new_empty(0)  # steps from the nodes of the sweep, as far as they were taken
        self.ends: slice | Tensor = slice(0)  # where the nodes after the first stand in x, as the last sweep had them
        self._open()

    @property
    def done(self) -> bool:
        """Whether the window has passed the last node, and any correction there is made."""
        return self.lo == self.plan.intervals and self.correction is None

    @property
    def final(self) -> Tensor:
        """The state at the window's first node, which is the sample once the window is done."""
        return self.x[self.plan.history]

    @property
    def newest(self) -> Tensor:
        """The state furthest along the chain; the sample itself once the window reaches the end."""
        return self.final if self.done else self.x[-1]

    @property
    def error_estimate(self) -> ErrorEstimate:
        """How far to trust the sample."""
        return ErrorEstimate(self.ledger.residual, self.ledger.estimated_error, self.rounds, self.evaluations)

    def ask(self) -> Query:
        """The rows wanted now; those of the correction, while one is made."""
        if self.correction is not None:
            return Query(*self.correction.rows())
        plan, h, first = self.plan, self.plan.history, self.plan.edges[self.lo]
        running = None
        if plan.single:
            nodes = torch.arange(self.lo, self.hi)
            at: slice | Tensor = slice(self.lo, self.hi)
            places: list[slice | Tensor] = [slice(h - j, h - j + len(nodes)) for j in range(plan.table.band)]
            noise_place: slice | Tensor = slice(0, len(nodes))
        else:
            edges = plan.edges
            running = [n for n in range(self.lo, self.hi) if edges[n] + self.substep < edges[n + 1]]
            nodes = torch.tensor([edges[n] + self.substep for n in running])
            at = nodes.to(plan.device)
            noise_place = at - first
            places = [noise_place + h - j for j in range(plan.table.band)]
        states = self.x[places[0]]
        return WindowQuery(nodes, plan.step.seen(at, states), at, places, noise_place, running, states)

    def tell(self, query: Query, outputs: Tensor, states: Tensor | None = None) -> Tensor | None:
        """Takes the outputs of a query.

        Args:
            query: What `ask` returned.
            outputs: `[R, ...]` outputs.
            states: `[R, ...]` the states as the caller changed them before the network saw them, not scaled; None where it
                left them alone.

        Returns:
            `[W]` mean square change of each node after the first, where that ended a sweep.

        Raises:
            ValueError: If states were changed and the method solves sub-intervals of several steps.
        """
        plan = self.plan
        self.rounds += 1
        self.evaluations += len(outputs)
        if self.correction is not None:
            assert states is None
            return self.correction.change if self.correction.absorb(outputs) else None
        assert isinstance(query, WindowQuery)
        asked, places = query.states, query.places
        if states is not None:
            self._edit(asked, states)
            self.x[places[0]] = asked = states
        m = plan.table.convert(query.nodes, asked, outputs)
        if plan.method.start == "clean" and (query.running is None or query.running[-1] == self.hi - 1):
            last = query.nodes[-1:]
            self.clean = plan.table.p[last].item() * asked[-1] + plan.table.q[last].item() * m[-1]
        if plan.history:
            self.m[places[0]] = m
        if plan.method.secants:
            if self.secants is None:
                self.secants = Secants(plan.method.secants, plan.resolution, plan.step.members)
            self.secants.observe(asked, m)
        read = [asked, *(self.x[place] for place in places[1:])]
        drives = [m, *(self.m[place] for place in places[1:])]
        z = self.z[query.noise_place] if plan.table.stochastic else None
        phi = plan.step(query.at, read, drives, z)
        return self._sweep(phi) if query.running is None else self._substep(phi, query.running, places[0])

    def _edit(self, asked: Tensor, states: Tensor) -> None:
        """Notes which states the caller changed (edits.py); steps are then taken from the changed ones."""
        if not self.plan.single:
            raise ValueError(
                f"the states of a window were changed between steps, and {self.plan.method.name} solves sub-intervals of "
                f"{self.plan.method.stride} steps, of which only the ends would be seen; give it a stride of 1"
            )
        if self.edits is None:
            self.edits = Edits()
        self.edits.take(self.lo, asked, states, self.x[self._places_of_edges()])

    def _substep(self, phi: Tensor, running: list[int], place: slice | Tensor) -> Tensor | None:
        """Puts one fine step of every running sub-interval in its place; sweeps after the last."""
        edges = self.plan.edges
        self.substep += 1
        going = [k for k, n in enumerate(running) if edges[n] + self.substep < edges[n + 1]]
        ended = [k for k, n in enumerate(running) if edges[n] + self.substep == edges[n + 1]]
        if self.substep == 1:
            self.phi = torch.empty_like(self.x[: self.hi - self.lo])
        if ended:
            self.phi[[running[k] - self.lo for k in ended]] = phi[ended]
        if going:
            assert isinstance(place, Tensor)
            self.x[place[going] + 1] = phi[going]
            return None
        self.substep = 0
        return self._sweep(self.phi)

    def _sweep(self, phi: Tensor) -> Tensor:
        """Updates all nodes of the window by equation (2); `[W]` the mean square change of each.

        The change is that of the update, which is the preconditioned residual; without a slope (Jacobi) the updates stay small
        far from the solution, and the residuals are added up instead. The clean-data estimate that fills new nodes was made
        from the last state before its update and follows it, as it would for Gaussian data.
        """
        plan, count = self.plan, self.hi - self.lo
        self.ends = self._places_of_edges()
        old = self.x[self.ends] if self.edits is None else self.edits.handed
        self.phi = phi
        if count > 1:
            residual = (phi - old).flatten(1)
            new = self._carried(phi.flatten(1), residual).view_as(phi)
            if self.secants is not None:
                new = new + self.secants.correction(new - old, *self._reach_of_pairs())
            if self.edits is not None:
                new = self.edits.spare(new, phi)
            distance = new - old if plan.sloped or self.secants is not None else residual.cumsum(0).view_as(phi)
            if self.edits is not None:
                distance = self.edits.spare(distance, torch.zeros_like(distance))
            if plan.single and plan.method.start == "clean":
                self.clean.add_(new[-2] - old[-2], alpha=plan.clean_slope[self.hi - 1])
        else:
            new = phi
            distance = new - old
        self.x[self.ends] = new
        self.ages = [age + 1 for age in self.ages]
        return plan.step.mean_square(distance)

    def _carried(self, phi: Tensor, residual: Tensor) -> Tensor:
        """Phi plus the changes carried from the nodes before, `[W, d]`: stretch by stretch, so that a wide window needs no
        matrix of its width squared."""
        plan, parts = self.plan, []
        for begin in range(0, len(phi), STRETCH):
            steps = plan.slope[self.lo + begin : min(self.lo + begin + STRETCH, self.hi)]
            part = slice(begin, begin + len(steps))
            carried = plan.move(inverse(steps).fill_diagonal_(0))
            if not parts:
                parts.append(torch.addmm(phi[part], carried, residual[part]))
                continue
            before = slice(begin - STRETCH, begin)
            change = parts[-1] - phi[before] + residual[before]
            entering = torch.zeros_like(residual[part][: steps.shape[1]])  # what the stretch before hands on
            for i in range(len(entering)):
                for j in range(i, steps.shape[1]):
                    entering[i].add_(change[i - j - 1], alpha=steps[i, j].item())
            forced = residual[part].clone()
            forced[: len(entering)] += entering
            parts.append(torch.addmm(phi[part], carried, forced))
            parts[-1][: len(entering)] += entering
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _reach_of_pairs(self) -> tuple[Tensor, Tensor]:
        """L (a - G) and L b of equation (2) of methods/secant.py, `[W, W]`, on the device."""
        plan, rows, width = self.plan, slice(self.lo, self.hi), self.hi - self.lo
        slope, table = plan.slope[rows], plan.table
        parts = [torch.zeros(width, width, dtype=torch.float64) for _ in range(2)]
        for part, values in zip(parts, (table.a[rows] - slope, table.b[rows]), strict=True):
            for j in range(min(table.band, width)):
                part.diagonal(-j).copy_(values[j:, j])
        carry = inverse(slope)
        first, second = (plan.move(carry @ part) for part in parts)
        return first, second

    def _places_of_edges(self) -> slice | Tensor:
        """Where the nodes after the first stand in `x`."""
        plan, h = self.plan, self.plan.history
        if plan.single:
            return slice(h + 1, h + 1 + self.hi - self.lo)
        edges = torch.tensor(plan.edges[self.lo : self.hi + 1])
        return (edges[1:] - edges[0] + h).to(plan.device)

    def advance(self, norms: list[float], round: int) -> WindowRecord:
        """Passes the leading nodes that the rule lets pass, one at least; fills what enters, or begins the correction of a
        block that ended. After a correction it only fills.

        Args:
            norms: What `tell` returned, on the host.
            round: The round's number, for the record.

        Raises:
            ValueError: If the state after the first node is not finite, or a state overflowed in a run of so many sweeps.
        """
        plan, first, passed = self.plan, self.lo, 1
        if self.correction is not None:
            return self._corrected(norms, round)
        if all(map(math.isfinite, norms)):
            rms = [math.sqrt(v) for v in norms]
            self.ledger.record(first, rms)
            if plan.method.sweeps is None:
                while passed < len(rms) and self._passes(passed, rms[passed - 1]):
                    passed += 1
            else:
                passed = max(1, sum(age >= plan.method.sweeps for age in self.ages))  # ages fall along the window
            self.ledger.settle(passed)
        else:
            rms = [math.inf] * self._salvage()
            self.ledger.forget()
        shift = plan.edges[self.lo + passed] - plan.edges[self.lo]
        if self.on_final is not None:
            self.on_final(plan.edges[self.lo] + 1, self.x[plan.history + 1 : plan.history + 1 + shift])
        if self.edits is not None:
            self.edits.pass_over(passed, self.x[plan.history :])
        if self.secants is not None:
            self.secants.slide(passed)
        self.x, self.z = self.x[shift:], self.z[shift:]
        if plan.history:
            self.m = self.m[shift:]
        self.lo += passed
        self.ages = self.ages[passed:]
        if plan.method.corrector is not None and self.lo in plan.blocks and plan.table.sigma[self.lo] > 0:
            place = plan.blocks.index(self.lo) - 1
            state = (self.noise, self.sample, self.final)
            self.correction = Correction(plan.step, plan.method.corrector, self.lo, place, *state)
        else:
            self._open()
        return WindowRecord(round, self.sample, first, rms, passed)

    def _corrected(self, change: list[float], round: int) -> WindowRecord:
        """Takes over the corrected state of a block's end."""
        assert self.correction is not None
        if not all(map(math.isfinite, change)):
            raise ValueError(
                f"sample {self.sample} is not finite after the correction at node {self.lo} (time "
                f"{float(self.plan.table.t[self.lo]):g}): the model returned NaN or infinity, or the corrector's step is too "
                "long for it; give its Lipschitz constant, or no corrector"
            )
        self.x[self.plan.history] = self.correction.state
        self.correction = None
        self._open()
        return WindowRecord(round, self.sample, self.lo, [math.sqrt(change[0])], 0)

    def _passes(self, node: int, rms: float) -> bool:
        """Whether the window's node of that number, which changed by `rms`, may be passed over."""
        plan, place = self.plan, self.lo + node
        if plan.method.rule == "change":
            return rms <= plan.bound[place - 1]
        return self.ledger.spent + self.ledger.cost(node + 1) <= plan.method.tolerance * plan.share[place + 1]

    def _salvage(self) -> int:
        """Keeps the finite head of a window in which some state overflowed or some output was not finite; how many nodes that
        is. The rest is filled afresh, from no clean-data estimate, as the newest one may have overflowed."""
        plan = self.plan
        finite = torch.isfinite(self.phi.flatten(1).square().mean(1)).tolist()
        count = finite.index(False) if False in finite else len(finite)
        if count == 0:
            node = plan.edges[self.lo]
            raise ValueError(
                f"sample {self.sample} is not finite after node {node} (time {float(plan.table.t[node]):g}), whose own state "
                "is that of the sequential chain: the model returned NaN or infinity, or overflowed its dtype; check its "
                "weights, its dtype and the times it was trained on"
            )
        if plan.method.sweeps is not None:
            raise ValueError(
                f"sample {self.sample} overflowed {self.phi.dtype} at node {plan.edges[self.lo + count]}, "
                f"{self.ages[0]} sweeps after its block began: sweeps with this linear part expand before they converge; use "
                "shorter blocks, a slope that stays bounded (freeze_clean_data, shifted), or no fixed number of sweeps"
            )
        self.x[self.ends] = self.phi
        self.secants = None
        self.clean = torch.zeros_like(self.clean)
        self.hi = self.lo + count
        self.ages = self.ages[:count]
        keep = plan.edges[self.hi] - plan.edges[self.lo]
        self.x, self.z = self.x[: plan.history + keep + 1], self.z[:keep]
        if plan.history:
            self.m = self.m[: plan.history + keep]
        return count

    def _open(self) -> None:
        """Widens the window to its full width and fills the nodes that enter it."""
        plan = self.plan
        width = 1 if self.lo < plan.method.warmup else plan.width
        hi = min(self.lo + width, self._reach())
        first, last = plan.edges[self.hi], plan.edges[hi]
        if plan.table.stochastic and last > first:
            drawn = plan.move(self.noise.draw(self.sample, range(first, last)))
            self.z = torch.cat([self.z, drawn])
        for begin in range(first, last, FILL):
            self._fill(slice(begin, min(begin + FILL, last)))
        self.ages += [0] * (hi - self.hi)
        self.hi = hi

    def _reach(self) -> int:
        """The block edge to which the window may reach: one further once the newest block has passed, or been swept as often
        as the stagger says."""
        blocks = self.plan.method.blocks
        if self.hi == self.plan.blocks[self.block] < self.plan.intervals:
            stagger = None if blocks is None else blocks.stagger
            if self.lo == self.hi or (stagger is not None and self.ages[-1] >= stagger):
                self.block += 1
        return self.plan.blocks[self.block]

    def _fill(self, steps: slice) -> None:
        """Appends the states after some steps, by the linear recurrence x' = sum_j A_j x_j + B D + c z."""
        plan, count, known = self.plan, steps.stop - steps.start, len(self.x) - 1
        if self.guide is not None:
            states, outputs = (v.to(self.x) for v in self.guide(steps))
            self.x = torch.cat([self.x, states])
            if plan.history:
                self.m = torch.cat([self.m, outputs])
            return
        forcing = column(plan.move(plan.fill_clean[steps]), self.x) * self.clean
        if plan.fill_noise:
            place = steps.start - plan.edges[self.lo]
            forcing.addcmul_(column(plan.step.c[steps], self.x), self.z[place : place + count])
        for i in range(min(plan.table.band, count)):
            for j in range(i, plan.table.band):
                factor = plan.fill_slope[steps.start + i, j].item()
                if factor:
                    forcing[i].add_(self.x[known + i - j], alpha=factor)
        carried = plan.move(inverse(plan.fill_slope[steps]))
        new = (carried @ forcing.flatten(1)).view_as(forcing)
        if plan.history:
            self.m = torch.cat([self.m, self._fill_outputs(steps, torch.cat([self.x[-1:], new[:-1]]))])
        self.x = torch.cat([self.x, new])

    def _fill_outputs(self, steps: slice, states: Tensor) -> Tensor:
        """Outputs that go with filled states, for multistep sub-intervals whose neighbour has not been evaluated yet."""
        plan = self.plan
        if plan.method.start == "clean":
            p, q = (column(plan.move(v[steps]), states) for v in (plan.table.p, plan.table.q))
            return (self.clean - p * states) / q
        return torch.zeros_like(states)

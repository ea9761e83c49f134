"""One sample's window of states: what it asks for, what it makes of the answers, how it slides.

Fine nodes are those of the table; sub-interval n runs from fine node edges[n] to edges[n+1]. The window holds the fine states
from P - 1 nodes before its first edge (the history that a multistep sampler reads; zeros at the chain's start) to its last
edge, the outputs at all of them but the last where the table reads earlier outputs, and the noises from its first edge on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.sensitivity import DATA_VARIANCE, noise_units, sensitivity, slope_error
from paradiff.chain.slope import freeze_clean_data, inverse, over_intervals, resolve
from paradiff.chain.step import Step
from paradiff.chain.table import Table, column
from paradiff.methods.secant import Secants
from paradiff.methods.window.budget import LEAST_THETA, ErrorBudget
from paradiff.methods.window.corrector import Correction
from paradiff.methods.window.edits import Edits
from paradiff.methods.window.method import WindowMethod
from paradiff.solver.solution import ErrorEstimate, WindowRecord

FILL = 64  # nodes filled by one matrix product
STRETCH = 256  # nodes swept by one matrix product

Settled = Callable[[int, Tensor], None]
"""Called with the states that became final, `[n, ...]`, and the fine node of the first of them."""

Guide = Callable[[slice], tuple[Tensor, Tensor]]
"""What nodes that enter the window are filled with instead of the method's start: for some steps, the states after them and
the outputs where they begin, each `[n, ...]`."""


class WindowSetup:
    """What all samples of a run share: edges, slopes, bounds, and the coefficients on the device in the states' dtype."""

    def __init__(
        self,
        table: Table,
        method: WindowMethod,
        device: torch.device,
        dtype: torch.dtype,
        members: bool = False,
        resolution: float | None = None,
    ) -> None:
        self.table, self.method, self.device, self.dtype = table, method, device, dtype
        self.resolution = torch.finfo(dtype).eps if resolution is None else resolution
        self.edges = method.edges(table)
        self.intervals = len(self.edges) - 1
        self.width = self.intervals if method.window is None else method.window
        self.single = self.intervals == table.steps
        self.history = table.band - 1
        self.blocks = [0, self.intervals] if method.blocks is None else method.blocks.edges(table)
        self.exact_after = _exact_after(self.blocks, None if method.blocks is None else method.blocks.stagger)
        if method.corrector is not None and method.corrector.lipschitz is None:
            for edge in self.blocks[1:]:
                if table.sigma[edge] > 0:
                    method.corrector.parameters(float(table.sigma[edge]) ** -2)
        self.slope = over_intervals(resolve(method.slope, table), self.edges)
        if method.blocks is not None and not method.blocks.carry:
            self.slope = self.slope.clone()
            for edge in self.blocks[1:-1]:
                for j in range(table.band):
                    self.slope[edge + j : edge + j + 1, j:] = 0  # what refers to the edge and to nodes before it
        self.bound = (method.tolerance * noise_units(table, self.edges)).tolist()
        self.sloped = bool(self.slope.any())
        self.least_theta = LEAST_THETA if self.sloped else 1.0
        error, factor = slope_error(table, self.slope, self.edges), sensitivity(table)[self.edges]
        costs = torch.cat([torch.zeros(1), (error * factor[1:].sqrt()).cumsum(0)])
        self.slope_error, self.factor = error.tolist(), factor.tolist()
        self.share = (costs / costs[-1]).tolist() if costs[-1] > 0 else [1.0] * len(self.edges)
        self.step = Step(table, device, dtype, members)
        self.t, self.move = self.step.t, self.step.move
        self.fill_slope = torch.zeros_like(table.a)
        self.fill_clean = torch.zeros_like(table.c)
        if method.start == "clean":
            source = (torch.arange(table.steps)[:, None] - torch.arange(table.band)).clamp(min=0)
            self.fill_slope = freeze_clean_data(table)
            self.fill_clean = (table.b / table.q[source]).sum(1)
        elif method.start == "linear":
            self.fill_slope = table.a
        else:
            self.fill_slope[:, 0] = 1
        alpha, sigma = table.alpha[:-1], table.sigma[:-1]
        self.clean_slope = (alpha * DATA_VARIANCE / (alpha**2 * DATA_VARIANCE + sigma**2)).tolist()
        self.fill_noise = table.stochastic and method.start != "copy"


def _exact_after(blocks: list[int], stagger: int | None) -> int:
    """Sweeps of every block after which all its nodes are exact, if the window is as wide as the blocks in flight: the length
    of the longest in turn, and more with a stagger, where a block's first sweeps begin at a node that is not exact yet."""
    begun = found = 0
    for first, last in itertools.pairwise(blocks):
        begun = first if stagger is None else min(begun + stagger, first)
        found = max(found, last - begun)
    return found


class WindowSolver:
    """The window of one sample.

    Attributes:
        sample: The sample.
        change: `[W]` mean square change of each node after the first in the last sweep, on the device.
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
        settled: Settled | None = None,
        guide: Guide | None = None,
    ) -> None:
        self.plan, self.noise, self.sample, self.settled, self.guide = plan, noise, sample, settled, guide
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
        self.change = x0.new_empty(0)
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
    def error_estimate(self) -> ErrorEstimate:
        """How far to trust the sample."""
        return ErrorEstimate(self.ledger.residual, self.ledger.estimated_error, self.rounds, self.evaluations)

    def rows(self) -> tuple[Tensor, Tensor]:
        """The rows wanted now: fine nodes `[R]` and states `[R, ...]` as the network expects them."""
        if self.correction is not None:
            return self.correction.rows()
        plan, h, first = self.plan, self.plan.history, self.plan.edges[self.lo]
        if plan.single:
            self.nodes = torch.arange(self.lo, self.hi)
            self.at: slice | Tensor = slice(self.lo, self.hi)
            self.places = [slice(h - j, h - j + len(self.nodes)) for j in range(plan.table.band)]
            self.noise_place: slice | Tensor = slice(0, len(self.nodes))
        else:
            edges = plan.edges
            self.running = [n for n in range(self.lo, self.hi) if edges[n] + self.substep < edges[n + 1]]
            self.nodes = torch.tensor([edges[n] + self.substep for n in self.running])
            self.at = self.nodes.to(plan.device)
            self.noise_place = self.at - first
            self.places = [self.noise_place + h - j for j in range(plan.table.band)]
        self.state = self.x[self.places[0]]
        return self.nodes, plan.step.seen(self.at, self.state)

    def absorb(self, outputs: Tensor, states: Tensor | None = None) -> bool:
        """Takes the outputs of the rows last asked for; whether that ended a sweep, so that `change` is new.

        Args:
            outputs: `[R, ...]` outputs.
            states: `[R, ...]` the states as the caller changed them before the network saw them, not scaled; None where it
                left them alone.

        Raises:
            ValueError: If states were changed and the method solves sub-intervals of several steps.
        """
        plan = self.plan
        self.rounds += 1
        self.evaluations += len(outputs)
        if self.correction is not None:
            assert states is None
            finished = self.correction.absorb(outputs)
            self.change = self.correction.change
            return finished
        if states is not None:
            self._edit(states)
        m = plan.table.convert(self.nodes, self.state, outputs)
        if plan.method.start == "clean" and (plan.single or self.running[-1] == self.hi - 1):
            last = self.nodes[-1:]
            self.clean = plan.table.p[last].item() * self.state[-1] + plan.table.q[last].item() * m[-1]
        if plan.history:
            self.m[self.places[0]] = m
        if plan.method.secants:
            if self.secants is None:
                self.secants = Secants(plan.method.secants, plan.resolution, plan.step.members)
            self.secants.observe(self.state, m)
        read = [self.state, *(self.x[place] for place in self.places[1:])]
        drives = [m, *(self.m[place] for place in self.places[1:])]
        z = self.z[self.noise_place] if plan.table.stochastic else None
        phi = plan.step(self.at, read, drives, z)
        return self._sweep(phi) if plan.single else self._substep(phi)

    def _edit(self, states: Tensor) -> None:
        """Takes over the states as the caller changed them (edits.py); steps are taken from them."""
        if not self.plan.single:
            raise ValueError(
                f"the states of a window were changed between steps, and {self.plan.method.name} solves sub-intervals of "
                f"{self.plan.method.stride} steps, of which only the ends would be seen; give it a stride of 1"
            )
        if self.edits is None:
            self.edits = Edits()
        self.edits.take(self.lo, self.state, states, self.x[self._places_of_edges()])
        self.state = states
        self.x[self.places[0]] = states

    def _substep(self, phi: Tensor) -> bool:
        """Puts one fine step of every running sub-interval in its place; whether that was the last of the sweep."""
        edges = self.plan.edges
        self.substep += 1
        going = [k for k, n in enumerate(self.running) if edges[n] + self.substep < edges[n + 1]]
        ended = [k for k, n in enumerate(self.running) if edges[n] + self.substep == edges[n + 1]]
        if self.substep == 1:
            self.phi = torch.empty_like(self.x[: self.hi - self.lo])
        if ended:
            self.phi[[self.running[k] - self.lo for k in ended]] = phi[ended]
        if going:
            place = self.places[0]
            assert isinstance(place, Tensor)
            self.x[place[going] + 1] = phi[going]
            return False
        self.substep = 0
        return self._sweep(self.phi)

    def _sweep(self, phi: Tensor) -> bool:
        """Updates all nodes of the window: equation (2) of solver/loop.py.

        `change` is that of the update, which is the preconditioned residual; without a slope (Jacobi) the updates stay small
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
        self.change = plan.step.mean_square(distance)
        self.x[self.ends] = new
        self.ages = [age + 1 for age in self.ages]
        return True

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

    def slide(self, change: list[float], round: int) -> WindowRecord:
        """Passes the leading nodes that the rule lets pass, one at least; fills what enters, or begins the correction of a
        block that ended. After a correction it only fills.

        Args:
            change: `change` on the host.
            round: The round's number, for the record.

        Raises:
            ValueError: If the state after the first node is not finite, or a state overflowed in a run of so many sweeps.
        """
        plan, first, passed = self.plan, self.lo, 1
        if self.correction is not None:
            return self._corrected(change, round)
        if all(map(math.isfinite, change)):
            rms = [math.sqrt(v) for v in change]
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
        if self.settled is not None:
            self.settled(plan.edges[self.lo] + 1, self.x[plan.history + 1 : plan.history + 1 + shift])
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

# SPDX-License-Identifier: Apache-2.0
"""The stopping rule: the values that Parareal gives to block edges, and how far each may be trusted.

After iteration p the error left at edge n+1 is about h[n] |x[n, p] - x[n, p-1]|. Carried along the chain as Gaussian data
would carry it (f) it gives e, the error expected of the edge; carried to the sample by chain/sensitivity.py's factor s it
gives the estimated error of the sample, `control.caution` (times `scatter` for samples of few elements) times theta times the
sum of

    e[n+1] = f[n] e[n] + h[n] |change n|,       estimate[n+1] = estimate[n] + s[n+1] h[n] |change n|                (1)

    h[n] = h0[n] (l + k d[n])                                                                                     (2)

h0 is `coarse.propagator_mismatch`, that of Gaussian data. A state that is about to decide which of several samples it becomes,
has a derivative that Gaussian data lack: d is chain/sensitivity.py's decision. l and k are fields of `PararealControl`; k is
larger for stochastic chains, whose noise keeps the question open.

theta is the observed contraction: the next change of an edge is the error that it had, so the ratio of the two calibrates h.
A sample that decides between the last edges and the end answers to their errors more strongly than h says, and its own changes
fall slowly. So in place of theta times the sum at least

    left = |change B| min(|change B|/|change B before|, 1)                                                         (3)

counts at the last edge B: what its next change would be, if its changes went on to fall as they last did.
All of this is known when the value itself is: no iteration is made only to see that nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from paradiff.chain.data_scale import held_to
from paradiff.chain.sensitivity import FITTED, decision, log_snr, noise_units, scatter, sensitivity
from paradiff.chain.slope import DATA_VARIANCE
from paradiff.chain.table import Table
from paradiff.errors import NotFinite
from paradiff.methods.parareal.coarse import Coarse, propagator_mismatch
from paradiff.methods.parareal.options import PararealOptions


@dataclass(eq=False)
class BlockRun:
    """The run of one block from x[i, p]; the last edge has one too, which holds the sample.

    Attributes:
        block: i.
        level: p.
        start: Slot of x[i, p].
        theta: The observed contraction.
        running: Slot of the running fine state, which ends as F(i, p); -1 before the first step.
        end: Slot of G(i, p); -1 before its first step.
        clean: Slot of the clean-data estimate of the last coarse step; -1 where none is kept.
        clean_before: Slot of the clean-data estimate before that of the next coarse step, or -1.
        fine: Fine steps taken.
        coarse: Coarse steps taken.
        change: Root mean square of x[i, p] - x[i, p-1].
        error: e of equation (1).
        estimate: Sum of s h |change| up to here.
        changes: The blocks before and |change| at their starts, which the sum is of.
        residual: Largest change that the value came from.
        seen, predicted: Sums of squares behind theta.
        left: Equation (3), at the last edge; 0 at others, and before it has changed twice.
    """

    block: int
    level: int
    start: int
    theta: float
    running: int = -1
    end: int = -1
    clean: int = -1
    clean_before: int = -1
    fine: int = 0
    coarse: int = 0
    change: float = math.inf
    error: float = math.inf
    estimate: float = math.inf
    changes: tuple[tuple[int, float], ...] = ()
    residual: float = math.inf
    seen: float = 0.0
    predicted: float = 0.0
    left: float = 0.0


@dataclass
class EdgeUpdate:
    """An edge value made in this round.

    Attributes:
        run: The run that it starts (at the last edge: that holds it).
        source: The newest run of the block before.
        kind: `coarse`: the first value, G; `corrected`: equation (1); `exact`: F from a settled edge.
        previous: The run that the edge's last value started.
    """

    run: BlockRun
    source: BlockRun
    kind: Literal["coarse", "corrected", "exact"]
    previous: BlockRun | None = None


class StoppingRule:
    """Equation (1) and the stop rules, for all samples of a run.

    Args:
        table: The sampler.
        method: The method, with its rule and tolerance.
        edges: `B+1` fine nodes.
        coarse: The coarse propagator.
        elements: Elements of a sample.
    """

    def __init__(
        self, table: Table, method: PararealOptions, edges: Sequence[int], coarse: Coarse, elements: int = FITTED
    ) -> None:
        self._table, self._method, self._edges, self._blocks = table, method, edges, len(edges) - 1
        self._units = [0.0, *(method.tolerance * noise_units(table, list(edges))).tolist()]
        if self._units[-1] == 0:  # the chain ends without noise: its last edge is held to the unit of the one before
            self._units[-1] = self._units[-2]
        self._coarse = coarse
        self._caution = method.control.caution * scatter(elements)
        self._weights: dict[float, tuple[list[float], list[float]]] = {}
        self._sensitivity, self._mismatch = self._weighted(1.0)
        spread = (table.alpha[list(edges)] ** 2 * DATA_VARIANCE + table.sigma[list(edges)] ** 2).sqrt()
        self._carried = (spread[1:] / spread[:-1]).tolist()

    def _weighted(self, size: float) -> tuple[list[float], list[float]]:
        """s `[B+1]` at the edges and h `[B]` of equation (1) for data of mean square `size`."""
        if size not in self._weights:
            table, control, edges = self._table, self._method.control, list(self._edges)
            factor = control.stochastic_decision if table.stochastic else control.deterministic_decision
            place = log_snr(table)[edges[:-1]] + math.log(size)
            mismatch = propagator_mismatch(table, self._coarse, edges, size)
            self._weights[size] = (
                sensitivity(table, size)[edges].tolist(),
                (mismatch * (control.least_mismatch + factor * decision(place))).tolist(),
            )
        return self._weights[size]

    def observe(self, update: EdgeUpdate, value: float, sample: int) -> None:
        """Equation (1) for one value.

        Args:
            update: The value.
            value: Its mean square change; of a first value, its mean square.
            sample: The sample, for messages.

        Raises:
            ValueError: If a state of the sequential chain is not finite.
        """
        run, source, previous = update.run, update.source, update.previous
        i, control = run.block - 1, self._method.control
        if previous is not None:
            run.change = math.sqrt(value) if math.isfinite(value) else math.inf
        if update.kind == "exact":
            if not math.isfinite(value):
                node = self._edges[i]
                raise NotFinite(
                    f"sample {sample} is not finite after the block from node {node} (time {float(self._table.t[node]):g}), "
                    "which was walked by the chain's own steps: the model returned NaN or infinity, or overflowed its dtype; "
                    "check its weights, its dtype and the times it was trained on"
                )
            run.error, run.estimate = self._carried[i] * source.error, source.estimate
            run.changes = source.changes
            run.residual = source.residual
        elif previous is not None:
            left = self._mismatch[i] * source.change
            run.error = self._carried[i] * source.error + left
            run.estimate = source.estimate + self._sensitivity[i + 1] * left
            run.changes = (*source.changes, (i, source.change))
            run.residual = max(source.residual, source.change)
            if run.block == self._blocks and previous.change < math.inf:
                run.left = run.change * min(run.change / max(previous.change, 1e-300), 1.0)
        run.seen, run.predicted = source.seen, source.predicted
        if previous is not None:
            run.theta = previous.theta
            if 0 < previous.error < math.inf and math.isfinite(run.change):
                run.seen += run.change * run.change
                run.predicted += previous.error * previous.error
                observed = math.sqrt(run.seen / run.predicted)
                run.theta = max(observed, control.forgetting * previous.theta, control.least_theta)

    def estimate(self, run: BlockRun, size: float) -> float:
        """The estimated root mean square error that this value leaves in the sample, for data of mean square `size`; at least
        that for data of mean square 1."""
        total = run.estimate
        if size != 1 and run.changes:
            factor, mismatch = self._weighted(size)
            total = max(total, sum(factor[i + 1] * mismatch[i] * change for i, change in run.changes))
        if total == 0:
            return 0.0
        found = self._caution * max(run.theta * total, run.left)
        return found if math.isfinite(found) else math.inf

    def passes(self, run: BlockRun, size: float) -> bool:
        """Whether an edge whose predecessor is settled may be settled at this value, by the rules that judge edges one by
        one. With a window, edges share the control's `windowed_share` of the tolerance along the chain, as they must pass for
        it to slide; without one, settling early saves evaluations but no rounds, and may use its `early_share` only."""
        method, n = self._method, run.block
        if method.iterations is not None or method.ordering == "batched":
            return False
        if method.rule == "change":
            return run.change <= self._units[n]
        if method.rule == "error":
            early = method.control.early_share if method.window is None else method.control.windowed_share
            share = n / self._blocks * (early if n < self._blocks else 1)
            return self.estimate(run, size) <= held_to(method.tolerance, size) * share
        return False

    def converged(self, values: Sequence[BlockRun], size: float) -> bool:
        """Whether the last of the newest `values` of all edges known at its iteration, in order, is the sample, for data of
        mean square `size`."""
        method, last = self._method, values[-1]
        if method.iterations is not None:
            return last.level >= method.iterations
        if last.level >= self._blocks:
            return True
        if method.rule == "error":
            return self.estimate(last, size) <= held_to(method.tolerance, size)
        if method.rule == "change":
            return method.ordering == "batched" and all(v.change <= self._units[v.block] for v in values if v.block)
        return last.change <= method.tolerance

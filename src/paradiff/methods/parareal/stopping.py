"""Refinement: the values that Parareal gives to block edges, and how far each may be trusted.

After iteration p the defect left at edge n+1 is about h[n] |x[n, p] - x[n, p-1]|. Carried along the chain as Gaussian data
would carry it (f) it gives e, the error expected of the edge; carried to the sample by chain/sensitivity.py's response s it
gives the estimated error of the sample, 7/4 theta times the sum of

    e[n+1] = f[n] e[n] + h[n] |change n|,       estimate[n+1] = estimate[n] + s[n+1] h[n] |change n|                (1)

    h[n] = h0[n] (0.3 + 4 k w (1 - w)),         w = alpha^2 v/(alpha^2 v + sigma^2)                                 (2)

h0 is `coarse.defect`, that of Gaussian data. A state that is about to decide which of several samples it becomes, most of all
near w = 1/2, has a derivative that Gaussian data lack: k = 2 for deterministic chains, and 6 for stochastic ones, whose noise
keeps the question open. The constants were fitted on the bundled network (DDIM and DDPM of 25 to 1000 steps, seeds 0 to 7).

theta is observed: the next change of an edge is the error that it had, so the ratio of the two calibrates h. All of this is
known when the value itself is: no iteration is made only to see that nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from paradiff.chain.sensitivity import DATA_VARIANCE, noise_units, response
from paradiff.chain.table import Table
from paradiff.methods.parareal.coarse import Coarse, defect
from paradiff.methods.parareal.options import PararealOptions

CAUTION = 1.75
LEAST_DEFECT, DETERMINISTIC_DECISION, STOCHASTIC_DECISION = 0.3, 2.0, 6.0  # equation (2)
FIRST_THETA, LEAST_THETA, FORGETTING = 1.0, 0.5, 0.7
EARLY = 0.01  # share of the tolerance that edges before the last may spend to settle early


@dataclass(eq=False)
class BlockRun:
    """The solve of one block from x[i, p]; the last edge has one too, which holds the sample.

    Attributes:
        block: i.
        level: p.
        start: Slot of x[i, p].
        run: Slot of the running fine state, which ends as F(i, p); -1 before the first step.
        end: Slot of G(i, p); -1 before its first step.
        lead: Slot of the clean-data estimate of the last coarse step.
        before: Slot of the clean-data estimate before that of the next coarse step, or -1.
        fine: Fine steps taken.
        coarse: Coarse steps taken.
        change: Root mean square of x[i, p] - x[i, p-1].
        error: e of equation (1).
        estimate: Sum of s h |change| up to here.
        residual: Largest change that the value came from.
        seen, predicted: Sums of squares behind theta.
        theta: The observed contraction.
    """

    block: int
    level: int
    start: int
    run: int = -1
    end: int = -1
    lead: int = -1
    before: int = -1
    fine: int = 0
    coarse: int = 0
    change: float = math.inf
    error: float = math.inf
    estimate: float = math.inf
    residual: float = math.inf
    seen: float = 0.0
    predicted: float = 0.0
    theta: float = FIRST_THETA


@dataclass
class EdgeUpdate:
    """An edge value made in this round.

    Attributes:
        solve: The solve that it starts (at the last edge: that holds it).
        source: The newest solve of the block before.
        kind: `coarse`: the first value, G; `corrected`: equation (1); `exact`: F from a settled edge.
        previous: The solve that the edge's last value started.
    """

    solve: BlockRun
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
    """

    def __init__(self, table: Table, method: PararealOptions, edges: Sequence[int], coarse: Coarse) -> None:
        self._table, self._method, self._edges, self._blocks = table, method, edges, len(edges) - 1
        self._units = [0.0, *(method.tolerance * noise_units(table, list(edges))).tolist()]
        if self._units[-1] == 0:  # the chain ends without noise: its last edge is held to the unit of the one before
            self._units[-1] = self._units[-2]
        self._response = response(table)[list(edges)].tolist()
        signal = table.alpha[list(edges[:-1])] ** 2 * DATA_VARIANCE
        weight = signal / (signal + table.sigma[list(edges[:-1])] ** 2)
        decision = STOCHASTIC_DECISION if table.stochastic else DETERMINISTIC_DECISION
        caution = LEAST_DEFECT + 4 * decision * weight * (1 - weight)
        self._defect = (defect(table, coarse, edges) * caution).tolist()
        spread = (table.alpha[list(edges)] ** 2 * DATA_VARIANCE + table.sigma[list(edges)] ** 2).sqrt()
        self._carried = (spread[1:] / spread[:-1]).tolist()

    def judge(self, made: EdgeUpdate, value: float, sample: int) -> None:
        """Equation (1) for one value.

        Args:
            made: The value.
            value: Its mean square change; of a first value, its mean square.
            sample: The sample, for messages.

        Raises:
            ValueError: If a state of the sequential chain is not finite.
        """
        solve, source, previous = made.solve, made.source, made.previous
        i = solve.block - 1
        if previous is not None:
            solve.change = math.sqrt(value) if math.isfinite(value) else math.inf
        if made.kind == "exact":
            if not math.isfinite(value):
                node = self._edges[i]
                raise ValueError(
                    f"sample {sample} is not finite after the block from node {node} (time {float(self._table.t[node]):g}), "
                    "which was walked by the chain's own steps: the model returned NaN or infinity, or overflowed its dtype; "
                    "check its weights, its dtype and the times it was trained on"
                )
            solve.error, solve.estimate = self._carried[i] * source.error, source.estimate
            solve.residual = source.residual
        elif previous is not None:
            defect = self._defect[i] * source.change
            solve.error = self._carried[i] * source.error + defect
            solve.estimate = source.estimate + self._response[i + 1] * defect
            solve.residual = max(source.residual, source.change)
        solve.seen, solve.predicted = source.seen, source.predicted
        if previous is not None:
            solve.theta = previous.theta
            if 0 < previous.error < math.inf and math.isfinite(solve.change):
                solve.seen += solve.change**2
                solve.predicted += previous.error**2
                observed = math.sqrt(solve.seen / solve.predicted)
                solve.theta = max(observed, FORGETTING * previous.theta, LEAST_THETA)

    def estimate(self, solve: BlockRun) -> float:
        """The estimated root mean square error that this value leaves in the sample."""
        found = CAUTION * solve.theta * solve.estimate if solve.estimate > 0 else 0.0
        return found if math.isfinite(found) else math.inf

    def passes(self, solve: BlockRun) -> bool:
        """Whether an edge whose predecessor is settled may be settled at this value, by the rules that judge edges one by
        one. With a window edges must pass for it to slide, and share the tolerance along the chain; without one, settling
        early saves evaluations but no rounds, and may spend little."""
        method, n = self._method, solve.block
        if method.iterations is not None or method.schedule == "batched":
            return False
        if method.rule == "change":
            return solve.change <= self._units[n]
        if method.rule == "error":
            share = n / self._blocks * (EARLY if method.window is None and n < self._blocks else 1)
            return self.estimate(solve) <= method.tolerance * share
        return False

    def converged(self, values: Sequence[BlockRun]) -> bool:
        """Whether the last of the newest `values` of all edges known at its iteration, in order, is the answer."""
        method, last = self._method, values[-1]
        if method.iterations is not None:
            return last.level >= method.iterations
        if last.level >= self._blocks:
            return True
        if method.rule == "error":
            return self.estimate(last) <= method.tolerance
        if method.rule == "change":
            return method.schedule == "batched" and all(v.change <= self._units[v.block] for v in values if v.block)
        return last.change <= method.tolerance

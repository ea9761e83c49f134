# SPDX-License-Identifier: Apache-2.0
"""The fine and coarse steps of one sample's block runs."""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.table import column
from paradiff.methods.parareal.pool import BlockRuns
from paradiff.methods.parareal.queue import PararealQuery
from paradiff.methods.parareal.setup import PararealSetup
from paradiff.methods.parareal.stopping import BlockRun


class FineSteps:
    """The chain's own steps."""

    def __init__(self, setup: PararealSetup, runs: BlockRuns, noise: Noise, sample: int) -> None:
        self._setup, self._runs, self._noise, self._sample = setup, runs, noise, sample

    def __call__(self, query: PararealQuery, rows: list[int], m: Tensor) -> None:
        """Takes one fine step of each of these rows.

        Args:
            query: The rows of the round.
            rows: The numbers of those that are fine steps.
            m: `[R, ...]` outputs of all rows, as the table reads them.
        """
        setup, pool, band = self._setup, self._runs.pool, self._setup.table.band
        everything = len(rows) == len(query.steps)
        chosen = slice(None) if everything else pool.index(rows)
        at, states, m = query.at[chosen], query.states[chosen], m[chosen]
        past = states.unbind(1)
        z = None
        if setup.table.stochastic:
            drawn = [self._noise.draw(self._sample, range(n, n + 1)) for n in query.nodes[rows].tolist()]
            z = setup.move(torch.cat(drawn))
        x = setup.step(at, past[:band], [m, *past[band:]], z)
        slots = []
        for k in rows:
            run = query.steps[k].run
            run.fine += 1
            if run.running < 0:
                run.running = pool.take()
            slots.append(run.running)
        new = x[:, None] if band == 1 else torch.stack([x, *past[: band - 1], m, *past[band : 2 * band - 2]], 1)
        pool.states[pool.index(slots)] = new


class CoarseSteps:
    """Equation (1) of coarse.py."""

    def __init__(self, setup: PararealSetup, runs: BlockRuns, noise: Noise, sample: int) -> None:
        self._setup, self._runs, self._noise, self._sample = setup, runs, noise, sample
        self._noises: dict[int, Tensor] = {}  # aggregates of the coarse steps in flight

    def __call__(self, query: PararealQuery, rows: list[int], outputs: Tensor) -> None:
        """Takes one coarse step of each of these rows, from the clean-data estimate as the table limits it.

        Args:
            query: The rows of the round.
            rows: The numbers of those that are coarse steps.
            outputs: `[R, ...]` the network's outputs of all rows.
        """
        setup, pool = self._setup, self._runs.pool
        chosen = pool.index(rows)
        x, m, at = query.states[chosen, 0], outputs[chosen], query.at[chosen]
        clean = column(setup.p[at], x) * x + column(setup.q[at], x) * m
        if setup.table.clip is not None:
            clean = setup.table.clip(clean)
        if setup.slope is not None:
            self._open_by_slope(query.steps[rows[0]].run, clean[0])
            return
        runs = [query.steps[k].run for k in rows]
        steps = [setup.first_step[run.block] + run.coarse for run in runs]
        estimate = self._extrapolated(runs, steps, clean) if setup.extrapolates else clean
        for run in runs:
            run.coarse += 1
            if run.end < 0:
                run.end = pool.take()
        pool.states[pool.index([run.end for run in runs])] = self._reached(steps, x, estimate)

    def forget(self, steps: range) -> None:
        """Drops the aggregated noises of coarse steps that are not taken again."""
        for step in steps:
            self._noises.pop(step, None)

    def _reached(self, steps: list[int], x: Tensor, clean: Tensor) -> Tensor:
        """`[R, 2P-1, ...]` states after coarse steps: those that the next block reads, then their outputs.

        Args:
            steps: The numbers of the R coarse steps.
            x: `[R, ...]` states before them.
            clean: `[R, ...]` clean-data estimates.
        """
        setup, pool, band = self._setup, self._runs.pool, self._setup.table.band
        shape = (len(steps), band, *[1] * (x.ndim - 1))
        chosen = pool.index(steps)
        state, gain = setup.state[chosen].view(shape), setup.clean[chosen].view(shape)
        new = state * x[:, None] + gain * clean[:, None]
        if setup.table.stochastic:
            missing = [step for step in steps if step not in self._noises]
            if missing:
                made = [setup.coarse.aggregate(self._noise, self._sample, step) for step in missing]
                self._noises.update(zip(missing, setup.move(torch.stack(made)), strict=True))
            new += torch.stack([self._noises[step] for step in steps])
        if band == 1:
            return new
        ends = torch.tensor([setup.coarse.nodes[step + 1] for step in steps])[:, None] - torch.arange(1, band)
        ends = ends.clamp(min=0).to(setup.device, non_blocking=True)
        shape = (*ends.shape, *[1] * (x.ndim - 1))
        past = (clean[:, None] - setup.p[ends].view(shape) * new[:, 1:]) / setup.q[ends].view(shape)
        return torch.cat([new, past], 1)

    def _extrapolated(self, runs: list[BlockRun], steps: list[int], clean: Tensor) -> Tensor:
        """The clean-data estimates extrapolated along their trend, where there is one before; keeps them for the next step."""
        pool, found = self._runs.pool, clean.clone()
        for k, (run, step) in enumerate(zip(runs, steps, strict=True)):
            before = run.clean_before if run.coarse == 0 else run.clean
            if before >= 0 and self._setup.extrapolation[step]:
                found[k].add_(clean[k] - pool.states[before, 0], alpha=self._setup.extrapolation[step])
            if run.clean < 0:
                run.clean = pool.take()
            pool.states[run.clean, 0] = clean[k]
        return found

    def _open_by_slope(self, first: BlockRun, clean: Tensor) -> None:
        """All starts at once, from the first clean-data estimate: the propagator that needs no network."""
        first.coarse += 1
        runs = self._runs
        state = runs.pool.states[first.start, 0]
        for block in runs.in_flight:
            reached = self._reached([block], state[None], clean[None])[0]
            run = runs.begin(block + 1, 0)
            runs.pool.states[run.start] = reached
            state = reached[0]

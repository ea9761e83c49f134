# SPDX-License-Identifier: Apache-2.0
"""What all samples of a run share: block edges, coarse propagator, stopping rule and coefficients."""

from __future__ import annotations

from itertools import pairwise

import torch

from paradiff.chain.sensitivity import FITTED
from paradiff.chain.step import Step
from paradiff.chain.table import Table
from paradiff.methods.parareal.options import PararealOptions
from paradiff.methods.parareal.stopping import BlockRun, StoppingRule


class PararealSetup:
    """See the module.

    Args:
        table: The sampler.
        method: The method.
        device: Where states live.
        dtype: Their dtype.
        shared_window: Whether a state is a batch of members, each of which is to come out right.
        elements: Elements of a sample; of a member, where it is a batch of them.

    Attributes:
        edges: `[B+1]` fine nodes.
        intervals: B.
        width: Most blocks in flight.
        longest: Fine steps of the longest block.
        first_step: `[B+1]` the number of the coarse step that begins at each edge.
        slope: `[B]` of a propagator that needs no network (coarse.py); None for others.
        extrapolation: u of each coarse step (coarse.py), and `extrapolates` whether any is above 0.
        state, clean: a and d of coarse.py, on the device.
        stopping: The stopping rule.
    """

    def __init__(
        self,
        table: Table,
        method: PararealOptions,
        device: torch.device,
        dtype: torch.dtype,
        shared_window: bool = False,
        elements: int = FITTED,
    ) -> None:
        self.table, self.method, self.device = table, method, device
        self.edges = method.edges(table)
        self.intervals = len(self.edges) - 1
        if method.iterations is not None and method.iterations > self.intervals:
            raise ValueError(
                f"{method.iterations} iterations were asked for; {self.intervals} blocks are exact after {self.intervals}: "
                "give at most that"
            )
        if method.window is not None and method.window > self.intervals:
            raise ValueError(f"the window is {method.window}; there are {self.intervals} blocks: give at most that, or None")
        self.width = self.intervals if method.window is None else method.window
        self.step = Step(table, device, dtype, shared_window)
        self.t, self.move = self.step.t, self.step.move
        self.coarse = method.propagator(table, self.edges)
        place = {node: k for k, node in enumerate(self.coarse.nodes)}
        self.first_step = [place[e] for e in self.edges]
        self.longest = max(b - a for a, b in pairwise(self.edges))
        self.state, self.clean = self.move(self.coarse.state), self.move(self.coarse.clean)
        self.slope = None if self.coarse.slope is None else self.coarse.slope.tolist()
        self.extrapolation = self.coarse.extrapolation.tolist()
        self.extrapolates = any(self.extrapolation)
        self.p, self.q = self.move(table.p), self.move(table.q)
        self.stopping = StoppingRule(table, method, self.edges, self.coarse, elements)

    def fine_steps(self, run: BlockRun) -> int:
        """Fine steps of a run's block."""
        return self.edges[run.block + 1] - self.edges[run.block]

    def coarse_steps(self, run: BlockRun) -> int:
        """Coarse steps of a run that need the network."""
        if self.slope is not None:
            return int(run.block == 0 and run.level == 0)
        return self.first_step[run.block + 1] - self.first_step[run.block]

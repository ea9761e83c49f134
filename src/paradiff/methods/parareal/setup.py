"""What all samples of a run share: block edges, coarse propagator, stopping rule and coefficients."""

from __future__ import annotations

import torch

from paradiff.chain.step import Step
from paradiff.chain.table import Table
from paradiff.methods.parareal.options import PararealOptions
from paradiff.methods.parareal.stopping import StoppingRule


class PararealSetup:
    """What all samples of a run share: edges, coarse propagator, bounds and coefficients."""

    def __init__(
        self, table: Table, method: PararealOptions, device: torch.device, dtype: torch.dtype, members: bool = False
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
        self.step = Step(table, device, dtype, members)
        self.t, self.move = self.step.t, self.step.move
        self.coarse = method.propagator(table, self.edges)
        place = {node: k for k, node in enumerate(self.coarse.nodes)}
        self.gaps = [place[e] for e in self.edges]
        self.longest = max(b - a for a, b in zip(self.edges, self.edges[1:], strict=False))
        self.state, self.clean = self.move(self.coarse.state), self.move(self.coarse.clean)
        self.slope = None if self.coarse.slope is None else self.coarse.slope.tolist()
        self.lead = self.coarse.lead.tolist()
        self.leads = any(self.lead)
        self.p, self.q = self.move(table.p), self.move(table.q)
        self.judge = StoppingRule(table, method, self.edges, self.coarse)

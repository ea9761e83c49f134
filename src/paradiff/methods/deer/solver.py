# SPDX-License-Identifier: Apache-2.0
"""One sample's window with probes: what quasi-DEER adds to the window loop.

Beside each state x of the window its network is evaluated at x + h v, with v of random signs. The output's derivative J in this
direction gives v * (J v), whose mean over v is the diagonal of J (Bekas, Kokiopoulou and Saad, 2007; Hutchinson's estimate is
its sum). All rows of a round are one batch. A window of one node takes its step and needs no probe.

The derivative is (m(x + h v) - m(x)) / h, h being the square root of the network's resolution times the state's size. An
evaluator that answers the probes by forward-mode derivatives, m(x) + h J v, makes it exact (forward.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paradiff.chain.table import column
from paradiff.methods.deer.update import DiagonalUpdate
from paradiff.methods.window.solver import WindowSolver
from paradiff.methods.window.substeps import WindowQuery
from paradiff.methods.window.windowed import Windowed
from paradiff.solver.protocol import Query
from paradiff.solver.records import WindowRecord
from paradiff.solver.solution import ErrorEstimate


@dataclass(frozen=True, eq=False)
class ProbedQuery(Query):
    """The rows of one round: those of the window, then `probes` times as many.

    Attributes:
        inner: The window's own query.
        signs: `[K, W, ...]` v.
        size: `[W, ...]` h, broadcast over a state.
    """

    inner: Query
    signs: Tensor
    size: Tensor


class DeerSolver(Windowed):
    """The window of one sample.

    Args:
        window: The window, whose update is replaced.
        probes: Probes of each state in a sweep.
        divergence: See update.py.

    Attributes:
        update: Equation (1) of update.py for this sample.
    """

    def __init__(self, window: WindowSolver, probes: int, divergence: float) -> None:
        super().__init__(window)
        self._probes, self._sweeps = probes, 0
        self._probed = 0  # rows beyond those of the window
        self.update = DiagonalUpdate(window.setup, divergence)
        window.update = self.update

    @property
    def error_estimate(self) -> ErrorEstimate:
        """How far to trust the sample; the probes are counted."""
        found = self._window.error_estimate
        return ErrorEstimate(found.residual, found.estimated_error, found.rounds, found.evaluations + self._probed)

    def ask(self) -> Query:
        """The window's rows, and their probes."""
        inner, setup = self._window.ask(), self._window.setup
        assert isinstance(inner, WindowQuery)
        self._sweeps += 1
        if len(inner.nodes) == 1:
            return inner
        rows = inner.rows
        draw = torch.Generator().manual_seed(1_000_003 * self.sample + self._sweeps)
        shape = (self._probes, *rows.shape)
        signs = setup.move((2 * torch.randint(0, 2, shape, generator=draw, dtype=torch.int8) - 1).to(setup.dtype))
        size = rows.flatten(1).square().mean(1).sqrt() * setup.resolution**0.5
        size = column(torch.where(size > 0, size, setup.resolution**0.5), rows)
        probes = (rows + size * signs).flatten(0, 1)
        return ProbedQuery(inner.nodes.repeat(1 + self._probes), torch.cat([rows, probes]), inner, signs, size)

    def tell(self, query: Query, outputs: Tensor, states: Tensor | None = None) -> Tensor | None:
        """Takes the outputs of a query; what the window's `tell` returns."""
        assert states is None, "the loop refuses changed states, since follows_edits is False"
        if not isinstance(query, ProbedQuery):
            return self._window.tell(query, outputs)
        inner, setup = query.inner, self._window.setup
        assert isinstance(inner, WindowQuery)
        own, probed = outputs[: len(inner.nodes)], outputs[len(inner.nodes) :]
        self._probed += len(probed)
        table, scale = setup.table, column(setup.step.scale[inner.at], own)
        moved = (inner.states + query.size * query.signs / scale).flatten(0, 1)
        m = table.convert(inner.nodes, inner.states, own)
        m_moved = table.convert(inner.nodes.repeat(self._probes), moved, probed).view_as(query.signs)
        self.update.jacobian = (query.signs * (m_moved - m) * (scale / query.size)).mean(0)
        return self._window.tell(inner, own)

    def advance(self, norms: list[float], round: int) -> WindowRecord:
        """Judges the round, and moves on."""
        return self._window.advance(norms, round)

# SPDX-License-Identifier: Apache-2.0
"""The handover: the window method over all nodes of the chain, which takes over a sample, from its first round or later."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.sensitivity import FITTED
from paradiff.chain.slope import shifted
from paradiff.chain.table import Table
from paradiff.methods.collocation.control import CollocationControl
from paradiff.methods.collocation.options import CollocationOptions
from paradiff.methods.secant import Symmetry
from paradiff.methods.window.control import WindowControl
from paradiff.methods.window.fill import Guide
from paradiff.methods.window.options import WindowOptions
from paradiff.methods.window.setup import WindowSetup
from paradiff.methods.window.solver import WindowSolver
from paradiff.methods.window.windowed import Windowed
from paradiff.solver.protocol import Query
from paradiff.solver.records import WindowRecord
from paradiff.solver.solution import ErrorEstimate
from paradiff.solver.trajectory import Part


class Handover(Windowed):
    """A window solver that took a sample over.

    Args:
        window: The window solver.
        reason: Why it takes over; None where that was asked for.
        rounds: Rounds of the sample before.
        evaluations: Its rows before.

    Attributes:
        reason: As given.
    """

    def __init__(self, window: WindowSolver, reason: str | None, *, rounds: int = 0, evaluations: int = 0) -> None:
        super().__init__(window)
        self.reason = reason
        self._rounds, self._evaluations = rounds, evaluations

    @property
    def error_estimate(self) -> ErrorEstimate:
        """How far to trust the sample, with its rounds and evaluations in all."""
        verified = self._window.error_estimate
        return dataclasses.replace(
            verified,
            rounds=self._rounds + verified.rounds,
            evaluations=self._evaluations + verified.evaluations,
        )

    @property
    def resizable(self) -> bool:
        """Whether the window's width is free."""
        return self._window.resizable

    def resize(self, rows: int) -> None:
        """Bounds the window's nodes."""
        self._window.resize(rows)

    def ask(self) -> Query:
        """The rows wanted now."""
        return self._window.ask()

    def tell(self, query: Query, outputs: Tensor, states: Tensor | None = None) -> Tensor | None:
        """Takes the outputs of a query."""
        assert states is None, "the loop refuses changed states, since follows_edits is False"
        return self._window.tell(query, outputs)

    def advance(self, norms: list[float], round: int) -> WindowRecord:
        """Judges the round; the sample passes as a whole."""
        record = self._window.advance(norms, round)
        return dataclasses.replace(record, passed=int(self._window.done))


class WindowLoop:
    """The window method over all nodes of one chain, and what all samples share that it takes over.

    Args:
        table: The chain.
        method: The method that hands over.
        control: Its tuned numbers.
        variance: The data's variance, which sets the slope.
        device: Where states live.
        dtype: Their dtype.
        shared_window: Whether a state is a batch of members that share a window.
        resolution: Relative precision of the network's outputs.
        symmetry: A group under which the network answers alike (methods/secant.py); None for none.
        renewed: Elements that each step makes anew (solver/protocol.py); None for none.
        elements: Elements of a sample, or of a member.
    """

    def __init__(
        self,
        table: Table,
        method: CollocationOptions,
        control: CollocationControl,
        *,
        variance: float,
        device: torch.device,
        dtype: torch.dtype,
        shared_window: bool,
        resolution: float | None,
        symmetry: Symmetry | None = None,
        renewed: Tensor | None = None,
        elements: int = FITTED,
    ) -> None:
        self._table, self._method, self._control, self._variance = table, method, control, variance
        self._arithmetic = (device, dtype, shared_window, resolution, symmetry, renewed, elements)
        self._setups: dict[float, WindowSetup] = {}

    @staticmethod
    def tightening(amplification: float) -> float:
        """Power of 2 by which the window method's caution is multiplied, which does not know of a sample that amplifies early
        errors so much more than the chain's linear part does."""
        return 2.0 ** max(0, math.ceil(math.log2(amplification)))

    def setup(self, amplification: float = 1.0) -> WindowSetup:
        """What samples of that amplification share; made once for a tightening."""
        tightening = self.tightening(amplification)
        if tightening not in self._setups:
            method, control, usual = self._method, self._control, WindowControl()
            caution = {name: tightening * getattr(usual, name) for name in ("stochastic_caution", "deterministic_caution")}
            loop = WindowOptions(
                name="collocation",
                slope=shifted(self._variance),
                window=min(method.window or control.handover_window, self._table.steps),
                tolerance=method.tolerance,
                secants=control.handover_secants,
                control=dataclasses.replace(usual, **caution),
            )
            self._setups[tightening] = WindowSetup(self._table, loop, *self._arithmetic)
        return self._setups[tightening]

    def first(
        self, noise: Noise, sample: int, start: Tensor | None, reason: str, *, begin: Part | None = None, keep: bool = False
    ) -> Handover:
        """Takes a sample over at its first round, whose amplification nothing was seen of.

        Args:
            noise: The noises.
            sample: The sample.
            start: Its state at node 0; None for the noise's.
            reason: Why.
            begin: The trajectory that it begins from; None for none.
            keep: Whether its own is kept.
        """
        amplification = self._control.unseen_amplification if self._table.stochastic else 1.0
        window = WindowSolver(self.setup(amplification), noise, sample, start, begin=begin, keep=keep)
        return Handover(window, reason)

    def take_over(
        self,
        noise: Noise,
        sample: int,
        start: Tensor,
        *,
        amplification: float,
        guide: Guide | None,
        reason: str | None,
        rounds: int,
        evaluations: int,
        keep: bool = False,
    ) -> Handover:
        """Takes a sample over later.

        Args:
            noise: The noises.
            sample: The sample.
            start: Its state at node 0.
            amplification: Of its early errors.
            guide: The initial guess for nodes that enter the window; None for the window method's own.
            reason: Why; None where that was asked for.
            rounds: Rounds of the sample before.
            evaluations: Its rows before.
            keep: Whether its trajectory is kept.
        """
        window = WindowSolver(self.setup(amplification), noise, sample, start, guide=guide, keep=keep)
        return Handover(window, reason, rounds=rounds, evaluations=evaluations)

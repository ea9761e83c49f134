# SPDX-License-Identifier: Apache-2.0
"""What all samples of a run share: edges, slopes, bounds, and the coefficients on the device in the states' dtype."""

from __future__ import annotations

import copy
import itertools
from functools import cached_property

import torch
from torch import Tensor

from paradiff.chain.data_scale import held_to
from paradiff.chain.sensitivity import FITTED, noise_units, scatter, sensitivity, slope_error
from paradiff.chain.slope import DATA_VARIANCE, Inverses, over_intervals, resolve, shifted
from paradiff.chain.step import Step
from paradiff.chain.table import Table
from paradiff.chain.volatility import volatility
from paradiff.methods.secant import Symmetry
from paradiff.methods.window.fill import Recurrence, RememberedRecurrence
from paradiff.methods.window.forgetting import Forgetting
from paradiff.methods.window.options import WindowOptions
from paradiff.methods.window.passing import PassByBound, PassByError, PassBySweeps, PassingRule
from paradiff.methods.window.past_outputs import PastOutputs
from paradiff.methods.window.path_answer import PathAnswer, on_a_path


class WindowSetup:
    """See the module.

    Args:
        table: The sampler.
        method: The method.
        device: Where states live.
        dtype: Their dtype.
        shared_window: Whether a state is a batch of members that share a window.
        resolution: Relative precision of the network's outputs; that of the states by default.
        symmetry: A group under which the network answers alike (methods/secant.py); None for none.
        renewed: Elements of a state that each step makes anew, `[*shape]` (solver/protocol.py); None for none.
        elements: Elements of a sample, or of a member. On stochastic chains the errors of a sample of few elements scatter more
            about their estimate (chain/sensitivity.py), and k is larger, but for narrow windows, in which it is looked at how
            nodes answer.

    Attributes:
        edges: `[M+1]` fine nodes between sub-intervals.
        intervals: M.
        width: Sub-intervals of a full window.
        single: Whether every sub-interval is one step.
        history: States before the window that a step reads, P - 1.
        blocks: Edges of the blocks, as numbers of sub-intervals.
        exact_after: Sweeps after which every block is exact.
        slope: `[M, P]` G over the sub-intervals; `sloped` says whether any of it is not 0.
        slope_error: `[M]` h of budget.py's equation (1).
        by_error: Whether nodes pass by the estimated error.
        by_residual: Whether they pass by their residuals.
        residual_bound: `[M]` the bound of every node's residual, with the rule `residual` or an Anderson mixing; else None.
        decides: Factor on carried errors where it is judged whether they keep to the tolerance (budget.py).
        recounts: The same on errors counted anew, of which the caution k is a part; 1 in narrow windows, whose nodes pass
            before the network was seen to answer.
        lends: Whether errors are carried with pairs of nodes before: in narrow windows of deterministic chains, most of whose
            nodes pass after one sweep.
        odds: Shift of the logarithm of two outcomes' odds from which on a sample may be another one (odds.py).
        past_outputs: How outputs of nodes that passed follow their states; None where no step reads them.
        recurrence: The predictor's coefficients.
        path: How nodes are seen to answer, in narrow windows; None where that is not looked at.
        forgetting: What a chain with churn forgets, in windows that are not narrow; None where that is not looked at.
        renewed: `[*shape]` whether each step makes an element anew, so that G is 0 there, on the device; None for none.
    """

    def __init__(
        self,
        table: Table,
        method: WindowOptions,
        device: torch.device,
        dtype: torch.dtype,
        shared_window: bool = False,
        resolution: float | None = None,
        symmetry: Symmetry | None = None,
        renewed: Tensor | None = None,
        elements: int = FITTED,
    ) -> None:
        self.symmetry = symmetry
        self.renewed = None if renewed is None else renewed.to(device)
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
        self.sloped = bool(self.slope.any())
        self.slope_error = slope_error(table, self.slope, self.edges).tolist()
        self.by_error = method.rule == "error" and method.sweeps is None and method.tolerance > 0 and self.width > 1
        self.by_residual = method.rule == "residual"
        self.residual_bound: list[float] | None = None
        if self.by_residual or method.anderson is not None:
            noise = method.noise_tolerance * noise_units(table, self.edges)
            self.residual_bound = noise.clamp(min=method.tolerance).tolist()
        narrow = self.width <= min(method.control.narrow, self.intervals - 1)
        self.lends = narrow and not table.stochastic
        few = scatter(elements) if table.stochastic and not narrow else 1.0
        self._caution = few * method.control.caution(table, method.learns)
        self.decides = min(method.control.carried_decides, self._caution)
        self._scaled: dict[float, tuple[list[float], PassingRule]] = {}
        self.step = Step(table, device, dtype, shared_window)
        self.t, self.move = self.step.t, self.step.move
        self.past_outputs = PastOutputs(self.step) if self.single and self.history else None
        self.recurrence = Recurrence(self.step, method.predictor, self.width, self.renewed)
        self.recounts = 1.0 if narrow else self.decides / self._caution
        self.odds = method.control.odds / (self._caution if narrow else 1.0)
        looks = self.by_error and self.single and on_a_path(table)
        self.path = PathAnswer(self.step, method.control.answer_bound) if looks and narrow else None
        forgets = looks and not narrow and self.history == 0 and volatility(table) > method.control.volatile
        self.forgetting = Forgetting(self.step, method.control, elements) if forgets else None

    @cached_property
    def remembered(self) -> RememberedRecurrence:
        """The coefficients of initial guesses from an earlier run's trajectory."""
        return RememberedRecurrence(self.step, self.width)

    @cached_property
    def carry(self) -> Inverses:
        """(I - G)^-1 of stretches of the window."""
        return Inverses(self.slope, self.move, self.width)

    @cached_property
    def answering(self) -> WindowSetup:
        """The same with the slope of Gaussian data, whatever that of the method, for sub-intervals of one step."""
        slope = resolve(shifted(DATA_VARIANCE), self.table)
        if torch.equal(slope, self.slope):
            return self
        found = copy.copy(self)
        found.__dict__.pop("carry", None)
        found.slope = slope
        return found

    def scaled(self, size: float) -> tuple[list[float], PassingRule]:
        """k s `[M+1]` of budget.py, and the rule by which nodes pass, for data of mean square `size`; no factor is below that
        for data of mean square 1."""
        if size not in self._scaled:
            known = torch.maximum(sensitivity(self.table), sensitivity(self.table, size))
            if self.path is not None:
                known = known.clamp(min=self.method.control.narrow_sensitivity)
            factor = self._caution * known[self.edges]
            self._scaled[size] = factor.tolist(), self._rule(factor, size)
        return self._scaled[size]

    def _rule(self, factor: Tensor, size: float) -> PassingRule:
        """The rule that the method names."""
        method = self.method
        if method.sweeps is not None:
            return PassBySweeps(method.sweeps)
        if method.rule == "change":
            return PassByBound((method.tolerance * noise_units(self.table, self.edges)).tolist())
        if self.by_residual:
            assert self.residual_bound is not None
            return PassByBound(self.residual_bound)
        error = torch.tensor(self.slope_error, dtype=torch.float64)
        costs = torch.cat([torch.zeros(1), (error * factor[1:].sqrt()).cumsum(0)])
        shares = (costs / costs[-1]).tolist() if costs[-1] > 0 else [1.0] * len(self.edges)
        return PassByError(method.tolerance, held_to(method.tolerance, size), shares)


def _exact_after(blocks: list[int], stagger: int | None) -> int:
    """Sweeps of every block after which all its nodes are exact, if the window is as wide as the blocks in flight: the length
    of the longest in turn, and more with a stagger, where a block's first sweeps begin at a node that is not exact yet."""
    begun = found = 0
    for first, last in itertools.pairwise(blocks):
        begun = first if stagger is None else min(begun + stagger, first)
        found = max(found, last - begun)
    return found

# SPDX-License-Identifier: Apache-2.0
"""What the errors of nodes that passed become further along the chain, as the network was seen to answer there.

The budget (budget.py) counts the error of a node by a factor that knows the chain's levels alone. A sample that decides after
the node passed answers to its error more strongly than that, in a direction of its own. The sweeps after show this and cost
no row: the nodes that pass in a sweep have pairs of changes of their states and outputs (methods/secant.py), and so the
derivative T of the steps from the window's first node to the one at which it comes to begin. The errors w of the nodes are
carried by

    w <- T v + e d/|d|,        v = w or r |w| c/|c|, whichever T makes the larger,                                 (1)

with e of budget.py's equation (1), and with d and c the changes that the new and the old first node saw in the sweeps that
made them final: an error is taken to lie where the last change lay. r is 1 on deterministic chains, and a little less on
stochastic ones, whose steps let go of errors in most directions: a larger one would pick the slowest of them again and again.
Signs are such that nothing cancels. In narrow windows of deterministic chains, nodes that pass after one sweep have no pairs,
and those of the last node before that has some are taken. At the chain's end a multiple of |T v| + e is an estimate of the
sample's error (`WindowControl`), and the larger of the two estimates is told; where errors on the way may have made another
sample of it, how far away that is (odds.py). It holds up no node, so that rounds, evaluations and samples are those of the
budget alone. Memory: 2 states a node of the window for methods that keep no pairs, and a sweep's changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paradiff.methods.window.edits import Edits
from paradiff.methods.window.odds import Odds
from paradiff.methods.window.setup import WindowSetup
from paradiff.methods.window.update import Carried, PairUpdate, SecantUpdate, Update


class CarriedError:
    """The errors of one sample's last nodes that passed.

    Args:
        setup: What all samples share.
        update: The sample's update, whose pairs are used where it has some.

    Attributes:
        apart: `[b]` how far another sample is that each member may have become by errors of nodes that passed, on the device; 0
            for none.
    """

    def __init__(self, setup: WindowSetup, update: Update) -> None:
        self._band, self._step = setup.table.band, setup.step
        self._turned = setup.method.control.turned if setup.table.stochastic else 1.0
        self._own: PairUpdate | None = None
        if isinstance(update, SecantUpdate):
            self._pairs = update
        else:
            self._pairs = self._own = PairUpdate(setup)
        self._errors: Carried | None = None  # [n, 1, ...] of up to P nodes, the last one the window's first
        self._last: Tensor | None = None  # [n, ...] their last changes
        self._ways: tuple[Carried, Carried] | None = None  # [n, 2, ...] both v of equation (1), and what T makes of them
        self._odds = None if setup.table.stochastic else Odds(setup.step, setup.odds)
        self.apart = torch.zeros((), dtype=setup.dtype, device=setup.device)

    @property
    def squares(self) -> list[float] | None:
        """Mean squares of the errors of the members at the window's first node; None before any node passed with an error.
        Waits for the device."""
        return None if self._errors is None else self._step.mean_squares(self._errors.change[-1])[0].tolist()

    def observe(self, states: Tensor, outputs: Tensor) -> None:
        """Takes a sweep's states `[W, ...]` and outputs, from the window's first node on."""
        if self._own is not None:
            self._own.observe(states, outputs)

    def forget(self) -> None:
        """A state overflowed, or the window was narrowed: what was observed is not used."""
        self._ways = None
        if self._own is not None:
            self._own.forget()

    def keep(self, count: int) -> None:
        """The window keeps its first `count` nodes; the others are filled afresh."""
        if self._own is not None:
            self._own.keep(count)

    def look(self, lo: int, hi: int) -> Tensor | None:
        """Carries the errors to the nodes after `lo`, up to `hi`, for `advance`.

        Returns:
            `[2, b]` mean squares of T v at node `hi`, for each member, and how far another sample is that it may have become by
            the errors up to there; None before any node passed with an error.
        """
        if self._errors is None or self._last is None:
            return None
        turned = self._unit(self._last) * self._beside(self._turned * self._norm(self._errors.change[:, 0]), self._last)
        change, states, outputs = self._errors
        nothing = torch.zeros_like(states)
        start = Carried(torch.cat([change, turned[:, None]], 1), *(torch.cat([v, nothing], 1) for v in (states, outputs)))
        self._ways = start, self._pairs.tangent(lo, hi, start)
        after = self._ways[1]
        squares = self._step.mean_squares(after.change[-1]).amax(0)
        return torch.stack([squares, self._apart(lo, after, hi - lo).expand_as(squares)])

    def _apart(self, lo: int, after: Carried, count: int) -> Tensor:
        """`apart` with the errors of `count` nodes from `lo` on."""
        if self._odds is None:
            return self.apart
        return torch.maximum(self.apart, self._odds(lo, after.states[:count], after.outputs[:count]))

    def advance(self, lo: int, changes: Tensor, errors: Sequence[float], edits: Edits) -> None:
        """Equation (1), before the window slides.

        Args:
            lo: The window's first sub-interval.
            changes: `[p, ...]` last changes of the p nodes that pass.
            errors: e of the last of them, for each member; none for none.
            edits: What the caller did to the states; an element that is overwritten carries no error.
        """
        passed = len(changes)
        if self._ways is None:
            self.look(lo, lo + passed)
        if self._ways is not None:
            before, after = self._ways
            self.apart = self._apart(lo, after, passed)
            both = [torch.cat([a, b[:passed]])[-self._band :] for a, b in zip(before, after, strict=True)]
            straight, turned = (self._norm(way) for way in both[0].unbind(1))
            change, *followed = (torch.where(self._beside(straight >= turned, v[:, 0]), v[:, 0], v[:, 1]) for v in both)
            self._errors = Carried(edits.spare(change, 0.0)[:, None], *(v[:, None] for v in followed))
        self._ways = None
        last = changes if self._last is None or passed >= self._band else torch.cat([self._last, changes])
        self._last = last[-self._band :].clone()
        if any(error > 0 for error in errors):
            sizes = self._beside(self._step.move(torch.tensor(errors, dtype=torch.float64)), self._last)
            self._add((sizes * self._unit(self._last))[:, None])
        if self._own is not None:
            self._own.advance(passed)

    def _add(self, errors: Tensor) -> None:
        """Adds the errors `[n, 1, ...]` that the last nodes were left with by their own sweeps."""
        if self._errors is None:
            self._errors = Carried(errors, torch.zeros_like(errors), torch.zeros_like(errors))
            return
        change, states, outputs = self._errors
        product = self._step.members(change[-1] * errors[-1]).sum(2)[0]
        sign = self._beside(1 - 2 * (product < 0).to(product.dtype), errors[:, 0])[:, None]
        known = min(len(change), len(errors))
        self._errors = Carried(
            torch.cat([change[: len(change) - known], change[len(change) - known :] + sign * errors[len(errors) - known :]]),
            states,
            outputs,
        )

    def _norm(self, states: Tensor) -> Tensor:
        """`[b]` the largest root mean square of states `[n, ...]`, for each member."""
        return self._step.mean_squares(states).amax(0).sqrt()

    def _unit(self, states: Tensor) -> Tensor:
        """States `[n, ...]` over the largest root mean square of them; zeros stay."""
        return states / self._beside(self._norm(states).clamp(min=torch.finfo(states.dtype).tiny), states)

    @staticmethod
    def _beside(values: Tensor, states: Tensor) -> Tensor:
        """Values `[b]` of the members, to be combined with states `[n, ...]`."""
        return values.view(1, -1, *[1] * (states.ndim - 2)) if states.ndim > 1 else values

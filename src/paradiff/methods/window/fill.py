# SPDX-License-Identifier: Apache-2.0
"""The initial guess for nodes that enter the window: a predictor, or states that are known from elsewhere.

A predictor runs the linear recurrence

    x[i+1] = sum_j A[i,j] x[i-j] + B[i] D + c[i] z[i]                                                           (1)

from the window's last states. `copy` and `held`: A is the identity, the rest is zero. `linear`: A is the linear part of the
steps, B is zero. `clean`: A and B are those of the steps with the newest clean-data estimate D frozen (`freeze_clean_data`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from paradiff.chain.slope import DATA_VARIANCE, Inverses, freeze_clean_data, gaussian_gain, shifted
from paradiff.chain.step import Step
from paradiff.chain.table import column
from paradiff.methods.remembered import coefficients
from paradiff.methods.window.options import Predictor

Guide = Callable[[slice], tuple[Tensor, Tensor]]
"""An initial guess: maps a slice of steps to the states after them and the network outputs before them, each `[n, ...]`."""


class Fill(Protocol):
    """What a window's new nodes are filled with, for one sample."""

    def observe(self, node: int, state: Tensor, output: Tensor) -> None:
        """Takes the output at the last node that was evaluated.

        Args:
            node: The node.
            state: `[...]` the state there.
            output: `[...]` the output there.
        """
        ...

    def follow(self, node: int, change: Tensor) -> None:
        """The state `[...]` at the node that was observed last changed."""
        ...

    def forget(self) -> None:
        """A state overflowed: what was observed is not used."""
        ...

    def __call__(self, steps: slice, x: Tensor, noises: Tensor) -> tuple[Tensor, Tensor]:
        """The states after some steps, and the outputs before them where the table reads earlier outputs, each `[n, ...]`.

        Args:
            steps: The n fine steps.
            x: `[.., ...]` the window's states, up to the one before the steps.
            noises: `[n, ...]` the noises of the steps.
        """
        ...


class GuidedFill:
    """States that are known from elsewhere."""

    def __init__(self, guide: Guide) -> None:
        self._guide = guide

    def observe(self, node: int, state: Tensor, output: Tensor) -> None:
        """Nothing is needed."""

    def follow(self, node: int, change: Tensor) -> None:
        """Nothing is needed."""

    def forget(self) -> None:
        """Nothing was observed."""

    def __call__(self, steps: slice, x: Tensor, noises: Tensor) -> tuple[Tensor, Tensor]:
        """The guide's states and outputs."""
        states, outputs = self._guide(steps)
        return states.to(x), outputs.to(x)


class RememberedFill:
    """The states that go with an earlier run's forcings and the chain's own noises.

    Equation (1) has the slope of Gaussian data of variance `DATA_VARIANCE` and, in place of D, the remainder of the clean-data
    estimate, D - g x, of the earlier run, to which the last difference that was observed is added
    (methods/remembered.py).

    Args:
        recurrence: The coefficients.
        forcings: `[N, ...]` the forcings.
    """

    def __init__(self, recurrence: RememberedRecurrence, forcings: Tensor) -> None:
        self._of, self._forcings = recurrence, forcings
        self._changed = torch.zeros_like(forcings[0])

    def observe(self, node: int, state: Tensor, output: Tensor) -> None:
        """Makes the difference of the forcing."""
        of, table = self._of, self._of.step.table
        clean = table.p[node].item() * state + table.q[node].item() * output
        self._changed = of.nu[node].item() * (clean - of.g[node].item() * state) - self._forcings[node]

    def follow(self, node: int, change: Tensor) -> None:
        """The forcing does not answer to the state, for Gaussian data."""

    def forget(self) -> None:
        """The forcings are the earlier run's."""
        self._changed = torch.zeros_like(self._changed)

    def __call__(self, steps: slice, x: Tensor, noises: Tensor) -> tuple[Tensor, Tensor]:
        """Equation (1)."""
        of, table, count, known = self._of, self._of.step.table, steps.stop - steps.start, len(x) - 1
        first = max(steps.start - table.band + 1, 0)
        rest = (self._forcings[first : steps.stop] + self._changed) / column(of.nu[first : steps.stop], x)
        forcing = torch.zeros_like(rest[-count:])
        for j in range(table.band):
            places = of.source[steps, j] - first
            forcing.addcmul_(column(of.weights[steps, j], x), rest[places.to(rest.device, non_blocking=True)])
        if table.stochastic:
            forcing.addcmul_(column(of.step.c[steps], x), noises)
        for i in range(min(table.band, count)):
            for j in range(i, table.band):
                factor = of.slope[steps.start + i, j].item()
                if factor:
                    forcing[i].add_(x[known + i - j], alpha=factor)
        new = (of.inverses.moved(steps.start, steps.stop) @ forcing.flatten(1)).view_as(forcing)
        if table.band == 1:
            return new, new[:0]
        states = torch.cat([x[-1:], new[:-1]])
        clean = column(of.g[steps], x) * states + rest[-count:]
        return new, (clean - column(table.p[steps], x) * states) / column(table.q[steps], x)


class RememberedRecurrence:
    """The coefficients of `RememberedFill`, which all samples share.

    Args:
        step: The table on the device.
        width: Nodes of the window.

    Attributes:
        step: As given.
        g: `[N]` slope of the clean-data estimate.
        nu: `[N]` scale of the forcing.
        source: `[N, P]` nodes that each step reads; `weights` those of their remainders in it.
        slope: `[N, P]` A of equation (1).
        inverses: (I - A)^-1 of stretches of the chain.
    """

    def __init__(self, step: Step, width: int) -> None:
        table = step.table
        self.step = step
        self.g, self.nu = coefficients(table, DATA_VARIANCE)
        self.source = (torch.arange(table.steps)[:, None] - torch.arange(table.band)).clamp(min=0)
        self.weights = table.b / table.q[self.source]
        self.slope = shifted(DATA_VARIANCE)(table)
        self.inverses = Inverses(self.slope, step.move, width)


class Recurrence:
    """The coefficients of equation (1), which all samples share.

    Args:
        step: The table on the device.
        predictor: The predictor.
        width: Nodes of the window.
        renewed: `[*shape]` elements of a state that each step makes anew, on the device; None for none.

    Attributes:
        step: As given.
        renewed: As given.
        frozen: Whether the recurrence contains a clean-data estimate.
        noisy: Whether it contains the steps' noises.
        slope: `[N, P]` A.
        clean: `[N]` B.
        inverses: (I - A)^-1 of stretches of the chain.
        clean_slope: `[N]` derivative of the clean-data estimate with respect to the state, for Gaussian data.
    """

    def __init__(self, step: Step, predictor: Predictor, width: int, renewed: Tensor | None = None) -> None:
        table = step.table
        self.step, self.renewed, self.frozen = step, renewed, predictor == "clean"
        self.noisy = table.stochastic and predictor not in ("copy", "held")
        self.slope, self.clean = torch.zeros_like(table.a), torch.zeros_like(table.c)
        if predictor == "clean":
            source = (torch.arange(table.steps)[:, None] - torch.arange(table.band)).clamp(min=0)
            self.slope = freeze_clean_data(table)
            self.clean = (table.b / table.q[source]).sum(1)
        elif predictor == "linear":
            self.slope = table.a
        else:
            self.slope[:, 0] = 1
        self.inverses = Inverses(self.slope, step.move, width)
        self.clean_slope = gaussian_gain(table.alpha[:-1], table.sigma[:-1], DATA_VARIANCE).tolist()


class PredictedFill:
    """The predictor of one sample; what steps make anew is as the last step that was observed made it.

    Args:
        recurrence: The coefficients.
        x0: `[...]` a state, for shape, dtype and device.
    """

    def __init__(self, recurrence: Recurrence, x0: Tensor) -> None:
        self._of = recurrence
        self._clean = torch.zeros_like(x0)  # D
        self._made = torch.zeros_like(x0)  # what the last step that was observed makes anew

    def observe(self, node: int, state: Tensor, output: Tensor) -> None:
        """Makes the clean-data estimate."""
        if self._of.frozen:
            table = self._of.step.table
            self._clean = table.p[node].item() * state + table.q[node].item() * output
        if self._of.renewed is not None:
            table = self._of.step.table
            self._made = table.a[node, 0].item() * state + table.b[node, 0].item() * output

    def follow(self, node: int, change: Tensor) -> None:
        """Moves the clean-data estimate as that of Gaussian data moves with its state."""
        if self._of.frozen:
            self._clean.add_(change, alpha=self._of.clean_slope[node])

    def forget(self) -> None:
        """The clean-data estimate becomes zero, the centre of the data."""
        self._clean, self._made = torch.zeros_like(self._clean), torch.zeros_like(self._made)

    def __call__(self, steps: slice, x: Tensor, noises: Tensor) -> tuple[Tensor, Tensor]:
        """Equation (1)."""
        of, table, count, known = self._of, self._of.step.table, steps.stop - steps.start, len(x) - 1
        forcing = column(of.step.move(of.clean[steps]), x) * self._clean
        if of.noisy:
            forcing.addcmul_(column(of.step.c[steps], x), noises)
        for i in range(min(table.band, count)):
            for j in range(i, table.band):
                factor = of.slope[steps.start + i, j].item()
                if factor:
                    forcing[i].add_(x[known + i - j], alpha=factor)
        new = (of.inverses.moved(steps.start, steps.stop) @ forcing.flatten(1)).view_as(forcing)
        if of.renewed is not None:
            new = torch.where(of.renewed, self._made, new)
        if table.band == 1:
            return new, new[:0]
        return new, self._outputs(steps, torch.cat([x[-1:], new[:-1]]))

    def _outputs(self, steps: slice, states: Tensor) -> Tensor:
        """Outputs that go with filled states, for multistep sub-intervals whose neighbour has not been evaluated yet."""
        if not self._of.frozen:
            return torch.zeros_like(states)
        table, move = self._of.step.table, self._of.step.move
        p, q = (column(move(v[steps]), states) for v in (table.p, table.q))
        return (self._clean - p * states) / q

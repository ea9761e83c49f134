# SPDX-License-Identifier: Apache-2.0
"""Networks that are shown their own last estimate of the clean data (self-conditioning; Chen et al., arXiv 2208.04202).

The sequential loop hands the clean-data estimate from step to step, beginning with zeros,

    m = M(scale[i] x, t[i], e),      e <- D = p x + q m,      x <- a[i] x + b[i] m + c[i] z[i]                       (1)

so that a step depends on the pair s = (x, e), and on nothing else. The pairs make a chain with the table's own coefficients: of
the second half

    e[i+1] = a[i] e[i] + b[i] n[i] + c[i] 0,      n[i] = (D[i] - a[i] e[i])/b[i]                                     (2)

which is D[i], whatever e[i] was. So a change of e is carried on through the network alone, and methods that carry changes along
by a slope are told so (`Problem.renewed`).

Errors are those of x: pairs are solved as (sqrt 2 x, w e) with a small weight w, so that a mean square over both halves is that
of x, and a little of that of e, whose errors reach x through single steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.chain.noise import Noise, Seen, noise_along
from paradiff.chain.table import Table
from paradiff.errors import shown
from paradiff.solver.by_row import ByRow, Rows, by_row

WEIGHT = 0.3
"""w: between 0.1 and 1 rounds are the same within one; at 0.01 samples err beyond what is told of them."""


class SelfConditioned:
    """The pairs of state and last estimate. They are compared by identity.

    Args:
        table: The chain: one-step, without a limit on the clean data, whose every step reads the network's output.
        noise: Its noise.

    Attributes:
        table: As given.
        noise: As given.

    Raises:
        ValueError: If the table is another one.
    """

    @made_at_home
    def __init__(self, table: Table, noise: Noise) -> None:
        if not isinstance(table, Table) or table.band != 1 or table.clip is not None or table.first:
            raise ValueError(
                f"the table is {shown(table)}; the last estimate is handed on along a whole chain that reads one step back and "
                "limits nothing, such as paradiff.samplers.ddpm(..., clip=None)"
            )
        if not bool(table.b[:, 0].all()):
            step = int((table.b[:, 0] == 0).nonzero()[0])
            raise ValueError(
                f"step {step} of table {table.name!r} does not read the network's output, and loses the last estimate: leave "
                "the step out"
            )
        self.table, self.noise = table, noise
        self._along = noise_along(noise, table.draws, table.first)

    def __repr__(self) -> str:
        return f"SelfConditioned({self.noise.samples} samples, {self.table.steps} steps)"

    @made_at_home
    def model(self, network: Callable[..., Tensor]) -> ByRow:
        """The model of (2), for `sample` beside `self_conditioned.pairs()`.

        Args:
            network: `network(x, t, estimate, **conditioning)`: states `[R, ...]`, times `[R]` and last estimates `[R, ...]` of
                the clean data, zeros at the first step; returns what the table's network predicts, like x.
        """
        table, shape = self.table, tuple(self.noise.shape)

        def paired(s: Tensor, t: Tensor, rows: Rows, **conditioning: Any) -> Tensor:
            own = (table.scale, table.p, table.q, table.a[:, 0], table.b[:, 0])
            scale, p, q, a, b = (rows.of(values)[:, 0] for values in own)
            x, e = s[:, 0] / math.sqrt(2), s[:, 1] / (WEIGHT * scale)
            m = network(x, t, e, **conditioning)
            clean = p / scale * x + q * m
            return torch.stack([math.sqrt(2) * m, WEIGHT * (clean - a * e) / b], 1)

        renewed = torch.zeros(2, *shape, dtype=torch.bool)
        renewed[1] = True
        return by_row(paired, table, self.pairs(), smooth=False, renewed=renewed)

    def pairs(self) -> Noise:
        """The noise of the pairs, of shape `[2, *shape]`."""
        return Seen(self, self.noise, (2, *self.noise.shape))

    def placed(self, sample: Tensor) -> Tensor:
        """`[B, *shape]` the samples x of pairs that a run found.

        Raises:
            ValueError: If the samples have another shape.
        """
        wanted = self.noise.samples, 2, *self.noise.shape
        if not isinstance(sample, Tensor) or tuple(sample.shape) != wanted:
            raise ValueError(f"the samples are {shown(sample)}; give those of the run, of shape {wanted}")
        return sample[:, 0] / math.sqrt(2)

    def start(self, sample: int) -> Tensor:
        """The draw behind the first pair."""
        return self._pair(self._along.start(sample), 0)

    def draw(self, sample: int, nodes: range) -> Tensor:
        """The noises of pairs at consecutive nodes, `[len(nodes), 2, *shape]`."""
        return self._pair(self._along.draw(sample, nodes), 1)

    def _pair(self, drawn: Tensor, axis: int) -> Tensor:
        """Noise of x, and none of e."""
        own = math.sqrt(2) * drawn.double()
        return torch.stack([own, torch.zeros_like(own)], axis)

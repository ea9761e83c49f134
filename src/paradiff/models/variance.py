# SPDX-License-Identifier: Apache-2.0
"""Networks that predict the variance of their steps beside the clean data (Nichol & Dhariwal 2021, section 3.1).

Such a network has twice the channels: its output m, and a number v in -1 ... 1 for each entry, which interpolates the logarithm
of the step's variance between its bounds,

    log s^2 = (1 + v)/2 · log beta + (1 - v)/2 · log beta~                                                       (1)

beta = 1 - alpha[i]^2/alpha[i+1]^2 is the variance of the step that adds noise, and beta~ that of its posterior, the square of a
DDPM table's c. The table's own noise stays c·z, and what is left is folded into the output, since z is known,

    m <- m + (s - c)/b · z                                                                                       (2)

so that the step lands on a·x + b·m + s·z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paradiff.chain.home import made_at_home
from paradiff.chain.noise import Noise
from paradiff.chain.table import Table
from paradiff.errors import shown
from paradiff.solver.by_row import ByRow, Rows, by_row
from paradiff.solver.evaluator import Denoiser


@made_at_home
def learned_variance(denoiser: Denoiser, table: Table, noise: Noise, *, seed: int | None = None) -> ByRow:
    """A model for `sample` of a network that predicts its steps' variances, on `samplers.ddpm(..., variance="fixed_small")`.

    Args:
        denoiser: `denoiser(x, t, **conditioning)`: states `[R, C, ...]`, times `[R]`; returns `[R, 2C, ...]`: the output
            that the table expects, and v of (1).
        table: The chain: one-step, variance-preserving, without a limit on the clean data.
        noise: The run's noise.
        seed: Of random numbers; see `by_row`.

    Raises:
        ValueError: If the table is another one, and, in the run, if the network returns another number of channels.
    """
    if not isinstance(table, Table) or table.band != 1 or not table.stochastic:
        raise ValueError(f"a learned variance is that of steps that add noise: the table is {shown(table)}; give a DDPM table")
    if table.clip is not None:
        raise ValueError(
            f"table {table.name!r} limits the clean data, which would see the folded noise; give clip=None, and limit the "
            "clean data in the network"
        )
    alpha, sigma = table.alpha, table.sigma
    if not torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-6):
        raise ValueError(f"table {table.name!r} does not preserve variance, and has no betas; give a DDPM table")
    largest = (1 - (alpha[:-1] / alpha[1:]) ** 2).clamp(min=1e-20).log()
    smallest = table.posterior_variance().clamp(min=1e-20).log()
    own, weight = table.c, torch.where(table.c > 0, 1 / table.b[:, 0], 0.0)

    def folded(x: Tensor, t: Tensor, rows: Rows, **conditioning: object) -> Tensor:
        both = denoiser(x, t, **conditioning)
        if not isinstance(both, Tensor) or both.ndim < 2 or both.shape[1] != 2 * x.shape[1]:
            raise ValueError(
                f"the network returned {shown(getattr(both, 'shape', both))} for rows of shape {tuple(x.shape)}; one that "
                f"predicts variances returns {2 * x.shape[1]} channels"
            )
        m, v = both.chunk(2, dim=1)
        share = (v + 1) / 2
        deviation = (0.5 * (share * rows.of(largest) + (1 - share) * rows.of(smallest))).exp()
        return m + (deviation - rows.of(own)) * rows.of(weight) * rows.noise

    return by_row(folded, table, noise, seed=seed)

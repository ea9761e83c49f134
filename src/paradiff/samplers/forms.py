# SPDX-License-Identifier: Apache-2.0
"""The form in which samplers are published, and the table's.

Every sampler here is linear in the states and in the network's clean-data estimates D = p x + q m (chain/prediction.py), so
each is written in the form in which it was published, as

    x[i+1] = sum_j ( A[i,j] x[i-j] + B[i,j] D[i-j] ) + c[i] z[i]                                              (1)

and turned into the table's a = A + B p and b = B q, whatever the network predicts. Primes mark the level that the step
lands on: alpha', sigma'. Three kinds of coordinates occur. Variance-preserving states have alpha^2 + sigma^2 = 1
(preserving.py); variance-exploding ones have alpha = 1 and the noise ratio as sigma, and the network sees
x/sqrt(sigma^2 + 1) (exploding.py); rectified flows live on the line alpha + sigma = 1 (flow.py).

The last node is the sample: its time is listed as 0 and no chain hands it to the network. Times, levels and options are
those of the diffusers scheduler that a docstring names; where they differ it says so.

Arguments that several samplers share and that are not explained again: `schedule`, of T training times; `steps`, N; `spacing`,
which times are visited, and `offset`, added to those of leading spacing; `prediction`, what the network predicts;
`clip`, a limit on the clean-data estimate (chain/clipping.py). Every sampler raises ValueError for an unknown option, for
more steps than the schedule can give, for an offset that leaves the training times (schedule.py), and for a network
that predicts epsilon at a node of pure noise (chain/table.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from paradiff.chain.prediction import Prediction, clean_coefficients
from paradiff.errors import is_whole, require_kind, shown
from paradiff.samplers.schedule import Schedule

Clipping = Callable[[Tensor], Tensor]
Final = Literal["zero", "sigma_min"]


def refuse_other_kinds(schedule: object, steps: object) -> None:
    """Refuses what is no schedule, or no whole number of steps.

    Raises:
        ValueError: If there is one.
    """
    require_kind("the schedule", schedule, Schedule)
    if not is_whole(steps):
        raise ValueError(f"the number of steps is {shown(steps)}; it must be a whole number")


def in_outputs(prediction: Prediction, alpha: Tensor, sigma: Tensor, state: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """The table's a and b, `[N, P]`, from A = `state` and B = `clean` of equation (1)."""
    p, q = clean_coefficients(prediction, alpha[:-1], sigma[:-1])
    source = (torch.arange(len(p))[:, None] - torch.arange(state.shape[1])).clamp(min=0)
    return state + clean * p[source], clean * q[source]


def with_end(times: Tensor) -> Tensor:
    """`[N+1]` float64 times: those of the N steps and the sample's."""
    return torch.cat([times.to(torch.float64), torch.zeros(1, dtype=torch.float64)])


def last_ratio(schedule: Schedule, final: Final) -> Tensor:
    """`[1]` noise ratio that the last step lands on."""
    return torch.zeros(1, dtype=torch.float64) if final == "zero" else schedule.ratio[:1]


def descending(ratio: Tensor) -> Tensor:
    """`ratio` itself, refused if it rises anywhere."""
    rises = (ratio[1:] > ratio[:-1]).nonzero()
    if len(rises):
        step = int(rises[0])
        raise ValueError(
            f"the noise ratio rises from {ratio[step]:.6g} to {ratio[step + 1]:.6g} at step {step}; it must fall. A "
            "zero-SNR schedule's last ratio is held at 4096, below its neighbours at some schedules: use fewer steps, "
            "ddim or ddpm"
        )
    return ratio

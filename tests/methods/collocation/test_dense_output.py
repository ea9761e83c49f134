# SPDX-License-Identifier: Apache-2.0
"""Dense output is the chain's states where the forcings are right, and the window method starts from it."""

from __future__ import annotations

import pytest
import torch

from paradiff import Keyed, Schedule, Table, collocation, sample
from paradiff.methods.collocation.dense_output import DenseOutput
from paradiff.methods.collocation.interval import Recurrence
from paradiff.methods.collocation.system import CollocationSystem
from paradiff.models.exact import Gaussian
from paradiff.samplers import ddim, ddpm, dpmpp_2m

SCHEDULE = Schedule.linear()
TABLES = {"ddim": ddim(SCHEDULE, 60), "ddpm": ddpm(SCHEDULE, 60), "dpmpp_2m": dpmpp_2m(SCHEDULE, 60)}
VARIANCE = 0.3


def walked(table: Table, data: Gaussian, noise: Keyed) -> tuple[torch.Tensor, torch.Tensor]:
    """All states and outputs of the sequential chain, step by step."""
    denoise = data.denoiser(table)
    states, outputs = [noise.start(0).double() * table.start_scale], []
    for i in range(table.steps):
        outputs.append(denoise(states[i][None] * table.scale[i], table.t[i : i + 1])[0])
        new = table.c[i] * noise.draw(0, range(i, i + 1))[0].double()
        for j in range(min(table.band, i + 1)):
            new = new + table.a[i, j] * states[i - j] + table.b[i, j] * outputs[i - j]
        states.append(new)
    return torch.stack(states), torch.stack(outputs)


@pytest.mark.parametrize("steps", [slice(0, 7), slice(9, 31), slice(25, 60)])
@pytest.mark.parametrize("name", TABLES)
def test_the_right_forcings_give_the_chains_states_and_outputs(name: str, steps: slice) -> None:
    table, noise = TABLES[name], Keyed((3,), 5)
    mean = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64)
    states, outputs = walked(table, Gaussian(mean, torch.full((3,), VARIANCE)), noise)
    system = CollocationSystem(Recurrence(table, VARIANCE), [0, 10, 25, 40, 59, 60], 0)
    points = torch.stack(
        [torch.stack([states[max(e - p, 0)] * (e >= p) for p in range(table.band)]) for e in system.points[:-1]]
    )
    forcings = mean.expand(5, 3)  # on Gaussian data the forcing is the mean
    after, found = DenseOutput(system, forcings, points, noise=noise, sample=0, move=lambda v: v.double())(steps)
    assert torch.allclose(after, states[steps.start + 1 : steps.stop + 1], atol=1e-7)
    assert torch.allclose(found, outputs[steps], atol=1e-6)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_the_window_that_verifies_begins_with_them(name: str) -> None:
    table, noise = TABLES[name], Keyed((3,), 5)
    data = Gaussian(torch.zeros(3), torch.full((3,), VARIANCE))
    plain = sample(data.denoiser(table), table, noise, collocation(42, shift=VARIANCE))
    exact = sample(data.denoiser(table), table, noise, collocation(42, shift=VARIANCE, exact=True))
    assert exact.evaluations - plain.evaluations == table.steps  # a single sweep finds nothing to change

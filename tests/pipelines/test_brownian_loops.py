# SPDX-License-Identifier: Apache-2.0
"""Loops whose scheduler draws from a Brownian tree: the last steps lie between values that the tree has by then, and draw
nothing more, and have their noise all the same."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from paradiff import jacobi, parallelize

pytestmark = pytest.mark.filterwarnings(
    "ignore:it took as many rounds",
    "ignore:__array_:DeprecationWarning",
    "ignore:Should have t",  # of torchsde, on the plain loop as well
)


class Net(nn.Module):
    """A network of any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.4 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = torch.cos(t.to(x.dtype).reshape(-1, 1, 1, 1) / 300)
        return torch.tanh(x @ self.weight.to(x.dtype) + time)


@pytest.mark.parametrize("steps", range(4, 16))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("DPMSolverSDE", {}),
        ("DPMSolverSDE", {"num_train_timesteps": 50, "timestep_spacing": "leading"}),
        ("DPMSolverSDE", {"use_karras_sigmas": True}),
        ("CosineDPMSolverMultistep", {}),
    ],
)
def test_the_sample_is_the_plain_calls(kind: str, options: dict[str, Any], steps: int) -> None:
    pytest.importorskip("torchsde")
    scheduler, net = getattr(diffusers, kind + "Scheduler")(**options), Net()

    @torch.no_grad()
    def loop(x: Tensor) -> Tensor:
        scheduler.set_timesteps(steps)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x)[0]
        return x

    x, found = torch.randn(2, 4, 4, 8, generator=torch.Generator().manual_seed(steps)), []
    run = parallelize(loop, jacobi(tolerance=1e-6))
    for call in (loop, run):
        torch.manual_seed(steps)
        found.append(call(x))
    assert run.report.executor == "vector"
    assert float((found[0] - found[1]).abs().max()) < 2e-5 * float(found[0].abs().max())

# SPDX-License-Identifier: Apache-2.0
"""The known denoiser of clouds that are turned in any way is the mean over many rotations, drawn at random."""

from __future__ import annotations

import pytest
import torch
from conformations import Conformations, walks
from torch import Tensor


def rotations(count: int) -> Tensor:
    """`[count, 3, 3]` uniform rotations, from quaternions."""
    q = torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w, x, y, z = (q / q.norm(dim=1, keepdim=True)).unbind(1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], 1),
        torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], 1),
        torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], 1),
    ]
    return torch.stack(rows, 1)


@pytest.mark.parametrize("sigma", [6.0, 20.0])
def test_the_estimate_is_the_posterior_mean(sigma: float) -> None:
    clouds, turns = walks(3, 12, 4.0, 1), rotations(200_000)
    drawn = torch.randn(12, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = clouds[0] + sigma * drawn
    x = x - x.mean(0)
    placed = torch.einsum("rij,kaj->rkai", turns, clouds)
    square = sigma**2 + 1.0
    shares = torch.softmax((-(x - placed).square().sum((2, 3)) / (2 * square)).flatten(), 0).view(len(turns), -1)
    wanted = (x + sigma**2 * torch.einsum("rk,rkai->ai", shares, placed)) / square
    found = Conformations(1.0)(x[None], torch.tensor([sigma]), clouds[None])[0]
    assert (found - wanted).abs().max() < 0.01 * wanted.abs().max()


def test_it_turns_with_its_input_and_comes_to_a_conformation() -> None:
    clouds, turn, known = walks(4, 20, 16.0, 2), rotations(1)[0], Conformations(1.0)
    x, level = clouds[1] @ turn.T, torch.tensor([1e-3])
    assert known(x[None], level, clouds[None])[0].allclose(x, atol=1e-4)
    noisy = x + 8.0 * torch.randn(20, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one, other = (known(v[None], torch.tensor([8.0]), clouds[None])[0] for v in (noisy, noisy @ turn.T))
    assert other.allclose(one @ turn.T, atol=1e-9)

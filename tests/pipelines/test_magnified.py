# SPDX-License-Identifier: Apache-2.0
"""What a loop's arithmetic makes of the rounding of its networks' outputs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paradiff.pipelines.loop.magnified import SLOPE, magnified


def outputs(count: int, of: float = 0.1) -> list[Tensor]:
    """Outputs `[2, 4, 8, 8]` that differ by a share of them, as those with and without a prompt do."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 4, 8, 8, generator=generator)
    return [first + of * k * torch.randn(2, 4, 8, 8, generator=generator) for k in range(count)]


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 4.0, 15.0])
def test_guidance_counts_by_its_factors(scale: float, calls: int) -> None:
    without, given = outputs(2)
    found = magnified([torch.cat([without, given])] if calls == 1 else [without, given], without + scale * (given - without))
    factors = math.hypot(scale - 1, scale)
    generator = torch.Generator().manual_seed(1)
    rounded = [part + 1e-3 * torch.randn(part.shape, generator=generator) for part in (without, given)]
    error = (rounded[0] + scale * (rounded[1] - rounded[0]) - (without + scale * (given - without))).square().mean().sqrt()
    assert error == pytest.approx(1e-3 * factors, rel=0.1)
    assert found.size == pytest.approx(factors, rel=0.1)
    assert found.apart >= SLOPE * factors * 0.99


def test_three_outputs_count_each() -> None:
    without, text, image = outputs(3)
    found = magnified([torch.cat([text, image, without])], without + 7 * (text - image) + 2 * (image - without))
    assert found.size == pytest.approx(math.sqrt(1 + 49 + 25), rel=0.1)


def test_other_layouts_leave_the_steps_own_size() -> None:
    output = 3 * outputs(1)[0]
    own = float(output.square().mean().sqrt())
    for given in ([], [output[:, :2]], [output.long()], [output] * 20, [output * math.nan]):
        found = magnified(given, output)
        assert found.size == pytest.approx(own)
        assert found.apart == 0

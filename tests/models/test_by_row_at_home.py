# SPDX-License-Identifier: Apache-2.0
"""Models that know their rows, made and run while torch's default device is another: the same samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from paradiff import Keyed, Schedule, by_row, parasolver, sample
from paradiff.models import Frames, Masked, SelfConditioned, learned_variance
from paradiff.samplers import alphafold3, ddpm

SHAPE = (4, 3)


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x)


def knowing() -> Tensor:
    table, noise = ddpm(Schedule.linear(), 10), Keyed(SHAPE)
    model = by_row(lambda x, t, rows: net(x, t) + rows.of(table.alpha) * rows.randn() + rows.noise, table, noise)
    return sample(model, table, noise, parasolver()).sample


def learning() -> Tensor:
    table, noise = ddpm(Schedule.linear(), 10), Keyed(SHAPE)
    return sample(learned_variance(lambda x, t: torch.cat([x, x.sin()], 1), table, noise), table, noise, parasolver()).sample


def turning() -> Tensor:
    table, noise = alphafold3(10), Keyed(SHAPE)
    frames = Frames.drawn(table, noise, mask=torch.ones(4, dtype=torch.bool, device="cpu"))
    return frames.placed(sample(frames.model(net), table, frames.moving(), parasolver()).sample)


def masking() -> Tensor:
    table, noise = ddpm(Schedule.linear(), 10), Keyed(SHAPE)
    masked = Masked(table, noise, torch.ones(4, 3, device="cpu").bool(), torch.ones(4, 3, device="cpu"), noised=True)
    return masked.placed(sample(masked.model(net), table, masked.kept(), parasolver()).sample)


def filling() -> Tensor:
    table, noise = ddpm(Schedule.linear(), 10), Keyed(SHAPE)
    masked = Masked(table, noise, torch.ones(4, 1, device="cpu").bool())
    return masked.placed(sample(masked.model(net), table, masked.kept(), parasolver()).sample)


def remembering() -> Tensor:
    table, noise = ddpm(Schedule.linear(), 10), Keyed(SHAPE)
    pairs = SelfConditioned(table, noise)
    return pairs.placed(sample(pairs.model(lambda x, t, e: net(x + e, t)), table, pairs.pairs(), parasolver()).sample)


@pytest.mark.parametrize("run", [knowing, learning, turning, masking, filling, remembering])
def test_another_default_device_changes_nothing(run: Callable[[], Tensor]) -> None:
    expected = run()
    with torch.device("meta"):
        found = run()
    assert torch.equal(found, expected)

# SPDX-License-Identifier: Apache-2.0
"""SRDS with a window: edges that pass before the samples' decisions are seen leave them alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from paradiff import Keyed, Schedule, sample, srds
from paradiff.methods.parareal.control import PararealControl
from paradiff.models.exact import Mixture
from paradiff.samplers import ddpm

SEEDS = [310, 324, 328]
"""Samples that become another of the five lumps where edges pass by the whole of their share of the tolerance."""


@pytest.mark.parametrize("window", [2, 4])
def test_samples_that_decide_beyond_a_narrow_window_are_those_of_the_chain(window: int) -> None:
    table, noise = ddpm(Schedule.linear(), 60), Keyed((256,), SEEDS)
    means = torch.randn(5, 256, generator=torch.Generator().manual_seed(300))
    lumps = Mixture(torch.full((5,), 0.2), means, torch.full((5,), 0.04)).denoiser(table)
    plain = []
    for k in range(len(SEEDS)):
        x, z = noise.start(k).double(), noise.draw(k, range(table.steps)).double()
        for i in range(table.steps):
            x = table.a[i, 0] * x + table.b[i, 0] * lumps(x[None], table.t[i : i + 1])[0] + table.c[i] * z[i]
        plain.append(x)

    def errors(share: float | None) -> list[float]:
        method = srds(window=window)
        if share is not None:
            method = dataclasses.replace(method, control=PararealControl(windowed_share=share))
        found = sample(lumps, table, noise, method)
        return (found.sample - torch.stack(plain)).square().mean(1).sqrt().tolist()

    assert min(errors(1.0)) > 1
    assert max(errors(None)) < 4e-3

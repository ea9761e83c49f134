# SPDX-License-Identifier: Apache-2.0
"""Chains with much churn whose data are a few sharp points: nodes ahead that settle on another point than the leading nodes are
filled afresh, and no sample ends at another point without a word."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from paradiff import Keyed, Solution, sample, sequential, slopes
from paradiff.methods.presets import parasolver, quasi_newton
from paradiff.methods.window.astray import LEADING, Astray
from paradiff.methods.window.control import WindowControl
from paradiff.methods.window.method import WindowMethod
from paradiff.models import Mixture
from paradiff.samplers import alphafold3

SCALE, TABLE = 16.0, alphafold3(200)


def points(elements: int, count: int, deviation: float) -> Mixture:
    means = SCALE * torch.randn(count, elements, generator=torch.Generator().manual_seed(5))
    return Mixture(torch.full((count,), 1 / count), means, torch.full((count,), deviation**2))


def solved(data: Mixture, seeds: range, method: WindowMethod, control: WindowControl) -> tuple[Solution, Tensor]:
    """A run, and its root mean square differences to the chain in turn."""
    denoiser, noise = data.denoiser(TABLE), Keyed((data.means.shape[1],), seed=list(seeds))
    plain = sample(denoiser, TABLE, noise, sequential()).sample
    found = sample(denoiser, TABLE, noise, dataclasses.replace(method, control=control), check="off")
    return found, (found.sample - plain).square().mean(1).sqrt()


METHODS = {
    "quasi_newton": quasi_newton(window=16, tolerance=0.01 * SCALE, slope=slopes.shifted(SCALE)),
    "parasolver": parasolver(window=16, tolerance=0.01 * SCALE),
}


@pytest.mark.parametrize(
    ("elements", "count", "seeds"), [(64, 4, range(300, 308)), (16, 16, range(300, 312))], ids=["four points", "sixteen points"]
)
@pytest.mark.parametrize("name", [*METHODS])
def test_no_sample_ends_at_another_point(elements: int, count: int, seeds: range, name: str) -> None:
    found, errors = solved(points(elements, count, 1.0), seeds, METHODS[name], WindowControl())
    for error, estimate in zip(errors.tolist(), found.error_estimates, strict=True):
        assert error <= estimate.estimated_error <= 0.01 * SCALE


def test_nodes_on_the_way_to_another_point_are_filled_afresh() -> None:
    rounds = []
    for astray in (1e9, WindowControl().astray):
        found, _ = solved(points(16, 16, 1.0), range(300, 308), METHODS["quasi_newton"], WindowControl(astray=astray))
        rounds.append(sum(e.rounds for e in found.error_estimates))
    assert rounds[1] < 0.75 * rounds[0]


def test_the_node_before_the_first_that_moved_far_says_how_to_go_on() -> None:
    astray, nodes = Astray([4.0] * 20, WindowControl(astray=0.5)), torch.arange(8.0)[:, None]
    astray.observe(nodes, 10 + nodes)
    astray.follow(20 + nodes)
    assert astray.row(3, [2.1] * 8) is None  # they have not been seen before
    assert astray.row(3, [2.0] * 8) is None
    found = astray.row(3, [0.0, 0.0, 2.1, 9.0])
    assert found is not None
    assert (found.node, float(found.state), float(found.output), float(found.change)) == (5, 2.0, 12.0, 21.0)
    assert astray.row(5, [2.0, 2.0, 2.0]) is None
    assert astray.row(5, [1.0, 1.9, 1.0]) is None
    assert astray.row(5, [2.1, 1.9, 2.2]) is not None
    assert astray.row(5, [0.0, 9.0, 9.0]) is None  # all after the first were filled afresh
    front = astray.row(5, [2.1])
    assert front is not None
    assert (front.node, float(front.change)) == (5, 0.0)
    assert astray.row(3, [0.0] * LEADING + [9.0]) is None  # farther ahead nodes may still come to the right point

# SPDX-License-Identifier: Apache-2.0
"""What loops walk over beside their times: its values are those of the times' nodes, or the loop is refused."""

from __future__ import annotations

import warnings
from collections import UserList, deque
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from adversary import Net
from torch import Tensor

from paradiff import parallelize, parasolver

NET, STEPS = Net(), 24
SCHEDULER: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


class Numbers:
    """A sequence in the old way: by its indices alone."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, place: int) -> float:
        if place >= STEPS:
            raise IndexError(place)
        return 1.1 * place


class Otherwise(Numbers):
    """A sequence whose values by their indices are others than those that are walked over."""

    def __iter__(self) -> Iterator[float]:
        return iter([3.0] * STEPS)


VALUES: dict[str, Callable[[], Any]] = {
    "keys": lambda: {k + 0.5: 1 - 0.01 * k for k in range(STEPS)},
    "values": lambda: {k: k for k in range(STEPS)}.values(),
    "deque": lambda: deque(range(STEPS)),
    "letters": lambda: b"abcdefghijklmnopqrstuvwxyz",
    "numbers": lambda: range(STEPS),
    "array": lambda: np.linspace(0, 3, STEPS),
    "list of one's own": lambda: UserList(range(STEPS)),
    "sequence in the old way": lambda: Numbers(),
}
"""Values that lanes take by their index."""


def walked(make: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    """A loop over the times and such values."""

    @torch.no_grad()
    def loop(x: Tensor) -> Tensor:
        SCHEDULER.set_timesteps(STEPS)
        for t, n in zip(SCHEDULER.timesteps, make()):  # noqa: B905  (what a loop has)
            x = SCHEDULER.step(NET(x, t) * (1 - 0.02 * float(n)), t, x)[0]
        return x

    return loop


@torch.no_grad()
def beside_the_next(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(STEPS)
    times = SCHEDULER.timesteps
    for t, after in zip(times, list(times[1:]) + [0]):  # noqa: B905, RUF005  (what a loop has)
        x = SCHEDULER.step(NET(x, t) * (1 - 1e-4 * float(after)), t, x)[0]
    return x


@torch.no_grad()
def beside_fewer(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(STEPS)
    for t, n in zip(SCHEDULER.timesteps, [1.0] * (STEPS - 2), strict=True):
        x = SCHEDULER.step(NET(x, t) * n, t, x)[0]
    return x


def both(loop: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Any]:
    """The plain sample and the parallel one, and the report."""
    run = parallelize(loop, parasolver(window=6, tolerance=1e-4), scheduler=SCHEDULER, networks=[NET])
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    plain = loop(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plain, run(x), run.report


@pytest.mark.parametrize("values", VALUES)
def test_values_beside_times_are_those_of_their_nodes(values: str) -> None:
    plain, found, report = both(walked(VALUES[values]))
    assert report.executor == "lanes", report.warnings
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error


def test_a_list_of_times_that_is_added_to_is_no_head_of_a_loop() -> None:
    plain, found, report = both(beside_the_next)
    assert report.executor == "lanes", report.warnings
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error


@pytest.mark.parametrize("kind", [Otherwise, lambda: iter(range(STEPS))])
def test_values_that_come_in_the_order_of_passes_are_refused(kind: Callable[[], Any]) -> None:
    plain, found, report = both(walked(kind))
    assert report.executor == "sequential"
    assert torch.equal(plain, found)
    assert "whose values come in the order of its passes" in report.warnings[-1]


@pytest.mark.filterwarnings("ignore:.*called sequentially:RuntimeWarning")
def test_a_strict_zip_fails_as_it_does_in_the_plain_call() -> None:
    run = parallelize(beside_fewer, parasolver(window=6), scheduler=SCHEDULER, networks=[NET])
    for call in (beside_fewer, run):
        with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter than argument 1"):
            call(torch.zeros(2, 8))

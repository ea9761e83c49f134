# SPDX-License-Identifier: Apache-2.0
"""Locks that a loop holds in its passes: passes of several states take turns in one thread, and none may wait."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from adversary import Net
from torch import Tensor

from paradiff import parallelize, parasolver

NET, STEPS = Net(), 24
SCHEDULER: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
LOCK, AGAIN, ONE = threading.Lock(), threading.RLock(), threading.Semaphore(1)
PATIENCE = 60.0
"""Seconds after which a call is taken to wait for ever; each takes less than one."""


class Engine:
    """A network behind a lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        with self.lock:
            return NET(x, t)


ENGINE = Engine()


@torch.no_grad()
def held_over_the_step(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(STEPS)
    for i, t in enumerate(SCHEDULER.timesteps):
        with LOCK:
            x = SCHEDULER.step(NET(x, t) * (1 - 0.01 * i), t, x)[0]
    return x


@torch.no_grad()
def held_over_the_network(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(STEPS)
    for i, t in enumerate(SCHEDULER.timesteps):
        with ONE:
            v = NET(x, t)
        x = SCHEDULER.step(v * (1 - 0.01 * i), t, x)[0]
    return x


@torch.no_grad()
def held_by_an_object(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(STEPS)
    for i, t in enumerate(SCHEDULER.timesteps):
        x = SCHEDULER.step(ENGINE(x, t) * (1 - 0.01 * i), t, x)[0]
    return x


@torch.no_grad()
def held_in_one_pass_of_all(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(STEPS)
    for t in SCHEDULER.timesteps:
        x = SCHEDULER.step(ENGINE(x, t), t, x)[0]
    return x


@torch.no_grad()
def taken_again(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(STEPS)
    for i, t in enumerate(SCHEDULER.timesteps):
        with AGAIN:
            x = SCHEDULER.step(NET(x, t) * (1 - 0.01 * i), t, x)[0]
    return x


def called(loop: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Any]:
    """The plain sample, the parallel one, and the report, of a call that comes back."""
    run = parallelize(loop, parasolver(window=6, tolerance=1e-4), scheduler=SCHEDULER, networks=[NET])
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    found = [loop(x)]
    thread = threading.Thread(target=lambda: found.append(run(x)), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thread.start()
        thread.join(PATIENCE)
    assert not thread.is_alive(), "the call waits for a lock"
    return found[0], found[1], run.report


@pytest.mark.parametrize("loop", [held_over_the_step, held_over_the_network, held_by_an_object])
def test_a_loop_that_holds_a_lock_in_lanes_is_called_plainly(loop: Callable[[Tensor], Tensor]) -> None:
    plain, found, report = called(loop)
    assert report.executor == "sequential"
    assert torch.equal(plain, found)
    assert "would wait for ever" in report.warnings[-1]


@pytest.mark.parametrize("loop", [held_in_one_pass_of_all, taken_again])
def test_a_lock_for_which_no_pass_waits_is_no_reason(loop: Callable[[Tensor], Tensor]) -> None:
    plain, found, report = called(loop)
    assert report.executor == ("lanes" if loop is taken_again else "vector"), report.warnings
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error

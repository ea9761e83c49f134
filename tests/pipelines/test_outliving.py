# SPDX-License-Identifier: Apache-2.0
"""What passes leave outside of their call, in functions, classes, arguments and global variables, is that of the plain call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from adversary import Net
from torch import Tensor

from paradiff import parallelize, parasolver

NET, SCHEDULER, STEPS = Net(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 30
COUNT = 0
FOUND: list[Tensor] = []


class Passes:
    """A class that counts."""

    count = 0


def step(x: Tensor, t: Any) -> Tensor:
    return SCHEDULER.step(NET(x, t), t, x)[0]


def record(x: Tensor) -> None:
    FOUND.append(x)


@torch.no_grad()
def counted_by_itself(x: Tensor) -> Tensor:
    counted_by_itself.count = 0  # pyright: ignore[reportFunctionMemberAccess]
    SCHEDULER.set_timesteps(STEPS)
    for t in SCHEDULER.timesteps:
        counted_by_itself.count += 1  # pyright: ignore[reportFunctionMemberAccess]
        x = step(x, t)
    return x * counted_by_itself.count  # pyright: ignore[reportFunctionMemberAccess]


@torch.no_grad()
def counted_by_a_class(x: Tensor) -> Tensor:
    Passes.count = 0
    SCHEDULER.set_timesteps(STEPS)
    for t in SCHEDULER.timesteps:
        Passes.count += 1
        x = step(x, t)
    return x * Passes.count


@torch.no_grad()
def counted_by_the_module(x: Tensor) -> Tensor:
    global COUNT
    COUNT = 0
    SCHEDULER.set_timesteps(STEPS)
    for t in SCHEDULER.timesteps:
        COUNT += 1
        x = step(x, t)
    return x


@torch.no_grad()
def recorded_by_a_helper(x: Tensor) -> Tensor:
    FOUND.clear()
    SCHEDULER.set_timesteps(STEPS)
    for t in SCHEDULER.timesteps:
        x = step(x, t)
        record(x)
    return x


@torch.no_grad()
def written_into_an_argument(x: Tensor, out: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(STEPS)
    for i, t in enumerate(SCHEDULER.timesteps):
        x = step(x, t)
        out[i] = x
    return x


@torch.no_grad()
def told(x: Tensor, on_step: Callable[[Tensor], Any] | None = None) -> Tensor:
    SCHEDULER.set_timesteps(STEPS)
    for t in SCHEDULER.timesteps:
        x = step(x, t)
        if on_step is not None:
            on_step(x)
    return x


@torch.no_grad()
def told_for_its_value(x: Tensor, limit: Callable[[Tensor], Tensor]) -> Tensor:
    SCHEDULER.set_timesteps(STEPS)
    for t in SCHEDULER.timesteps:
        x = limit(step(x, t))
    return x


def nearest(found: dict[str, Any]) -> Callable[[Tensor], None]:
    """Keeps the state that is nearest to one."""
    found.update(norm=1e9, x=None)

    def keep(x: Tensor) -> None:
        if (norm := float((x - 0.4).norm())) < found["norm"]:
            found.update(norm=norm, x=x.clone())

    return keep


def both(loop: Callable[..., Tensor], given: Callable[[], Any] | None, left: Callable[[Any], Any]) -> Any:
    """Of the plain call and of the parallel one the sample, and what is left of its argument; and the report."""
    found: list[Any] = []
    run = parallelize(loop, parasolver(window=6, tolerance=1e-3), scheduler=SCHEDULER, networks=[NET])
    for call in (loop, run):
        x, more = torch.randn(2, 8, generator=torch.Generator().manual_seed(3)), None if given is None else given()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append((call(x) if given is None else call(x, more), left(more)))
    return *found, run.report


LEFT: dict[str, tuple[Any, Callable[[], Any] | None, Callable[[Any], Any], str]] = {
    "an attribute of the function": (
        counted_by_itself,
        None,
        lambda _: counted_by_itself.count,
        "to the next: counted_by_itself.count",
    ),
    "an attribute of a class": (counted_by_a_class, None, lambda _: Passes.count, "to the next: Passes.count"),
    "a global number": (counted_by_the_module, None, lambda _: COUNT, "add to COUNT, which outlives its call"),
    "a list of a helper": (recorded_by_a_helper, None, lambda _: torch.stack(FOUND), r"to the next: len\(FOUND\)"),
    "an argument": (written_into_an_argument, lambda: torch.zeros(STEPS, 2, 8), lambda out: out, "add to out, which outlives"),
    "a list by its method": (
        told,
        lambda: [].append,
        lambda add: torch.stack(add.__self__),
        "call on_step, one of its arguments",
    ),
    "a function that keeps one": (told, lambda: nearest(BEST), lambda _: BEST["x"], "call on_step, one of its arguments"),
}
"""Where something is left: the loop, what makes its argument, what is left, and a pattern of the reason."""
BEST: dict[str, Any] = {}


@pytest.mark.parametrize("where", LEFT)
def test_what_is_left_is_that_of_the_plain_call(where: str) -> None:
    loop, given, left, reason = LEFT[where]
    (plain, wanted), (found, got), report = both(loop, given, left)
    assert report.executor == "sequential"
    assert torch.equal(found, plain)
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(wanted))
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.warnings[-1])


@pytest.mark.parametrize("case", ["no function", "a function for its value"])
def test_loops_that_leave_nothing_run_in_parallel(case: str) -> None:
    loop, given = (told, None) if case == "no function" else (told_for_its_value, lambda: lambda x: x.clamp(-3, 3))
    (plain, _), (found, _), report = both(loop, given, lambda _: None)
    assert report.executor in ("vector", "lanes"), report.warnings
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error

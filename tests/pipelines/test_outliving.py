# SPDX-License-Identifier: Apache-2.0
"""What passes leave outside of their call, in functions, classes, arguments and global variables, is that of the plain call."""

from __future__ import annotations

import contextlib
import io
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from adversary import Net
from torch import Tensor

from paradiff import parallelize, parasolver

NET, SCHEDULER, STEPS = Net(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 30
COUNT, LATEST = 0, 0.0
FOUND: list[Tensor] = []


class Passes:
    """A class that counts."""

    count = 0


class Norms:
    """A class whose objects keep norms."""

    def __init__(self) -> None:
        self.kept: list[float] = []

    def __call__(self, x: Tensor) -> None:
        self.kept.append(float(x.norm()))


LARGEST, ROWS, TEXT, NORMS, LAST = {"norm": 0.0}, torch.zeros(STEPS), io.StringIO(), Norms(), torch.zeros(2, 8)
DEPTH: list[int] = []
ELSEWHERE: Any = types.ModuleType("elsewhere")
ELSEWHERE.count = 0
"""What helpers of loops leave, or write into."""


def count() -> None:
    global COUNT
    COUNT += 1


def latest(t: Any) -> None:
    global LATEST
    LATEST = float(t)


def largest(x: Tensor) -> None:
    LARGEST["norm"] = max(LARGEST["norm"], float(x.norm()))


def row(x: Tensor, t: Any) -> None:
    ROWS[int((SCHEDULER.timesteps == t).nonzero()[0])] = x.norm()


def tell(t: Any) -> None:
    print(f"{float(t):.0f}", file=TEXT)


def count_elsewhere() -> None:
    ELSEWHERE.count += 1


@contextlib.contextmanager
def deeper() -> Iterator[None]:
    DEPTH.append(1)
    yield
    DEPTH.pop()


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


def helped(help: Callable[[Tensor, Any], Any], begin: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    """A loop that calls a helper in each pass."""

    @torch.no_grad()
    def loop(x: Tensor) -> Tensor:
        begin()
        SCHEDULER.set_timesteps(STEPS)
        for t in SCHEDULER.timesteps:
            x = step(x, t)
            help(x, t)
        return x

    return loop


@torch.no_grad()
def deeper_in_each_pass(x: Tensor) -> Tensor:
    SCHEDULER.set_timesteps(STEPS)
    for t in SCHEDULER.timesteps:
        with deeper():
            x = SCHEDULER.step(NET(x, t), t, x)[0]
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
        "leave counted_by_itself.count, which outlives the call",
    ),
    "an attribute of a class": (
        counted_by_a_class,
        None,
        lambda _: Passes.count,
        "leave Passes.count, which outlives the call",
    ),
    "a global number": (counted_by_the_module, None, lambda _: COUNT, "add to COUNT, which outlives its call"),
    "a list of a helper": (recorded_by_a_helper, None, lambda _: torch.stack(FOUND), "leave FOUND, which outlives the call"),
    "a global number of a helper": (
        helped(lambda x, t: count(), lambda: globals().update(COUNT=0)),
        None,
        lambda _: COUNT,
        "leave .*, which outlives the call",
    ),
    "a largest value": (
        helped(lambda x, t: largest(x), lambda: LARGEST.update(norm=0.0)),
        None,
        lambda _: LARGEST["norm"],
        r"leave LARGEST\['norm'\]",
    ),
    "a row of each pass": (helped(row, ROWS.zero_), None, lambda _: ROWS.clone(), "leave .*, which outlives the call"),
    "a text": (
        helped(lambda x, t: tell(t), lambda: (TEXT.seek(0), TEXT.truncate())),
        None,
        lambda _: len(TEXT.getvalue()),
        "leave .*, which outlives the call",
    ),
    "an object that is called": (
        helped(lambda x, t: NORMS(x), NORMS.kept.clear),
        None,
        lambda _: NORMS.kept,
        "leave .*, which outlives the call",
    ),
    "another module": (
        helped(lambda x, t: count_elsewhere(), lambda: setattr(ELSEWHERE, "count", 0)),
        None,
        lambda _: ELSEWHERE.count,
        "leave ELSEWHERE.count",
    ),
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


def test_what_the_last_pass_alone_would_leave_is_followed() -> None:
    (plain, wanted), (found, got), report = both(helped(lambda x, t: latest(t), lambda: None), None, lambda _: LATEST)
    assert report.executor == "lanes", report.warnings
    assert got == wanted
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error


def test_what_passes_take_back_is_no_reason() -> None:
    (plain, wanted), (found, got), report = both(deeper_in_each_pass, None, lambda _: len(DEPTH))
    assert report.executor == "vector", report.warnings
    assert wanted == got == 0
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error


def test_a_text_of_refused_tries_is_that_of_the_plain_call() -> None:
    """What a loop writes into a buffer of its call, and then refuses to be run in parallel, is written once."""

    @torch.no_grad()
    def loop(x: Tensor) -> Tensor:
        memory: Any = 0.0
        SCHEDULER.set_timesteps(STEPS)
        for t in SCHEDULER.timesteps:
            tell(t)
            memory = 0.5 * memory + NET(x, t)
            x = SCHEDULER.step(memory, t, x)[0]
        return x

    text = []
    for call in (loop, parallelize(loop, parasolver(window=6), executor="lanes", scheduler=SCHEDULER, networks=[NET])):
        TEXT.seek(0)
        TEXT.truncate()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(torch.zeros(2, 8))
        text.append(TEXT.getvalue())
    assert text[0] == text[1]

# SPDX-License-Identifier: Apache-2.0
"""Loops that hand on what each pass makes: where something keeps it, the call is the plain one; the last alone may be kept."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import itertools
import re
import warnings
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from adversary import Net
from torch import Tensor

from paradiff import collocation, parallelize, parasolver

NET, SCHEDULER, STEPS = Net(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 30


def step(x: Tensor, t: Any) -> Tensor:
    return SCHEDULER.step(NET(x, t), t, x)[0]


def states(x: Tensor) -> Iterator[Tensor]:
    for t in SCHEDULER.timesteps:
        x = step(x, t)
        yield x


class Walk:
    """Makes a pass whenever it is asked for the next state."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.times = x, iter(SCHEDULER.timesteps)

    def __iter__(self) -> Walk:
        return self

    def __next__(self) -> Tensor:
        t = next(self.times)
        self.x = step(self.x, t)
        return self.x


def mean(values: Any) -> Tensor:
    return torch.stack(values).mean(0)


def of_a_list(x: Tensor) -> Tensor:
    return mean(list(states(x)))


def of_a_sum(x: Tensor) -> Tensor:
    return sum(states(x)) / STEPS  # pyright: ignore[reportReturnType]


def of_the_largest(x: Tensor) -> Tensor:
    return max(states(x), key=lambda y: -float((y - 0.4 * x).norm()))


def of_a_comprehension(x: Tensor) -> Tensor:
    return x * mean([y.norm() for y in states(x)])


def of_a_generator(x: Tensor) -> Tensor:
    return mean(list(2 * y for y in states(x)))


def passed_on(x: Tensor) -> Tensor:
    def others() -> Iterator[Tensor]:
        yield from states(x)

    return mean(list(others()))


def of_a_part(x: Tensor) -> Tensor:
    return mean(list(itertools.islice(states(x), 3, None)))


def of_two(x: Tensor) -> Tensor:
    last = deque(states(x), maxlen=2)
    return last[0] + last[1]


def last_but_one(x: Tensor) -> Tensor:
    return list(states(x))[-2]


def starred(x: Tensor) -> Tensor:
    *_, y = states(x)
    return y + _[3]


def added_in_another_loop(x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for y in states(x):
        total = total + y
    return total / STEPS


def kept_in_another_loop(x: Tensor) -> Tensor:
    kept = None
    for n, y in enumerate(states(x)):
        if n == 12:
            kept = y
    assert kept is not None
    return kept


def asked_for(x: Tensor) -> Tensor:
    found, total = states(x), torch.zeros_like(x)
    for _ in range(STEPS):
        total = total + next(found)
    return total / STEPS


def of_an_iterator(x: Tensor) -> Tensor:
    return mean(list(Walk(x)))


def added_of_an_iterator(x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for y in Walk(x):
        total += y
    return total / STEPS


def mapped(x: Tensor) -> Tensor:
    def one(t: Any) -> Tensor:
        nonlocal x
        x = step(x, t)
        return x

    return mean(list(map(one, SCHEDULER.timesteps)))


def comprehended(x: Tensor) -> Tensor:
    def one(t: Any) -> Tensor:
        nonlocal x
        x = step(x, t)
        return x

    return mean([one(t) for t in SCHEDULER.timesteps])


def accumulated(x: Tensor) -> Tensor:
    return mean(list(itertools.accumulate(SCHEDULER.timesteps, step, initial=x)))


def reduced_with_more(x: Tensor) -> Tensor:
    found = functools.reduce(lambda s, t: (step(s[0], t), s[1] + s[0]), SCHEDULER.timesteps, (x, torch.zeros_like(x)))
    return found[1] / STEPS


def added_in_a_while(x: Tensor) -> Tensor:
    times, total = iter(SCHEDULER.timesteps), torch.zeros_like(x)
    while (t := next(times, None)) is not None:
        x = step(x, t)
        total = total + x
    return total / STEPS


def of_asynchronous_ones(x: Tensor) -> Tensor:
    async def some() -> AsyncIterator[Tensor]:
        for y in states(x):
            yield y

    async def all_of_them() -> Tensor:
        return mean([y async for y in some()])

    return asyncio.run(all_of_them())


def of_a_text(x: Tensor) -> Tensor:
    text = io.StringIO()
    for t in SCHEDULER.timesteps:
        x = step(x, t)
        text.write("above" if float(x[0, 0]) > 0 else "below")
    return x * len(text.getvalue())


KEPT = {
    of_a_list: "of_a_list|mean",
    of_a_sum: r"return sum\(states\(x\)\)",
    of_the_largest: r"return max\(states\(x\)",
    of_a_comprehension: r"y.norm\(\) for y in states",
    of_a_generator: r"2 \* y for y in states",
    passed_on: r"list\(others\(\)\)",
    of_a_part: "itertools.islice",
    of_two: "maxlen=2",
    last_but_one: "-2",
    starred: r"\*_, y = states\(x\)",
    added_in_another_loop: "leave total to the next one",
    kept_in_another_loop: "leaves kept to what follows",
    asked_for: r"total \+ next\(found\)",
    of_an_iterator: r"list\(Walk\(x\)\)",
    added_of_an_iterator: "add to total, which is read after the loop",
    mapped: r"list\(map\(one",
    comprehended: r"one\(t\) for t in",
    accumulated: "itertools.accumulate",
    reduced_with_more: "functools.reduce",
    added_in_a_while: "leave x, total to the next one",
    of_asynchronous_ones: "to what keeps them: some",
    of_a_text: "the place in text",
}
"""What keeps more than the last, each with a pattern of the reason."""


def last_of_a_for(x: Tensor) -> Tensor:
    for x in states(x):  # noqa: B007, B020
        pass
    return x


def last_of_a_star(x: Tensor) -> Tensor:
    *_, y = states(x)
    return y


def last_of_a_list(x: Tensor) -> Tensor:
    return list(states(x))[-1]


def last_of_an_iterator(x: Tensor) -> Tensor:
    for x in Walk(x):  # noqa: B007, B020
        pass
    return x


def last_beside_numbers(x: Tensor) -> Tensor:
    y = x
    for _, y in zip(range(STEPS), states(x), strict=False):  # noqa: B007
        pass
    return y


def last_of_a_map(x: Tensor) -> Tensor:
    def one(t: Any) -> Tensor:
        nonlocal x
        x = step(x, t)
        return x

    y = x
    for y in map(one, SCHEDULER.timesteps):  # noqa: B007
        pass
    return y


def last_accumulated(x: Tensor) -> Tensor:
    return list(itertools.accumulate(SCHEDULER.timesteps, step, initial=x))[-1]


def reduced(x: Tensor) -> Tensor:
    return functools.reduce(lambda x, t: SCHEDULER.step(NET(x, t), t, x)[0], SCHEDULER.timesteps, x)


def mapped_for_nothing(x: Tensor) -> Tensor:
    def one(t: Any) -> None:
        nonlocal x
        x = step(x, t)

    list(map(one, SCHEDULER.timesteps))
    return x


def whole_in_a_list(x: Tensor) -> Tensor:
    def whole(x: Tensor) -> Tensor:
        for t in SCHEDULER.timesteps:
            x = step(x, t)
        return x

    return mean([whole(y) for y in [x]])


def yielded_once(x: Tensor) -> Tensor:
    @contextlib.contextmanager
    def sampled(x: Tensor) -> Iterator[Tensor]:
        for t in SCHEDULER.timesteps:
            x = step(x, t)
        yield x

    with sampled(x) as y:
        return y


def times_of_a_generator(x: Tensor) -> Tensor:
    for t in (t for t in SCHEDULER.timesteps):
        x = step(x, t)
    return x


def asked_in_a_while(x: Tensor) -> Tensor:
    times = iter(SCHEDULER.timesteps)
    while (t := next(times, None)) is not None:
        x = step(x, t)
    return x


LAST = [
    last_of_a_for,
    last_of_a_star,
    last_of_a_list,
    last_of_an_iterator,
    last_beside_numbers,
    last_of_a_map,
    last_accumulated,
    reduced,
    mapped_for_nothing,
    whole_in_a_list,
    yielded_once,
    times_of_a_generator,
    asked_in_a_while,
]


def both(loop: Callable[[Tensor], Tensor], method: Any) -> tuple[Tensor, Tensor, Any]:
    """The plain sample, that of the parallel call, and its report."""

    @torch.no_grad()
    def denoise(x: Tensor) -> Tensor:
        SCHEDULER.set_timesteps(STEPS)
        return loop(x)

    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    run = parallelize(denoise, method, scheduler=SCHEDULER, networks=[NET])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return denoise(x), run(x), run.report


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")  # that of a try that was given up
@pytest.mark.parametrize("loop", KEPT, ids=lambda loop: loop.__name__)
def test_what_keeps_more_than_the_last_state_is_given_the_plain_calls(loop: Callable[[Tensor], Tensor]) -> None:
    plain, found, report = both(loop, parasolver(window=6, tolerance=1e-3))
    assert report.executor == "sequential"
    assert torch.equal(found, plain)
    assert re.search(KEPT[loop], report.warnings[-1]), report.warnings


@pytest.mark.parametrize("loop", LAST, ids=lambda loop: loop.__name__)
def test_what_keeps_the_last_state_runs_in_parallel(loop: Callable[[Tensor], Tensor]) -> None:
    plain, found, report = both(loop, parasolver(window=6, tolerance=1e-3))
    assert report.executor in ("vector", "lanes"), report.warnings
    assert float((found - plain).square().mean().sqrt()) <= 2 * report.error_estimate.estimated_error


def before_the_last(x: Tensor) -> Tensor:
    before = x
    for y in states(x):
        before, x = x, y
    return x + 0.1 * before


def test_what_the_last_pass_leaves_to_another_loop_is_refused_where_states_between_are_not_known() -> None:
    plain, found, report = both(before_the_last, collocation())
    assert report.executor == "sequential"
    assert torch.equal(found, plain)

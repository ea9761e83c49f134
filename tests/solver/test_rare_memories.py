# SPDX-License-Identifier: Apache-2.0
"""Models whose memory of earlier calls acts at a few calls: found, or called as the plain chain calls them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from faulty_networks import SHAPE, answer
from test_row_check import METHODS
from torch import Tensor

from paradiff import Keyed, Schedule, parasolver, sample, sequential
from paradiff.samplers import ddpm
from paradiff.solver.witnesses import MANY, MOST

Model = Callable[[Tensor, Tensor], Tensor]
PARALLEL = [name for name in METHODS if name != "sequential"]


class Counting:
    """Adds a share of the first row of its call before, at every `period`-th call, and counts in an attribute."""

    def __init__(self, period: int) -> None:
        self.period, self.calls = period, 0
        self.kept: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        y, before = answer(x, t), self.kept
        self.calls, self.kept = self.calls + 1, y[:1]
        return y if before is None or self.calls % self.period else y - 0.15 * before


def iterating(period: int) -> Model:
    """Adds a share of its very first output, and counts with an iterator, which cannot be read."""
    calls, kept = itertools.count(1), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        y = answer(x, t)
        kept.append(y[:1]) if not kept else None
        return y if next(calls) % period else torch.maximum(y, 0.8 * kept[0])

    return model


@pytest.mark.parametrize("model", [Counting, iterating])
@pytest.mark.parametrize("period", [4, 5, 6, 7, 9])
@pytest.mark.parametrize("method", PARALLEL)
def test_it_is_found(method: str, period: int, model: Callable[[int], Model]) -> None:
    table, given = METHODS[method]
    for seed in range(3):
        with pytest.raises(ValueError, match=r"earlier calls|in two ways|influence each other|number of rows"):
            sample(model(period), table, Keyed(SHAPE, seed, 2), given)


@pytest.mark.parametrize("model", [Counting, iterating])
@pytest.mark.parametrize("period", [2, 5, 9, 23])
def test_the_plain_chain_is_not_disturbed_by_its_check(period: int, model: Callable[[int], Model]) -> None:
    """Its sample is that without a check, or it is refused."""
    table, _ = METHODS["sequential"]
    for seed in range(3):
        plain = sample(model(period), table, Keyed(SHAPE, seed), sequential(), check="off").sample
        try:
            found = sample(model(period), table, Keyed(SHAPE, seed), sequential())
        except ValueError as error:
            assert "earlier calls" in str(error) or "in two ways" in str(error)  # noqa: PT017
        else:
            assert torch.equal(found.sample, plain)
            assert found.checked_rows > 0


class TooFarError(Exception):
    """The chain was walked to its middle."""


@pytest.mark.parametrize("keeps", [False, True])
def test_a_model_that_keeps_nothing_is_checked_in_its_first_round(keeps: bool) -> None:
    """So that one whose rows influence each other is refused before the chain was walked; one that keeps something is later."""
    last: list[Tensor] = []

    def mixing(x: Tensor, t: Tensor) -> Tensor:
        if t.max() < 500:
            raise TooFarError
        if keeps:
            last[:] = [x]
        return answer(x, t) + x.mean(0)

    with pytest.raises(TooFarError if keeps else ValueError, match=None if keeps else "influence each other"):
        sample(mixing, METHODS["sequential"][0], Keyed(SHAPE, samples=3), sequential())


@pytest.mark.parametrize("keeps", [False, True])
def test_a_row_of_each_round_is_evaluated_again_of_models_that_keep_something(keeps: bool) -> None:
    last: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        if keeps:
            last[:] = [x]
        return answer(x, t)

    found = sample(model, ddpm(Schedule.linear(), 200), Keyed(SHAPE), parasolver(8, 1e-4))
    assert found.rounds > 60
    least = MANY // 2 if keeps else 0  # of long runs every second round
    assert least < found.checked_rows < (MANY + 20 if keeps else MOST + 20)

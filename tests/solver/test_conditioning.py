# SPDX-License-Identifier: Apache-2.0
"""Conditioning that is equal in all rows is one row in memory, and copies of it where the model needs them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import SHAPE, TABLES, gap, network
from torch import Tensor

from paradiff import Evaluator, Keyed, jacobi, parasolver, sample
from paradiff.solver import Batch

Y = {"y": torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0))}
Model = Callable[..., Tensor]


def batch_of(samples: list[int]) -> Batch:
    t = torch.arange(len(samples))
    return Batch(torch.randn(len(samples), *SHAPE), t, t, torch.tensor(samples))


def conditioned(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return network(x, t) * y.mean((1, 2))[:, None, None]


class Seen:
    """A conditioned model that keeps the strides of its conditioning."""

    def __init__(self, model: Model = conditioned) -> None:
        self.model, self.strides = model, list[tuple[int, ...]]()

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.strides.append(y.stride())
        return self.model(x, t, y)


@pytest.mark.parametrize(
    ("samples", "shared"), [([0, 0, 0, 0], True), ([2, 2, 2], True), ([0, 1, 2], False), ([1, 1, 0], False)]
)
def test_rows_of_one_sample_share_their_conditioning(samples: list[int], shared: bool) -> None:
    seen, batch = Seen(), batch_of(samples)
    found = Evaluator(seen, conditioning=Y)(batch)
    assert torch.equal(found, conditioned(batch.x, batch.t, Y["y"][batch.samples]))
    assert seen.strides == [(0, 2, 1) if shared else (8, 2, 1)]


@pytest.mark.parametrize(("count", "strides"), [(1, {(0, 2, 1)}), (3, {(8, 2, 1)})])
def test_strides_of_padded_calls_are_those_of_the_run(count: int, strides: set[tuple[int, ...]]) -> None:
    seen = Seen()
    evaluator = Evaluator(seen, conditioning={"y": Y["y"][:count]}, pad=True)
    sample(evaluator, TABLES["ddpm"], Keyed(SHAPE, 0, count), jacobi(tolerance=1e-6))
    assert set(seen.strides) - {(8, 2, 1)} == strides - {(8, 2, 1)}
    for samples in ([0, 0, 0, 0], [0, 0, 0]):
        seen.strides.clear()
        evaluator(batch_of(samples))
        assert set(seen.strides) == strides


def writes(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    y.mul_(2)
    return conditioned(x, t, y)


def writes_one_by_one(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    for row in y:
        row.add_(1)
    return conditioned(x, t, y)


def views(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return conditioned(x, t, y.view(-1, 2).view(len(x), 4, 2))


def demands(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    assert y.is_contiguous(), "the kernel takes contiguous memory"
    return conditioned(x, t, y)


@pytest.mark.parametrize("model", [writes, writes_one_by_one, views, demands])
@pytest.mark.parametrize("pad", [False, True])
def test_a_model_that_needs_copies_is_given_copies(model: Model, pad: bool) -> None:
    kept, table, noise = Y["y"].clone(), TABLES["ddpm"], Keyed(SHAPE)
    seen = Seen(model)
    evaluator = Evaluator(seen, conditioning={"y": Y["y"][:1]}, pad=pad)
    for _ in range(2):
        found = sample(evaluator, table, noise, parasolver(tolerance=1e-6), dtype=torch.float64)
        wanted = sample(
            Evaluator(lambda x, t: model(x, t, Y["y"][[0] * len(x)])),
            table,
            noise,
            parasolver(tolerance=1e-6),
            dtype=torch.float64,
        )
        assert gap(found.sample, wanted.sample) < 1e-12  # the same rounds in float64
        assert torch.equal(Y["y"], kept)
    assert sum(strides[0] == 0 for strides in seen.strides) == 1  # the call that showed it


def test_what_rows_share_is_handed_over_as_it_is() -> None:
    prefix, cache = torch.randn(7, 2), [torch.randn(2), torch.randn(2)]
    seen: set[tuple[int, int]] = set()

    def prefixed(x: Tensor, t: Tensor, prefix: Tensor, cache: list[Tensor], y: Tensor) -> Tensor:
        seen.add((id(prefix), id(cache)))
        return network(x, t) + prefix.mean() * y.mean((1, 2))[:, None, None] + cache[0].sum()

    evaluator = Evaluator(prefixed, conditioning=Y, shared={"prefix": prefix, "cache": cache})
    found = sample(evaluator, TABLES["ddpm"], Keyed(SHAPE, 0, 3), parasolver(tolerance=1e-6), dtype=torch.float64)
    assert seen == {(id(prefix), id(cache))}
    repeated = Evaluator(lambda x, t, y: prefixed(x, t, prefix, cache, y), conditioning=Y)
    wanted = sample(repeated, TABLES["ddpm"], Keyed(SHAPE, 0, 3), parasolver(tolerance=1e-6), dtype=torch.float64)
    assert torch.equal(found.sample, wanted.sample)


def test_a_model_that_writes_into_what_rows_share_is_refused() -> None:
    def writing(x: Tensor, t: Tensor, prefix: Tensor) -> Tensor:
        return network(x, t) + prefix.mul_(0.5).mean()

    with pytest.raises(ValueError, match="the model writes into 'prefix', which all rows share; have it write into a copy"):
        sample(Evaluator(writing, shared={"prefix": torch.ones(3)}), TABLES["ddpm"], Keyed(SHAPE), parasolver())


def test_rows_of_their_own_given_as_shared_are_found_by_the_check() -> None:
    def labelled(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return network(x, t) + y

    with pytest.raises(ValueError, match="the model fails for node"):
        sample(Evaluator(labelled, shared={"y": torch.randn(12, 1, 1)}), TABLES["ddpm"], Keyed(SHAPE), jacobi())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": [1]}, r"what rows share is .*; give values by name, such as"),
        ({"shared": {"y": 1}, "conditioning": Y}, "'y' is given as conditioning and as shared; give it once"),
    ],
)
def test_shared_values_are_given_by_name_and_once(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluator(network, **options)  # pyright: ignore[reportArgumentType]


def test_an_error_of_the_model_is_raised_with_conditioning_too() -> None:
    calls: list[int] = []

    def broken(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Evaluator(broken, conditioning=Y)(batch_of([1, 1, 1]))
    assert calls == [3, 3]


def test_an_error_of_another_kind_is_raised_at_once() -> None:
    class Cancelled(RuntimeError):
        pass

    calls: list[int] = []

    def broken(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(len(x))
        raise Cancelled

    with pytest.raises(Cancelled):
        Evaluator(broken, conditioning=Y)(batch_of([1, 1, 1]))
    assert calls == [3]

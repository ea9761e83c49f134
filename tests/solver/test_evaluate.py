# SPDX-License-Identifier: Apache-2.0
"""The evaluator keeps to its bound, hands each row its own conditioning, moves dtypes, counts, and says what is wrong."""

from __future__ import annotations

import pytest
import torch
from problems import SHAPE, TABLES, gap, network, run
from torch import Tensor

from paradiff import Evaluator, Keyed, jacobi, parasolver, quasi_newton, sample, srds
from paradiff.solver import Batch, Method


def batch_of(rows: int, dtype: torch.dtype = torch.float32) -> Batch:
    x = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return Batch(x, torch.arange(rows), torch.arange(rows), torch.arange(rows) % 3)


class Watched:
    """The toy network, noting the number of rows of each call; out of memory above a limit."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.calls = limit, []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls.append(len(x))
        if self.limit is not None and len(x) > self.limit:
            raise torch.OutOfMemoryError(f"{len(x)} rows")
        return network(x, t)


@pytest.mark.parametrize(
    ("bound", "calls"), [(None, [7]), (1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (7, [7]), (100, [7])]
)
def test_no_call_holds_more_rows_than_the_bound(bound: int | None, calls: list[int]) -> None:
    watched = Watched()
    evaluator = Evaluator(watched, max_rows=bound)
    batch = batch_of(7)
    # Single entries of float32 may round differently in other places of a batch.
    torch.testing.assert_close(evaluator(batch), network(batch.x, batch.t), rtol=1e-6, atol=1e-6)
    assert watched.calls == calls
    assert (evaluator.rounds, evaluator.evaluations) == (1, 7)
    assert evaluator.seconds > 0


def test_out_of_memory_halves_the_chunk_and_keeps_it() -> None:
    watched = Watched(limit=3)
    evaluator = Evaluator(watched)
    batch = batch_of(16)
    torch.testing.assert_close(evaluator(batch), network(batch.x, batch.t), rtol=1e-6, atol=1e-6)
    assert watched.calls == [16, 8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert evaluator.max_rows == 2
    watched.calls.clear()
    evaluator(batch)
    assert watched.calls == [2] * 8
    assert (evaluator.rounds, evaluator.evaluations) == (2, 32)


def test_out_of_memory_in_the_middle_of_a_round_loses_no_row() -> None:
    watched = Watched()
    evaluator = Evaluator(watched, max_rows=4)
    original = watched.__call__

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        watched.limit = None if len(watched.calls) < 2 else 2
        return original(x, t)

    evaluator.denoiser = denoiser
    batch = batch_of(11)
    torch.testing.assert_close(evaluator(batch), network(batch.x, batch.t), rtol=1e-6, atol=1e-6)
    assert watched.calls == [4, 4, 3, 2, 1]


def test_out_of_memory_at_one_row_is_raised() -> None:
    watched = Watched(limit=0)
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        Evaluator(watched)(batch_of(5))
    assert watched.calls == [5, 3, 2, 1]


def test_a_run_out_of_memory_still_gives_its_sample() -> None:
    table = TABLES["ddpm"]
    wanted = run(table, parasolver(6), samples=3)
    found = sample(Evaluator(Watched(limit=5)), table, Keyed(SHAPE, 0, 3), parasolver(6), dtype=torch.float64)
    assert gap(found.sample, wanted.sample) < 1e-12  # The same sweeps in float64.
    assert (found.rounds, found.evaluations) == (wanted.rounds, wanted.evaluations)


@pytest.mark.parametrize("bound", [None, 1, 2, 3])
def test_each_row_is_handed_the_conditioning_of_its_sample(bound: int | None) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def denoiser(x: Tensor, t: Tensor, scale: Tensor, prompt: Tensor) -> Tensor:
        seen.append((t, scale, prompt))
        return x * scale.view(-1, 1, 1)

    scale, prompt = torch.tensor([2.0, 3.0, 5.0]), torch.randn(3, 4, 2)
    evaluator = Evaluator(denoiser, conditioning={"scale": scale, "prompt": prompt}, max_rows=bound)
    x = torch.randn(5, *SHAPE)
    samples = torch.tensor([2, 0, 0, 1, 2])
    times = torch.tensor([9, 8, 7, 6, 5])
    found = evaluator(Batch(x, times, times, samples))
    assert torch.equal(found, x * scale[samples].view(-1, 1, 1))
    assert torch.equal(torch.cat([t for t, _, _ in seen]), times)
    assert torch.equal(torch.cat([s for _, s, _ in seen]), scale[samples])
    assert torch.equal(torch.cat([p for _, _, p in seen]), prompt[samples])


@pytest.mark.parametrize("states", [torch.float32, torch.float64])
@pytest.mark.parametrize("inside", [torch.float16, torch.bfloat16, torch.float32, torch.float64, None])
def test_the_network_sees_its_own_dtype_and_the_states_keep_theirs(states: torch.dtype, inside: torch.dtype | None) -> None:
    seen = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.dtype, t.dtype))
        return network(x, t)

    batch = batch_of(4, states)
    found = Evaluator(denoiser, dtype=inside)(batch)
    assert seen == [(inside or states, torch.int64)]
    assert found.dtype == states
    # Bfloat16 has 8 bits.
    torch.testing.assert_close(found, network(batch.x, batch.t), rtol=0, atol=2e-2)


def test_a_float64_network_serves_float32_states() -> None:
    table = TABLES["ddpm"]
    evaluator = Evaluator(network, dtype=torch.float64)
    found = sample(evaluator, table, Keyed(SHAPE), parasolver(tolerance=0.0))
    assert found.sample.dtype == torch.float32
    # States are rounded to 6e-8 in each of 12 steps.
    assert gap(found.sample, run(table, parasolver(tolerance=0.0)).sample) < 1e-5


def test_nothing_is_recorded_for_gradients() -> None:
    weight = torch.ones(1, requires_grad=True)
    found = Evaluator(lambda x, t: x * weight)(batch_of(3))
    assert not found.requires_grad
    solved = sample(lambda x, t: x * weight, TABLES["ddpm"], Keyed(SHAPE), parasolver())
    assert not solved.sample.requires_grad


def test_a_sample_can_be_used_outside() -> None:
    found = run(TABLES["ddpm"], parasolver()).sample
    assert (found.clone().requires_grad_() * 2).sum().requires_grad


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (lambda x, t: (x,), r"the model returned a tuple; it must return one tensor \(for a diffusers network, its `.sample`"),
        (lambda x, t: {"sample": x}, "the model returned a dict; it must return one tensor"),
        (lambda x, t: None, "the model returned a NoneType; it must return one tensor"),
        (
            lambda x, t: torch.cat([x, x], 1),
            r"the model returned shape \(4, 4, 3\) for rows of shape \(4, 2, 3\); .* predicts a variance needs those channels",
        ),
        (lambda x, t: x[:1], r"the model returned shape \(1, 2, 3\) for rows of shape \(4, 2, 3\)"),
        (
            lambda x, t: x.half(),
            r"the model returned dtype torch.float16 for rows of dtype torch.float32; .* dtype=torch.float16, or have",
        ),
        (lambda x, t: x.double(), "the model returned dtype torch.float64 for rows of dtype torch.float32"),
        (lambda x, t: x.to("meta"), "the model returned a tensor on the meta device, which holds no numbers; load the model's"),
        (lambda x, t: x.long(), "dtype torch.int64 for rows of dtype torch.float32; have the model return real numbers of its"),
        (lambda x, t: torch.complex(x, x), "dtype torch.complex64 for rows of dtype torch.float32; have the model return real"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(denoiser: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluator(denoiser)(batch_of(4))


@pytest.mark.parametrize("bound", [0, -1])
def test_a_bound_below_one_row_is_refused(bound: int) -> None:
    with pytest.raises(ValueError, match=rf"max_rows is {bound}; it must be a whole number, at least 1, or None for no bound"):
        Evaluator(network, max_rows=bound)


def test_an_error_of_the_network_comes_through() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(TABLES["ddpm"], parasolver(), broken)


# -- models that keep, write or differentiate --------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [None, 3])
@pytest.mark.parametrize(
    "method", [jacobi(tolerance=0.0), quasi_newton(tolerance=1e-6), srds(4, tolerance=1e-6)], ids=lambda m: m.name
)
def test_a_model_may_return_the_same_memory_at_every_call(max_rows: int | None, method: Method) -> None:
    buffer = torch.zeros(512, *SHAPE)

    def kept(x: Tensor, t: Tensor) -> Tensor:
        buffer[: len(x)] = network(x, t)
        return buffer[: len(x)]

    for samples in (1, 2):
        noise = Keyed(SHAPE, samples=samples)
        found = sample(Evaluator(kept, max_rows=max_rows), TABLES["ddpm"], noise, method)
        assert torch.equal(found.sample, sample(Evaluator(network, max_rows=max_rows), TABLES["ddpm"], noise, method).sample)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_a_model_may_write_into_its_input(dtype: torch.dtype | None) -> None:
    found = sample(Evaluator(lambda x, t: x.mul_(0.5), dtype=dtype), TABLES["ddpm"], Keyed(SHAPE), parasolver(tolerance=1e-4))
    wanted = sample(Evaluator(lambda x, t: x * 0.5, dtype=dtype), TABLES["ddpm"], Keyed(SHAPE), parasolver(tolerance=1e-4))
    assert torch.equal(found.sample, wanted.sample)


def test_a_model_may_take_gradients() -> None:
    def guided(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            return x + 0.1 * torch.autograd.grad(network(y, t).sum(), y)[0]

    def written(x: Tensor, t: Tensor) -> Tensor:
        s, u = 0.7 * x + 0.1 * t.view(-1, 1, 1) / 1000, 0.3 * torch.cos(t.view(-1, 1, 1) / 150)
        return x + 0.1 * (0.7 * (1 - torch.tanh(s) ** 2) + u * torch.cos(x))

    found, wanted = (sample(f, TABLES["ddim"], Keyed(SHAPE), parasolver(tolerance=0.0)) for f in (guided, written))
    torch.testing.assert_close(found.sample, wanted.sample, rtol=1e-5, atol=1e-5)  # float32, 12 steps, in another order
    assert not found.sample.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fractional_times_come_in_the_dtype_of_the_states(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(7, 6, dtype=dtype)

    def joined(x: Tensor, t: Tensor) -> Tensor:
        return layer(torch.cat([x.flatten(1), t[:, None]], 1)).view_as(x)

    assert sample(joined, TABLES["flow_euler"], Keyed(SHAPE), parasolver(), dtype=dtype).sample.dtype == dtype


def test_half_precision_networks_get_fractional_times_in_float32() -> None:
    seen: set[torch.dtype] = set()

    def half(x: Tensor, t: Tensor) -> Tensor:
        seen.add(t.dtype)
        return x

    sample(Evaluator(half, dtype=torch.bfloat16), TABLES["flow_euler"], Keyed(SHAPE), parasolver())
    assert seen == {torch.float32}


def test_conditioning_needs_a_row_for_each_sample() -> None:
    evaluator = Evaluator(lambda x, t, y: x * y, conditioning={"y": torch.ones(5, 1, 1)})
    with pytest.raises(ValueError, match="the conditioning 'y' has 5 rows; the noise has 2 samples, and each needs one row"):
        sample(evaluator, TABLES["ddpm"], Keyed(SHAPE, samples=2), parasolver())

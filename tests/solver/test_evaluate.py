"""The evaluator keeps to its bound, hands each row its own conditioning, moves dtypes, counts, and says what is wrong."""

from __future__ import annotations

import pytest
import torch
from problems import SHAPE, TABLES, gap, network, run
from torch import Tensor

from paradiff import Evaluator, Keyed, parasolver, sample
from paradiff.solver import Batch


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
        (lambda x, t: x.long(), "the model returned dtype torch.int64 for rows of dtype torch.float32"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(denoiser: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Evaluator(denoiser)(batch_of(4))


@pytest.mark.parametrize("bound", [0, -1])
def test_a_bound_below_one_row_is_refused(bound: int) -> None:
    with pytest.raises(ValueError, match=rf"max_rows is {bound}; a network call needs at least 1 row, or None for no bound"):
        Evaluator(network, max_rows=bound)


def test_an_error_of_the_network_comes_through() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(TABLES["ddpm"], parasolver(), broken)

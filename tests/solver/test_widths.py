# SPDX-License-Identifier: Apache-2.0
"""Padded network calls have at most four widths a run, for every method, and give the sample of calls that are not padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from problems import METHODS, SHAPE, TABLES, gap, network
from torch import Tensor, nn

from paradiff import Evaluator, Keyed, collocation, jacobi, parasolver, quasi_newton, sample, sequential, srds
from paradiff.methods import WindowMethod
from paradiff.solver import Batch, Method, drive, solve
from paradiff.solver.widths import widths_of

TABLE = TABLES["ddpm"]
ALL: Mapping[str, Method] = {name: make(TABLE) for name, make in METHODS.items() if " from " not in name} | {
    "parasolver, window 8": parasolver(window=8),
    "quasi_newton, window 5": quasi_newton(window=5),
    "srds": srds(4),
    "srds, 3 rows": srds(6, rows=3),
    "collocation": collocation(),
    "collocation, window 4": collocation(window=4),
    "collocation, whole chain": collocation(exact=True),
}


class Watched:
    """The toy network, noting the rows of each call; out of memory above a limit."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.rows = limit, list[int]()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.limit is not None and len(x) > self.limit:
            raise torch.OutOfMemoryError(f"{len(x)} rows")
        self.rows.append(len(x))
        return network(x, t)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 5, 8, 16, 33, 1000])
def test_widths_go_from_one_row_to_the_widest_round(most: int) -> None:
    widths = list(widths_of(most))
    assert len(widths) <= 4
    assert [1, most] == [widths[0], widths[-1]]
    assert widths == sorted(set(widths))


@pytest.mark.parametrize(("samples", "bound"), [(1, None), (3, None), (3, 5)])
@pytest.mark.parametrize("name", ALL)
def test_a_run_meets_at_most_four_widths(name: str, samples: int, bound: int | None) -> None:
    noise, method = Keyed(SHAPE, 0, samples), ALL[name]
    wanted = sample(Evaluator(network, max_rows=bound), TABLE, noise, method, dtype=torch.float64)
    watched = Watched()
    padded = Evaluator(watched, max_rows=bound, pad=True)
    found = sample(padded, TABLE, noise, method, dtype=torch.float64)
    assert len(set(watched.rows)) <= 4
    assert max(watched.rows) <= (bound or method.width(TABLE) * samples)
    assert gap(found.sample, wanted.sample) < 1e-12  # the same rounds in float64
    assert (found.rounds, found.evaluations) == (wanted.rounds, wanted.evaluations)
    assert sum(watched.rows) == found.evaluations + found.checked_rows + padded.filled


def test_out_of_memory_lowers_the_bound_to_the_next_width() -> None:
    noise, method = Keyed(SHAPE, 0, 2), jacobi(tolerance=1e-6)
    watched = Watched(limit=15)  # of the widths 1, 8, 16 and 24 the largest two do not fit
    evaluator = Evaluator(watched, pad=True)
    found = sample(evaluator, TABLE, noise, method, dtype=torch.float64)
    assert set(watched.rows) == {1, 8}
    assert evaluator.max_rows == 8
    watched.rows.clear()
    again = sample(evaluator, TABLE, noise, method, dtype=torch.float64)
    assert set(watched.rows) == {1, 8}
    assert torch.equal(found.sample, again.sample)


def test_one_row_out_of_memory_is_raised_from_a_padded_call() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        sample(Evaluator(Watched(limit=0), pad=True), TABLE, Keyed(SHAPE), jacobi())


def test_calls_have_the_widths_of_the_run_in_which_they_are() -> None:
    watched = Watched()
    evaluator = Evaluator(watched, pad=True)
    for window, widths in ((3, {1, 3}), (9, {1, 3, 6, 9}), (3, {1, 3})):
        watched.rows.clear()
        sample(evaluator, TABLE, Keyed(SHAPE), jacobi(window=window, tolerance=1e-9))
        assert set(watched.rows) <= {*widths, *widths_of(window)}
        assert max(watched.rows) == window


def test_without_a_run_the_widest_round_so_far_counts() -> None:
    watched = Watched()
    evaluator = Evaluator(watched, pad=True)
    for rows in (12, 7, 3, 1, 9):
        x, t = torch.randn(rows, *SHAPE), torch.arange(rows)
        found = evaluator(Batch(x, t, t, torch.zeros(rows, dtype=torch.int64)))
        torch.testing.assert_close(found, network(x, t), rtol=1e-6, atol=1e-6)  # single entries round differently
    assert watched.rows == [12, 8, 4, 1, 12]
    assert (evaluator.rounds, evaluator.evaluations, evaluator.filled) == (5, 32, 5)


def test_rows_that_fill_a_call_have_the_conditioning_of_the_last_one() -> None:
    seen: list[Tensor] = []

    def conditioned(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(torch.cat([x[:, 0, 0].double(), t.double(), y[:, 0]]).view(3, -1))
        return x * y.to(x.dtype)[:, :, None]

    y = torch.arange(3.0, dtype=torch.float64)[:, None] + 1
    evaluator = Evaluator(conditioned, conditioning={"y": y}, pad=True)
    for rows in (6, 5):
        x, t, samples = torch.randn(rows, *SHAPE), torch.arange(rows), torch.arange(rows) % 3
        assert torch.equal(evaluator(Batch(x, t, t, samples, widest=6)), x * y[samples].float()[:, :, None])
    assert seen[1].shape == (3, 6)
    assert torch.equal(seen[1][:, 5], seen[1][:, 4])


@pytest.mark.parametrize("pad", [1, None, "yes", [1, 2]])
def test_pad_is_true_or_false(pad: object) -> None:
    with pytest.raises(ValueError, match=r"pad is .*; give True or False"):
        Evaluator(network, pad=pad)  # pyright: ignore[reportArgumentType]


# -- compiled networks ---------------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    """A network with weights and conditioning."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.inner(x.flatten(1) + t[:, None] / 1000 + y.mean((1, 2))[:, None]).view_as(x)


@pytest.fixture
def graphs() -> Iterator[list[int]]:
    """The number of graphs that were made, as the length of a list."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def counting(graphs: list[int]) -> Callable[..., object]:
    """A backend that notes each graph and runs it as it is."""

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(len(inputs))
        return module.forward

    return backend


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "default"])
@pytest.mark.parametrize(("samples", "bound"), [(1, None), (3, None), (3, 10)])
@pytest.mark.parametrize("name", ["jacobi", "parasolver, stride 3", "srds", "collocation, window 4"])
def test_a_compiled_network_has_at_most_four_graphs(
    graphs: list[int], name: str, samples: int, bound: int | None, dynamic: bool | None
) -> None:
    layers = Layers()
    compiled = torch.compile(layers, backend=counting(graphs), dynamic=dynamic)
    conditioning = {"y": torch.randn(samples, 4, 2)}
    noise, method = Keyed(SHAPE, 0, samples), ALL[name]
    wanted = sample(Evaluator(layers, conditioning=conditioning, max_rows=bound), TABLE, noise, method)
    found = sample(Evaluator(compiled, conditioning=conditioning, max_rows=bound, pad=True), TABLE, noise, method)
    assert 1 <= len(graphs) <= 4
    first = len(graphs)
    again = sample(Evaluator(compiled, conditioning=conditioning, max_rows=bound, pad=True), TABLE, noise, method)
    assert len(graphs) == first
    assert torch.equal(found.sample, again.sample)
    torch.testing.assert_close(found.sample, wanted.sample, rtol=1e-4, atol=1e-4)  # rows round differently in wider calls


def test_without_padding_a_compiled_network_has_more_graphs(graphs: list[int]) -> None:
    compiled = torch.compile(Layers(), backend=counting(graphs), dynamic=False)
    sample(Evaluator(compiled, conditioning={"y": torch.randn(1, 4, 2)}), TABLE, Keyed(SHAPE), ALL["jacobi"])
    assert len(graphs) > 4


def test_a_driven_solver_tells_the_widest_round() -> None:
    found: set[int | None] = set()

    def outputs(batch: Batch) -> Tensor:
        found.add(batch.widest)
        return network(batch.x, batch.t)

    for method, widest in ((jacobi(window=5), 10), (sequential(), 2), (srds(4), 8)):
        found.clear()
        drive(solve(TABLE, Keyed(SHAPE, 0, 2), method), outputs, check="off")
        assert found == {widest}, method
        assert not isinstance(method, WindowMethod) or method.width(TABLE) * 2 == widest

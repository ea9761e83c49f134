# SPDX-License-Identifier: Apache-2.0
"""Models that know their rows: the samples of a textbook loop that knows its steps, whatever the method and the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems import SHAPE, TABLES
from torch import Tensor

import paradiff
from paradiff import Evaluator, Keyed, Method, Schedule, Table, collocation, parasolver, quasi_newton, sample, sequential, srds
from paradiff.models import Mixture
from paradiff.samplers import ddpm, edm
from paradiff.solver import Batch, Rows

METHODS: dict[str, Callable[[], Method]] = {
    "sequential": sequential,
    "parasolver": lambda: parasolver(window=5, tolerance=0.0),
    "quasi_newton": lambda: quasi_newton(window=7, tolerance=0.0),
    "srds": lambda: srds(tolerance=1e-12),
    "collocation": lambda: collocation(tolerance=1e-9),
    "auto": paradiff.auto,
}
EXACT = {"rtol": 0, "atol": 1e-9}


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.7 * x + 0.1 * t.to(x).view(-1, *[1] * (x.ndim - 1)) / 1000)


def plain(table: Table, noise: Keyed, sample: int, output: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The chain of equation (1), written out, with an output that knows its node."""
    states, outputs = [noise.start(sample).double() * table.start_scale], []
    for i in range(table.steps):
        raw = output(states[i] * table.scale[i], i)
        outputs.append(table.convert(slice(i, i + 1), states[i][None], raw[None])[0])
        new = table.c[i] * noise.draw(sample, range(i, i + 1))[0].double()
        for j in range(min(table.band, i + 1)):
            new = new + table.a[i, j] * states[i - j] + table.b[i, j] * outputs[i - j]
        states.append(new)
    return states[-1]


def at(table: Table, x: Tensor, i: int) -> Tensor:
    return net(x[None], table.t[i : i + 1])[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun", "dpmpp_2m", "ddpm thresholded"])
def test_a_guidance_that_changes_from_step_to_step_is_that_of_the_textbook_loop(name: str, method: str) -> None:
    table, noise = TABLES[name], Keyed(SHAPE, seed=3, samples=2)
    strength = torch.linspace(0.5, 1.5, table.steps + 1, dtype=torch.float64)

    def guided(x: Tensor, t: Tensor, rows: Rows) -> Tensor:
        return rows.of(strength) * net(x, t) + 0.1 * (rows.steps % 2).view(-1, 1, 1) * (rows.samples + 1).view(-1, 1, 1)

    found = sample(paradiff.by_row(guided, table, smooth=False), table, noise, METHODS[method](), dtype=torch.float64)
    stage = [sum(n <= i for n in table.restarts) - 1 for i in range(table.steps)]
    for k in range(2):

        def output(x: Tensor, i: int, k: int = k) -> Tensor:
            return strength[i] * at(table, x, i) + 0.1 * (stage[i] % 2) * (k + 1)

        expected = plain(table, noise, k, output)
        limit = 4e-3 if method == "auto" else 1e-7
        assert float((found.sample[k] - expected).abs().max()) < limit


@pytest.mark.parametrize("method", ["parasolver", "quasi_newton", "srds", "collocation"])
def test_dropout_with_masks_of_the_step_gives_the_sequential_sample(method: str) -> None:
    table, noise = TABLES["ddpm"], Keyed(SHAPE, seed=[5, 8])
    model = paradiff.by_row(lambda x, t, rows: rows.dropout(net(x, t), 0.3) + 0.01 * rows.randn((1, 3)), table, noise)
    expected = sample(model, table, noise, sequential(), dtype=torch.float64, check="every").sample
    found = sample(model, table, noise, METHODS[method](), dtype=torch.float64, check="every")
    torch.testing.assert_close(found.sample, expected, **EXACT)
    if method == "collocation":
        assert "vary from node to node" in found.message


def test_random_numbers_are_a_rows_own() -> None:
    """Not of the batch that it stands in, of the chain's noise, or of one another; and a slice's are the whole chain's."""
    table = TABLES["ddpm"]
    noise, alone = Keyed(SHAPE, seed=[5, 8]), Keyed(SHAPE, seed=8)
    drawn: list[Tensor] = []

    def keeping(x: Tensor, t: Tensor, rows: Rows) -> Tensor:
        drawn.append(torch.stack([rows.randn(), rows.randn(), rows.noise]))
        return net(x, t)

    def ask(table: Table, noise: Keyed, nodes: list[int], samples: list[int], seed: int | None = None) -> Tensor:
        model = paradiff.by_row(keeping, table, noise, seed=seed)
        batch = Batch(torch.zeros(len(nodes), *SHAPE), table.t[nodes], torch.tensor(nodes), torch.tensor(samples))
        Evaluator(model)(batch)
        return drawn.pop()

    one, two, noises = ask(table, noise, [3, 4, 4], [0, 0, 1])
    other, second, own = ask(table, alone, [4], [0])
    assert torch.equal(torch.stack([one[2], two[2], noises[2]]), torch.stack([other[0], second[0], own[0]]))
    assert torch.equal(noises[2], noise.draw(1, range(4, 5))[0])
    every = [*one, *two, *noises]
    assert all(not torch.equal(a, b) for k, a in enumerate(every) for b in every[:k])
    part = ask(table[2:], alone, [2], [0])
    assert torch.equal(part[:, 0], torch.stack([other[0], second[0], own[0]]))
    assert not torch.equal(ask(table, alone, [4], [0], seed=1)[0], other)


def test_the_stages_of_a_step_count_once() -> None:
    table = edm(5)
    rows = Rows(torch.arange(table.steps), torch.zeros(table.steps).long(), torch.zeros(1), paradiff.by_row(net, table))
    assert rows.steps.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_rows_keep_their_places_in_padded_and_bounded_calls() -> None:
    table, noise = TABLES["ddpm"], Keyed(SHAPE, seed=0, samples=3)
    model = paradiff.by_row(lambda x, t, rows: net(x, t) + 0.1 * rows.randn(), table, noise)
    one = sample(model, table, noise, parasolver(window=5, tolerance=0.0), dtype=torch.float64).sample
    for evaluator in (Evaluator(model, max_rows=2), Evaluator(model, pad=True), Evaluator(model, shares=3)):
        found = sample(evaluator, table, noise, parasolver(window=5, tolerance=0.0), dtype=torch.float64)
        torch.testing.assert_close(found.sample, one, **EXACT)


def test_a_model_of_another_chain_or_noise_is_refused() -> None:
    table, noise = TABLES["ddpm"], Keyed(SHAPE)
    model = paradiff.by_row(lambda x, t, rows: net(x, t), table, noise)
    with pytest.raises(ValueError, match="knows the rows of table 'ddpm' of 12 steps, and the run's is 'ddim' of 12"):
        sample(model, TABLES["ddim"], noise, parasolver())
    with pytest.raises(ValueError, match=r"knows the rows of Keyed noise.*seed 0, and the run's is Keyed noise.*seed 1"):
        sample(model, table, Keyed(SHAPE, seed=1), parasolver())
    sample(model, table, Keyed(SHAPE), parasolver())
    with pytest.raises(ValueError, match="has nodes of its own, of which the model knows nothing"):
        sample(model, table, noise, collocation(target="ode"))


def test_what_cannot_be_known_is_refused() -> None:
    table, noise = TABLES["ddpm"], Keyed(SHAPE)
    for ask, what in (
        (lambda rows: rows.noise, "asked for the noise of its rows, which nobody gave; make it with paradiff.by_row"),
        (lambda rows: rows.randn(), "asked for random numbers, which nobody gave"),
        (lambda rows: rows.of(torch.zeros(3)), r"values of nodes were asked for of .*; give a tensor \[12\]"),
    ):
        model = paradiff.by_row(lambda x, t, rows, ask=ask: x + ask(rows), table)
        with pytest.raises(ValueError, match=what):
            sample(model, table, noise, parasolver())
    for ask, what in (
        (lambda rows: rows.randn((0,)), r"random numbers of shape \(0,\) were asked for"),
        (lambda rows: rows.dropout(torch.zeros(1), 1.5), "share of dropout is 1.5; it must be in 0 <= p < 1"),
    ):
        with pytest.raises(ValueError, match=what):
            sample(paradiff.by_row(lambda x, t, rows, ask=ask: x + ask(rows), table, noise), table, noise, parasolver())
    with pytest.raises(ValueError, match="called with states and times alone"):
        paradiff.by_row(net, table)(torch.zeros(1, *SHAPE), table.t[:1])
    with pytest.raises(ValueError, match="the table is 12; give the one of the run"):
        paradiff.by_row(net, 12)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="smooth is 1; it must be True or False"):
        paradiff.by_row(net, table, smooth=1)  # type: ignore[arg-type]


def test_a_memory_is_found_behind_a_row_function_too() -> None:
    table, noise, calls = TABLES["ddpm"], Keyed(SHAPE), []

    def remembers(x: Tensor, t: Tensor, rows: Rows) -> Tensor:
        calls.append(0)
        return net(x, t) + 0.01 * len(calls)

    with pytest.raises(ValueError, match="in two ways"):
        sample(paradiff.by_row(remembers, table), table, noise, parasolver())


def test_rows_are_known_on_closed_form_data() -> None:
    """That nothing of the model's own is lost: the sample is that of the function alone."""
    table, data = TABLES["ddim"], Mixture(torch.ones(2) / 2, torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), torch.full((2,), 0.01))
    noise, denoiser = Keyed((2,), samples=4), data.denoiser(TABLES["ddim"])
    one = sample(denoiser, table, noise, parasolver())
    two = sample(paradiff.by_row(lambda x, t, rows: denoiser(x, t), table), table, noise, parasolver())
    assert torch.equal(one.sample, two.sample)
    assert one.rounds == two.rounds


def test_a_model_with_noise_of_its_own_is_planned_compared_and_begun_from_a_trajectory() -> None:
    table, noise = ddpm(Schedule.linear(), 40), Keyed(SHAPE, samples=2)
    model = paradiff.by_row(lambda x, t, rows: net(x, t) + 0.01 * rows.randn(), table, noise)
    assert paradiff.plan(model, table, noise, pilots=1).best.method is not None
    compared = paradiff.compare(model, table, noise, [parasolver()])
    assert [row.samples[0].error < 4e-3 for row in compared.rows] == [True, True]
    first = sample(model, table, noise, collocation(), keep_trajectory=True)
    again = sample(model, table, noise, collocation(), start=first)
    assert float((first.sample - again.sample).abs().max()) < 4e-3
    with pytest.raises(ValueError, match="knows the rows of table"):
        sample(model, table[10:], noise, parasolver())

# SPDX-License-Identifier: Apache-2.0
"""Elements that fill a sample up, or are given: the loop that clamps them, and errors of what is sought alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from paradiff import Keyed, Schedule, Table, auto, collocation, parasolver, quasi_newton, sample, sequential, srds
from paradiff.chain import Clip
from paradiff.models import Masked
from paradiff.samplers import ddim, ddpm

SCHEDULE, SIZE = Schedule.linear(), 10
METHODS = [
    sequential(),
    parasolver(tolerance=0.0),
    quasi_newton(window=7, tolerance=0.0),
    collocation(tolerance=1e-9),
    auto(tolerance=1e-9),
]
IDS = ["sequential", "parasolver", "quasi_newton", "collocation", "auto"]


def net(x: Tensor, t: Tensor) -> Tensor:
    """Elements look at their neighbours, so that what is shown elsewhere matters."""
    return torch.tanh(x + 0.3 * x.roll(1, 1) - 0.2 * x.roll(-1, 1)) + 0.1 * (t.to(x)[:, None] / 1000)


def plan(noised: bool = False) -> tuple[Table, Keyed, Masked, Tensor, Tensor]:
    table, noise = ddpm(SCHEDULE, 30), Keyed((SIZE,), seed=[3, 4])
    mask = torch.ones(SIZE, dtype=torch.bool)
    mask[0] = mask[-1] = False
    values = torch.zeros(2, SIZE)
    values[:, 0], values[:, -1] = torch.tensor([-0.5, 0.2]), torch.tensor([0.8, 0.4])
    return table, noise, Masked(table, noise, mask, values, noised=noised), mask, values


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_a_plan_with_clamped_ends_is_that_of_the_loop_that_clamps_them(method: object) -> None:
    table, noise, masked, mask, values = plan()
    found = sample(masked.model(net), table, masked.kept(), method, dtype=torch.float64)  # type: ignore[arg-type]
    for k in range(2):
        x = torch.where(mask, noise.start(k), values[k]).double()
        for i in range(table.steps):
            x = table.a[i, 0] * x + table.b[i, 0] * net(x[None], table.t[i : i + 1])[0]
            x = torch.where(mask, x + table.c[i] * noise.draw(k, range(i, i + 1))[0].double(), values[k].double())
        assert float((masked.placed(found.sample)[k] - x).abs().max()) < 1e-6


@pytest.mark.parametrize("method", METHODS[:3], ids=IDS[:3])
def test_given_values_at_the_level_of_noise_are_those_of_repaint(method: object) -> None:
    table, _, masked, mask, values = plan(noised=True)
    shown: dict[tuple[int, float], Tensor] = {}

    def seen(x: Tensor, t: Tensor) -> Tensor:
        for row, time in zip(x, t.tolist(), strict=True):
            given = torch.where(mask, 0.0, row)
            assert torch.equal(shown.setdefault((int((row[0] * 1e9).round()), time), given), given)
        return net(x, t)

    model = masked.model(seen)
    found = sample(model, table, masked.kept(), method, dtype=torch.float64, check="off")  # type: ignore[arg-type]
    one = sample(masked.model(net), table, masked.kept(), sequential(), dtype=torch.float64)
    torch.testing.assert_close(found.sample, one.sample, rtol=0, atol=1e-9)
    assert len(shown) == 2 * table.steps  # one draw for each step and sample, however often it was evaluated
    known = torch.stack(list(shown.values()))[:, [0, -1]]
    assert 0.5 < float(known.std()) < 1.5
    assert torch.equal(masked.placed(found.sample)[:, [0, -1]], values[:, [0, -1]].double())


def test_padding_changes_neither_rounds_nor_estimates() -> None:
    """A sample of four elements is solved alike by itself and among twelve places of nothing."""
    table = ddim(SCHEDULE, 40)
    small = Keyed((4,), seed=5)

    class Wide:
        shape, samples = (16,), 1

        def start(self, sample: int) -> Tensor:
            return torch.cat([small.start(sample), torch.ones(12)])

        def draw(self, sample: int, nodes: range) -> Tensor:
            return torch.cat([small.draw(sample, nodes), torch.ones(len(nodes), 12)], 1)

    def wide(x: Tensor, t: Tensor) -> Tensor:
        assert not x[:, 4:].any()
        return torch.cat([net(x[:, :4], t), torch.full((len(x), 12), math.nan)], 1)

    mask = torch.arange(16) < 4
    for method in (parasolver(window=8), quasi_newton(window=8), srds(), collocation()):
        one = sample(net, table, small, method, check="off")
        masked = Masked(table, Wide(), mask)
        two = sample(masked.model(wide), table, masked.kept(), method, check="off")
        assert (one.rounds, one.evaluations) == (two.rounds, two.evaluations)
        told = one.error_estimates[0].estimated_error, two.error_estimates[0].estimated_error
        assert told[1] == pytest.approx(told[0], rel=0.2 if method.name == "srds" else 1e-2)  # its caution counts all places
        torch.testing.assert_close(masked.placed(two.sample)[:, :4], one.sample, rtol=0, atol=1e-4)
        if method.name == "parasolver":  # without the size at which it is solved, its changes would seem half as large
            masked.stretch = torch.ones(1)
            unlike = sample(masked.model(wide), table, masked.kept(), method, check="off")
            assert unlike.error_estimates[0].estimated_error < 0.7 * told[0]


def test_samples_of_several_sizes_in_one_batch_are_their_own() -> None:
    table = ddim(SCHEDULE, 30)
    noise = Keyed((8,), seed=[1, 2, 3])
    mask = torch.arange(8) < torch.tensor([[3], [8], [5]])
    masked = Masked(table, noise, mask)

    def local(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) + 0.1 * torch.sin(3 * x)

    found = sample(masked.model(local), table, masked.kept(), quasi_newton(window=8))
    placed = masked.placed(found.sample)
    plain = sample(local, table, noise, sequential()).sample
    error = (placed - plain)[mask].abs().max()
    assert float(error) < 4e-3
    assert not placed[~mask].any()
    for estimate, k in zip(found.error_estimates, range(3), strict=True):
        rms = float((placed - plain)[k][mask[k]].square().mean().sqrt())
        assert rms <= estimate.estimated_error


@pytest.mark.parametrize(
    "table", [ddpm(SCHEDULE, 30, clip=Clip(0.4)), ddim(SCHEDULE, 30, clip=Clip(0.4))], ids=["ddpm", "ddim"]
)
def test_a_limit_on_the_clean_data_is_that_of_the_loop(table: Table) -> None:
    """Also where the sample is solved at another size, and the limit has a weight of its own."""
    noise, mask = Keyed((SIZE,), seed=[3, 4]), torch.arange(SIZE) < 4
    masked = Masked(table, noise, mask)
    found = sample(masked.model(net), masked.table, masked.kept(), quasi_newton(tolerance=0.0), dtype=torch.float64)
    x = torch.where(mask, torch.stack([noise.start(k) for k in range(2)]), 0.0).double()
    for i in range(table.steps):
        m = table.convert(torch.tensor([i, i]), x, net(x, table.t[i : i + 1].expand(2)))
        z = torch.stack([noise.draw(k, range(i, i + 1))[0] for k in range(2)]).double()
        x = torch.where(mask, table.a[i, 0] * x + table.b[i, 0] * m + table.c[i] * z, 0.0)
    torch.testing.assert_close(masked.placed(found.sample), x, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="the model knows the rows of table"):
        sample(masked.model(net), table, masked.kept(), sequential())


def test_masks_that_fit_nothing_are_refused() -> None:
    table, noise = ddim(SCHEDULE, 10), Keyed((4,), samples=2)
    ones = torch.ones(4, dtype=torch.bool)
    for call, what in (
        (lambda: Masked(table, noise, ~ones), "mask of sample 0 has no element that is sought; give one at least"),
        (lambda: Masked(table, noise, torch.stack([ones, ~ones])), "mask of sample 1 has no element"),
        (lambda: Masked(table, noise, torch.ones(4)), "give a tensor of truth values of shape"),
        (lambda: Masked(table, noise, ones[:3]), "give a tensor of truth values of shape"),
        (lambda: Masked(table, noise, ones, torch.zeros(3)), r"the values are .*; give a tensor of shape \(2, 4\)"),
        (lambda: Masked(table, noise, ones & False | (torch.arange(4) > 0), torch.full((4,), math.nan)), "is not finite"),
        (lambda: Masked(table, noise, ones, noised=True), "noised=True was given without values"),
        (lambda: Masked(table, noise, ones, noised=1), "noised is 1"),  # type: ignore[arg-type]
        (lambda: Masked(None, noise, ones), "the table is None; give a Table"),  # type: ignore[arg-type]
        (lambda: Masked(table, noise, ones).placed(torch.zeros(4)), "give those of the run, of shape"),
    ):
        with pytest.raises(ValueError, match=what):
            call()

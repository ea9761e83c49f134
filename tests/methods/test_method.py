# SPDX-License-Identifier: Apache-2.0
"""Methods: what they refuse, which nodes they choose, which of them are the same, and ParaDiGMS against its pseudo-code."""

from __future__ import annotations

import math

import pytest
import torch
from problems import EXACT, SHAPE, STEPS, TABLES, gap, network, run, sweep, window_of
from textbook import betas_of
from torch import Tensor

from paradiff import Keyed, Schedule, jacobi, paradigms, parasolver, sequential
from paradiff.chain.slope import freeze_clean_data, identity, zero
from paradiff.methods import WindowMethod
from paradiff.samplers import ddpm

# -- ParaDiGMS ---------------------------------------------------------------------------------------------------------


def algorithm_1(steps: int, width: int, tolerance: float, noise: Keyed) -> list[tuple[int, Tensor]]:
    """arXiv 2305.16317, algorithm 1, for DDPM with an epsilon network: after each iteration, the window's first node t and
    the states t ... t+p, before the window slides. The variance beside which the change of node j is held is that of the
    noise that arrives with it, at step j - 1."""
    bar = torch.cumprod(1 - torch.from_numpy(betas_of("linear")), 0)
    times = torch.arange(0, 1000, 1000 // steps).flip(0)[-steps:]

    def level(i: int) -> float:
        return float(bar[times[i]]) if i < steps else 1.0

    def mean(x: Tensor, i: int) -> Tensor:
        alpha = level(i) / level(i + 1)
        return (x - (1 - alpha) / math.sqrt(1 - level(i)) * network(x[None], times[i : i + 1])[0]) / math.sqrt(alpha)

    variance = [(1 - level(i + 1)) / (1 - level(i)) * (1 - level(i) / level(i + 1)) for i in range(steps)]
    z = [math.sqrt(max(variance[i], 0)) * noise.draw(0, range(i, i + 1))[0].double() for i in range(steps)]
    x = [noise.start(0).double()] * (steps + 1)
    t, p, found = 0, width, []
    while t < steps:
        y = [mean(x[t + j], t + j) - x[t + j] for j in range(p)]
        new, total = [], x[t]
        for j in range(p):
            total = total + y[j] + z[t + j]
            new.append(total)
        errors = [float((new[j] - x[t + 1 + j]).square().mean()) for j in range(p)]
        x[t + 1 : t + p + 1] = new
        found.append((t, torch.stack(x[t : t + p + 1])))
        stride = next((j for j in range(1, p) if errors[j - 1] > tolerance**2 * variance[t + j - 1]), p)
        for j in range(1, stride + 1):
            if t + p + j <= steps:
                x[t + p + j] = x[t + p]
        t += stride
        p = min(p, steps - t)
    return found


@pytest.mark.parametrize(("steps", "width"), [(40, 8), (40, 40), (100, 16), (20, 1)])
@pytest.mark.parametrize("tolerance", [0.03, 0.1, 1.0])
def test_paradigms_is_algorithm_1_sweep_for_sweep(steps: int, width: int, tolerance: float) -> None:
    noise, table = Keyed(SHAPE, 4), ddpm(Schedule.linear(), steps)
    wanted = algorithm_1(steps, width, tolerance, noise)
    window = window_of(table, paradigms(width, tolerance), noise)
    for round, (first, states) in enumerate(wanted, 1):
        assert window.lo == first
        norms = sweep(window)
        # The same sums in another order; states are of size 1 to 100.
        assert gap(window.x, states) < 1e-11
        window.advance(norms, round)
    assert window.done


# -- equivalences ------------------------------------------------------------------------------------------------------

each_table = pytest.mark.parametrize("name", TABLES)


@each_table
def test_every_method_with_window_one_is_sequential(name: str) -> None:
    wanted = run(TABLES[name], sequential())
    for method in (jacobi(1), paradigms(1), parasolver(1), parasolver(1, slope=zero, warmup=0)):
        found = run(TABLES[name], method)
        assert torch.equal(found.sample, wanted.sample)
        assert (found.rounds, found.evaluations) == (wanted.rounds, wanted.evaluations)


@each_table
@pytest.mark.parametrize("window", [5, None])
def test_parasolver_with_copied_nodes_and_no_warm_up_is_paradigms(name: str, window: int | None) -> None:
    one, other = paradigms(window), parasolver(window, rule="change", warmup=0)
    copied = WindowMethod(
        other.name, other.slope, other.window, other.stride, other.warmup, "copy", other.tolerance, other.rule
    )
    found, wanted = run(TABLES[name], copied), run(TABLES[name], one)
    assert torch.equal(found.sample, wanted.sample)
    assert found.history == wanted.history


@each_table
def test_jacobi_is_the_window_loop_with_slope_zero(name: str) -> None:
    found = run(TABLES[name], parasolver(5, slope=zero, warmup=0))
    assert found.history == run(TABLES[name], jacobi(5)).history


@each_table
def test_strides_of_one_are_no_strides(name: str) -> None:
    table = TABLES[name]
    wanted = run(table, parasolver(5, warmup=1))
    for stride in (1, [1] * (table.steps - 1)):
        assert run(table, parasolver(5, stride=stride, warmup=1)).history == wanted.history


@each_table
def test_one_stride_over_the_whole_chain_is_sequential(name: str) -> None:
    table = TABLES[name]
    found = run(table, parasolver(stride=table.steps, warmup=0))
    assert gap(found.sample, run(table, sequential()).sample) < EXACT
    assert (found.rounds, found.evaluations) == (table.steps, table.steps)


def test_a_warm_up_over_the_whole_chain_is_sequential() -> None:
    table = TABLES["ddpm"]
    found = run(table, parasolver(5, warmup=STEPS))
    assert torch.equal(found.sample, run(table, sequential()).sample)
    assert [s.passed for s in found.history] == [1] * STEPS


# -- presets and nodes -------------------------------------------------------------------------------------------------


def test_presets_hold_what_their_papers_say() -> None:
    assert (sequential().window, sequential().tolerance) == (1, 0.0)
    assert (jacobi().slope, jacobi().predictor) == (zero, "clean")
    published = paradigms(10)
    assert (published.slope, published.predictor, published.rule, published.tolerance) == (identity, "copy", "change", 0.1)
    found = parasolver(10)
    assert (found.slope, found.predictor, found.rule, found.tolerance, found.warmup) == (identity, "clean", "error", 4e-3, 0)
    assert parasolver(rule="change").tolerance == 0.1
    assert parasolver(tolerance=0.3, rule="change").tolerance == 0.3
    assert parasolver(slope=freeze_clean_data).slope is freeze_clean_data


@pytest.mark.parametrize(
    ("options", "edges"),
    [
        ({"stride": 1, "warmup": 0}, list(range(13))),
        ({"stride": 5, "warmup": 0}, [0, 5, 10, 12]),
        ({"stride": 5, "warmup": 2}, [0, 1, 2, 7, 12]),
        ({"stride": 12, "warmup": 0}, [0, 12]),
        ({"stride": 4, "warmup": 12}, list(range(13))),
        ({"stride": [1, 4, 7], "warmup": 0}, [0, 1, 5, 12]),
        ({"stride": [1, 4, 4], "warmup": 3}, [0, 1, 2, 3, 4, 8, 12]),
    ],
)
def test_sub_intervals_cover_the_chain(options: dict, edges: list[int]) -> None:
    assert parasolver(**options).edges(TABLES["ddpm"]) == edges


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "the window is 0; it must be a whole number, at least 1, or None for the whole chain"),
        ({"window": -3}, "the window is -3; it must be a whole number, at least 1"),
        ({"stride": 0}, "the stride is 0; a sub-interval must have at least 1 step"),
        ({"stride": [3, 0]}, r"the stride is \[3, 0\]; a sub-interval must have at least 1 step"),
        ({"stride": []}, r"the stride is \[\]; a sub-interval must have at least 1 step"),
        ({"warmup": -1}, "warmup is -1; it must be a whole number, at least 0"),
        ({"tolerance": -1e-3}, "the tolerance is -0.001; it must be a number, 0 or more, and finite"),
        ({"tolerance": math.nan}, "the tolerance is nan; it must be a number, 0 or more, and finite"),
        ({"tolerance": math.inf}, "the tolerance is inf; it must be a number, 0 or more, and finite"),
        ({"predictor": "frozen"}, "predictor is 'frozen'; it must be one of copy, held, linear, clean"),
        ({"rule": "remainder"}, "rule is 'remainder'; it must be one of error, change"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowMethod("mine", **options)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (parasolver(13), "the window is 13; the chain has 12 sub-intervals: give at most that, or None for all"),
        (parasolver(5, stride=4, warmup=0), "the window is 5; the chain has 3 sub-intervals"),
        (parasolver(warmup=13), "warmup is 13 steps; the chain has 12: give at most 12"),
        (parasolver(stride=13), "the stride is 13 steps; the chain has 12: give at most 12"),
        (
            parasolver(stride=[4, 4], warmup=0),
            "the strides add up to 8 steps; after 0 warm-up steps the chain has 12 left, and they must cover it exactly",
        ),
        (parasolver(stride=[6, 6], warmup=1), "the strides add up to 12 steps; after 1 warm-up steps the chain has 11 left"),
    ],
)
def test_methods_that_do_not_fit_the_table_are_refused(method: WindowMethod, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(TABLES["ddpm"], method)

# SPDX-License-Identifier: Apache-2.0
"""Errors of nodes that passed are carried along the chain as the network answers there, and told of the sample."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from problems import TABLES
from torch import Tensor

from paradiff import Keyed, Schedule, Table, parasolver, quasi_newton, sample, sequential
from paradiff.methods import WindowMethod
from paradiff.methods.window.control import WindowControl
from paradiff.methods.window.setup import WindowSetup
from paradiff.methods.window.update import Carried, PairUpdate, SecantUpdate
from paradiff.models.exact import Mixture
from paradiff.planning.harness import family, mixture
from paradiff.samplers import ddim
from paradiff.solver.protocol import Method
from paradiff.solver.solution import Status

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
LINEAR = [name for name in TABLES if TABLES[name].clip is None]


def numbers(count: int, seed: int) -> Tensor:
    """`[count, 1]` random states of one element."""
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walked(table: Table, answers: Tensor, states: Tensor, lo: int, hi: int) -> Tensor:
    """`[hi - lo, 1]` changes of the nodes after `lo` by changes of those up to it, for outputs that are multiples of states."""
    found = [*states]
    for n in range(lo, hi):
        parts = ((table.a[n, j] + table.b[n, j] * answers[n - j]) * found[n - j] for j in range(min(table.band, n + 1)))
        found.append(sum(parts, torch.zeros(1, dtype=torch.float64)))
    return torch.stack(found[lo + 1 :])


@pytest.mark.parametrize("stretch", [4, 96])
@pytest.mark.parametrize("kind", [SecantUpdate, PairUpdate])
@pytest.mark.parametrize("name", LINEAR)
def test_the_tangent_is_the_derivative_where_pairs_span_the_states(
    name: str, kind: type[SecantUpdate], stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paradiff.methods.secant.DAMPING", 0.0)
    monkeypatch.setattr("paradiff.methods.window.update.PAIRED", stretch)
    table, lo = TABLES[name], 2
    hi, band = table.steps - 1, table.band
    method = quasi_newton() if kind is SecantUpdate else parasolver()
    setup = WindowSetup(table, method, torch.device("cpu"), torch.float64)
    update, answers = kind(setup), numbers(table.steps, 0)
    for seed in (1, 2):
        states = numbers(table.steps - lo, seed)
        update.observe(states, answers[lo:] * states)
    before = numbers(lo + 1, 3)
    nodes = slice(max(0, lo + 1 - band), None)
    earlier = torch.cat([before, before[:1]])[:-1][nodes]  # a filler where the last node stands, which is not read there
    shown = torch.cat([torch.zeros(1, 1, dtype=torch.float64), before[:-1]])[nodes]
    known = torch.cat([torch.zeros(1, 1, dtype=torch.float64), answers[:lo] * before[:-1]])[nodes]
    twice = Carried(*(torch.stack([v, -3 * v], 1) for v in (earlier, shown, known)))
    one, other = update.tangent(lo, hi, twice).change.unbind(1)
    torch.testing.assert_close(other, -3 * one)
    torch.testing.assert_close(one, walked(table, answers, before, lo, hi), rtol=1e-9, atol=1e-12)


def errors_of(method: Method, chain: str, steps: int, seeds: list[int]) -> tuple[list[float], list[float], Status]:
    """Errors and estimates of the digits network, and how the run ended."""
    own = family("digits")
    table = own.table(chain, steps)
    evaluator, noise = own.evaluator(table, seeds), own.noise(seeds)
    wanted = sample(evaluator, table, noise, sequential(), check="off").sample
    found = sample(evaluator, table, noise, method, check="off")
    errors = (found.sample - wanted).square().flatten(1).mean(1).sqrt().tolist()
    return errors, [e.estimated_error for e in found.error_estimates], found.status


@pytest.mark.parametrize(
    ("method", "chain"),
    [
        (quasi_newton(4), "ddim"),
        (parasolver(4), "dpmpp_2m"),
        (quasi_newton(), "dpmpp_2m"),
    ],
    ids=str,
)
def test_samples_that_decide_after_nodes_passed_err_by_no_more_than_twice_what_is_told(method: Method, chain: str) -> None:
    """By the budget alone the first of these two samples errs by 3 to 16 times its estimate."""
    errors, told, _ = errors_of(method, chain, 25, [7007, 7013])
    assert all(error <= 2 * estimate for error, estimate in zip(errors, told, strict=True))


def test_a_sample_that_left_its_tolerance_says_so_and_keeps_to_a_smaller_one() -> None:
    errors, told, status = errors_of(parasolver(4), "dpmpp_2m", 25, [7007])
    assert errors[0] > 4e-3
    assert told[0] > errors[0] / 2
    assert status is Status.STOPPED
    errors, *_ = errors_of(parasolver(4, 4e-3 / 16), "dpmpp_2m", 25, [7007])
    assert errors[0] < 4e-3


def small(factor: float) -> Mixture:
    """Eight Gaussians in 64 dimensions, times a factor."""
    usual = mixture(64)
    return Mixture(usual.weights, factor * usual.means, factor**2 * usual.variances)


def test_small_data_that_decide_in_the_last_steps_are_told() -> None:
    """By the levels alone one of these samples is another one, and a twentieth of its error is told."""
    table, noise = ddim(Schedule.linear(), 200), Keyed((64,), 1000, 16)
    model = small(0.1).denoiser(table)
    wanted = sample(model, table, noise, sequential(), check="off").sample
    found = sample(model, table, noise, quasi_newton(), check="off")
    errors = (found.sample - wanted).square().mean(1).sqrt().tolist()
    for error, estimate in zip(errors, found.error_estimates, strict=True):
        assert error <= max(2 * estimate.estimated_error, 4e-3 * float(wanted.std()))


@pytest.mark.parametrize("method", [parasolver(), parasolver(5), quasi_newton(5)], ids=str)
@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun", "dpmpp_2m"])
def test_carrying_moves_no_number_but_the_estimate(name: str, method: WindowMethod) -> None:
    own, seeds = family("mixture-2"), range(3)
    table = TABLES[name]
    without = dataclasses.replace(method, control=WindowControl(carried_caution=0.0, carried_decides=0.0))
    many, none = (sample(own.denoiser(table), table, own.noise(seeds), m, check="off") for m in (method, without))
    assert torch.equal(many.sample, none.sample)
    assert (many.rounds, many.evaluations) == (none.rounds, none.evaluations)
    assert all(a.estimated_error >= b.estimated_error for a, b in zip(many.error_estimates, none.error_estimates, strict=True))

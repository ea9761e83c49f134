# SPDX-License-Identifier: Apache-2.0
"""Collocation reaches the sequential chain's sample, says how far from it they are, and refuses what it cannot do."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paradiff import Evaluator, Keyed, Recorded, Schedule, Solution, Table, collocation, sample, solve
from paradiff.chain import Clip
from paradiff.methods.collocation.control import HIGHER_ORDER, NARROW, ORDER_ZERO, SHORT, SHORT_WIDE, CollocationControl
from paradiff.methods.collocation.defect import DoubledIntervals
from paradiff.methods.collocation.error import told
from paradiff.methods.collocation.method import CollocationMethod
from paradiff.methods.collocation.setup import CollocationSetup
from paradiff.models.exact import Gaussian, Mixture
from paradiff.models.pixel import load
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler, euler_ancestral, flow_euler, heun
from paradiff.solver import Batch, CollocationRecord, WindowRecord, drive
from paradiff.solver.protocol import EditedOutputs
from paradiff.solver.solution import Status

LINEAR = Schedule.linear()
Clean = Callable[[Tensor, float, float], Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PLANE = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([[-0.6, 0.2], [0.5, -0.3]]), torch.tensor([0.1, 0.2]))
WIDE = Mixture(torch.full((8,), 1 / 8), 0.6 * random(8, 64, seed=1), torch.full((8,), 0.05))
DATA = {2: PLANE, 64: WIDE}


def textbook(name: str, table: Table, clean: Clean, noise: Keyed) -> Tensor:
    """The published loops on clean-data estimates, in float64, from the levels alone; all samples."""
    x = torch.stack([noise.start(k) for k in range(noise.samples)]).double() * table.start_scale
    alpha, sigma = table.alpha.tolist(), table.sigma.tolist()
    old = None
    for i in range(len(alpha) - 1):
        (a, s), (a1, s1) = (alpha[i], sigma[i]), (alpha[i + 1], sigma[i + 1])
        d = clean(x, a, s)
        z = torch.stack([noise.draw(k, range(i, i + 1))[0] for k in range(noise.samples)]).double()
        if name in ("ddim", "ddim eta"):
            eta = 0.5 if name == "ddim eta" else 0.0
            c = eta * s1 / s * math.sqrt(1 - (a / a1) ** 2)
            x = a1 * d + math.sqrt(s1**2 - c**2) * (x - a * d) / s + c * z
        elif name == "ddpm":
            beta = 1 - (a / a1) ** 2
            x = a1 * beta / s**2 * d + a / a1 * (s1 / s) ** 2 * x + math.sqrt(beta) * s1 / s * z
        elif name == "euler":
            x = x + (s1 - s) * (x - d) / s
        elif name == "euler_ancestral":
            down = s1**2 / s
            x = x + (down - s) * (x - d) / s + math.sqrt(s1**2 - down**2) * z
        elif name == "flow_euler":
            x = x + (s1 - s) * (x - d) / s
        elif name == "dpmpp_2m":
            guess = d
            if old is not None and s1 > 0:
                h, h0 = (math.log(alpha[j + 1] * sigma[j] / (sigma[j + 1] * alpha[j])) for j in (i, i - 1))
                guess = d + h / (2 * h0) * (d - old)
            x = s1 / s * x + (a1 - a * s1 / s) * guess
            old = d
    return x


def textbook_heun(table: Table, clean: Clean, noise: Keyed) -> Tensor:
    x = torch.stack([noise.start(k) for k in range(noise.samples)]).double() * table.start_scale
    levels = table.sigma.tolist()[::2] if table.steps % 2 == 0 else [*table.sigma.tolist()[:-1:2], 0.0]
    for s, s1 in itertools.pairwise(levels):
        slope = (x - clean(x, 1.0, s)) / s
        guess = x + (s1 - s) * slope
        if s1 > 0:
            slope = (slope + (guess - clean(guess, 1.0, s1)) / s1) / 2
        x = x + (s1 - s) * slope
    return x


def wanted_of(name: str, table: Table, data: Gaussian | Mixture, noise: Keyed) -> Tensor:
    if name == "heun":
        return textbook_heun(table, data.clean, noise)
    return textbook(name, table, data.clean, noise)


TABLES: dict[str, Callable[[int], Table]] = {
    "ddim": lambda n: ddim(LINEAR, n),
    "ddim eta": lambda n: ddim(LINEAR, n, eta=0.5),
    "ddpm": lambda n: ddpm(LINEAR, n),
    "euler": lambda n: euler(LINEAR, n),
    "euler_ancestral": lambda n: euler_ancestral(LINEAR, n),
    "heun": lambda n: heun(LINEAR, n // 2),
    "dpmpp_2m": lambda n: dpmpp_2m(LINEAR, n),
    "flow_euler": flow_euler,
}
each_table = pytest.mark.parametrize("name", [name for name in TABLES if name != "heun"])  # which has no mesh


def run(table: Table, data: Gaussian | Mixture, method: CollocationMethod, noise: Keyed, **options: Any) -> Solution:
    return sample(data.denoiser(table), table, noise, method, **{"dtype": torch.float64, **options})


def rms(found: Tensor, wanted: Tensor) -> Tensor:
    return (found.double() - wanted).flatten(1).square().mean(1).sqrt()


def unrefined(table: Table, order: int | None = None) -> CollocationControl:
    """The interpolation error is taken for 0, so that the mesh stays as it is."""
    control = collocation(order=order).control_on(table)
    return replace(control, error=replace(control.error, safety=0.0))


# -- the chain's sample -----------------------------------------------------------------------------------------------


@each_table
@pytest.mark.parametrize("variance", [0.04, 1.0])
def test_on_gaussian_data_of_the_shifts_variance_few_nodes_give_the_chains_sample(name: str, variance: float) -> None:
    table, noise = TABLES[name](200), Keyed((6,), 1, 2)
    data = Gaussian(0.5 * random(6), torch.full((6,), variance))
    control = collocation().control_on(table)
    found = run(table, data, collocation(8, shift=variance, control=replace(control, resolved_share=0.0)), noise)
    assert (found.sample - wanted_of(name, table, data, noise)).abs().max() < 1e-5
    assert found.evaluations <= 2 * 25
    assert max(c.interpolation_error for c in found.error_estimates) < 1e-5
    assert found.estimated_error < 4e-4  # a bound by the staleness of the nodes


@each_table
def test_with_every_fine_node_the_fixed_point_is_the_sequential_sample(name: str) -> None:
    table, noise = TABLES[name](20), Keyed((2,), 3, 3)
    found = run(table, PLANE, collocation(list(range(table.steps)), tolerance=1e-6, control=unrefined(table)), noise)
    assert rms(found.sample, wanted_of(name, table, PLANE, noise)).max() < 1e-4


@pytest.mark.parametrize("shift", [0.05, "auto", 3.0])
@pytest.mark.parametrize("secants", [0, 2])
def test_neither_shift_nor_pairs_change_the_fixed_point(shift: Any, secants: int) -> None:
    table, noise = TABLES["ddpm"](20), Keyed((2,), 3, 2)
    found = run(table, PLANE, collocation(list(range(20)), tolerance=1e-6, shift=shift, secants=secants), noise)
    assert rms(found.sample, wanted_of("ddpm", table, PLANE, noise)).max() < 1e-4


def test_a_limit_on_the_clean_data_estimate_is_kept() -> None:
    table, noise = ddpm(LINEAR, 20, clip=Clip(0.3)), Keyed((2,), 3, 2)
    found = run(table, PLANE, collocation(list(range(20)), tolerance=1e-6), noise)
    wanted = textbook("ddpm", table, lambda x, a, s: PLANE.clean(x, a, s).clamp(-0.3, 0.3), noise)
    assert rms(found.sample, wanted).max() < 1e-4
    assert rms(found.sample, wanted_of("ddpm", table, PLANE, noise)).max() > 1e-2


def test_it_begins_where_it_is_told_to() -> None:
    table, noise = TABLES["ddim"](200), Keyed((2,), 0, 2)
    other = Keyed((2,), 9, 2)
    start = torch.stack([other.start(k) for k in range(2)])
    found = run(table, PLANE, collocation(), noise, start=start)
    assert torch.allclose(found.sample, run(table, PLANE, collocation(), other).sample)


# -- order of accuracy ------------------------------------------------------------------------------------------------


def slope(counts: list[int], errors: list[float]) -> float:
    """Order of convergence: minus the slope of log error in log count, by least squares."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (counts, errors))
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize(("order", "counts"), [(1, [12, 24, 48]), (3, [10, 20, 40])])
def test_on_a_long_deterministic_chain_the_error_falls_with_the_order_plus_1(order: int, counts: list[int]) -> None:
    table, noise = TABLES["ddim"](1000), Keyed((2,), 0, 6)
    wanted = wanted_of("ddim", table, PLANE, noise)
    errors = []
    for n in counts:
        found = run(table, PLANE, collocation(n, order=order, tolerance=1e-9, control=unrefined(table, order)), noise)
        errors.append(float(rms(found.sample, wanted).mean()))
    assert order + 0.5 < slope(counts, errors) < order + 2.5, errors


def test_on_a_long_stochastic_chain_averaged_states_are_of_higher_strong_order_than_the_path() -> None:
    table, noise = TABLES["ddpm"](1000), Keyed((2,), 0, 12)
    wanted = wanted_of("ddpm", table, PLANE, noise)
    counts, found = [24, 48, 96], {}
    for order in (0, 1):
        control = unrefined(table, order)
        runs = [run(table, PLANE, collocation(n, order=order, tolerance=1e-4, control=control), noise) for n in counts]
        found[order] = [float(rms(r.sample, wanted).mean()) for r in runs]
    assert 1.15 < slope(counts, found[0]) < 2.2, found
    assert 0.6 < slope(counts, found[1]) < 1.4, found
    assert found[0][-1] < 0.8 * found[1][-1]


# -- samples, windows, records ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_batch_is_its_samples_one_by_one(name: str) -> None:
    table, seeds = TABLES[name](200), [4, 5, 6]
    together = run(table, PLANE, collocation(), Keyed((2,), seeds))
    for k, seed in enumerate(seeds):
        alone = run(table, PLANE, collocation(), Keyed((2,), [seed]))
        assert torch.allclose(together.sample[k], alone.sample[0], atol=1e-9)
        assert together.error_estimates[k].evaluations == alone.evaluations


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_the_window_bounds_rows_and_moves_the_sample_within_the_tolerance_only(name: str) -> None:
    table, noise, tolerance = TABLES[name](200), Keyed((2,), 4, 5), 4e-3
    samples = {}
    for window in (8, 32, None):
        found = run(table, PLANE, collocation(window=window, tolerance=tolerance), noise)
        samples[window] = found.sample
        most = max(len(v.nodes) for v in found.history if isinstance(v, CollocationRecord))
        assert most <= (window or table.steps)
        assert window != 8 or most == 8  # the bound is reached
    # Errors are estimates, and other rounds may refine other intervals: a sample between two modes may miss both tolerances.
    for window in (32, None):
        assert rms(samples[8], samples[window]).median() < 2 * tolerance


def test_more_is_told_of_samples_whose_meshes_were_refined_in_a_narrow_window() -> None:
    table, error = TABLES["ddim"](100), NARROW.error
    assert error.refined_told > 1
    data = Mixture(torch.full((8,), 1 / 8), 0.6 * random(8, 2, seed=1), torch.full((8,), 0.01))
    method = collocation(window=3, control=replace(NARROW, nodes=12))
    found = sample(data.denoiser(table), table, Keyed((2,), 4, 12), method, dtype=torch.float64)
    assert found.status == Status.CONVERGED
    refined = 0
    for k, error_estimate in enumerate(found.error_estimates):
        own = [v for v in found.history if isinstance(v, CollocationRecord) and v.sample == k]
        if error_estimate.rounds > len(own):
            continue  # handed over
        more = any(math.isfinite(v.interpolation_error) and v.of < own[-1].of for v in own)
        decided = math.hypot(own[-1].interpolation_error, own[-1].iteration_error)
        refined += more
        assert error_estimate.estimated_error == pytest.approx(
            told(decided, 4e-3, error.told * (error.refined_told if more else 1))
        )
    assert 0 < refined < 12


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_visits_add_up_to_what_was_evaluated(name: str) -> None:
    table, seen = TABLES[name](200), []
    denoiser = PLANE.denoiser(table)

    def counted(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        return denoiser(x, t)

    method = collocation(window=16)
    found = sample(counted, table, Keyed((2,), 4, 3), method, dtype=torch.float64, check="off")
    visits = [v for v in found.history if isinstance(v, CollocationRecord)]
    assert len(visits) == len(found.history)
    assert sum(len(v.nodes) for v in visits) == found.evaluations == sum(seen)
    assert found.rounds == len(seen) == max(v.round for v in visits)
    control = method.control_on(table)
    for k, error_estimate in enumerate(found.error_estimates):
        own = [v for v in visits if v.sample == k]
        assert sum(len(v.nodes) for v in own) == error_estimate.evaluations
        assert len(own) == error_estimate.rounds
        assert [v.passed for v in own] == [0] * (len(own) - 1) + [1]
        decided = math.hypot(own[-1].interpolation_error, own[-1].iteration_error)
        assert error_estimate.estimated_error == pytest.approx(told(decided, 4e-3, control.error.told))
        share = own[-1].interpolation_error / decided
        assert error_estimate.interpolation_error == pytest.approx(share * error_estimate.estimated_error)
    assert all(0 <= n < table.steps for v in visits for n in v.nodes)


def test_members_of_one_sample_are_found_together() -> None:
    table = TABLES["ddim"](200)
    denoiser = PLANE.denoiser(table)
    solver = solve(table, Keyed((3, 2), 5), collocation(), dtype=torch.float64, shared_window=True)

    def outputs(batch: Batch) -> Tensor:
        return denoiser(batch.x.flatten(0, 1), batch.t.repeat_interleave(3)).view_as(batch.x)

    found = drive(solver, outputs, check="off")
    start = Keyed((3, 2), 5).start(0).double()
    wanted = run(table, PLANE, collocation(tolerance=1e-4), Keyed((2,), 0, 3), start=start)
    assert rms(found.sample[0], wanted.sample).max() < 4e-3


# -- the error estimate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("dimensions", DATA)
def test_a_tighter_tolerance_costs_more_and_errs_less_and_the_estimate_is_of_the_errors_size(
    name: str, dimensions: int
) -> None:
    table, noise, data = TABLES[name](200), Keyed((dimensions,), 0, 6), DATA[dimensions]
    wanted = wanted_of(name, table, data, noise)
    costs, errors, fair = [], [], []
    for tolerance in (5e-2, 4e-3, 1e-3):
        found = run(table, data, collocation(tolerance=tolerance), noise)
        error = rms(found.sample, wanted)
        costs.append(found.evaluations)
        errors.append(float(error.mean()))
        fair += [c.estimated_error > e / 2 for c, e in zip(found.error_estimates, error.tolist(), strict=True)]
        assert found.message.startswith(f"converged: the estimated error of every sample is at most {tolerance:g}")
        for c in found.error_estimates:
            assert c.estimated_error <= tolerance
            assert c.estimated_error == pytest.approx(math.hypot(c.interpolation_error, c.iteration_error))
            assert 0 <= c.interpolation_error < tolerance
            assert c.iteration_error < tolerance
    assert costs == sorted(set(costs))
    assert errors[2] < errors[0] / 2
    assert errors == sorted(errors, reverse=True)
    assert sum(fair) >= 0.75 * len(fair), (sum(fair), errors)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_the_most_nodes_are_kept_and_what_was_reached_is_said(name: str) -> None:
    table = TABLES[name](100)
    found = run(table, PLANE, collocation(10, max_nodes=14, tolerance=1e-3), Keyed((2,), 0, 2))
    visits = [v for v in found.history if isinstance(v, CollocationRecord)]
    assert max(v.of for v in visits) <= 14
    assert found.estimated_error > 1e-3
    assert found.message == (
        f"stopped: an estimated error of {found.estimated_error:.2g} was reached, where 0.001 was asked for; give more nodes "
        "(max_nodes), or let the window method go on (exact=True)"
    )


def trained(sampler: str, nodes: Any, seed: int = 1, **options: Any) -> Solution:
    """A sample of a trained network and 1000 steps."""
    model = load("digits")
    noise = Recorded(model.shape, torch.Generator().manual_seed(seed))
    return sample(model, model.table(sampler, 1000), noise, collocation(nodes, **{"window": 24, **options}))


def test_intervals_that_leave_out_too_much_are_refinement_before_the_sweeps_come_to_rest() -> None:
    unaided = replace(HIGHER_ORDER, whole_share=0.0)
    early = trained("ddim", 12, control=unaided)
    refined = next(
        a
        for a, b in itertools.pairwise(early.history)
        if isinstance(b, CollocationRecord) and isinstance(a, CollocationRecord) and b.of > a.of
    )
    assert 0.3 * 4e-3 < refined.iteration_error <= 10 * 4e-3
    late = trained("ddim", 12, control=replace(unaided, early_factor=0.0))
    assert early.rounds < late.rounds
    assert trained("ddim", 12).rounds <= early.rounds
    assert early.estimated_error <= 4e-3
    assert late.estimated_error <= 4e-3


def test_intervals_are_compared_in_rows_that_stale_nodes_leave_idle() -> None:
    found = trained("ddpm", 56, seed=2)
    late = trained("ddpm", 56, seed=2, control=replace(ORDER_ZERO, early_factor=0.0))  # once all have come to rest
    assert found.rounds < late.rounds
    assert found.evaluations <= late.evaluations
    assert found.estimated_error <= 4e-3


def test_a_sample_with_no_node_worth_asking_again_is_at_rest() -> None:
    control = replace(
        HIGHER_ORDER, node_share=30.0, early_factor=0.0, most_sweeps=20
    )  # no node is stale, but all of them together are
    found, exact = (trained("ddim", 40, max_nodes=40, control=control, exact=exact) for exact in (False, True))
    assert found.rounds < exact.rounds


def test_a_sample_without_a_node_to_spare_is_brought_to_rest_first() -> None:
    found = trained("ddpm", 24, max_nodes=30)
    assert found.status is Status.STOPPED
    assert 4e-3 < found.error_estimates[0].interpolation_error < math.inf
    assert found.error_estimates[0].iteration_error <= 0.25 * 4e-3


def test_intervals_that_a_refinement_leaves_alone_are_not_compared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained("ddpm", 40, seed=4)  # refined more than once, of some intervals
    nodes = {v.of for v in found.history if isinstance(v, CollocationRecord)}
    assert len(nodes) > 2
    fresh = itertools.count()  # no place is ever met again
    monkeypatch.setattr(DoubledIntervals, "spans", property(lambda self: [(next(fresh), 0, 0) for _ in self.first]))
    forgetful = trained("ddpm", 40, seed=4)
    assert found.evaluations < 0.95 * forgetful.evaluations
    assert found.estimated_error <= 4e-3


def test_defects_count_as_much_as_samples_respond_to_them() -> None:
    sensitive = replace(ORDER_ZERO.defect, late_sensitivity=1.4, early_sensitivity=5.4)
    once, twice, again = (
        trained("ddpm", 24, max_nodes=24, control=replace(ORDER_ZERO, defect=defect, resolved_share=0.0))
        .error_estimates[0]
        .interpolation_error
        for defect in (ORDER_ZERO.defect, sensitive, replace(sensitive, halving_ratio=4.4))
    )
    assert (twice, again) == pytest.approx((2 * once, once), rel=1e-9)


def test_a_network_of_low_precision_comes_to_rest() -> None:
    model = load("digits")
    low = Evaluator(lambda x, t: model(x.float(), t).bfloat16(), dtype=torch.bfloat16)
    noise = Recorded(model.shape, torch.Generator().manual_seed(0))
    found = sample(low, model.table("ddpm", 1000), noise, collocation(window=16))
    assert found.status is Status.CONVERGED
    assert found.rounds < 60  # and does not chase its own rounding


def test_samples_whose_sweeps_do_not_converge_are_solved_with_more_caution() -> None:
    table, data = TABLES["ddim"](100), Mixture(torch.full((8,), 1 / 8), 0.6 * random(8, 64, seed=1), torch.full((8,), 0.01))
    noise, found = Keyed((64,), 4, 6), []
    for amplification in (1.0, 8.0):
        control = replace(NARROW, most_sweeps=1, unseen_amplification=amplification)
        found.append(sample(data.denoiser(table), table, noise, collocation(window=4, control=control)))
        assert found[-1].message.endswith("6 of 6 samples over, since their sweeps did not converge")
    trusting, cautious = ([e.rounds for e in one.error_estimates] for one in found)
    assert sum(cautious) > 1.1 * sum(trusting)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_sample_that_would_need_most_nodes_is_handed_over_to_the_window_method(name: str) -> None:
    table, noise = TABLES[name](60), Keyed((2,), 0, 4)
    control = replace(collocation(12).control_on(table), resolved_share=0.0, handover_least=0)
    found = run(table, PLANE, collocation(12, window=8, tolerance=5e-5, control=control), noise)
    assert found.message.startswith("converged: the estimated error of every sample is at most 5e-05; the window method took ")
    assert found.message.endswith("of 4 samples over, since they would need most of the chain's nodes")
    assert rms(found.sample, wanted_of(name, table, PLANE, noise)).max() < 4e-4
    handed = {v.sample for v in found.history if isinstance(v, WindowRecord)}
    assert handed
    for k, c in enumerate(found.error_estimates):
        assert (k in handed) == (c.interpolation_error == 0)
        assert k not in handed or c.evaluations > table.steps
        assert c.estimated_error <= 2e-4
    within = run(table, PLANE, collocation(12, window=8, tolerance=2e-4, max_nodes=60), noise)
    assert not any(isinstance(v, WindowRecord) for v in within.history)  # nodes are bounded, and so is memory


def test_the_window_method_is_tightened_for_a_sample_that_amplifies() -> None:
    setup = CollocationSetup(TABLES["ddpm"](200), collocation(tolerance=4e-3), device=torch.device("cpu"), dtype=torch.float32)
    assert setup.step.dtype == torch.float64  # in float32 nearly parallel pairs keep sensitive samples from rest
    loop = setup.window_loop
    assert [loop.tightening(amplification) for amplification in (0.5, 1.0, 1.1, 9.0)] == [1, 1, 2, 16]
    assert loop.setup(9.0).method.tolerance == 4e-3
    usual, tightened = (loop.setup(amplification).scaled(1.0)[0] for amplification in (1.0, 9.0))
    assert tightened == [16 * factor for factor in usual]
    assert loop.setup(9.0) is loop.setup(12.0)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m"])
def test_exact_goes_on_to_the_sequential_sample(name: str) -> None:
    table, noise, tolerance = TABLES[name](100), Keyed((2,), 0, 3), 1e-4
    wanted = wanted_of(name, table, PLANE, noise)
    found = run(table, PLANE, collocation(tolerance=tolerance, exact=True), noise)
    assert rms(found.sample, wanted).max() < tolerance
    assert found.message.startswith("converged: the estimated error of every sample is at most 0.0001")
    assert found.estimated_error <= tolerance
    assert [c.interpolation_error for c in found.error_estimates] == [0] * 3
    assert sum(c.evaluations for c in found.error_estimates) == found.evaluations
    every = {n for v in found.history if isinstance(v, WindowRecord) for n in range(v.first, v.first + len(v.change))}
    assert every == set(range(table.steps))


def test_a_network_that_jumps_in_time_gets_nodes_where_it_jumps() -> None:
    table, noise = TABLES["ddim"](200), Keyed((2,), 0)
    denoiser, jump = PLANE.denoiser(table), 425.0

    def jumping(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(x, t) + 0.5 * (t > jump).to(x)[:, None]

    def sequential(x: Tensor) -> Tensor:
        for i in range(table.steps):
            x = table.a[i, 0] * x + table.b[i, 0] * jumping(x, table.t[i : i + 1])
        return x

    near = int((table.t - jump).abs().argmin())
    seen = {}
    for kind, network in {"smooth": denoiser, "jumping": jumping}.items():
        found = sample(network, table, noise, collocation(12, tolerance=4e-3), dtype=torch.float64)
        visits = [v for v in found.history if isinstance(v, CollocationRecord)]
        first = next(v.interpolation_error for v in visits if math.isfinite(v.interpolation_error))
        nodes = {n for v in visits for n in v.nodes}
        seen[kind] = first, len([n for n in nodes if abs(n - near) <= 5])
        if kind == "jumping":
            error = rms(found.sample, sequential(noise.start(0).double()[None]))
            assert error.max() < 2 * 4e-3
    assert seen["jumping"][0] > 3 * seen["smooth"][0]
    assert seen["jumping"][1] >= 3 + seen["smooth"][1]


@pytest.mark.parametrize("variance", [1e-4, 100.0])
def test_a_variance_that_is_far_off_is_corrected(variance: float) -> None:
    table, noise = TABLES["ddpm"](200), Keyed((6,), 1)
    data = Gaussian(torch.zeros(6), torch.full((6,), variance))
    found = run(table, data, collocation(tolerance=4e-3 * variance**0.5), noise)
    assert rms(found.sample, wanted_of("ddpm", table, data, noise)).max() < 4e-3 * variance**0.5


def test_a_corrected_variance_spares_rounds_and_keeps_the_chains_noises() -> None:
    table, noise = TABLES["ddpm"](200), Keyed((64,), 3)
    data = Gaussian(torch.full((64,), 0.9), torch.full((64,), 9.0))
    found, kept = (run(table, data, collocation(tolerance=0.012, shift=shift), noise) for shift in ("auto", 0.25))
    assert found.rounds < 0.75 * kept.rounds
    assert rms(found.sample, wanted_of("ddpm", table, data, noise)).max() < 0.012


# -- the equation that a chain discretizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "euler", "flow_euler"])
def test_the_ode_of_gaussian_data_is_the_probability_flow_map(name: str) -> None:
    table, noise = TABLES[name](100), Keyed((4,), 2, 2)
    data = Gaussian(0.3 * random(4), torch.tensor([0.1, 0.2, 0.3, 0.5]))
    start = torch.stack([noise.start(k) for k in range(2)]).double() * table.start_scale
    levels = [(table.alpha[i].item(), table.sigma[i].item()) for i in (0, -1)]
    if name == "flow_euler":
        levels[0] = (0.0, 1.0)
    wanted = data.flow(start, *levels)

    def network(x: Tensor, t: Tensor) -> Tensor:  # at any time: levels interpolated as the equation's are
        return off_grid(table, data, x, t)

    found = sample(network, table, noise, collocation(target="ode", tolerance=5e-4), dtype=torch.float64)
    assert rms(found.sample, wanted).max() < 2e-3


def off_grid(table: Table, data: Gaussian, x: Tensor, t: Tensor) -> Tensor:
    """What the optimal network says between the table's times."""
    times, place = table.t[:-1].flip(0), torch.bucketize(t.double(), table.t[:-1].flip(0)).clamp(1, table.steps - 1)
    weight = ((t - times[place - 1]) / (times[place] - times[place - 1]))[:, None]
    if table.prediction == "flow":
        sigma = t.double()[:, None] / 1000
        alpha, scale = 1 - sigma, torch.ones_like(sigma)
    else:
        known = (table.alpha / table.sigma)[:-1].flip(0).log()
        ratio = (known[place - 1, None] * (1 - weight) + known[place, None] * weight).exp()
        preserving = bool(table.alpha[0] < 0.9)
        alpha = ratio / (1 + ratio**2).sqrt() if preserving else torch.ones_like(ratio)
        sigma = alpha / ratio
        scale = torch.ones_like(sigma) if preserving else (1 + sigma**2).rsqrt()
    state = x / scale
    clean = data.clean(state, alpha[:, 0], sigma[:, 0])
    epsilon = (state - alpha * clean) / sigma
    return epsilon - clean if table.prediction == "flow" else epsilon


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"nodes": "many"}, r"nodes is 'many'; it must be a count, a sequence of fine nodes, or 'auto'"),
        ({"nodes": 1}, r"1 nodes were asked for; an interpolation needs at least 2"),
        ({"nodes": []}, r"the nodes begin with \[\]; the first must be node 0"),
        ({"nodes": [3, 5]}, r"the nodes begin with \[3\]; the first must be node 0"),
        ({"nodes": [0, 5, 5]}, r"node 5 follows node 5; nodes must increase"),
        ({"nodes": [0]}, r"1 node was given; an interpolation needs at least 2"),
        ({"order": 9}, r"the order is 9; it must be a whole number, 0 \(averages\) to 8"),
        ({"order": -1}, r"the order is -1; it must be a whole number, 0"),
        ({"shift": 0.0}, r"the shift, a data variance, is 0.0; it must be a number, positive, and finite"),
        ({"shift": math.inf}, r"the shift, a data variance, is inf; it must be a number"),
        ({"shift": math.nan}, r"the shift, a data variance, is nan; it must be a number"),
        ({"shift": "large"}, r"the shift, a data variance, is 'large'; it must be a number.*or 'auto'"),
        ({"window": 0}, r"the window is 0; it must be a whole number, at least 1, or None for no bound"),
        ({"tolerance": 0.0}, r"the tolerance is 0.0; it must be a number, positive, and finite .*exact=True"),
        ({"tolerance": math.nan}, r"the tolerance is nan; it must be a number"),
        ({"secants": -1}, r"secants is -1; it must be a whole number, at least 0"),
        ({"nodes": 10, "max_nodes": 9}, r"max_nodes is 9, below the 10 nodes to begin with"),
        ({"nodes": [0, 4, 9], "max_nodes": 2}, r"max_nodes is 2, below the 3 nodes to begin with"),
        ({"max_nodes": 1}, r"max_nodes is 1, below the 2 nodes to begin with"),
        ({"warm_start": "nodes.json", "nodes": 20}, r"warm_start was given with nodes=20; it says where nodes go itself"),
        ({"target": "flow"}, r"the target is 'flow'; it must be one of chain, ode, sde"),
        ({"target": "ode", "exact": True}, r"exact=True was given with target='ode'; only the chain's own sample"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        collocation(**options)


WRONG_KINDS: dict[str, list[Any]] = {
    "nodes": [8.5, True, "8", None, [0, 4.5], [0, "4"], {0, 4}],
    "window": [16.5, "16", True],
    "tolerance": ["1e-3", None, True, 1j],
    "order": [1.5, "1", True],
    "shift": ["0.25", None, True, [0.25]],
    "secants": [2.5, None, "4", True],
    "max_nodes": [10.5, "10", True],
    "exact": ["yes", 1, None],
    "target": [3, None, "ODE"],
    "warm_start": [5, True, ["nodes.json"]],
    "control": [{}, "fast", 3],
}


def test_every_argument_has_values_of_the_wrong_kind() -> None:
    assert set(WRONG_KINDS) == set(inspect.signature(collocation).parameters)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_KINDS.items() for value in values], ids=str
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}\b.* is {re.escape(repr(value))}; it must be"):
        collocation(**{name: value})


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    table = TABLES["ddim"](40)
    given = collocation(np.int64(8), window=np.int64(4), order=np.int32(1), tolerance=np.float64(0.1), max_nodes=np.int64(9))
    assert given.edges(table) == collocation(8, window=4, order=1, tolerance=0.1, max_nodes=9).edges(table)
    assert collocation([np.int64(n) for n in (0, 9, 20, 30)]).edges(table) == collocation([0, 9, 20, 30]).edges(table)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("ddim", {"nodes": 41}, r"41 nodes were asked for; the chain has 40 steps: give at most that"),
        ("ddim", {"nodes": [0, 10, 20, 40]}, r"node 40 was given; the chain evaluates nodes 0 to 39"),
        ("ddim", {"nodes": [0, 10, 20]}, r"the nodes are 3, for interpolation of order 3; it needs at least 4"),
        ("ddpm", {"nodes": 2, "order": 2}, r"the nodes are 2, for interpolation of order 2; it needs at least 3"),
    ],
)
def test_nodes_that_do_not_fit_the_chain_are_refused(name: str, options: dict[str, Any], sentence: str) -> None:
    table = TABLES[name](40)
    with pytest.raises(ValueError, match=sentence):
        run(table, PLANE, collocation(**options), Keyed((2,)))


def test_the_methods_own_order_is_that_of_its_chain() -> None:
    assert collocation().degree(TABLES["ddim"](40)) == 3
    assert collocation().degree(TABLES["ddpm"](40)) == 0
    assert collocation(order=1).degree(TABLES["ddpm"](40)) == 1


def test_the_tuned_numbers_are_those_of_the_order_or_the_callers() -> None:
    assert collocation().control_on(TABLES["ddpm"](40)) is ORDER_ZERO
    assert collocation().control_on(TABLES["ddim"](20)) is HIGHER_ORDER  # left to the window method
    assert collocation().control_on(TABLES["ddim"](25)) is SHORT_WIDE
    assert collocation().control_on(TABLES["ddim"](50)) is SHORT_WIDE
    assert collocation(window=8).control_on(TABLES["ddim"](50)) is SHORT_WIDE
    assert collocation(window=7).control_on(TABLES["ddim"](50)) is SHORT
    assert collocation(window=16).control_at_any_window(TABLES["ddim"](50)) is SHORT
    assert collocation(window=7).control_on(TABLES["ddim"](100)) is NARROW
    assert collocation(window=8).control_on(TABLES["ddim"](100)) is SHORT_WIDE
    assert collocation().control_on(TABLES["ddim"](64)) is HIGHER_ORDER
    assert collocation(exact=True).control_on(TABLES["ddim"](50)) is HIGHER_ORDER
    assert collocation(max_nodes=20).control_on(TABLES["ddim"](50)) is HIGHER_ORDER
    assert collocation(order=1).control_on(TABLES["ddpm"](40)) is HIGHER_ORDER
    assert collocation(order=0).control_on(TABLES["ddim"](40)) is ORDER_ZERO
    fewer = replace(HIGHER_ORDER, nodes=8)
    assert collocation(control=fewer).control_on(TABLES["ddim"](40)) is fewer
    assert len(collocation(control=fewer).edges(TABLES["ddim"](40))) == 9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_a_network_that_is_not_finite_is_named(name: str, bad: float) -> None:
    table = TABLES[name](200)
    denoiser = PLANE.denoiser(table)

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t < 300)[:, None], bad, denoiser(x, t))

    with pytest.raises(
        ValueError, match=r"sample 0 is not finite after round 1 \(times .*: the model returned NaN or infinity"
    ):
        sample(broken, table, Keyed((2,)), collocation(), dtype=torch.float64)


def test_edited_states_are_refused() -> None:
    table = TABLES["ddim"](40)
    evaluator = Evaluator(PLANE.denoiser(table))
    solver = solve(table, Keyed((2,)), collocation())
    batch = next(solver)
    with pytest.raises(ValueError, match=r"states were changed between steps, which collocation as it was given cannot follow"):
        solver.send(EditedOutputs(evaluator(batch), batch.x + 1))


def test_the_states_of_every_node_are_not_to_be_had() -> None:
    with pytest.raises(ValueError, match=r"collocation keeps the states of a few nodes only"):
        next(solve(TABLES["ddim"](40), Keyed((2,)), collocation(), on_final=lambda x, n: None))

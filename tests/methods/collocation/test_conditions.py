# SPDX-License-Identifier: Apache-2.0
"""Outside of its conditions collocation hands over and says so, and nothing at rest is called found unseen."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from paradiff import Keyed, Recorded, Schedule, Solution, Table, collocation, sample, sequential
from paradiff.methods.collocation.conditions import unfit_levels
from paradiff.methods.collocation.control import HIGHER_ORDER, ORDER_ZERO
from paradiff.methods.collocation.method import CollocationMethod
from paradiff.models.exact import Empirical, digits
from paradiff.samplers import ddim, ddpm, dpmpp_2m, euler, flow_euler, from_scheduler, heun
from paradiff.solver import WindowRecord
from paradiff.solver.solution import Status

LINEAR, ZERO = Schedule.linear(), Schedule.linear(rescale_zero_snr=True)
POINTS = torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=torch.float64)


def scheduler(name: str) -> Table:
    diffusers = pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of numpy
        made = getattr(diffusers, name)()
        made.set_timesteps(20)
    return from_scheduler(made)


def solved(table: Table, method: CollocationMethod, noise: Keyed, points: Tensor = POINTS) -> tuple[Solution, Tensor]:
    """The solution, and the errors of its samples beside the data's scale."""
    network = Empirical(points).denoiser(table)
    exact = sample(network, table, noise, sequential()).sample
    found = sample(network, table, noise, method)
    return found, (found.sample - exact).square().mean(1).sqrt()


def test_without_a_window_every_sample_is_on_its_own_point() -> None:
    table, noise = ddpm(LINEAR, 200), Keyed((2,), 0, 8)
    found, errors = solved(table, collocation(), noise)
    assert found.status is Status.CONVERGED
    assert errors.max() < 4e-3
    trusting = replace(ORDER_ZERO, trusted_move=1e9)  # what is at rest by its staleness is taken for found
    assert solved(table, collocation(control=trusting), noise)[1].max() > 1


LEFT_TO_THE_WINDOW: dict[str, tuple[Callable[[], Table], str]] = {
    "heun": (lambda: heun(LINEAR, 20), "the sampler's steps have several stages, of which 20 of 39 nodes are the first"),
    "kdpm2": (lambda: scheduler("KDPM2DiscreteScheduler"), "the sampler's steps have several stages, of which 20 of 39"),
    "kdpm2 ancestral": (lambda: scheduler("KDPM2AncestralDiscreteScheduler"), "the sampler's steps have several stages"),
    "zero-SNR, 2 steps": (
        lambda: ddpm(ZERO, 2, prediction="sample", spacing="linspace"),
        "a chain of 2 steps from pure noise has no levels to interpolate along",
    ),
    "flow, 1 step": (lambda: flow_euler(1), "a chain of 1 step from pure noise has no levels to interpolate along"),
    "ddim, 1 step": (lambda: ddim(LINEAR, 1), "a chain of 1 step leaves little to interpolate between 56 nodes"),
    "ddim, 20 steps": (lambda: ddim(LINEAR, 20), "a chain of 20 steps leaves little to interpolate between 32 nodes"),
    "flow, 50 steps": (lambda: flow_euler(50), "a chain of 50 steps leaves little to interpolate between 32 nodes"),
    "ddpm, 25 steps": (lambda: ddpm(LINEAR, 25), "a chain of 25 steps leaves little to interpolate between 56 nodes"),
    "dpmpp_2m, 7 steps": (lambda: dpmpp_2m(LINEAR, 7), "a chain of 7 steps leaves little to interpolate between 32 nodes"),
}


@pytest.mark.parametrize("name", LEFT_TO_THE_WINDOW)
def test_a_chain_that_it_does_not_fit_is_solved_by_the_window_method_from_the_first_round(name: str) -> None:
    make, reason = LEFT_TO_THE_WINDOW[name]
    table = make()
    found, errors = solved(table, collocation(), Keyed((2,), 0, 6))
    assert found.status is Status.CONVERGED
    assert f"; the window method solved all nodes, since {reason}" in found.message
    assert all(isinstance(record, WindowRecord) for record in found.history)
    assert errors.max() < 4e-3
    assert collocation().edges(table) == list(range(table.steps + 1))
    assert found.rounds == max(e.rounds for e in found.error_estimates)
    assert found.evaluations == sum(e.evaluations for e in found.error_estimates)


@pytest.mark.parametrize("make", [lambda: ddpm(LINEAR, 200), lambda: euler(LINEAR, 100), lambda: dpmpp_2m(LINEAR, 100)])
def test_a_chain_that_it_fits_is_left_to_nobody(make: Callable[[], Table]) -> None:
    table = make()
    assert collocation().unfit(table) is None
    found, _ = solved(table, collocation(window=16), Keyed((2,), 0, 2))
    assert "window method" not in found.message


def test_levels_that_cannot_be_interpolated_along_are_named() -> None:
    table = ddim(LINEAR, 40)
    sigma, alpha = table.sigma.clone(), table.alpha.clone()
    sigma[7], alpha[9] = 0.0, 0.0
    assert unfit_levels(_levels(table, sigma=sigma)) == "node 7 of the chain has no noise"
    assert unfit_levels(_levels(table, alpha=alpha)) == "node 9 of the chain has no signal"
    flat = table.sigma.clone()
    flat[5] = 1.5 * flat[4]
    assert unfit_levels(_levels(table, sigma=flat)) == "the signal-to-noise ratio does not rise from node 4 to node 5"
    assert unfit_levels(table) is None


def _levels(table: Table, **levels: Tensor) -> Table:
    """A table with other levels, as those of a scheduler may be that states its own clean-data estimate."""
    clean = torch.stack([table.p, table.q], 1)
    return replace(table, clean=clean, exact_levels=False, **levels)


def test_coefficients_that_multiply_rounding_are_not_used() -> None:
    found, errors = solved(ddpm(ZERO, 5, prediction="sample", spacing="linspace"), collocation(3, shift=1e6), Keyed((2,), 0, 2))
    assert "; the window method solved all nodes, since the chain's coefficients would multiply the network's" in found.message
    assert errors.max() < 4e-3


def test_a_given_variance_that_is_far_off_is_replaced() -> None:
    found, errors = solved(ddim(LINEAR, 200), collocation(shift=1e-12), Keyed((2,), 0, 8))
    assert found.status is Status.CONVERGED
    assert errors.max() < 4e-3


Nodes = int | Literal["auto"]


@pytest.mark.parametrize(("nodes", "most"), [(8, None), ("auto", 12)])
@pytest.mark.parametrize("steps", [30, 200])
def test_few_nodes_leave_no_sample_silently_on_the_wrong_point(steps: int, nodes: Nodes, most: int | None) -> None:
    noise = Keyed((2,), 0, 12)
    found, errors = solved(ddpm(LINEAR, steps), collocation(nodes, max_nodes=most), noise)
    for error, estimate in zip(errors.tolist(), found.error_estimates, strict=True):
        assert error <= max(2 * estimate.estimated_error, 4e-3)
    if most is None:  # the window method, which takes over, may tell of more, as it does of one sample here
        assert errors.max() < 4e-3
        assert sum(estimate.estimated_error > 4e-3 for estimate in found.error_estimates) <= 1
    else:  # as far off as another sample of the data would be
        assert found.status is Status.STOPPED
        for one, estimate in zip(found.sample, found.error_estimates, strict=True):
            assert estimate.estimated_error >= math.sqrt(2) * float(one.square().mean().sqrt()) * (1 - 1e-6)


@pytest.mark.parametrize("case", ["two points", "digits"])
def test_a_mesh_that_does_not_tell_the_side_of_a_decision_is_refined(case: str) -> None:
    """The sample is on another side than the chain's own, and answers to no defect there; the states before it do."""
    if case == "two points":
        table, data, noise = ddim(LINEAR, 200), POINTS, Keyed((2,), 1000, 16)
        method = collocation(tolerance=1e-2, control=replace(HIGHER_ORDER, nodes=20))
    else:
        table, data, method = ddpm(LINEAR, 200), digits().data, collocation(window=16)
        noise = Recorded((1, 8, 8), [torch.Generator().manual_seed(2027)])
    network = Empirical(data).denoiser(table)
    exact = sample(network, table, noise, sequential()).sample
    control = method.control_on(table)
    trusting = replace(method, control=replace(control, error=replace(control.error, decided_error=1e9)))
    for tried, right in ((method, True), (trusting, False)):
        found = sample(network, table, noise, tried)
        errors = (found.sample - exact).flatten(1).square().mean(1).sqrt()
        assert found.status is Status.CONVERGED
        assert bool((errors < method.tolerance).all()) is right, errors


@pytest.mark.parametrize("case", ["two points", "digits"])
def test_a_path_that_is_undecided_for_long_has_a_finer_mesh(case: str) -> None:
    """Sample 6 passes close to where it is decided, late; the other side of that answers to no early defect."""
    data = POINTS if case == "two points" else digits().data.flatten(1)
    table, noise = ddpm(LINEAR, 200), Keyed((data.shape[1],), 4000, 7)
    trusting = replace(ORDER_ZERO, error=replace(ORDER_ZERO.error, free_growth=1e9, few_exponent=0.5))
    for control, right in ((ORDER_ZERO, True), (trusting, False)):
        _, errors = solved(table, collocation(control=control), noise, data)
        assert bool((errors < 4e-3).all()) is right, errors


def test_samples_of_few_numbers_are_allowed_more_chance() -> None:
    plain = replace(ORDER_ZERO, error=replace(ORDER_ZERO.error, chance_safety=0.0))
    for size, factor in ((2, 1 + 3.5 * (2**-0.5 - 1 / 8)), (64, 1.0)):
        data = 0.6 * torch.randn(4, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        told = [
            solved(ddpm(LINEAR, 200), collocation(tolerance=0.5, control=control), Keyed((size,), 0), data)[0]
            for control in (plain, ORDER_ZERO)
        ]
        without, with_chance = (t.error_estimates[0].interpolation_error for t in told)
        assert with_chance == pytest.approx(factor * without)

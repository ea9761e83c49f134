# SPDX-License-Identifier: Apache-2.0
"""chain/slope.py: each slope is the derivative that its docstring says, and the window's linear algebra is that of dense
matrices."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from problems import SHAPE, SLOPES, TABLES, arbitrary, chain, ends, gap, sweep, uneven, window_of
from torch import Tensor

from paradiff import Keyed, Schedule, Table, from_scheduler
from paradiff.chain.slope import (
    carried,
    freeze_clean_data,
    freeze_epsilon,
    identity,
    inverse,
    over_intervals,
    resolve,
    shifted,
    staged,
    taken_from,
    zero,
)
from paradiff.methods import WindowMethod
from paradiff.models.exact import Gaussian
from paradiff.samplers import ddim, ddpm

each_table = pytest.mark.parametrize("name", TABLES)


def dense(slope: Tensor) -> np.ndarray:
    """G of a whole chain as a matrix `[N, N]`: row i holds the slopes of node i + 1 on nodes 1 ... N."""
    steps, band = slope.shape
    matrix = np.zeros((steps, steps))
    for i in range(steps):
        for j in range(min(band, i)):
            matrix[i, i - 1 - j] = slope[i, j]
    return matrix


@each_table
@pytest.mark.parametrize("slope", SLOPES)
def test_inverse_is_that_of_the_dense_matrix(name: str, slope: str) -> None:
    found = resolve(SLOPES[slope], TABLES[name])
    for rows in (slice(0, 1), slice(0, 2), slice(3, 8), slice(0, None)):
        matrix = dense(found[rows])
        wanted = np.linalg.inv(np.eye(len(matrix)) - matrix)
        # Float64; entries are products of up to 12 slopes, each up to 10.
        np.testing.assert_allclose(inverse(found[rows]).numpy(), wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())


def test_identity_makes_the_update_a_cumulative_sum() -> None:
    table = TABLES["ddpm"]
    r = torch.randn(table.steps, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Sums of 12 numbers of size 1.
    torch.testing.assert_close(inverse(identity(table)) @ r, r.cumsum(0), rtol=0, atol=1e-14)


def test_the_second_stage_of_a_step_is_taken_from_the_state_before_the_first() -> None:
    table = TABLES["heun"]
    assert taken_from(table).tolist() == [k % 2 for k in range(table.steps)]
    found = inverse(identity(table))
    steps = torch.eye(table.steps, dtype=torch.float64)
    for i in range(table.steps):  # a change at a predicted state ends there; one at a step's end is carried to all that follows
        wanted = steps[i].clone()
        if i % 2:
            wanted[i + 1 :] = 1
        elif i + 1 == table.steps:
            wanted[i:] = 1
        torch.testing.assert_close(found[:, i], wanted)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "heun"])
def test_multistep_samplers_have_one_stage(name: str) -> None:
    assert not staged(TABLES[name])


@pytest.mark.parametrize(
    ("kind", "options", "stages"),
    [
        ("Heun", {}, True),
        ("Heun", {"use_karras_sigmas": True}, True),
        ("KDPM2Discrete", {}, True),
        ("KDPM2AncestralDiscrete", {}, True),
        ("DPMSolverMultistep", {}, False),
        ("DPMSolverMultistep", {"solver_order": 3, "use_karras_sigmas": True}, False),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, False),
        ("UniPCMultistep", {}, False),
        ("LMSDiscrete", {}, False),
        ("EulerAncestralDiscrete", {}, False),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
def test_stages_are_seen_in_tables_of_schedulers(kind: str, options: dict[str, Any], stages: bool, prediction: str) -> None:
    name = f"{kind}Scheduler" if kind != "Heun" else "HeunDiscreteScheduler"
    scheduler: Any = getattr(diffusers, name)(prediction_type=prediction, **options)
    scheduler.set_timesteps(18)
    assert staged(from_scheduler(scheduler)) is stages


def test_zero_leaves_the_residual_as_it_is() -> None:
    assert torch.equal(inverse(zero(TABLES["heun"])), torch.eye(TABLES["heun"].steps, dtype=torch.float64))


@each_table
@pytest.mark.parametrize("stride", [1, 2, 3, "uneven"])
def test_over_intervals_carries_a_change_through_the_fine_steps(name: str, stride: int | str) -> None:
    table = TABLES[name]
    edges = (
        [0, *itertools.accumulate(uneven(table, 0))] if stride == "uneven" else [*range(0, table.steps, stride), table.steps]
    )
    slope = arbitrary(table)
    found, whole = over_intervals(slope, edges), carried(slope, edges)
    if stride == 1:
        assert found is slope
        return
    assert found.shape == (len(edges) - 1, 1)
    for n, (left, right) in enumerate(itertools.pairwise(edges)):
        for k in range(table.band):
            change = np.zeros(table.steps + 2)  # Node i stands at place i + 1, so that there is one before node 0.
            change[left + 1 - k] = 1
            for i in range(left, right):
                change[i + 2] = sum(float(slope[i, j]) * change[i + 1 - j] for j in range(table.band))
            assert whole[n, k] == pytest.approx(change[right + 1], abs=1e-15)
        assert found[n, 0] == whole[n, 0]


@pytest.mark.parametrize("make", [ddim, ddpm])
def test_frozen_estimates_have_their_textbook_form_for_epsilon_networks(make: object) -> None:
    table = make(Schedule.linear(), 20)
    torch.testing.assert_close(freeze_epsilon(table), table.a, rtol=1e-12, atol=1e-12)
    wanted = table.a + table.b / table.sigma[:-1, None]
    # At noise of 1e-2 the two terms are 100 times their difference.
    torch.testing.assert_close(freeze_clean_data(table), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [ddim, ddpm])
def test_slopes_do_not_depend_on_what_the_network_predicts(make: object) -> None:
    tables = [make(Schedule.linear(), 20, prediction=prediction) for prediction in ("epsilon", "sample", "v", "flow")]
    for slope in (freeze_epsilon, freeze_clean_data, shifted(0.4)):
        for other in tables[1:]:
            # Epsilon tables cancel: their coefficients are up to 150 at the noisy end.
            torch.testing.assert_close(slope(other), slope(tables[0]), rtol=1e-9, atol=1e-9)


@each_table
def test_slopes_are_the_derivatives_of_the_steps_of_their_model_networks(name: str) -> None:
    table = TABLES[name]
    variance = 0.3
    alpha, sigma = table.alpha[:-1], table.sigma[:-1]
    models = {
        shifted(variance): alpha * variance / (alpha**2 * variance + sigma**2),
        freeze_clean_data: torch.zeros_like(alpha),
        freeze_epsilon: torch.where(alpha > 0, 1 / alpha, 0.0),
    }
    for slope, clean_slope in models.items():
        for i in range(1, table.steps):
            recent = torch.zeros(table.band, dtype=torch.float64, requires_grad=True)
            step = torch.zeros((), dtype=torch.float64)
            for j in range(min(table.band, i + 1)):
                m = (clean_slope[i - j] - table.p[i - j]) / table.q[i - j] * recent[j]
                step = step + table.a[i, j] * recent[j] + table.b[i, j] * m
            (wanted,) = torch.autograd.grad(step, recent)
            torch.testing.assert_close(slope(table)[i], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in TABLES if TABLES[name].clip is None])
def test_the_shifted_slope_is_newtons_method_on_gaussian_data(name: str) -> None:
    # The chain is linear for such data and the slope its true derivative, so that one sweep solves all of it.
    table, variance = TABLES[name], 0.3
    target = Gaussian(torch.full(SHAPE, 0.2), torch.full((6,), variance, dtype=torch.float64))
    denoiser = target.denoiser(table)
    window = window_of(table, WindowMethod("newton", shifted(variance), predictor="copy", tolerance=0.0))
    sweep(window, denoiser)
    # Float64 with coefficients of up to 1e2 in matrices of 12.
    assert gap(ends(window), chain(denoiser, table, Keyed(SHAPE))[1:]) < 1e-10


def test_the_slope_of_frozen_epsilon_at_pure_noise_is_that_of_frozen_clean_data() -> None:
    table = TABLES["ddim pure noise"]
    assert table.alpha[0] == 0
    assert freeze_epsilon(table).isfinite().all()
    torch.testing.assert_close(freeze_epsilon(table)[0], freeze_clean_data(table)[0])


def test_arrays_are_taken_as_slopes() -> None:
    table = TABLES["heun"]
    row, rows = torch.rand(table.steps), torch.rand(table.steps, 2)
    assert torch.equal(resolve(row, table), torch.stack([row, torch.zeros_like(row)], 1).double())
    assert torch.equal(resolve(rows, table), rows.double())


@pytest.mark.parametrize(
    ("slope", "message"),
    [
        (
            torch.ones(11),
            r"the slope has shape \(11, 1\); table 'ddpm' has 12 steps and band 1, so it must be \[12\]",
        ),
        (torch.ones(12, 2), r"the slope has shape \(12, 2\); table 'ddpm' has 12 steps and band 1"),
        (torch.ones(1, 12, 1), r"the slope has shape \(1, 12, 1\)"),
        (torch.tensor(1.0), r"the slope has shape \(\)"),
        (torch.cat([torch.ones(4), torch.tensor([torch.nan]), torch.ones(7)]), "the slope is not finite at step 4"),
        (lambda table: torch.full((12, 1), torch.inf), "the slope is not finite at step 0"),
    ],
)
def test_slopes_that_do_not_fit_are_refused(slope: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(slope, TABLES["ddpm"])


@pytest.mark.parametrize("variance", [0.0, -1.0, float("inf"), float("nan"), "a", None, True])
def test_a_variance_that_is_none_is_refused(variance: Any) -> None:
    with pytest.raises(ValueError, match=rf"the data variance is {variance!r}; it must be a number, positive, and finite"):
        shifted(variance)


def nothing(table: Table) -> Any:
    return None


def truths(table: Table) -> Tensor:
    return torch.ones(table.steps, dtype=torch.bool)


def rotations(table: Table) -> Tensor:
    return torch.ones(table.steps, dtype=torch.complex128)


def short(table: Table) -> Tensor:
    return torch.ones(3)


def length(table: Table) -> Any:
    return table.steps


@pytest.mark.parametrize(
    ("slope", "message"),
    [
        (nothing, r"^the slope nothing returned None for table 'ddpm'; it must return a tensor, \[12\] or \[12, 1\]$"),
        (length, r"^the slope length returned 12 for table 'ddpm'; it must return a tensor"),
        (truths, r"^the slope truths is made of truth values; it must be a tensor of real numbers, \[12\] or \[12, 1\]$"),
        (rotations, r"^the slope rotations is made of complex numbers; it must be a tensor of real numbers"),
        (short, r"^the slope short has shape \(3, 1\); table 'ddpm' has 12 steps and band 1, so it must be \[12\]"),
        (torch.ones(12, dtype=torch.bool), "^the slope is made of truth values; it must be a tensor of real numbers"),
        (lambda table: None, "^the slope returned None"),
        (int, r"^the slope is the class int; it must be a function of a table, such as paradiff.slopes.identity"),
        ("identity", r"^the slope is 'identity'; it must be a function of a table"),
    ],
)
def test_what_is_no_slope_is_refused_by_its_name(slope: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(slope, TABLES["ddpm"])


@pytest.mark.parametrize(
    "slope", [lambda table: np.ones(table.steps), lambda table: torch.ones(table.steps, dtype=torch.int32, requires_grad=False)]
)
def test_a_slope_may_return_any_array_of_real_numbers(slope: Any) -> None:
    assert torch.equal(resolve(slope, TABLES["ddpm"]), torch.ones(12, 1, dtype=torch.float64))

# SPDX-License-Identifier: Apache-2.0
"""The tuned numbers are fields: a method with other numbers takes them, and none outside its range."""

from __future__ import annotations

import dataclasses
import math

import diffusers
import pytest
import torch
from problems import SHAPE, TABLES, network

from paradiff import Keyed, Method, from_scheduler, parasolver, quasi_newton, sample, sequential, srds
from paradiff.methods.parareal.control import PararealControl
from paradiff.methods.window.control import WindowControl
from paradiff.planning.harness import family

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
CONTROLS = (PararealControl, WindowControl)


@pytest.mark.parametrize(("control", "field"), [(c, f.name) for c in CONTROLS for f in dataclasses.fields(c)])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "0.5", True, None])
def test_a_number_out_of_its_range_is_refused(control: type, field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"the control's {field} is .*; it must be a (whole )?number"):
        control(**{field: value})


def test_the_estimate_of_srds_is_proportional_to_its_caution() -> None:
    one, two = (
        sample(network, TABLES["ddpm"], Keyed(SHAPE), method, dtype=torch.float64).estimated_error
        for method in (
            dataclasses.replace(srds(4, iterations=2), control=PararealControl(caution=caution)) for caution in (1.0, 2.0)
        )
    )
    assert 0 < one < math.inf
    assert two == pytest.approx(2 * one)


def test_the_planner_takes_the_iterations_that_the_control_expects() -> None:
    assert srds().planned(100) == 14
    assert dataclasses.replace(srds(), control=PararealControl(expected_iterations=4)).planned(100) == 20


def test_a_window_that_assumes_more_error_takes_more_sweeps() -> None:
    few, many = (
        sample(network, TABLES["ddpm"], Keyed(SHAPE), method).rounds
        for method in (
            dataclasses.replace(parasolver(tolerance=1e-2), control=WindowControl(first_theta=theta, forgetting=forgetting))
            for theta, forgetting in ((0.0, 0.0), (1.0, 1.0))
        )
    )
    assert few < many


def test_stochastic_steps_of_several_stages_have_a_caution_of_their_own() -> None:
    control = WindowControl()
    scheduler = diffusers.KDPM2AncestralDiscreteScheduler()
    scheduler.set_timesteps(8)
    table = from_scheduler(scheduler)
    assert control.caution(table, False) == control.stage_caution * control.stochastic_caution
    assert control.caution(table, True) == control.stage_caution * control.stochastic_caution * control.secant_caution
    assert control.caution(TABLES["ddpm"], False) == control.stochastic_caution
    assert control.caution(TABLES["heun"], False) == control.deterministic_caution


@pytest.mark.parametrize("method", [parasolver(), quasi_newton(), parasolver(8)])
def test_two_stage_steps_of_a_trained_network_keep_to_their_estimates(method: Method) -> None:
    """With the last state's slope and no caution of their own, 5 of these 16 samples err by 2 to 77 times their estimate."""
    own, seeds = family("digits"), range(2000, 2016)
    table = own.table("two_stage_sde", 18)
    evaluator, noise = own.evaluator(table, seeds), own.noise(seeds)
    wanted = sample(evaluator, table, noise, sequential(), check="off").sample
    found = sample(evaluator, table, noise, method, check="off")
    errors = (found.sample - wanted).square().flatten(1).mean(1).sqrt().tolist()
    held = [error <= e.estimated_error for error, e in zip(errors, found.error_estimates, strict=True)]
    assert sum(held) >= 15
    assert max(errors) < 4e-3


def test_srds_estimates_hold_in_the_plane() -> None:
    """Of these 32 samples 6 err by more than an estimate that takes them for samples of many elements."""
    own, seeds = family("mixture-2"), range(2000, 2032)
    table = own.table("flow", 28)
    evaluator, noise = own.evaluator(table, seeds), own.noise(seeds)
    wanted = sample(evaluator, table, noise, sequential(), check="off").sample
    found = sample(evaluator, table, noise, srds(), check="off")
    errors = (found.sample - wanted).square().flatten(1).mean(1).sqrt().tolist()
    assert sum(error <= e.estimated_error for error, e in zip(errors, found.error_estimates, strict=True)) >= 30

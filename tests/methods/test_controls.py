# SPDX-License-Identifier: Apache-2.0
"""The tuned numbers are fields: a method with other numbers takes them, and none outside its range."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from problems import SHAPE, TABLES, network

from paradiff import Keyed, parasolver, sample, srds
from paradiff.methods.parareal.control import PararealControl
from paradiff.methods.window.control import WindowControl

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

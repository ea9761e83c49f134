# SPDX-License-Identifier: Apache-2.0
"""The decision: one function of the levels, from which estimates and meshes derive."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chi2

from paradiff import Schedule
from paradiff.chain.sensitivity import FITTED, decision, log_snr, scatter, undecided
from paradiff.methods.collocation.control import DefectControl, MeshControl
from paradiff.methods.collocation.defect import sensitivity
from paradiff.methods.collocation.mesh import monitor
from paradiff.samplers import ddim

LEVELS = torch.linspace(-8, 8, 33, dtype=torch.float64)


def test_a_sample_decides_at_signal_to_noise_ratio_one() -> None:
    table = ddim(Schedule.linear(), 1000)
    share = table.sigma**2 / (table.alpha**2 + table.sigma**2)
    torch.testing.assert_close(undecided(log_snr(table)), share)
    torch.testing.assert_close(decision(log_snr(table)), 4 * share * (1 - share))
    assert decision(LEVELS).argmax() == 16
    assert float(decision(LEVELS).max()) == 1


def test_pure_noise_and_data_have_no_decision() -> None:
    ends = torch.tensor([-math.inf, math.inf])
    assert decision(ends).tolist() == [0, 0]
    assert undecided(ends).tolist() == [1, 0]


def test_defects_and_meshes_derive_from_it() -> None:
    found = sensitivity(LEVELS, DefectControl(late_sensitivity=0.5, early_sensitivity=3.0))
    torch.testing.assert_close(found, 0.5 + 3 * undecided(LEVELS))
    found = monitor(LEVELS, False, MeshControl(plateau=0.5, peak=3.0, deterministic_lead=0.0))
    torch.testing.assert_close(found, 0.5 + 3 * decision(LEVELS))
    early = monitor(LEVELS, False, MeshControl(deterministic_lead=2.0))
    assert float(LEVELS[early.argmax()]) == pytest.approx(-2)


@pytest.mark.parametrize("elements", [1, 2, 6, 30, FITTED, 1000])
def test_samples_of_few_elements_scatter_as_the_chi_distribution_does(elements: int) -> None:
    wanted = math.sqrt(chi2.ppf(0.95, elements) / elements) / math.sqrt(chi2.ppf(0.95, FITTED) / FITTED)
    assert scatter(elements) == pytest.approx(max(1.0, wanted), rel=0.02)

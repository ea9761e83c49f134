# SPDX-License-Identifier: Apache-2.0
"""Chains whose noise is scaled down forget less, and their nodes pass with more caution."""

from __future__ import annotations

import dataclasses

import pytest
from problems import TABLES

from paradiff import quasi_newton, sample, sequential
from paradiff.methods.window.control import WindowControl
from paradiff.planning.harness import family
from paradiff.samplers import with_noise_scale

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy


@pytest.mark.parametrize("learns", [False, True])
def test_the_caution_grows_with_the_noise_that_is_missing(learns: bool) -> None:
    control, usual = WindowControl(cold_caution=2.0), TABLES["ddpm"]
    full = control.caution(usual, learns)
    assert full == WindowControl(cold_caution=0.0).caution(usual, learns)
    for scale in (0.6, 0.2):
        found = control.caution(with_noise_scale(usual, scale), learns)
        assert full < found <= full * (1 + 2 * (1 - scale)) * (1 + 1e-6)  # the last states hold no noise to fall short of
    assert control.caution(TABLES["ddim"], learns) == control.deterministic_caution


def test_samples_of_a_cold_chain_keep_to_the_tolerance() -> None:
    own, seeds = family("digits"), range(43000, 43012)
    table = with_noise_scale(own.table("ddpm", 100), 0.2)
    network, method = own.evaluator(table, seeds), quasi_newton(window=16)
    wanted = sample(network, table, own.noise(seeds), sequential(), check="off").sample

    def beyond(cold_caution: float) -> int:
        """How many samples err by more than the tolerance."""
        made = dataclasses.replace(method, control=WindowControl(cold_caution=cold_caution))
        found = sample(network, table, own.noise(seeds), made, check="off").sample
        return int(((found - wanted).square().flatten(1).mean(1).sqrt() > method.tolerance).sum())

    assert beyond(0.0) >= 2
    assert beyond(WindowControl().cold_caution) == 0

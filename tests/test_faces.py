# SPDX-License-Identifier: Apache-2.0
"""Functions called with arguments of every kind, by faces.py, which makes more calls as a script; and what it found."""

from __future__ import annotations

import math
from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from faces import FACES, SCHEDULE, SHAPE, TABLE, Face, check, fitting, fuzz
from hypothesis import HealthCheck, given, settings

from paradiff import Keyed, jacobi, piadm_sde, samplers, solve
from paradiff.chain.clipping import Clip, DynamicThreshold
from paradiff.samplers.continuum import continuum
from paradiff.samplers.process import rectified_flow, variance_exploding, variance_preserving
from paradiff.samplers.schedule import Schedule, flow_sigmas, karras_ratios, spaced_times, zero_snr_betas


@pytest.mark.parametrize("name", FACES)
def test_a_call_gives_a_result_or_one_sentence(name: str) -> None:
    fuzz(name, 8)


@pytest.mark.parametrize("name", FACES)
def test_what_fits_is_taken(name: str) -> None:
    """Otherwise the calls above would show nothing."""
    face, taken = FACES[name], []

    @settings(max_examples=6, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(fitting(face))
    def call(chosen: dict[str, Any]) -> None:
        with suppress(ValueError):
            face.call(**chosen)
            taken.append(chosen)

    call()
    assert taken


FOUND: dict[str, tuple[Any, str]] = {
    "betas": (lambda: Schedule(10**400), "betas is an int of 1329 bits; it must be a row of at least two numbers"),
    "betas to rescale": (lambda: zero_snr_betas("x"), "betas is 'x'; it must be a row of at least two numbers"),
    "a rescaling": (lambda: Schedule.linear(rescale_zero_snr="no"), "rescale_zero_snr is 'no'; it must be True or False"),
    "times": (lambda: spaced_times("50", 5, "leading"), "the number of training times is '50'; it must be a whole number"),
    "ratios": (lambda: karras_ratios("1", 2, 3), "Karras ratios were asked from 2 down to '1' in 3 steps"),
    "ratio steps": (lambda: karras_ratios(1, 2, 2.5), "Karras ratios were asked from 2 down to 1 in 2.5 steps"),
    "huge ratios": (lambda: karras_ratios(1, 10**400, 2), "Karras ratios were asked from an int of 1329 bits down to 1"),
    "many ratios": (lambda: karras_ratios(1, 2, 10**12), "at most 1000000"),
    "flow steps": (lambda: flow_sigmas(10**12), "flow levels were asked for 1000000000000 steps; give at most 1000000"),
    "blocks": (lambda: samplers.uniform_grid(1, 0.1, "2", 3), "blocks is '2'; it must be a whole number"),
    "block steps": (lambda: samplers.log_snr_grid(1, 0.1, 2, math.nan), "steps is nan; it must be a whole number"),
    "a start": (lambda: samplers.uniform_grid(None, 0.1, 2, 3), "the grid begins at u = T = None; it must be positive"),
    "a high start": (lambda: samplers.log_snr_grid(1e4, 0.1, 2, 3), "the grid begins at u = T = 10000.0; give at most 700"),
    "a stop": (lambda: samplers.uniform_grid(1, "0.1", 2, 3), "the early stop eta is '0.1'; it must lie above 0"),
    "a clean end": (lambda: samplers.uniform_grid(1, 0.1, 2, 3, clean=1), "clean is 1; it must be True or False"),
    "many steps": (lambda: samplers.uniform_grid(1, 0.1, 10**6, 10**6), r"the grid would have 1e\+12 steps; it may have"),
    "small steps": (lambda: samplers.paper_grid(1, 1e-12, 0.1), "the grid would have .* steps; it may have 1000000 at most"),
    "a length": (lambda: samplers.paper_grid(1, 0.1, 0.1, length="1"), "the length h of a block is '1'; it must be a number"),
    "levels": (lambda: samplers.Grid("ab", [0, 1]), "the grid's levels are 'ab'; give a row of at least two numbers"),
    "edges": (lambda: samplers.Grid([1, 0], 3), "the block edges are 3; give a sequence of whole numbers"),
    "half edges": (
        lambda: samplers.Grid([1, 0], [0, 1.0]),
        "the block edges are \\[0, 1.0\\]; give a sequence of whole numbers",
    ),
    "a target": (lambda: continuum(TABLE, "chain"), "the target is 'chain'; it must be one of ode, sde"),
    "a table": (lambda: continuum(None, "ode"), "the table is None; it must be a Table"),
    "fine steps": (lambda: continuum(TABLE, "ode", 1e3), "the number of fine steps is 1000.0; it must be a whole number"),
    "one fine step": (
        lambda: continuum(TABLE, "ode", 1),
        "the number of fine steps is 1; it must be a whole number, at least 2",
    ),
    "spacing": (lambda: samplers.euler(SCHEDULE, 5, karras="yes"), "karras is 'yes'; it must be True or False"),
    "spacing, heun": (lambda: samplers.heun(SCHEDULE, 5, karras=1), "karras is 1; it must be True or False"),
    "spacing, 2m": (lambda: samplers.dpmpp_2m(SCHEDULE, 5, karras=None), "karras is None; it must be True or False"),
    "order": (lambda: samplers.dpmpp_2m(SCHEDULE, 5, lower_order_final=0), "lower_order_final is 0; it must be True or False"),
    "an end": (lambda: samplers.ddim(SCHEDULE, 5, set_alpha_to_one="no"), "set_alpha_to_one is 'no'; it must be True or False"),
    "epsilon": (lambda: samplers.ddim(SCHEDULE, 5, clipped_epsilon="no"), "clipped_epsilon is 'no'; it must be True or False"),
    "a prediction": (lambda: samplers.ddim(SCHEDULE, 5, prediction=TABLE), "prediction is Table 'ddim'.*; it must be one of"),
    "volatility": (
        lambda: samplers.exponential_integrator(
            variance_preserving(SCHEDULE), samplers.uniform_grid(0.4, 0.1, 1, 2), volatility="1"
        ),
        "the volatility is '1'; it must be 0",
    ),
    "a process": (lambda: samplers.exponential_integrator(SCHEDULE, None), "the process is .*; it must be a Process"),
    "a schedule": (lambda: variance_preserving(TABLE), "the schedule is .*; it must be a Schedule"),
    "noise levels": (lambda: variance_exploding("1", 2), "the noise levels are '1' to 2; they must be above 0"),
    "a flow": (lambda: rectified_flow(None), "the flow has None training steps"),
    "a limit": (lambda: Clip(None), "the clipping limit is None; it must be positive"),
    "a ratio": (lambda: DynamicThreshold("1"), "the thresholding ratio is '1'; it must be above 0 and at most 1"),
    "a maximum": (lambda: DynamicThreshold(0.9, math.nan), "the thresholding maximum is nan; it must be at least 1"),
    "sweeps": (lambda: piadm_sde(1, sweeps=False, tolerance=TABLE), "got sweeps = False and tolerance = Table 'ddim'"),
    "a device": (
        lambda: next(solve(TABLE, Keyed(SHAPE), jacobi(), device=b"\x80")),
        "the device is .*, which is not available here",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_one_sentence(name: str) -> None:
    call, sentence = FOUND[name]
    with pytest.raises(ValueError, match=sentence) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_numbers_of_numpy_are_numbers() -> None:
    given = np.float32(0.25), np.float32(0.0625)
    assert torch.equal(samplers.log_snr_grid(*given, 1, 3).u, samplers.log_snr_grid(*map(float, given), 1, 3).u)
    assert torch.equal(karras_ratios(*given[::-1], np.int64(3)), karras_ratios(*map(float, given[::-1]), 3))


@pytest.mark.parametrize("name", FACES)
def test_fractions_are_numbers_or_refused(name: str) -> None:
    face = FACES[name]

    @settings(max_examples=4, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(fitting(face))
    def call(chosen: dict[str, Any]) -> None:
        for argument, value in chosen.items():
            if isinstance(value, float) and math.isfinite(value):
                check(face, chosen | {argument: Fraction(value)})

    call()


def test_the_check_sees_what_is_wrong() -> None:
    def raises(error: Exception) -> Face:
        def call() -> None:
            raise error

        return Face(call)

    for error in (
        TypeError("a"),
        KeyError("a"),
        ValueError(""),
        ValueError("a\nb"),
        ValueError("a at 0x7f"),
        ValueError("a" * 9999),
    ):
        with pytest.raises(AssertionError):
            check(raises(error), {})
    check(raises(ValueError("a sentence")), {})

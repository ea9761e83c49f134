# SPDX-License-Identifier: Apache-2.0
"""Loops whose states have 16 bits: how far the plain call's sample may be, whose states are rounded in each step, is told."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny import CASES

from paradiff import parallelize, parasolver

CALL: dict[str, Any] = {"num_inference_steps": 20}
TOLD = re.compile(r"rounds its states to (b?float16) in each step, .* may differ by ([\d.e+-]+) more than is told")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd", "sd_euler_ancestral", "sd_dpmpp_2m"])
def test_the_plain_calls_sample_is_as_near_as_is_told(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    plain = case.run(case.make().to(dtype), 3, **CALL).float()
    with parallelize(pipe := case.make().to(dtype), parasolver(window=6)) as run:
        found = case.run(pipe, 3, **CALL).float()
    report = run.report
    said = [match for match in map(TOLD.search, report.warnings) if match is not None]
    assert [match[1] for match in said] == [str(dtype).removeprefix("torch.")]
    error = float((found - plain).square().mean().sqrt())
    assert 2 * report.error_estimate.estimated_error < error  # which is why it is told
    assert error <= 2 * report.error_estimate.estimated_error + float(said[0][2])


def test_nothing_is_told_of_states_of_32_bits() -> None:
    with parallelize(pipe := CASES["sd"].make(), parasolver(window=6)) as run:
        CASES["sd"].run(pipe, 3, **CALL)
    assert not [note for note in run.report.warnings if TOLD.search(note)]

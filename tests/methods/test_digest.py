# SPDX-License-Identifier: Apache-2.0
"""No number moves unseen: every table under every method gives the recorded rounds, evaluations and samples (digest.py)."""

from __future__ import annotations

import json

import pytest
import torch
from digest import COUNTED_BY_CHANCE, FILE, NOISE, UNIT, cases, hashed, offset_of, solve

RECORDED = json.loads(FILE.read_text())
CASES = cases()


def test_every_table_and_method_is_recorded() -> None:
    assert list(RECORDED) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_rounds_evaluations_and_samples_are_those_recorded(name: str) -> None:
    found = solve(*CASES[name])
    rounds, evaluations, offset, digest = RECORDED[name]
    if name not in COUNTED_BY_CHANCE:
        assert (found.rounds, found.evaluations) == (rounds, evaluations)
    assert hashed(found.sample, offset) == digest


def test_the_hash_bears_the_noise_of_processors_and_sees_a_change_of_a_unit() -> None:
    values = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    offset = offset_of(values)
    assert hashed(values + NOISE, offset) == hashed(values - NOISE, offset) == hashed(values, offset)
    changed = values.clone()
    changed[7] += UNIT
    assert hashed(changed, offset) != hashed(values, offset)

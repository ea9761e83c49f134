# SPDX-License-Identifier: Apache-2.0
"""Loops that hold more than a chain are followed or refused for their reason, and plain ones run in parallel (adversary.py)."""

from __future__ import annotations

import pytest
from adversary import Loop, judged, sampled

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy

LOOPS = sampled(84, 11)
"""A part of the full product, for its time; `python tests/pipelines/adversary.py` takes a larger one."""


@pytest.mark.parametrize("loop", LOOPS, ids=str)
def test_no_loop_is_silently_wrong_and_none_is_refused_without_its_reason(loop: Loop) -> None:
    verdict = judged(loop)
    assert verdict.kind in ("parallel", "refused", "skipped"), verdict.text

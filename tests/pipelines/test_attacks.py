# SPDX-License-Identifier: Apache-2.0
"""A quarter of the loops of attacks.py, and all of its networks: none is silently wrong."""

from __future__ import annotations

import pytest
from attacks import ATTACKS, METHODS, NETWORKS, judged

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy

CHOSEN = [*list(ATTACKS)[::4], *NETWORKS]


@pytest.mark.parametrize("name", CHOSEN)
def test_it_gives_the_plain_sample_or_the_plain_call(name: str) -> None:
    verdict = judged(name, METHODS["fine"](), "auto")
    assert verdict.kind in ("parallel", "refused"), verdict.text

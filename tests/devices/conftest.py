# SPDX-License-Identifier: Apache-2.0
"""The tests of this folder run on the device double, and are skipped where it cannot be compiled."""

from __future__ import annotations

import double
import pytest


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    """The first device of the double."""
    reason = double.missing()
    if reason is not None:
        pytest.skip(reason)
    double.load()
    return "pseudo"

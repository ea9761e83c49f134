# SPDX-License-Identifier: Apache-2.0
"""The simulation of several devices, on runs whose clock is known."""

from __future__ import annotations

import pytest
from cluster import STATED, Trace, linear, simulated

FREE = (0.0, 0.0)


@pytest.mark.parametrize(("devices", "seconds"), [(1, 8 + 5 + 1), (2, 1 + 4 + 3 + 1), (4, 1 + 2 + 2 + 1), (16, 1 + 1 + 1 + 1)])
def test_a_round_takes_as_long_as_its_longest_share(devices: int, seconds: float) -> None:
    # One second a row, and one call of the first row where there are several devices to compare.
    assert simulated(Trace((8, 5, 1)), devices, linear(0.0, 1.0), FREE) == seconds


def test_rows_that_are_evaluated_again_cost_every_device_a_call() -> None:
    trace = Trace((4, -1, -3), (5,))
    assert simulated(trace, 4, linear(0.0, 1.0), FREE) == 1 + 1 + 1 + 3 + 2  # the last five are dealt out
    assert simulated(trace, 4, linear(1.0, 1.0), FREE) == 2 + 2 + 2 + 4 + 3  # one call of three rows
    assert simulated(trace, 1, linear(0.0, 1.0), FREE) == 4 + 1 + 3 + 5
    assert trace.calls == (4, 1, 3, 5)
    assert (trace.rounds, trace.evaluations, trace.unchecked.rows) == (1, 4, (4,))


def test_each_round_has_its_overhead() -> None:
    assert simulated(Trace((4, 4)), 1, linear(0.0, 1.0), (0.5, 0.25)) == 8 + 2 * 0.5 + 8 * 0.25


def test_the_sequential_chain_gains_nothing_from_devices() -> None:
    for curve in STATED.values():
        plain = Trace((1,) * 50)
        assert simulated(plain, 8, curve, FREE) == pytest.approx(simulated(plain, 1, curve, FREE) + curve(1))

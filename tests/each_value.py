# SPDX-License-Identifier: Apache-2.0
"""Cases of parametrised tests in which each value of each parameter is found, in place of all combinations of values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def with_each_value(cases: Iterable[tuple[str, Mapping[str, int]]]) -> list[bool]:
    """Whether each case holds a value that no case of its test before it held; those without parameters do.

    Args:
        cases: Of each case its test's name, and the place of each parameter's value among those it is given.
    """
    seen: set[tuple[str, str, int]] = set()
    kept: list[bool] = []
    for test, places in cases:
        values = {(test, parameter, place) for parameter, place in places.items()}
        kept.append(not values or not values <= seen)
        seen |= values
    return kept

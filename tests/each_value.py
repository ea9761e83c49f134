# SPDX-License-Identifier: Apache-2.0
"""Cases of parametrised tests in which each value of each parameter is found, in place of all combinations of values."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

import pytest


def with_each_value(cases: Iterable[tuple[str, Mapping[str, Hashable]]]) -> list[bool]:
    """Whether each case holds a value that no case of its test before it held; those without parameters do.

    Args:
        cases: Of each case its test's name, and what tells each parameter's value from others that it is given.
    """
    seen: set[tuple[str, str, Hashable]] = set()
    kept: list[bool] = []
    for test, parameters in cases:
        values = {(test, parameter, value) for parameter, value in parameters.items()}
        kept.append(not values or not values <= seen)
        seen |= values
    return kept


def given(item: pytest.Function) -> dict[str, tuple[int, ...]]:
    """The values of each `parametrize` in a test's case, and of each parametrised fixture, by their identity."""
    if not hasattr(item, "callspec"):
        return {}
    values, found = dict(item.callspec.params), {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else mark.args[0]
        found[",".join(names)] = tuple(id(values.pop(name)) for name in names)
    return found | {name: (id(value),) for name, value in values.items()}

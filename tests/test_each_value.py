# SPDX-License-Identifier: Apache-2.0
"""`--each-value` runs each value of each parameter, and fewer cases than there are combinations."""

from __future__ import annotations

import itertools

import pytest
from each_value import given, with_each_value


@pytest.mark.parametrize("sizes", [(3, 4), (4, 3), (2, 5, 3), (6,)])
def test_each_value_is_in_a_case_that_is_kept(sizes: tuple[int, ...]) -> None:
    names = [f"p{n}" for n in range(len(sizes))]
    for order in itertools.permutations(range(len(sizes))):  # the outermost parameter is another each time
        grid = itertools.product(*(range(sizes[n]) for n in order))
        cases = [("one", {names[n]: place for n, place in zip(order, places, strict=True)}) for places in grid]
        found = [places for (_, places), kept in zip(cases, with_each_value(cases), strict=True) if kept]
        for name, size in zip(names, sizes, strict=True):
            assert {places[name] for places in found} == set(range(size))
        assert len(found) == sum(sizes) - len(sizes) + 1


def test_values_of_another_test_and_tests_without_parameters_do_not_count() -> None:
    assert with_each_value([("one", {"p": 0}), ("other", {"p": 0}), ("third", {}), ("third", {}), ("one", {"p": 0})]) == [
        *[True] * 4,
        False,
    ]


@pytest.fixture(params=["one", "other"])
def fixed(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("low", "high"), [(1, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("kind", [int, float])
def test_values_are_known_by_what_they_are_and_those_given_together_are_one(
    low: int, high: int, kind: type, fixed: str, request: pytest.FixtureRequest
) -> None:
    assert given(request.node) == {"low,high": (id(low), id(high)), "kind": (id(kind),), "fixed": (id(fixed),)}
    same = [item for item in request.session.items if getattr(item, "originalname", "") == request.node.originalname]
    assert len({tuple(given(item).items()) for item in same}) == len(same)

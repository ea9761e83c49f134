# SPDX-License-Identifier: Apache-2.0
"""Arguments of the wrong kind are refused by a sentence: the argument, what was given, what was expected."""

from __future__ import annotations

import ast
import importlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import TABLES

import paradiff
from paradiff.errors import (
    are_whole,
    is_whole,
    refuse_unknown,
    require_between,
    require_one_of,
    require_real,
    require_whole,
    shown,
)


@pytest.mark.parametrize("value", [1, 7, np.int64(3)])
def test_whole_numbers_pass(value: object) -> None:
    assert is_whole(value)
    require_whole("the window", value, 1)
    assert are_whole([value, value])
    require_real("the tolerance", value, positive=True)


@pytest.mark.parametrize("value", [16.5, 8.0, "8", True, None, 0, -1, [8]])
def test_what_is_no_whole_number_of_the_range_is_refused(value: object) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"the window is {value!r}; it must be a whole number, at least 1, or None for all")
    ):
        require_whole("the window", value, 1, ", or None for all")


@pytest.mark.parametrize("value", ["12", b"12", bytearray(2), [1, 2.5], [True], None, 2.5, np.ones(2, int), torch.ones(2)])
def test_what_is_no_sequence_of_whole_numbers_is_none(value: object) -> None:
    assert not are_whole(value)


def test_a_whole_number_above_the_most_is_refused() -> None:
    require_whole("secants", 1000, 0, most=1000)
    with pytest.raises(ValueError, match=r"^secants is 10{30}; it must be a whole number, at least 0 and at most 1000$"):
        require_whole("secants", 10**30, 0, most=1000)


@pytest.mark.parametrize(("sign", "digits"), [(1, 400), (-1, 400), (1, 5000)])
def test_numbers_that_no_float_holds_are_refused(sign: int, digits: int) -> None:
    with pytest.raises(ValueError, match=r"the tolerance is an int of \d+ bits; it must be a number, 0 or more, and finite"):
        require_real("the tolerance", sign * 10**digits)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("abc", "'abc'"),
        (2.5, "2.5"),
        (torch.zeros(3, 4), "a Tensor of shape (3, 4) and torch.float32"),
        (np.zeros(3), "an array of shape (3,) and float64"),
        (TABLES["ddim"], repr(TABLES["ddim"]).splitlines()[0][:60].rstrip() + "..."),
        ("a" * 100, "'" + 59 * "a" + "..."),
    ],
)
def test_a_sentence_shows_a_value_in_one_short_line(value: object, wanted: str) -> None:
    assert shown(value) == wanted
    with pytest.raises(ValueError, match=re.escape(f"rule is {wanted}; it must be one of error, change")):
        refuse_unknown("rule", value, ["error", "change"])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", ["1e-3", None, True, math.nan, math.inf, -1.0, 1j])
def test_what_is_no_number_of_the_range_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"the tolerance is {value!r}; it must be a number, 0 or more, and finite")):
        require_real("the tolerance", value)


def test_zero_passes_unless_a_positive_number_is_asked_for() -> None:
    require_real("the tolerance", 0.0)
    with pytest.raises(ValueError, match=r"the tolerance is 0\.0; it must be a number, positive, and finite, or None"):
        require_real("the tolerance", 0.0, positive=True, otherwise=", or None")


@pytest.mark.parametrize("value", ["0.5", None, True, math.nan, -0.1, 1.1])
def test_what_is_no_number_between_two_is_refused(value: object) -> None:
    require_between("the share", 0, 0, 1)
    require_between("the share", np.float32(1), 0, 1)
    with pytest.raises(ValueError, match=re.escape(f"the share is {value!r}; it must be a number, from 0 to 1")):
        require_between("the share", value, 0, 1)


def test_infinity_lies_between_no_two_numbers() -> None:
    with pytest.raises(ValueError, match=r"caution is inf; it must be a number, at least 1, and finite"):
        require_between("caution", math.inf, 1, math.inf)


@pytest.mark.parametrize("value", ["slow", None, 1, ["error"]])
def test_what_is_no_choice_is_refused(value: object) -> None:
    require_one_of("rule", "error", ("error", "change"))
    with pytest.raises(ValueError, match=re.escape(f"rule is {value!r}; it must be one of error, change")):
        require_one_of("rule", value, ("error", "change"))


def advised() -> set[str]:
    """Every `paradiff.<name>` in a string of the package."""
    sources = Path(paradiff.__file__).parent.rglob("*.py")
    strings = (n.value for p in sources for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.Constant))
    return {name for s in strings if isinstance(s, str) for name in re.findall(r"\bparadiff((?:\.[A-Za-z_]\w*)+)", s)}


def test_every_name_that_a_sentence_gives_exists() -> None:
    assert ".slopes.identity" in advised()
    for name in advised():
        found: Any = paradiff
        for part in name[1:].split("."):
            found = getattr(found, part) if hasattr(found, part) else importlib.import_module(f"{found.__name__}.{part}")

# SPDX-License-Identifier: Apache-2.0
"""The tuned numbers are documented one by one, refuse what is out of their range, and are none of the modules' own."""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from paradiff.methods.collocation import control
from paradiff.methods.collocation.control import (
    DIFFERENCES,
    HIGHER_ORDER,
    NARROW,
    ORDER_ZERO,
    SHORT,
    SHORT_WIDE,
    CollocationControl,
    DefectControl,
    ErrorControl,
    Falloff,
    MeshControl,
    StoreControl,
)

OBJECTS: list[Any] = [ORDER_ZERO, HIGHER_ORDER, NARROW, SHORT, SHORT_WIDE, DIFFERENCES]
PARTS: list[Any] = [
    part for whole in OBJECTS for part in (whole, whole.mesh, whole.mesh.noise_side, whole.store, whole.defect, whole.error)
]
CLASSES = [CollocationControl, DefectControl, ErrorControl, Falloff, MeshControl, StoreControl]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_number_is_documented(cls: Any) -> None:
    assert [f.name for f in fields(cls) if f"    {f.name}: " not in cls.__doc__] == []


@pytest.mark.parametrize("name", [f"{type(p).__name__}.{f.name}" for p in PARTS[:6] for f in fields(p)])
@pytest.mark.parametrize("bad", ["1", None, float("nan"), True])
def test_a_number_of_the_wrong_kind_is_refused_by_its_name(name: str, bad: Any) -> None:
    part = next(p for p in PARTS if type(p).__name__ == name.split(".")[0])
    field = name.split(".")[1]
    with pytest.raises(ValueError, match=rf"^{field} is .*; it must be"):
        replace(part, **{field: bad})


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        (ORDER_ZERO, {"handover_share": 1.5}, "handover_share is 1.5; it must be a number, from 0 to 1"),
        (ORDER_ZERO, {"iteration_share": 0.0}, "iteration_share is 0.0; it must be a number, positive"),
        (ORDER_ZERO, {"order": 9}, "order is 9; it must be a number, from 0 to 8"),
        (HIGHER_ORDER, {"variance_margin": 0.5}, "variance_margin is 0.5; it must be a number, at least 1"),
        (HIGHER_ORDER.mesh, {"level_growth": 1}, "level_growth is 1; it must be above 1, or the search does not end"),
    ],
    ids=str,
)
def test_a_number_out_of_its_range_is_refused(part: Any, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(part, **changes)


def test_no_module_of_the_room_has_a_number_of_its_own() -> None:
    found = []
    for path in Path(control.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            constants = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
            if isinstance(node, ast.Assign) and any(isinstance(value, int | float) for value in constants):
                found += [target.id for target in node.targets if isinstance(target, ast.Name)]
    of_the_store = ["MOST_BYTES", "PATIENCE"]
    assert sorted(found) == sorted(
        ["DIFFERENCES", "HIGHER_ORDER", "NARROW", "ORDER_ZERO", "SHORT", "SHORT_WIDE", *of_the_store]
    )

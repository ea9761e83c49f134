# SPDX-License-Identifier: Apache-2.0
"""Every argument of every preset refuses a value of the wrong kind by a sentence that names the argument and the value."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest

from paradiff import jacobi, paradigms, parasolver, piadm_ode, piadm_sde, quasi_newton, sequential, srds
from paradiff.methods.parareal.method import PararealMethod
from paradiff.methods.window.corrector import underdamped_langevin
from paradiff.methods.window.method import WindowMethod

PRESETS: dict[str, Callable[..., Any]] = {
    "sequential": sequential,
    "jacobi": jacobi,
    "paradigms": paradigms,
    "parasolver": parasolver,
    "quasi_newton": quasi_newton,
    "srds": srds,
    "piadm_sde": piadm_sde,
    "piadm_ode": piadm_ode,
    "underdamped_langevin": underdamped_langevin,
}
NEEDED = {"piadm_sde": {"blocks": 2}, "piadm_ode": {"blocks": 2}}

WHOLE = (16.5, "8", True, math.nan, [8])
NUMBER = ("1e-3", True, math.nan, [0.1], 1j)
SEVERAL = (16.5, "8", True, math.nan, [2.5, 1], ["2"], {2: 3})
CHOICE = ("nothing", 1, True, 2.5, ["error"])
SLOPE = ("identity", 1, 2.5, True, [1.0])
WRONG: dict[str, tuple[Any, ...]] = {
    "window": WHOLE,
    "tolerance": NUMBER,
    "stride": SEVERAL,
    "warmup": WHOLE,
    "slope": SLOPE,
    "rule": CHOICE,
    "secants": WHOLE,
    "blocks": SEVERAL,
    "coarse": ("three step", 1.5, True, math.nan, [1.5], {}),
    "ordering": CHOICE,
    "iterations": WHOLE,
    "rows": WHOLE,
    "sweeps": WHOLE,
    "predictor": CHOICE,
    "stagger": WHOLE,
    "carry": ("yes", 1, None),
    "corrector": (4, "4x4", True),
    "steps": WHOLE,
    "friction": NUMBER,
    "step": NUMBER,
    "lipschitz": NUMBER,
}
CASES = [
    (preset, argument, value)
    for preset, make in PRESETS.items()
    for argument in inspect.signature(make).parameters
    for value in WRONG[argument]
]


@pytest.mark.parametrize(("preset", "argument", "value"), CASES)
def test_a_value_of_the_wrong_kind_is_refused_by_a_sentence(preset: str, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument) as found:
        PRESETS[preset](**(NEEDED.get(preset, {}) | {argument: value}))
    sentence = str(found.value)
    assert repr(value) in sentence
    assert "; it must be " in sentence or "; a sub-interval must have " in sentence or "; give " in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("method", [WindowMethod, PararealMethod])
@pytest.mark.parametrize("value", [None, {}, 1.75])
def test_a_control_of_the_wrong_kind_is_refused(method: type, value: Any) -> None:
    with pytest.raises(ValueError, match=r"control is .*; it must be a (Window|Parareal)Control"):
        method("mine", control=value)

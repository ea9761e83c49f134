# SPDX-License-Identifier: Apache-2.0
"""Every argument of every preset refuses a value of the wrong kind by a sentence that names the argument and the value."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import TABLES

from paradiff import (
    Keyed,
    chords,
    collocation,
    jacobi,
    paradigms,
    parasolver,
    parataa,
    piadm_ode,
    piadm_sde,
    quasi_deer,
    quasi_newton,
    sample,
    sequential,
    srds,
)
from paradiff.errors import shown
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
    "collocation": collocation,
    "piadm_sde": piadm_sde,
    "piadm_ode": piadm_ode,
    "parataa": parataa,
    "quasi_deer": quasi_deer,
    "chords": chords,
    "underdamped_langevin": underdamped_langevin,
}
NEEDED = {"piadm_sde": {"blocks": 2}, "piadm_ode": {"blocks": 2}}

ARRAYS = (np.ones(3), np.ones((2, 2), int), torch.ones(3))
WHOLE = (16.5, "8", True, math.nan, [8], *ARRAYS)
NUMBER = ("1e-3", True, math.nan, [0.1], 1j, np.ones(3), torch.ones(3))
SEVERAL = (16.5, "8", True, math.nan, [2.5, 1], ["2"], {2: 3}, b"12", "abc", *ARRAYS)
CHOICE = ("nothing", 1, True, 2.5, ["error"], *ARRAYS)
SLOPE = ("identity", 1, 2.5, True, [1.0], int, torch.Tensor)
WRONG: dict[str, tuple[Any, ...]] = {
    "window": WHOLE,
    "tolerance": NUMBER,
    "stride": SEVERAL,
    "warmup": WHOLE,
    "slope": SLOPE,
    "rule": CHOICE,
    "secants": WHOLE,
    "blocks": SEVERAL,
    "coarse": ("three step", 1.5, True, math.nan, [1.5], {}, int, b"12", np.ones(3)),
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
    "nodes": ("few", 2.5, True, math.nan, [0.5], b"12", *ARRAYS),
    "order": WHOLE,
    "cores": WHOLE,
    "probes": WHOLE,
    "starts": SEVERAL,
    "answers": WHOLE,
    "history": WHOLE,
    "neighbours": WHOLE,
    "neighbour_damping": NUMBER,
    "noise_tolerance": NUMBER,
    "ridge": NUMBER,
    "shift": ("own", True, math.nan, [0.1], np.ones(3), torch.ones(3)),
    "max_nodes": WHOLE,
    "exact": ("yes", 1, None, np.ones(3)),
    "target": CHOICE,
    "warm_start": (5, True, [1], np.ones(3)),
    "control": (1, "tight", np.ones(3)),
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
    assert shown(value) in sentence
    assert "; it must be " in sentence or "; a sub-interval must have " in sentence or "; give " in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("method", [WindowMethod, PararealMethod])
@pytest.mark.parametrize("value", [None, {}, 1.75])
def test_a_control_of_the_wrong_kind_is_refused(method: type, value: Any) -> None:
    with pytest.raises(ValueError, match=r"control is .*; it must be a (Window|Parareal)Control"):
        method("mine", control=value)


@pytest.mark.parametrize("preset", [quasi_newton, collocation])
def test_more_secants_than_any_sample_could_use_are_refused(preset: Callable[..., Any]) -> None:
    assert preset(secants=1000).secants == 1000
    with pytest.raises(ValueError, match=r"secants is 10{30}; it must be a whole number, at least 0 and at most 1000"):
        preset(secants=10**30)


@pytest.mark.parametrize("preset", [jacobi, paradigms, parasolver, quasi_newton, srds, collocation])
def test_a_tolerance_is_a_float_whatever_was_given(preset: Callable[..., Any]) -> None:
    for value in (1, 10**30, np.float32(0.5), np.int64(2)):
        method = preset(tolerance=value)
        assert type(method.tolerance) is float
        assert method.tolerance == float(value)
    with pytest.raises(ValueError, match=r"the tolerance is an int of 1329 bits; it must be a number"):
        preset(tolerance=10**400)


@pytest.mark.parametrize("preset", [paradigms, srds])
def test_a_huge_tolerance_is_one(preset: Callable[..., Any]) -> None:
    table, noise = TABLES["ddim"], Keyed((2,), 0)
    found = sample(lambda x, t: x, table, noise, preset(tolerance=10**30))
    assert found.sample.isfinite().all()


@pytest.mark.parametrize("rule", ["x", "sweeps", "sample"])
def test_a_preset_offers_the_rules_that_it_takes(rule: Any) -> None:
    with pytest.raises(ValueError, match=rf"^rule is '{rule}'; it must be one of error, change$"):
        parasolver(rule=rule)


def test_huge_strides_and_iterations_are_refused_or_planned() -> None:
    with pytest.raises(ValueError, match="the strides add up to"):
        parasolver(stride=[10**30, 1]).edges(TABLES["ddim"])
    assert srds(iterations=10**400).planned(12) == 12

# SPDX-License-Identifier: Apache-2.0
"""Methods side by side: counts and errors are those of runs made by hand, each sample alone or all in one batch."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import paradiff
from paradiff.planning import Compared, Comparison, Effectivity, LatencyCurve, SampleCost, compare
from paradiff.samplers import ddim, ddpm

MODEL = paradiff.models.Mixture(
    torch.tensor([0.5, 0.5]), torch.tensor([[-0.8, 0.1, 0.3], [0.7, -0.2, 0.4]]), torch.tensor([0.02, 0.03])
)
SCHEDULE = paradiff.Schedule.linear()
TABLE = ddim(SCHEDULE, 20)
NOISE = paradiff.Keyed((3,), samples=3)
METHODS = {"window 4": paradiff.parasolver(4), "srds": paradiff.srds()}
CURVE = LatencyCurve({1: 1.0, 4: 1.3, 16: 3.0})


@pytest.fixture(scope="module")
def alone() -> Comparison:
    return compare(MODEL.denoiser(TABLE), TABLE, NOISE, METHODS, rivals={"10 steps": ddim(SCHEDULE, 10)}, curve=CURVE)


def rms(gap: Tensor) -> list[float]:
    return gap.double().square().mean(1).sqrt().tolist()


def by_hand(method: paradiff.Method, table: paradiff.Table = TABLE) -> paradiff.Solution:
    return paradiff.sample(MODEL.denoiser(table), table, NOISE, method)


@pytest.mark.parametrize("label", METHODS)
def test_a_row_is_what_runs_by_hand_give(alone: Comparison, label: str) -> None:
    found, wanted = alone[label], by_hand(METHODS[label])
    reference = by_hand(paradiff.sequential()).sample
    unit = float(reference.double().std())
    assert alone.unit == pytest.approx(unit)
    assert [s.error for s in found.samples] == pytest.approx([e / unit for e in rms(wanted.sample - reference)], abs=1e-5)
    assert [s.rounds for s in found.samples] == [e.rounds for e in wanted.error_estimates]
    assert [s.evaluations for s in found.samples] == [e.evaluations for e in wanted.error_estimates]
    estimates = [e.estimated_error / unit for e in wanted.error_estimates]
    assert [s.estimated_error for s in found.samples] == pytest.approx(estimates, rel=1e-3, abs=1e-5)
    assert all(sum(s.widths) == s.evaluations and len(s.widths) == s.rounds for s in found.samples)


def test_the_effectivity_of_a_row_is_that_of_its_samples() -> None:
    pairs = [(4e-3, 1e-3), (4e-3, 2e-4), (1e-3, 2e-3), (0.0, 1e-7), (3e-3, 0.0)]  # indices 4, 20, 0.5, 1 and 1500
    found = Effectivity.of(pairs)
    assert (found.median, found.within, found.below) == (pytest.approx(4), pytest.approx(2 / 5), pytest.approx(1 / 5))
    samples = [SampleCost(1, 1, error, estimate, (1,), 1.0) for estimate, error in pairs]
    row = Compared("", "", samples, "converged")
    assert row.effectivity == found
    assert row.held == pytest.approx(1 - found.below)
    assert Effectivity.of([(math.inf, 1.0)]).to_json() == {"median": None, "within": 0, "below": 0}


def test_a_gain_is_that_of_the_curve(alone: Comparison) -> None:
    row = alone["window 4"]
    seconds = sum(CURVE(w) for s in row.samples for w in s.widths)
    assert alone.gain(row) == pytest.approx(3 * TABLE.steps / seconds)
    assert alone.gain(alone["sequential"]) == 1


def test_a_rival_begins_at_the_same_noise(alone: Comparison) -> None:
    row = alone["10 steps"]
    short = ddim(SCHEDULE, 10)
    wanted = paradiff.sample(MODEL.denoiser(TABLE), short, NOISE, paradiff.sequential()).sample
    errors = [e / alone.unit for e in rms(wanted - by_hand(paradiff.sequential()).sample)]
    assert [s.error for s in row.samples] == pytest.approx(errors, abs=1e-5)
    assert (row.rounds, row.held, row.effectivity) == (10, None, None)


def test_a_rival_may_have_a_model_of_its_own(alone: Comparison) -> None:
    short = ddim(SCHEDULE, 10)
    rivals = {"10 steps": (short, MODEL.denoiser(short)), "zero": (short, lambda x, t: 0 * x)}
    found = compare(MODEL.denoiser(TABLE), TABLE, NOISE, METHODS, rivals=rivals)
    assert [s.error for s in found["10 steps"].samples] == pytest.approx([s.error for s in alone["10 steps"].samples])
    assert found["zero"].error_max > 10 * found["10 steps"].error_max


def test_in_one_batch_the_counts_are_the_same(alone: Comparison) -> None:
    batch = compare(MODEL.denoiser(TABLE), TABLE, NOISE, METHODS, alone=False)
    for label in METHODS:
        assert [s.rounds for s in batch[label].samples] == [s.rounds for s in alone[label].samples]
    assert max(batch["window 4"].samples[0].widths) == 12
    assert batch.gain(batch["window 4"]) > 0


def test_conditioning_stays_with_its_sample() -> None:
    def model(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return 0.5 * x + shift

    evaluator = paradiff.Evaluator(model, conditioning={"shift": torch.tensor([[0.0], [1.0], [5.0]])})
    found = compare(evaluator, TABLE, NOISE, METHODS)
    assert all(s.error < 1e-2 for label in METHODS for s in found[label].samples)
    together = compare(evaluator, TABLE, NOISE, METHODS, alone=False)
    assert together.unit == pytest.approx(found.unit, rel=1e-5)


def test_recorded_draws_of_a_stochastic_chain() -> None:
    table = ddpm(SCHEDULE, 20)
    noise = paradiff.Recorded((3,), [torch.Generator().manual_seed(s) for s in range(2)])
    found = compare(MODEL.denoiser(table), table, noise, [paradiff.parasolver(tolerance=1e-6)])
    assert found.rows[1].error_max < 1e-5
    wanted = paradiff.sample(MODEL.denoiser(table), table, noise, paradiff.sequential()).sample
    assert found.unit == pytest.approx(float(wanted.double().std()))


def test_the_fastest_and_the_undominated(alone: Comparison) -> None:
    assert alone.best(1e9) is max(alone.rows, key=alone.gain)
    assert alone.best(1e-12).label == "sequential"
    front = alone.pareto()
    gains, errors = [alone.gain(row) for row in front], [row.error_max for row in front]
    assert gains == sorted(gains, reverse=True)
    assert errors == sorted(errors, reverse=True)
    assert front[-1].label == "sequential"


def test_a_method_that_does_not_fit_is_named_with_its_reason() -> None:
    found = compare(MODEL.denoiser(TABLE), TABLE, NOISE, {**METHODS, "sde": paradiff.piadm_sde(4)})
    assert "stochastic chains" in found.refused["sde"]
    assert "sde: " in str(found)
    with pytest.raises(KeyError, match="no row is called 'sde'; rows are sequential, window 4, srds"):
        found["sde"]


def test_a_model_whose_rows_mix_shows_as_an_error() -> None:
    found = compare(lambda x, t: x - x.mean(0, keepdim=True), TABLE, NOISE, METHODS)
    assert found["window 4"].error_max > 0.01


def test_table_json_and_picture(alone: Comparison, tmp_path: Path) -> None:
    lines = str(alone).splitlines()
    assert len(lines) == 1 + len(alone.rows) + 1
    assert "each alone" in lines[-1]
    alone.save(tmp_path / "found.json")
    stored = json.loads((tmp_path / "found.json").read_text())
    assert [row["label"] for row in stored["rows"]] == [row.label for row in alone.rows]
    assert stored["rows"][1]["gain"] == pytest.approx(alone.gain(alone.rows[1]))
    assert stored["rows"][0]["decibels"] is None
    effectivity = alone.rows[1].effectivity
    assert effectivity is not None
    assert stored["rows"][1]["effectivity"] == effectivity.to_json()
    assert f"{effectivity.median:.1f}" in lines[2]
    assert stored["rows"][-1]["effectivity"] is None
    pytest.importorskip("matplotlib")
    alone.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes()[:4] == b"\x89PNG"
    assert "window 4" in repr(alone) or "srds" in repr(alone) or "10 steps" in repr(alone)


def test_decibels() -> None:
    found = Comparison("", [], {}, True, 1.0, 2.0)
    assert found.decibels(2e-3) == pytest.approx(60)
    assert math.isinf(found.decibels(0))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"methods": []}, "methods are"),
        ({"methods": "srds"}, "methods are 'srds'"),
        ({"methods": ["srds"]}, "the method is 'srds'"),
        ({"methods": [paradiff.srds(), paradiff.srds()]}, "was given twice"),
        ({"methods": {"sequential": paradiff.srds()}}, "a method's label is 'sequential'"),
        ({"methods": {1: paradiff.srds()}}, "a method's label is 1"),
        ({"rivals": [TABLE]}, "rivals are"),
        ({"rivals": {"srds": TABLE}}, "a rival is called 'srds'"),
        ({"rivals": {"other": 3}}, "a rival is 3"),
        ({"curve": {1: 1.0}}, "the latency curve is"),
        ({"unit": 0}, "the unit is 0"),
        ({"alone": 1}, "alone is 1"),
        ({"denoiser": 3}, "the model is 3"),
        ({"table": 3}, "the table is 3"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(given: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"denoiser": MODEL.denoiser(TABLE), "table": TABLE, "noise": NOISE, "methods": METHODS} | given
    with pytest.raises(ValueError, match=sentence):
        compare(**arguments)


def test_a_model_that_fails_on_the_chain_itself_fails() -> None:
    with pytest.raises(ValueError, match="the model returned"):
        compare(lambda x, t: x.sum(), TABLE, NOISE, METHODS)  # pyright: ignore[reportArgumentType]


def test_samples_that_are_all_alike_have_no_unit_of_errors() -> None:
    table = dataclasses.replace(TABLE, a=0 * TABLE.a, exact_levels=False)
    with pytest.raises(
        ValueError, match=r"^the sequential samples have a standard deviation of 0, in .*: give the unit of errors"
    ):
        compare(lambda x, t: 0 * x, table, NOISE, METHODS)
    assert compare(lambda x, t: 0 * x, table, NOISE, METHODS, unit=1.0)["srds"].samples[0].error == 0

# SPDX-License-Identifier: Apache-2.0
"""The latency curve: between its points, beyond them, from a text, and of a model whose calls take a known time."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

import paradiff
from paradiff.planning import LatencyCurve, measure_latency

TABLE = paradiff.samplers.ddim(paradiff.Schedule.linear(), 10)
NOISE = paradiff.Keyed((4,), samples=2)


@pytest.mark.parametrize(("rows", "seconds"), [(0, 0.0), (1, 1.0), (2, 1.2), (3, 1.4), (4, 1.6), (8, 2.4), (1.5, 1.1)])
def test_a_curve_is_straight_between_its_points_and_beyond(rows: float, seconds: float) -> None:
    assert LatencyCurve({4: 1.6, 1: 1.0, 2: 1.2})(rows) == pytest.approx(seconds)


def test_one_point_is_in_proportion() -> None:
    curve = LatencyCurve({2: 3.0})
    assert [curve(1), curve(2), curve(6)] == [1.5, 3.0, 9.0]
    assert curve.of_rounds([1, 2, 2]) == 7.5


def test_a_curve_that_falls_stays_positive() -> None:
    assert LatencyCurve({1: 1.0, 2: 0.5})(100) > 0


def test_a_curve_from_a_text() -> None:
    curve = LatencyCurve.of_text("1:1, 2:1.1,4:1.44")
    assert curve.points == {1: 1.0, 2: 1.1, 4: 1.44}
    assert "4: 1.44" in repr(curve)


@pytest.mark.parametrize("text", [None, "", "1", "1:a", "1:1,1:2", "1:1;2:2", "x:1"])
def test_texts_that_are_no_curve_are_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"give (a text of )?rows and seconds, such as 1:1,2:1\.1"):
        LatencyCurve.of_text(text)


@pytest.mark.parametrize("points", [{}, {0: 1.0}, {1: 0.0}, {1: float("nan")}, {1.5: 1.0}, [1, 2], None])
def test_points_that_are_none_are_refused(points: object) -> None:
    with pytest.raises(ValueError, match=r"latency|rows"):
        LatencyCurve(points)  # pyright: ignore[reportArgumentType]


def test_a_model_is_measured_where_its_calls_take_a_known_time() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        time.sleep(2e-3 if len(x) < 4 else 12e-3)
        return x

    evaluator = paradiff.Evaluator(model)
    curve = measure_latency(evaluator, TABLE, NOISE, rows=(1, 2, 4), seconds=0.2)
    assert [*curve.points] == [1, 2, 4]
    assert curve(4) > 2 * curve(2)
    assert curve(1) >= 2e-3
    assert curve.spread is not None
    assert set(curve.spread) == {1, 2, 4}
    assert (evaluator.rounds, evaluator.evaluations) == (0, 0)


def test_no_further_number_of_rows_is_begun_after_the_time() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        time.sleep(1e-2)
        return x

    assert [*measure_latency(model, TABLE, NOISE, rows=(1, 2, 4), seconds=1e-3).points] == [1]


def test_memory_bounds_the_curve() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > 4:
            raise torch.OutOfMemoryError
        return x

    curve = measure_latency(model, TABLE, NOISE, rows=(1, 4, 8, 16), seconds=0.2)
    assert [*curve.points] == [1, 4]
    assert curve.most == 4


@pytest.mark.parametrize("given", [{"rows": ()}, {"rows": (2, 1)}, {"rows": (0, 1)}, {"rows": (1, 1)}, {"seconds": 0}])
def test_other_numbers_are_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"rows are|seconds of the measurement"):
        measure_latency(lambda x, t: x, TABLE, NOISE, **given)  # pyright: ignore[reportArgumentType]

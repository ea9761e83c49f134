# SPDX-License-Identifier: Apache-2.0
"""The latency curve is measured once for a model, device, dtype, shape and version, and only its own file is believed."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import paradiff
from paradiff.planning import LatencyCurve, curve_of, measure_latency
from paradiff.planning.identity import curve_key
from paradiff.planning.store import FOLDER, Store, cache_folder

TABLE = paradiff.samplers.ddim(paradiff.Schedule.linear(), 10)
NOISE = paradiff.Keyed((4,))


class Network(nn.Module):
    """A network that counts its calls."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return x * self.first.weight.mean()


def found(network: Network, folder: Path, **more: Any) -> tuple[LatencyCurve, list[str], int]:
    """The curve, the notes, and how many calls it took."""
    before = network.calls
    curve, notes = curve_of(paradiff.Evaluator(network, **more), TABLE, NOISE, seconds=0.05, folder=folder)
    return curve, notes, network.calls - before


def file_of(folder: Path) -> Path:
    (path,) = folder.glob("curve-*.json")
    return path


def test_a_curve_is_measured_once(tmp_path: Path) -> None:
    network = Network()
    first, notes, calls = found(network, tmp_path / "new" / "folder")
    assert calls > 0
    assert notes == []
    second, notes, calls = found(network, tmp_path / "new" / "folder")
    assert (calls, notes) == (0, [])
    assert second.to_json() == first.to_json()
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == [file_of(tmp_path / "new" / "folder").name]


def test_other_models_shapes_and_dtypes_have_curves_of_their_own() -> None:
    network = Network()
    evaluators = [
        paradiff.Evaluator(network),
        paradiff.Evaluator(Network(5)),
        paradiff.Evaluator(network, dtype=torch.bfloat16),
        paradiff.Evaluator(network, conditioning={"y": torch.zeros(1, 2)}),
        paradiff.Evaluator(network, conditioning={"y": torch.zeros(1, 3)}),
        paradiff.Evaluator(lambda x, t: x),
        paradiff.Evaluator(lambda x, t: -x),
    ]
    keys = [curve_key(e, (1, 4)) for e in evaluators] + [curve_key(evaluators[0], (2, 4))]
    assert len({*keys}) == len(keys)
    assert curve_key(paradiff.Evaluator(Network()), (1, 4)) == keys[0]  # other weights are no other model


def test_functions_differ_by_the_plain_values_that_they_hold() -> None:
    def scaled(by: float) -> paradiff.Evaluator:
        return paradiff.Evaluator(lambda x, t: by * x)

    assert curve_key(scaled(1.0), (4,)) == curve_key(scaled(1.0), (4,)) != curve_key(scaled(2.0), (4,))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it cannot be read"),
        ("{", "it cannot be read"),
        ("\x00\xff", "it cannot be read"),
        ("[" * 100_000, "it cannot be read"),
        ("[1, 2]", "it does not say 'paradiff curve 1'"),
        ('{"format": "another program"}', "it does not say 'paradiff curve 1'"),
        ('{"format": "paradiff curve 1", "content": 3, "facts": {}}', "it has no content"),
        ("1" * 5_000_000, "it is too large"),
    ],
    ids=["empty", "cut", "bytes", "deep", "list", "foreign", "hollow", "large"],
)
def test_a_file_that_is_none_is_left_out_with_a_sentence(text: str, why: str, tmp_path: Path) -> None:
    network = Network()
    found(network, tmp_path)
    path = file_of(tmp_path)
    path.write_text(text)
    curve, notes, calls = found(network, tmp_path)
    assert calls > 0
    assert len(notes) == 1
    assert str(path) in notes[0]
    assert why in notes[0]
    assert found(network, tmp_path)[0].to_json() == curve.to_json()  # the file was replaced


@pytest.mark.parametrize("fact", ["device", "version of torch", "version of paradiff", "threads"])
def test_a_curve_of_another_device_or_version_is_left_out_with_a_sentence(fact: str, tmp_path: Path) -> None:
    network = Network()
    found(network, tmp_path)
    path = file_of(tmp_path)
    stored = json.loads(path.read_text())
    stored["facts"][fact] = "another"
    path.write_text(json.dumps(stored))
    _, notes, calls = found(network, tmp_path)
    assert calls > 0
    assert f"its {fact} is another, and here it is" in notes[0]


@pytest.mark.parametrize("points", [{}, {"1": -1.0}, {"1": float("nan")}, {"a": 1.0}, {"0": 1.0}, 3, None, {"1": "x"}])
def test_numbers_out_of_their_range_are_left_out_with_a_sentence(points: object, tmp_path: Path) -> None:
    network = Network()
    found(network, tmp_path)
    path = file_of(tmp_path)
    stored = json.loads(path.read_text())
    stored["content"]["points"] = points
    path.write_text(json.dumps(stored))
    _, notes, calls = found(network, tmp_path)
    assert calls > 0
    assert "was left out" in notes[0]


def test_a_folder_that_cannot_be_made_costs_a_sentence_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, notes, calls = found(Network(), tmp_path / "file" / "below")
    assert calls > 0
    assert "was not kept" in notes[0]


def damped(x: Tensor, t: Tensor) -> Tensor:
    """A network that answers to each row by itself."""
    return torch.sin(x) / 2


def test_an_entry_that_is_no_file_is_left_out_and_not_waited_for(tmp_path: Path) -> None:
    store = Store("curve", tmp_path)
    path = store.path("a")
    assert path is not None
    os.mkfifo(path)
    content, said = store.read("a", {})
    assert content is None
    assert said is not None
    assert "it is no regular file" in said


@pytest.mark.parametrize("name", ["a" * 300, "a" * 5000])
def test_a_folder_whose_name_is_too_long_costs_a_sentence_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, name)
    table = paradiff.samplers.ddim(paradiff.Schedule.linear(), 10)
    method, noise = paradiff.quasi_newton(), paradiff.Keyed((2,), 0)
    assert paradiff.sample(damped, table, noise, method).sample.shape == (1, 2)
    said = paradiff.calibrate(damped, table, method, range(20), shape=(2,)).notes
    assert "File name too long" in said[0]


def test_the_folder_of_an_unknown_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "~nobody-is-called-so/x")
    with pytest.raises(ValueError, match="PARADIFF_CACHE is '~nobody-is-called-so/x', and the home of that user is not known"):
        cache_folder()


def test_files_are_whole_whatever_is_written_at_once(tmp_path: Path) -> None:
    store = Store("curve", tmp_path)
    texts: list[str | None] = []

    def write(number: int) -> None:
        for _ in range(5):
            texts.append(store.write("key", {}, {"points": {"1": number}, "long": "x" * 10_000}))

    threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        content, notice = store.read("key", {})
        assert notice is None
        assert content is None or len(content["long"]) == 10_000
    for thread in threads:
        thread.join()
    assert texts == [None] * 20
    assert [p.name for p in tmp_path.iterdir()] == ["curve-key.json"]


def test_the_folder_is_the_users_or_named_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv(FOLDER, "")
    assert cache_folder() is None
    assert Store("curve").read("key", {}) == (None, None)
    assert Store("curve").write("key", {}, {}) is None
    monkeypatch.delenv(FOLDER)
    found = cache_folder()
    assert found is not None
    assert "paradiff" in str(found)


def test_a_model_that_fails_at_some_rows_ends_the_curve_at_the_largest_number_that_works() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        if len(x) > 6:
            raise RuntimeError("no more than six\nsecond line")
        return x

    curve = measure_latency(model, TABLE, NOISE, rows=(1, 4, 16), seconds=0.2)
    assert [*curve.points] == [1, 4]
    assert curve.most == 6
    assert curve.failed == "RuntimeError: no more than six"
    assert curve.within(12) == pytest.approx(2 * curve(6))
    assert curve.within(13) == pytest.approx(2 * curve(6) + curve(1))


def test_a_model_that_fails_on_one_row_fails_as_it_does() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure_latency(model, TABLE, NOISE, seconds=0.1)

# SPDX-License-Identifier: Apache-2.0
"""`paradiff bench`: rows at equal measured error, gone on with, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipelines import Cli

from paradiff.app.bench import LADDER, Wanted, tolerance_of, windows_of
from paradiff.planning.harness import contestants, family
from paradiff.solver.protocol import Method

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
SMALL = ["--problem", "mixture-2", "--chain", "flow:28", "--windows", "4", "--seeds", "1"]


def test_rows_are_measured_once_and_gone_on_with(cli: Cli, tmp_path: Path) -> None:
    found = cli("bench", "--out", str(tmp_path), *SMALL, "--method", "parasolver", "--curve", "1:1,4:2")
    assert found.code == 0
    assert "mixture-2, flow of 28 steps, window 4" in found.out
    first = json.loads((tmp_path / "bench.json").read_text())
    (row,) = first["rows"]
    assert (row["method"], row["window"], row["steps"], row["rival"]) == ("parasolver", 4, 28, False)
    assert row["equal"] is (row["error_max"] < 4e-3)
    assert row["tolerance"] in LADDER
    (one,) = row["samples"]
    assert row["effectivity"]["median"] == pytest.approx(one["estimated_error"] / max(one["error"], 2e-6))
    assert 28 / (2 * row["rounds"]) <= row["gain"] <= 28 / row["rounds"]
    found = cli("bench", "--out", str(tmp_path), *SMALL, "--method", "parasolver", "--method", "s*", "--curve", "1:1,4:2")
    assert found.code == 0
    second = json.loads((tmp_path / "bench.json").read_text())
    assert second["rows"][0] == row
    assert [r["method"] for r in second["rows"]] == ["parasolver", "srds"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.json"]


def test_a_tolerance_is_the_largest_at_which_the_tuning_seeds_agree() -> None:
    table = family("mixture-2").table("flow", 28)
    asked: list[float] = []

    def make(tolerance: float) -> Method:
        asked.append(tolerance)
        return contestants(table, 4)["parasolver"](tolerance if tolerance < 2e-3 else 10.0)

    assert tolerance_of("mixture-2", "flow", 28, make, 2) in LADDER[2:]
    assert asked[:3] == [*LADDER[:3]]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--problem", "nothing"], "no cell fits the problems nothing"),
        (["--chain", "ddim:7"], "no cell fits the problems"),
        (["--windows", "4,x"], "--windows is '4,x', of which 'x' is none"),
        (["--windows", "0"], "of which '0' is none"),
        (["--seeds", "0"], "--seeds is 0; give 1 to 8"),
        (["--seeds", "9"], "--seeds is 9; give 1 to 8"),
        (["--curve", "1"], "the latency curve is '1'"),
        (["--threads", "0"], "threads is 0"),
        (
            ["--problem", "mixture-2", "--chain", "ddim:25", "--method", "nothing"],
            "no method fits 'nothing'; methods are jacobi, parasolver",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(cli: Cli, tmp_path: Path, given: list[str], sentence: str) -> None:
    assert sentence in cli("bench", "--out", str(tmp_path / "new"), *given).sentence
    assert not (tmp_path / "new").exists()


def test_a_file_of_other_settings_is_left_alone(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    for text, sentence in (
        ("{}", "is no file of paradiff bench"),
        ('{"rows": [], "settings": {"seeds": 3}}', "was measured with"),
    ):
        path.write_text(text)
        assert sentence in cli("bench", "--out", str(tmp_path), *SMALL).sentence
        assert path.read_text() == text


@pytest.mark.parametrize(
    "rows",
    ["3", '{"a": 1}', '["x"]', "[{}]", '[{"problem": "plane", "method": "srds"}]', "[" * 100_000, '[], "version": 99', "[]}"],
)
def test_a_file_of_other_rows_is_left_alone(cli: Cli, tmp_path: Path, rows: str) -> None:
    path, text = tmp_path / "bench.json", f'{{"settings": {{"seeds": 1, "curve": {{"1": 1.0, "2": 1.0}}}}, "rows": {rows}}}'
    path.write_text(text)
    assert "is no file of paradiff bench" in cli("bench", "--out", str(tmp_path), *SMALL).sentence
    assert path.read_text() == text


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path)])
def test_what_is_no_file_is_refused_before_anything_is_measured(cli: Cli, tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "bench.json")
    before = (tmp_path / "bench.json").lstat()
    assert "is no file of paradiff bench" in cli("bench", "--out", str(tmp_path), *SMALL).sentence
    assert (tmp_path / "bench.json").lstat().st_ino == before.st_ino


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("file", "Not a directory"),
        ("file/below", "Not a directory"),
        ("/proc/bench", "No such file or directory"),
        ("n" * 300, "File name too long"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, why: str
) -> None:
    (tmp_path / "file").touch()

    def measured(*_: Any) -> Any:
        raise AssertionError("it was measured")

    monkeypatch.setattr("paradiff.app.bench.measured", measured)
    refused = cli("bench", "--out", str(tmp_path / place), *SMALL)
    assert (refused.code, why in refused.sentence) == (2, True), refused.sentence


def test_windows_and_cells() -> None:
    assert windows_of("2, all,2") == (2, None)
    cells = Wanted(problems=["mixture-*"], chains=["ddim:25"], windows=(4, 32, None)).cells()
    assert ("mixture-2", "ddim", 25, 4) in cells
    assert ("mixture-2", "ddim", 25, None) in cells
    assert all(window != 32 for *_, window in cells)

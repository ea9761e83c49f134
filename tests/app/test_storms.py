# SPDX-License-Identifier: Apache-2.0
"""A few of the calls that fuzz.py makes and of the kills of storm.py, which make more of them as scripts."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import Place, call, fuzz, verdict

# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


def test_random_calls_end_well_or_with_one_sentence(tmp_path: Path) -> None:
    counts, wrong = fuzz(25, 5, tmp_path)
    assert wrong == []
    assert counts["well"] > 1
    assert counts["refused"] > 10


def test_random_calls_of_pipelines_end_well_or_with_one_sentence(tmp_path: Path) -> None:
    counts, wrong = fuzz(50, 4, tmp_path, pipelines=True)
    assert wrong == []
    assert counts["well"] > 2
    assert counts["refused"] > 20


def test_random_calls_of_bench_measure_or_end_with_one_sentence(tmp_path: Path) -> None:
    counts, wrong = fuzz(25, 2, tmp_path, bench=True)
    assert wrong == []
    assert counts["well"] > 1
    assert counts["refused"] > 10


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (RuntimeError("it broke"), "exit code 1"),
        (OSError(5, "a\nb"), "refused"),
        (SystemExit(0), "writes no run.json"),
        (SystemExit(7), "exit code 7"),
    ],
    ids=repr,
)
def test_the_verdict_sees_a_fault(fault: BaseException, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    place = Place(tmp_path)
    monkeypatch.setattr("paradiff.app.cli.make_method", fail)
    assert verdict(["sample", str(place.model), "--out", str(place.outs / "new")], place)[0] == seen


def test_the_verdict_sees_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)

    def leave(*_: object, **__: object) -> None:
        (place.outs / "half").write_text("ha")
        raise ValueError("a sentence")

    monkeypatch.setattr("paradiff.app.cli.make_method", leave)
    assert verdict(["sample", str(place.model), "--out", str(place.outs / "new")], place)[0] == "leaves ['half']"


def test_calls_are_the_same_at_each_time(tmp_path: Path) -> None:
    place = Place(tmp_path)
    one, two = ([call(draw, place) for _ in range(20)] for draw in (random.Random(3), random.Random(3)))
    assert one == two


KILLS = "import storm; [storm.main(line.split()) for line in ('sample --kills 4 --seed 2', 'generate --kills 3 --seed 3')]"


def test_runs_that_are_killed_lose_and_mix_nothing_and_leave_nothing_unreadable_or_behind() -> None:
    command = [sys.executable, "-c", KILLS]  # one process for both, whose imports take longer than its runs
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False, timeout=600)
    assert found.returncode == 0, found.stderr
    assert "4 kills in " in found.stdout
    assert "3 kills in " in found.stdout

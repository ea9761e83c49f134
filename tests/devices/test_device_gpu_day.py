# SPDX-License-Identifier: Apache-2.0
"""The script of a GPU day on the device double, whose module has streams and graphs as torch.cuda does: what is for a GPU alone
is executed."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import gpu
from harness import Results


@pytest.mark.filterwarnings("ignore")  # of profilers
def test_a_quick_day_is_right_on_a_device(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, parts = tmp_path / "gpu.json", ["right", "latency", "bookkeeping"]
    monkeypatch.setattr(gpu, "METHODS", {"parasolver": gpu.METHODS["parasolver"]})
    for name in ("compile_right", "pipeline_right"):  # which take seconds, and are tested on the double elsewhere
        monkeypatch.setattr(gpu, name, lambda *_: None)
    day = gpu.Day(torch.device(device), True, Results(path), time.monotonic() + 600)
    gpu.run(day, parts, 600)
    rows = json.loads(path.read_text())["rows"]
    wrong = [row for row in rows if "failed" in row or "skipped" in row or row.get("ok") is False]
    assert wrong == []
    assert {row["part"] for row in rows} == set(parts)
    assert next(row for row in rows if row["name"] == "CUDA graphs")["ok"]
    assert next(row for row in rows if row["name"] == "out of memory")["max_rows"] == 3
    assert {row["mode"] for row in rows if "mode" in row} == {"eager", "graph"}
    assert all(row["peak_mib"] > 0 for row in rows if "peak_mib" in row)


def test_memory_that_runs_out_ends_a_curve(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day = gpu.Day(torch.device(device), True, Results(tmp_path / "gpu.json"), time.monotonic() + 600)
    monkeypatch.setattr(gpu, "counts", lambda day: (1, 2**40))
    gpu.curves(day, gpu.SHAPES[0])
    found = [row for row in day.results.rows if row.get("rows") == 2**40]
    assert [row["ended"] for row in found] == ["out of memory"] * 2


def test_what_takes_longer_than_its_time_is_broken_off(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(day: gpu.Day) -> None:
        for name in ("one", "another"):
            with day.fenced("latency", name) as begins:
                while begins:
                    try:
                        time.sleep(0.01)
                    except Exception:  # as libraries catch what they do not know
                        continue

    monkeypatch.setattr(gpu, "latency", endless)
    monkeypatch.setattr(gpu, "GRACE", 0.1)
    monkeypatch.setattr(gpu, "SHARES", {"latency": 0.02, "bookkeeping": 0.98})
    monkeypatch.setattr(gpu, "bookkeeping", lambda day: day.add("bookkeeping", "after it"))
    day = gpu.Day(torch.device(device), True, Results(tmp_path / "gpu.json"), time.monotonic())
    begin = time.monotonic()
    gpu.run(day, ["latency", "bookkeeping"], 30.0)
    assert time.monotonic() - begin < 15
    found = [(row["name"], row.get("skipped")) for row in day.results.rows]
    assert found == [("one", "the time was over within it"), ("another", "the time was over"), ("after it", None)]

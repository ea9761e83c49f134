# SPDX-License-Identifier: Apache-2.0
"""The script of a GPU day, small and on a CPU: it runs to its end, whatever fails in it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import gpu
import pytest
import torch
from gpu_shapes import SHAPES, Shape
from harness import Results


def day(path: Path, seconds: float = 600.0) -> gpu.Day:
    return gpu.Day(torch.device("cpu"), True, Results(path), time.monotonic() + seconds)


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


@pytest.mark.filterwarnings("ignore")  # of compilers and profilers
def test_a_quick_day_is_right_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--quick", "--threads", str(torch.get_num_threads()), "--json", str(path)])
    gpu.main()
    assert " rows, 0 failed or wrong\n" in capsys.readouterr().out
    contents = json.loads(path.read_text())
    assert contents["environment"]["device"] == "cpu"
    assert contents["quick"] is True
    assert contents["environment"]["commit"]
    assert {row["part"] for row in contents["rows"]} == set(gpu.SHARES)
    names = {row["name"] for row in contents["rows"] if row["part"] == "right"}
    assert names >= {
        *gpu.METHODS,
        "piadm_sde",
        "DDPMPipeline, float32",
        "DDIMPipeline, float32",
        "torch.compile",
        "out of memory",
    }
    assert [row for row in contents["rows"] if "skipped" in row] == [
        {"part": "right", "name": "CUDA graphs", "skipped": "there is no CUDA here"}
    ]
    assert all(row["seconds"] > 0 for row in contents["rows"] if row.get("mode") == "eager")


def test_what_fails_is_recorded_by_name_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel\nand more")

    own = day(tmp_path / "gpu.json")
    monkeypatch.setattr(gpu, "latency", fail)
    gpu.run(own, ["latency", "bookkeeping"], 600.0)
    rows = rows_of(tmp_path / "gpu.json")
    assert (rows[0]["part"], rows[0]["failed"]) == ("latency", "RuntimeError: no such kernel")
    assert rows[0]["at"].startswith("test_gpu_day.py:")
    assert rows[-1]["part"] == "bookkeeping"
    assert rows[-1]["microseconds"] > 0


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    gpu.run(day(tmp_path / "gpu.json"), ["latency", "whole"], 0.0)
    rows = rows_of(tmp_path / "gpu.json")
    assert rows == [{"part": name, "name": name, "skipped": "the time was over"} for name in ("latency", "whole")]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_tiny_network_of_each_shape_takes_rows(shape: Shape) -> None:
    place = torch.device("cpu"), torch.float32
    network = shape.network(*place, True)
    with torch.inference_mode():
        found = shape.call(network, 3, True, *place)()
    assert len(found) == 3 * shape.guided
    assert bool(found.isfinite().all())

# SPDX-License-Identifier: Apache-2.0
"""`paradiff sample --save-trajectory` and `--start`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pipelines import Cli

# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

DIGITS = ("sample", "digits", "--sampler", "ddim", "--steps", 50, "--seeds", "0-1", "--device", "cpu")
TEXT = ("sample", "shapes", "--prompt", "a red circle left of a blue square", "--steps", 12, "--device", "cpu")


def rounds(folder: Path) -> int:
    return json.loads((folder / "run.json").read_text())["rounds"]


def test_a_run_begins_from_a_file(cli: Cli, tmp_path: Path) -> None:
    file, one, two = tmp_path / "a.safetensors", tmp_path / "one", tmp_path / "two"
    assert cli(*DIGITS, "--method", "quasi_newton", "--out", one, "--save-trajectory", file).code == 0
    found = cli(*DIGITS, "--method", "collocation", "--out", two, "--start", file, "--compare")
    assert (found.code, found.err) == (0, "")
    assert rounds(two) <= 2 < rounds(one)
    contents = json.loads((two / "run.json").read_text())
    assert max(sample["error"]["rms"] for sample in contents["samples"]) < 4e-3
    assert contents["arguments"]["start"] == str(file)
    os.mkfifo(tmp_path / "pipe")
    for more, text in (
        (("--steps", 40), "start is a trajectory of table 'ddim' with 50 steps, and the chain is another one, 'ddim' with 40"),
        (("--seeds", "0-2"), "start is a trajectory of 2 samples of shape (1, 8, 8), and 3 of shape (1, 8, 8) are sought"),
        (("--method", "srds"), "srds cannot begin from a trajectory"),
        (("--start", tmp_path / "b"), "is not there; give its file"),
        (("--start", one / "run.json"), "cannot be read as safetensors, since it was cut short or is another kind of file"),
        (("--save-trajectory", tmp_path / "no" / "c"), "whose folder does not exist; make it first"),
        (("--save-trajectory", tmp_path), "which is a folder; give the path of a file"),
        (("--save-trajectory", tmp_path / "pipe"), "which is no regular file; give another path"),
        (("--save-trajectory", tmp_path / ("n" * 300)), "cannot be written: File name too long; give another path"),
        (("--method", "srds", "--save-trajectory", tmp_path / "c"), "srds"),
    ):
        method = () if "--method" in more else ("--method", "collocation")
        refused = cli(*DIGITS, *method, "--out", tmp_path / "three", "--start", file, *more)
        assert refused.code == 2
        assert text in " ".join(refused.err.split())
    assert not (tmp_path / "three").exists()


def test_a_trajectory_that_cannot_be_written_leaves_the_run_whole(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paradiff.whole_file.tempfile.mkstemp", full)
    out = tmp_path / "out"
    refused = cli(*DIGITS, "--method", "quasi_newton", "--out", out, "--save-trajectory", tmp_path / "a")
    assert refused.code == 2
    assert "the trajectory cannot be written to" in refused.err
    assert f"No space left on device; the run itself is whole and is written to {out}" in " ".join(refused.err.split())
    assert (out / "run.json").exists()
    assert not (tmp_path / "a").exists()


def test_each_seed_of_a_pipeline_begins_from_its_own(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    given = (*TEXT, "--seeds", "0-1", "--method", "quasi_newton")
    assert cli(*given, "--out", tmp_path / "one", "--save-trajectory", file).code == 0
    found = cli(*given, "--guidance", 5, "--out", tmp_path / "two", "--start", file, "--compare")
    assert (found.code, found.err) == (0, "")
    contents = json.loads((tmp_path / "two" / "run.json").read_text())
    assert max(sample["error"]["rms"] for sample in contents["samples"]) < 4e-3
    refused = cli(*TEXT, "--seeds", "0", "--method", "collocation", "--out", tmp_path / "three", "--start", file)
    assert refused.code == 2
    assert "the trajectory is of 2 seeds, and 1 are asked for; begin from one of as many seeds" in refused.err

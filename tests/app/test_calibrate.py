# SPDX-License-Identifier: Apache-2.0
"""`paradiff calibrate`: what it prints, writes and keeps, what later runs state of it, and what it refuses."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from pipelines import Cli

import paradiff
from paradiff.app.cli import calibrate
from paradiff.app.flags import CALIBRATED
from paradiff.app.options import parse_seeds
from paradiff.models import load_pipeline
from paradiff.pipelines import Report
from paradiff.planning import Calibration
from paradiff.planning.store import FOLDER

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "run_json.schema.json").read_text(encoding="utf-8"))
CHAIN = ("--sampler", "ddim", "--steps", 6, "--device", "cpu", "--method", "parasolver")
FEW = ("--seeds", "100-103", "--coverage", 0.8)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(place: Path) -> dict[str, Any]:
    """run.json, checked."""
    contents = json.loads((place / "run.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    jsonschema.Draft202012Validator(SCHEMA).validate(contents)
    return contents


def test_a_calibration_is_printed_written_kept_and_stated(cli: Cli, tmp_path: Path, folder: Path) -> None:
    found = cli("calibrate", "digits", *CHAIN, "--window", 3, *FEW, "--json", tmp_path / "found.json")
    assert found.code == 0, found.err
    assert "parasolver(window=3) on ddim of 6 steps, 4 seeds against the sequential chain" in found.out
    assert f"kept in {folder}" in found.out
    made = Calibration.of_json(json.loads((tmp_path / "found.json").read_text()))
    assert (len(made.errors), made.coverage) == (4, 0.8)
    assert [path.name.partition("-")[0] for path in folder.iterdir() if not path.name.startswith(".")] == ["calibration"]

    ran = cli("sample", "digits", *CHAIN, "--window", 3, "--seeds", "1-2", "--compare", "--out", tmp_path / "with")
    assert ran.code == 0, ran.err
    assert "by calibration on 4 seeds, 80 of 100 samples err by at most" in ran.out
    contents = read(tmp_path / "with")
    factor = contents["calibrated"]["factor"]
    assert contents["calibrated"] == {"factor": pytest.approx(made.bound.factor), "coverage": 0.8, "seeds": 4}
    for one in contents["samples"]:
        assert one["error_bound"] == pytest.approx(factor * max(one["estimated_error"], 2e-6))
    indices = [max(one["estimated_error"], 2e-6) / max(one["error"]["rms"], 2e-6) for one in contents["samples"]]
    assert contents["effectivity"]["median"] == pytest.approx(sum(indices) / 2)
    assert contents["effectivity"]["below"] == sum(index < 1 for index in indices) / 2

    ran = cli("sample", "digits", *CHAIN, "--window", 2, "--out", tmp_path / "other")
    assert "by calibration" not in ran.out
    contents = read(tmp_path / "other")
    assert (contents["calibrated"], contents["effectivity"], contents["samples"][0]["error_bound"]) == (None, None, None)


def test_without_a_folder_it_is_said_that_nothing_was_kept(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "")
    assert "it was not kept, since PARADIFF_CACHE is empty" in cli("calibrate", tiny, *CHAIN, *FEW).out


def test_a_pipelines_call_is_calibrated_and_states_its_bound(cli: Cli, tmp_path: Path) -> None:
    call = ("shapes", "--prompt", "a red circle", "--steps", 4, "--device", "cpu", "--method", "parasolver", "--window", 2)
    found = cli("calibrate", *call, "--seeds", "5,6", "--coverage", 0.6)
    assert found.code == 0, found.err
    assert "parasolver(window=2) on DDIMScheduler, 2 seeds against the sequential chain" in found.out
    ran = cli("sample", *call, "--seeds", 7, "--out", tmp_path / "with")
    assert "by calibration on 2 seeds, 60 of 100 samples err by at most" in ran.out
    contents = read(tmp_path / "with")
    (one,) = contents["samples"]
    assert one["error_bound"] == pytest.approx(contents["calibrated"]["factor"] * max(one["estimated_error"], 2e-6))
    assert contents["effectivity"] is None
    other = [*call[:2], "a blue square", *call[3:]]
    assert "by calibration" not in cli("sample", *other, "--seeds", 7, "--out", tmp_path / "other").out


def test_a_hook_on_a_network_of_a_pipeline_is_told() -> None:
    pipe, method = load_pipeline("shapes"), paradiff.parasolver(window=3)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red circle", "num_inference_steps": 4, "output_type": "latent"}
    paradiff.calibrate(pipe, call, method, range(4), coverage=0.8)
    run = paradiff.parallelize(pipe, method)

    def made() -> Report:
        run(**call, generator=torch.Generator().manual_seed(9))
        return run.report

    assert made().error_bound is not None
    hook = pipe.unet.register_forward_hook(lambda module, given, found: tuple(one / 2 for one in found))
    assert made().error_bound is None
    assert "was left out, since its code with its settings is" in made().message
    hook.remove()
    assert made().error_bound is not None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            ("--seeds", "0-17"),
            "18 seeds were given, and a bound that 95 of 100 samples keep needs at least 19; give more seeds",
        ),
        (("--coverage", 0.99), "39 seeds were given, and a bound that 99 of 100 samples keep needs at least 99"),
        (("--coverage", 1.5), "the coverage is 1.5; it must be a number between 0 and 1"),
        (("--seeds", "x"), "seeds"),
        (("--method", "auto"), "whose choices depend on the clock; calibrate the one that it chooses"),
        (("-m", "nothing=3"), "nothing"),
        (("--json", "nowhere/found.json"), "'nowhere/found.json' is in a folder that does not exist"),
        (("--prompt", "a red circle"), "--prompt was given"),
        (("--steps", 0), "steps"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    cli: Cli, tiny: Path, folder: Path, given: tuple[object, ...], sentence: str
) -> None:
    assert sentence in cli("calibrate", tiny, *CHAIN, *given).sentence
    assert not folder.exists()


def test_the_defaults_are_those_of_the_function() -> None:
    default = inspect.signature(paradiff.calibrate).parameters
    assert parse_seeds(CALIBRATED["seeds"][1]) == [*default["seeds"].default]
    assert default["coverage"].default == inspect.signature(calibrate).parameters["coverage"].default


def test_a_method_has_to_be_named(cli: Cli, tiny: Path) -> None:
    assert "--method" in cli("calibrate", tiny).err


def test_a_row_bound_of_a_pipeline_is_refused(cli: Cli) -> None:
    call = ("calibrate", "shapes", "--prompt", "a", "--method", "parasolver", "--max-rows", 4)
    assert "--max-rows is 4, and calls of 'shapes' are calibrated without; leave it out" in cli(*call).sentence

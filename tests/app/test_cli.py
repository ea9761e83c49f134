# SPDX-License-Identifier: Apache-2.0
"""The command line: what it writes, what stays as it was, and what is counted."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import Cli

from paradiff.app import run_json
from paradiff.app.folder import Taken, next_folder, output_folder
from paradiff.app.method_page import argument_texts
from paradiff.app.options import PRESETS, effective_options, make_method, parameters, preset
from paradiff.app.plots import save_history
from paradiff.app.stream import Stream
from paradiff.chain import slope
from paradiff.chain.noise import Keyed
from paradiff.chain.table import Table
from paradiff.methods import presets as methods
from paradiff.methods.piadm import piadm_sde
from paradiff.models.pixel import load
from paradiff.samplers.preserving import ddpm
from paradiff.samplers.schedule import Schedule
from paradiff.solver.loop import sample
from paradiff.solver.protocol import Method
from paradiff.solver.records import PararealRecord

# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "run_json.schema.json").read_text(encoding="utf-8"))
SHORT = ("--sampler", "ddim", "--steps", 10, "--device", "cpu", "--method", "parasolver")


def read(folder: Path) -> dict:
    """run.json, checked."""
    contents = json.loads((folder / "run.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    jsonschema.Draft202012Validator(SCHEMA).validate(contents)
    return contents


def pixels(path: Path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.tensor(np.array(picture), dtype=torch.int64)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_field_of_the_schema_is_explained() -> None:
    page = (Path(__file__).parents[2] / "docs" / "run_json.md").read_text(encoding="utf-8")
    parts = [
        SCHEMA,
        SCHEMA["properties"]["effective"],
        SCHEMA["properties"]["environment"],
        SCHEMA["properties"]["sequential"],
        SCHEMA["properties"]["speedup"],
    ]
    parts.append(SCHEMA["properties"]["samples"]["items"])
    pipeline = SCHEMA["properties"]["pipeline"]
    parts += [pipeline, pipeline["properties"]["calls"]["items"]]
    for part in parts:
        for field in part["properties"]:
            assert f"`{field}`" in page or f".{field}`" in page, field
    sweep, wave = page.split("## `history`")[1].split("For `srds`")
    for name, text in {"sweep": sweep, "wave": wave}.items():
        for field in SCHEMA["$defs"][name]["properties"]:
            assert f"| `{field}` |" in text, (name, field)
    for option in SCHEMA["properties"]["arguments"]["properties"]:
        given = ("model", "seeds", "noise", "method", "compare", "trace", "overwrite", "dtype", "trust_remote_code")
        assert option in given or f"`{option}`" in page.split("## `arguments`")[1].split("##")[0], option


# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_run_writes_its_pictures_and_run_json(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    result = cli("sample", "digits", *SHORT, "--seeds", "3,5-6", "--trace", "--out", out)
    assert result.code == 0
    assert result.err == ""
    assert str(out) in result.out
    assert names(out) == {"samples.png", "seed-3.png", "seed-5.png", "seed-6.png", "run.json", "trace.png"}
    assert names(out.parent) == {"b"}
    assert pixels(out / "seed-5.png").shape == (8, 8)
    contents = read(out)
    assert [s["seed"] for s in contents["samples"]] == [3, 5, 6]
    assert contents["arguments"]["seeds"] == "3,5-6"
    assert contents["arguments"]["steps"] == 10
    assert contents["arguments"]["tolerance"] is None
    assert contents["arguments"]["method_option"] == []
    assert contents["status"].startswith("converged: ")
    assert contents["status_code"] == "converged"
    assert contents["schema_version"] == 1
    age = datetime.now(timezone.utc) - datetime.fromisoformat(contents["date"])
    assert timedelta(0) <= age < timedelta(minutes=10)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("compare", [False, True])
def test_only_compare_fills_what_a_sequential_run_measures(compare: bool, cli: Cli, tmp_path: Path) -> None:
    steps = ("--sampler", "ddpm", "--steps", 30, "--device", "cpu", "--method", "parasolver")
    result = cli("sample", "digits", *steps, "--seeds", "0-1", "--out", tmp_path / "out", *["--compare"] * compare)
    contents = read(tmp_path / "out")
    assert names(tmp_path / "out") == {"samples.png", "seed-0.png", "seed-1.png", "run.json"}
    errors = [s["error"] for s in contents["samples"]]
    if not compare:
        assert (contents["sequential"], contents["speedup"], errors) == (None, None, [None, None])
        assert "estimated" in result.out
        return
    assert (contents["sequential"]["rounds"], contents["sequential"]["evaluations"]) == (30, 60)
    clock = contents["sequential"]["seconds"]
    assert contents["speedup"]["rounds"] == pytest.approx(30 / contents["rounds"])
    assert contents["speedup"]["seconds"] == pytest.approx(clock / contents["seconds"])
    assert contents["speedup"]["rounds"] > 1
    assert "RMS, worst" in result.out
    for one in contents["samples"]:
        assert 0 < one["error"]["rms"] <= one["error"]["max"] <= 8 * one["error"]["rms"]  # 64 entries.
        assert one["error"]["rms"] < one["estimated_error"]


def test_the_measured_error_is_that_of_the_samples(cli: Cli, tmp_path: Path) -> None:
    cli("sample", "digits", *SHORT, "--noise", "keyed", "--tolerance", 0.2, "--seeds", 4, "--compare", "--out", tmp_path / "o")
    model = load("digits")
    runs = [
        sample(model, model.table("ddim", 10), Keyed(model.shape, [4]), method)
        for method in (methods.parasolver(tolerance=0.2), methods.sequential())
    ]
    gap = (runs[0].sample - runs[1].sample).double().abs()
    error = read(tmp_path / "o")["samples"][0]["error"]
    # Batches of other sizes round otherwise, by 1e-6.
    assert error["rms"] == pytest.approx(float(gap.square().mean().sqrt()), abs=1e-5)
    assert error["max"] == pytest.approx(float(gap.max()), abs=1e-5)
    assert error["rms"] > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "sequential"),
        ("--method", "jacobi", "--window", 5),
        ("--method", "paradigms", "--tolerance", 0.01, "--window", 4),
        ("-m", "rule=change", "-m", "slope=freeze-clean-data", "-m", "warmup=0"),
        ("-m", "stride=3", "-m", "slope=shifted:0.5", "--max-rows", 2),
        ("--sampler", "heun", "--noise", "keyed"),
        ("--sampler", "dpmpp_2m", "-m", "stride=2"),
        ("--sampler", "ddpm", "--window", 1),
        ("--sampler", "euler_ancestral", "--tolerance", 0),
        ("--eta", 1, "--dtype", "bfloat16", "--tolerance", 0.1),
        ("--method", "piadm_ode", "-m", "blocks=3", "-m", "sweeps=2"),
        ("--method", "piadm_sde", "-m", "blocks=3", "-m", "stagger=1", "--sampler", "exponential_sde", "--form", "score"),
        ("--method", "piadm_ode", "-m", "blocks=2", "-m", "corrector=3x2", "--sampler", "exponential_ode", "--grid", "uniform"),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_the_counts_of_a_run_agree(options: tuple, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    assert cli("sample", tiny, *SHORT, "--seeds", "0-2", "--threads", 1, "--out", tmp_path / "out", *options).code == 0
    contents = read(tmp_path / "out")
    samples, history = contents["samples"], contents["history"]
    assert contents["evaluations"] == sum(s["evaluations"] for s in samples)
    assert contents["rounds"] == max(s["rounds"] for s in samples)
    stride = contents["effective"]["method_options"].get("stride", 1)
    steps = 19 if "heun" in options else 10
    nodes = steps if stride == 1 else -(-steps // stride)
    for one in samples:
        own = [h for h in history if h["seed"] == one["seed"]]
        assert sum(h["passed"] for h in own) == nodes
        assert own[-1]["round"] == one["rounds"]
        if stride == 1:
            # Of a corrector's two sweeps, of 1 and 2 rows, one number is listed; the last block ends clean, without one.
            unlisted = 2 if "corrector=3x2" in options else 0
            assert sum(len(h["change"]) for h in own) + unlisted == one["evaluations"]
    if options[-1] == "sequential" or options[-2:] in (("--window", 1), ("--tolerance", 0)):
        assert contents["status"].startswith("exact: ")
        assert [s["estimated_error"] for s in samples] == [0, 0, 0]


def test_a_corrected_chain_is_compared_with_its_own_sequential_chain(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    chain = ("--sampler", "exponential_ode", "--steps", 12, "--device", "cpu", "--threads", 1)
    piadm = ("--method", "piadm_ode", "-m", "blocks=3", "-m", "corrector=4x4", "-m", "sweeps=12")
    assert cli("sample", tiny, *chain, *piadm, "--compare", "--out", tmp_path / "out").code == 0
    contents = read(tmp_path / "out")
    assert contents["status"].startswith("exact: ")
    assert contents["sequential"]["rounds"] == 12 + 2 * 4  # no noise is left after the last block
    assert contents["samples"][0]["error"]["max"] < 1e-4
    plain = ("--method", "sequential")
    assert cli("sample", tiny, *chain, *plain, "--out", tmp_path / "plain").code == 0
    assert (pixels(tmp_path / "out" / "seed-0.png") - pixels(tmp_path / "plain" / "seed-0.png")).abs().max() > 5


def test_a_picture_does_not_depend_on_the_other_seeds_or_the_method(cli: Cli, tmp_path: Path) -> None:
    cli("sample", "digits", *SHORT, "--seeds", "0,7", "--tolerance", 1e-4, "--out", tmp_path / "two")
    cli("sample", "digits", *SHORT, "--seeds", "7", "--method", "sequential", "--out", tmp_path / "one")
    two, one = (pixels(tmp_path / folder / "seed-7.png") for folder in ("two", "one"))
    assert (two - one).abs().max() <= 1  # A level may fall on the edge between two.
    assert (one - pixels(tmp_path / "two" / "seed-0.png")).abs().max() > 50


def test_the_models_folder_can_be_given(cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("sample", tiny, *SHORT).code == 0
    assert read(tmp_path / "paradiff-out")["arguments"]["model"] == str(tiny)


# -- wavefronts --------------------------------------------------------------------------------------------------------

WAVES: dict[str, tuple[int, str]] = {  # The number of blocks, and how the status begins.
    "--tolerance 2": (4, "converged"),
    "-m blocks=3 -m iterations=3": (3, "exact"),
    "-m ordering=batched --tolerance 2": (3, "converged"),
    "-m ordering=batched -m blocks=3 -m iterations=3": (3, "exact"),
    "-m coarse=one-step -m ordering=pipelined -m blocks=2 --sampler ddpm": (2, "exact"),
    "-m coarse=two-step --tolerance 2": (4, "converged"),
    "--steps 20 -m blocks=3 -m coarse=2 -m iterations=1": (3, "stopped"),
    "-m coarse=freeze-epsilon -m blocks=3 -m rule=change --tolerance 1e-4": (3, "exact"),
    "-m coarse=shifted:0.5 --tolerance 20": (4, "converged"),
    "-m rows=2 -m blocks=3 --tolerance 2": (3, "converged"),
    "--window 2 --steps 20 -m blocks=5 --tolerance 20 --sampler euler_ancestral": (5, "converged"),
    "-m iterations=0": (3, "stopped"),
    "-m rule=image --tolerance 200 --sampler dpmpp_2m --max-rows 3": (4, "converged"),
    "-m rule=sample --sampler heun --noise keyed -m blocks=3": (3, "converged"),
}


@pytest.mark.parametrize("line", WAVES)
def test_the_counts_of_a_wavefront_agree(line: str, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    srds = (*SHORT, "--method", "srds", "--seeds", "0-2", "--threads", 1, *line.split())
    result = cli("sample", tiny, *srds, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    blocks, status = WAVES[line]
    assert f"{3 * blocks}/{3 * blocks} blocks" in result.out
    contents = read(tmp_path / "out")
    samples, history, asked = contents["samples"], contents["history"], contents["effective"]["method_options"]
    words = line.split()
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option == "-m":
            assert value in contents["arguments"]["method_option"]
            name, _, value = value.partition("=")
            assert str(asked[name]).replace(" ", "-") == value
        else:
            name = option[2:].replace("-", "_")
            assert str(contents["arguments"][name]) == str(float(value) if name == "tolerance" else value)
    assert contents["effective"]["parts"] == asked["blocks"] == blocks
    assert contents["effective"]["unit"] == "blocks"
    assert contents["status"].startswith(f"{status}: ")
    assert contents["evaluations"] == sum(s["evaluations"] for s in samples)
    assert contents["rounds"] == max(s["rounds"] for s in samples)
    for one in samples:
        own = [h for h in history if h["seed"] == one["seed"]]
        assert [h["round"] for h in own] == list(range(1, one["rounds"] + 1))
        assert sum(h["passed"] for h in own) == blocks
        assert sum(len(h["rows"]) for h in own) == one["evaluations"]
        assert {block for h in own for block, _ in h["rows"]} == set(range(blocks))
        assert max(len(h["rows"]) for h in own) <= (asked["rows"] or 100)
        values = [value for h in own for value in h["values"]]
        for edge in range(1, blocks + 1):
            first, *later = [(iteration, change) for at, iteration, change in values if at == edge]
            if asked["coarse"] in ("freeze-epsilon", "shifted:0.5"):  # Their first values cost no rows, and are not listed.
                assert first[0] == 1
                assert first[1] > 0
            else:
                assert first[1] is None
                assert first[0] == 0 or contents["arguments"]["window"]  # Which opens with the newest value before it.
            assert [iteration for iteration, _ in later] == sorted({iteration for iteration, _ in later} - {0})
            assert all(change is not None for _, change in later)
        if asked["iterations"] is not None:
            assert [v[1] for v in values if v[0] == blocks][-1] == asked["iterations"]
        if asked["iterations"] == 0:
            assert (one["residual"], one["estimated_error"]) == (None, None)
        if status == "exact":
            assert one["estimated_error"] == 0


def test_the_schema_refuses_what_is_no_wavefront(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    assert cli("sample", tiny, *SHORT, "--method", "srds", "--out", tmp_path / "wave").code == 0
    assert cli("sample", tiny, *SHORT, "--out", tmp_path / "sweep").code == 0
    contents, other = read(tmp_path / "wave"), read(tmp_path / "sweep")
    schema = jsonschema.Draft202012Validator(SCHEMA)
    for change in (
        {"rows": []},
        {"rows": [[0]]},
        {"rows": [[0, 0, 0]]},
        {"rows": [[-1, 0]]},
        {"values": [[0, 0, None]]},
        {"values": [[1, 0]]},
        {"values": [[1, 0, -0.1]]},
        {"passed": -1},
        {"first": 0},
    ):
        wrong = copy.deepcopy(contents)
        wrong["history"][0].update(change)
        assert not schema.is_valid(wrong), change
    assert not schema.is_valid({**contents, "history": [*contents["history"], *other["history"]]})


SAME = {
    "pipelined": ("-m", "blocks=4"),
    "batched": ("-m", "blocks=4", "-m", "ordering=batched"),
    "two-step": ("-m", "coarse=two-step"),
    "slope": ("-m", "coarse=freeze-clean-data"),
    "window": ("--window", 2),
    "all iterations": ("-m", "blocks=5", "-m", "iterations=5", "--sampler", "ddpm"),
}


@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_a_wavefront_gives_the_sequential_picture(options: tuple, cli: Cli, tmp_path: Path) -> None:
    srds = (*SHORT, "--method", "srds", "--tolerance", 2e-3, *options)
    cli("sample", "digits", *srds, "--compare", "--out", tmp_path / "wave")
    sampler = ("--sampler", read(tmp_path / "wave")["arguments"]["sampler"])
    cli("sample", "digits", *SHORT, *sampler, "--method", "sequential", "--out", tmp_path / "chain")
    wave, chain = (pixels(tmp_path / folder / "seed-0.png") for folder in ("wave", "chain"))
    assert chain.max() - chain.min() > 100
    assert (wave - chain).abs().max() <= 1  # A level may fall on the edge between two.
    (one,) = read(tmp_path / "wave")["samples"]
    # Batches of other sizes round otherwise, by 1e-6.
    assert one["error"]["rms"] < (1e-5 if "iterations=5" in options else 2e-3)


def test_without_enough_iterations_the_picture_is_another(cli: Cli, tmp_path: Path) -> None:
    cli("sample", "digits", *SHORT, "--method", "srds", "-m", "iterations=0", "--compare", "--out", tmp_path / "out")
    contents = read(tmp_path / "out")
    assert contents["status"] == "stopped: 0 iterations were made, as asked"
    assert contents["samples"][0]["error"]["rms"] > 1e-2


def test_the_trace_of_a_wavefront_is_that_of_its_slowest_sample(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    srds = ("--method", "srds", "-m", "blocks=3", "--tolerance", 0.3, "--seeds", "3,0,4")
    assert cli("sample", tiny, *SHORT, "--sampler", "ddpm", *srds, "--trace", "--out", tmp_path / "out").code == 0
    contents = read(tmp_path / "out")
    first, second, third = (s["rounds"] for s in contents["samples"])
    assert max(first, third) < second
    history = [
        PararealRecord(h["round"], 0, [tuple(row) for row in h["rows"]], [], h["passed"])
        for h in contents["history"]
        if h["seed"] == 0
    ]
    save_history(history, 0, 3, tmp_path / "wanted.png", "ddpm, 10 steps, srds: seed 0, the slowest of 3")
    assert (tmp_path / "out" / "trace.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (methods.parasolver(), 8),
        (methods.parasolver(window=3), 3),
        (methods.sequential(), 1),
        (methods.srds(8), 8),
        (methods.srds(8, window=3), 3),
        (methods.srds(8, rows=2), 2),
        (methods.srds(8, window=3, rows=2), 2),
        (methods.srds(8, rows=20), 8),
        (piadm_sde([0, 3, 8]), 5),
        (piadm_sde([0, 3, 8], window=2), 2),
        (piadm_sde([0, 3, 8], stagger=1), 8),
    ],
)
def test_the_widest_round_is_known_beforehand(method: Method, rows: int) -> None:
    assert method.width(ddpm(Schedule.linear(), 8)) == rows


# -- method options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_option_of_every_method_is_listed_with_its_default(name: str, cli: Cli) -> None:
    found = cli("methods", name)
    assert (found.code, found.err) == (0, "")
    known = parameters(preset(name))
    texts = argument_texts(preset(name))
    for option, parameter in known.items():
        (line,) = [line for line in found.out.splitlines() if line.startswith(f"  {option}: ")]
        assert ("has to be given" in line) == (parameter.default is parameter.empty)
        if option in texts:
            assert texts[option].split()[0] in found.out
    assert known or "It has no options." in found.out


def test_a_methods_page_names_its_source(cli: Cli) -> None:
    for name, source in {"srds": "arXiv 2412.08292", "paradigms": "arXiv 2305.16317", "piadm_sde": "arXiv 2405.15986"}.items():
        assert source in cli("methods", name).out


def test_the_methods_are_listed_in_a_line_each(cli: Cli) -> None:
    found = cli("methods")
    assert (found.code, found.err) == (0, "")
    assert [line.split()[0] for line in found.out.splitlines()] == list(PRESETS)
    assert "SRDS: self-refining diffusion samplers" in found.out


VALUES: dict[str, tuple[str, Any]] = {
    "window=8": ("parasolver", 8),
    "window=none": ("parasolver", None),
    "tolerance=1e-3": ("parasolver", 1e-3),
    "stride=4,4,4": ("parasolver", (4, 4, 4)),
    "slope=identity": ("parasolver", slope.identity),
    "slope=freeze-epsilon": ("quasi_newton", slope.freeze_epsilon),
    "blocks=0, 4, 8": ("srds", (0, 4, 8)),
    "coarse=two-step": ("srds", "two step"),
    "coarse=two step": ("srds", "two step"),
    "coarse=3": ("srds", 3),
    "coarse=zero": ("srds", slope.zero),
    "rule=sample": ("srds", "sample"),
    "max-nodes=40": ("collocation", 40),
    "max_nodes=40": ("collocation", 40),
    "nodes=auto": ("collocation", "auto"),
    "nodes=12": ("collocation", 12),
    "shift=0.5": ("collocation", 0.5),
    "exact=true": ("collocation", True),
    "exact=false": ("collocation", False),
    "warm_start=a-file=b.json": ("collocation", "a-file=b.json"),
}


@pytest.mark.parametrize("text", VALUES)
def test_a_method_option_is_read_by_its_annotation(text: str) -> None:
    name, value = VALUES[text]
    method, _ = make_method(name, [text])
    found = getattr(method, text.partition("=")[0].replace("-", "_"))
    assert type(found) is type(value)
    assert found is value if callable(value) else found == value


def test_an_argument_that_no_text_can_be_given_for_is_no_option() -> None:
    def build(size: int, table: Table, other: Table | None = None) -> None: ...

    assert list(parameters(build)) == ["size"]


def test_a_corrector_and_a_variance_are_read() -> None:
    method: Any = make_method("piadm_ode", ["blocks=2", "corrector=4x3", "slope=shifted:0.5"])[0]
    assert (method.corrector.steps, method.corrector.sweeps) == (4, 3)
    table = ddpm(Schedule.linear(), 8)
    assert torch.equal(method.slope(table), slope.shifted(0.5)(table))


def test_the_effective_options_are_those_after_the_methods_own_defaults() -> None:
    srds = effective_options(*make_method("srds", ["rule=change"], window=3))
    assert (srds["tolerance"], srds["rule"], srds["window"], srds["coarse"]) == (0.1, "change", 3, "one step")
    assert effective_options(*make_method("parasolver"))["slope"] == "identity"
    assert effective_options(*make_method("quasi_newton"))["slope"] == "shifted:0.25"
    assert effective_options(*make_method("parasolver", ["slope=shifted:0.50"]))["slope"] == "shifted:0.50"
    piadm = effective_options(*make_method("piadm_ode", ["blocks=2", "corrector=4x3", "sweeps=2"]))
    assert (piadm["corrector"], piadm["slope"], piadm["predictor"], piadm["carry"]) == ("4x3", "freeze-epsilon", "copy", True)
    assert effective_options(*make_method("sequential")) == {}


@pytest.mark.parametrize(("seconds", "code", "status"), [(1e-9, 3, "stopped"), (3600, 0, "converged")])
def test_a_deadline_that_ended_a_run_is_an_exit_code(
    seconds: float, code: int, status: str, cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    found = cli("sample", tiny, *SHORT, "--deadline", seconds, "--compare", "--out", tmp_path / "out")
    assert (found.code, found.err) == (code, "")
    contents = read(tmp_path / "out")
    assert (contents["status_code"], contents["arguments"]["deadline"]) == (status, seconds)
    assert contents["sequential"]["rounds"] == 10  # the reference has no deadline
    assert ("ended it" in found.out) == (code == 3)


def test_what_took_effect_is_written(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    assert cli("sample", tiny, *SHORT, "--out", tmp_path / "window").code == 0
    found = read(tmp_path / "window")["effective"]
    assert (found["tolerance"], found["window"], found["parts"], found["unit"]) == (4e-3, 10, 10, "nodes")
    assert found["method_options"]["window"] == 10
    assert cli("sample", tiny, *SHORT, "--method", "srds", "--out", tmp_path / "srds").code == 0
    found = read(tmp_path / "srds")["effective"]
    assert (found["tolerance"], found["window"], found["parts"], found["unit"]) == (4e-3, 4, 4, "blocks")
    assert found["method_options"]["blocks"] == 4


# -- the output folder -------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is not empty; give another one, or --overwrite" in cli("sample", tiny, *SHORT, "--out", out).sentence
    assert names(out) == {"notes.txt"}
    assert names(tmp_path) == {"out"}


def test_overwrite_replaces_its_own_files_only(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("sample", tiny, *SHORT, "--seeds", "0-1", "--out", out).code == 0
    (out / "notes.txt").write_text("mine")
    before = {name: (out / name).read_bytes() for name in names(out)}
    assert cli("sample", tiny, *SHORT, "--steps", 12, "--seeds", "0", "--out", out, "--overwrite").code == 0
    assert names(out) == set(before)
    assert names(tmp_path) == {"out"}
    for name in ("notes.txt", "seed-1.png"):
        assert (out / name).read_bytes() == before[name]
    for name in ("seed-0.png", "run.json"):
        assert (out / name).read_bytes() != before[name]
    assert read(out)["arguments"]["steps"] == 12


def test_an_empty_folder_is_used(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    assert cli("sample", tiny, *SHORT, "--out", tmp_path).code == 0
    assert "run.json" in names(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_fails_leaves_nothing_behind(
    overwrite: bool, cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "run.json").write_text("old")

    def full(*_: object) -> None:
        raise ValueError("the disk is full")

    monkeypatch.setattr("paradiff.app.run_json.write_json", full)
    result = cli("sample", tiny, *SHORT, "--out", out, *["--overwrite"] * overwrite)
    assert result.sentence == "the disk is full"
    assert names(tmp_path) == ({"out"} if overwrite else set())
    assert not overwrite or [p.read_text() for p in out.iterdir()] == ["old"]


def test_an_output_that_is_a_file_is_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for path in (tmp_path / "out", tmp_path / "out" / "below"):
        for overwrite in ([], ["--overwrite"]):
            found = cli("sample", tiny, *SHORT, "--out", path, *overwrite).sentence
            assert "is a file; give a folder" in found or "cannot be written: " in found
    assert (tmp_path / "out").read_text() == "mine"
    assert names(tmp_path) == {"out"}


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a place that nobody can write to")
def test_an_output_that_cannot_be_written_is_refused(cli: Cli, tiny: Path) -> None:
    found = cli("sample", tiny, *SHORT, "--out", "/proc/paradiff/out").sentence
    assert found.startswith("the output '/proc/paradiff/out' cannot be written: ")


def test_a_second_run_without_a_folder_goes_to_the_next_one(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("paradiff-out", "paradiff-out-2", "paradiff-out-3"):
        found = cli("sample", tiny, *SHORT)
        assert found.code == 0
        assert f"; written to {name}\n" in found.out
        assert (f"paradiff-out is not empty; this run goes to {name}\n" in found.out) == (name != "paradiff-out")
        assert read(tmp_path / name)["arguments"]["out"] == name
    before = (tmp_path / "paradiff-out" / "run.json").read_bytes()
    assert cli("sample", tiny, *SHORT, "--overwrite").code == 0
    assert names(tmp_path) == {"paradiff-out", "paradiff-out-2", "paradiff-out-3"}
    assert (tmp_path / "paradiff-out" / "run.json").read_bytes() != before


def test_the_next_folder_is_the_first_that_is_free(tmp_path: Path) -> None:
    first = tmp_path / "out"

    def found() -> Path:
        with next_folder(first) as folder:
            assert names(folder.path) == {".paradiff"}
            return folder.path

    assert found() == first
    first.write_text("a file")
    assert found() == tmp_path / "out-2"
    (tmp_path / "out-2").mkdir()
    assert found() == tmp_path / "out-2"
    with next_folder(first):
        assert found() == tmp_path / "out-3"
    (tmp_path / "out-2" / "run.json").write_text("")
    assert found() == tmp_path / "out-3"
    assert names(tmp_path) == {"out", "out-2"}


def write(text: str, *files: str) -> list[Any]:
    """What writes a text into files, each on its own."""
    return [lambda folder, name=name: (folder / name).write_text(text) for name in files]


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    return place


@pytest.mark.parametrize("fails_at", range(5))
def test_files_that_cannot_all_be_replaced_are_put_back_and_the_run_is_kept_elsewhere(
    fails_at: int, tmp_path: Path, spare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a", "run.json", "mine"):
        (out / name).write_text("old")
    replace, moves = os.replace, [0]

    def full(source: Path, target: Path) -> None:  # one from new to whole, two out of the way, three into their places
        moves[0] += 1
        if moves[0] == fails_at + 2:
            raise FULL
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    with (
        pytest.raises(ValueError, match=f"'{out}' cannot be written: No space left on device; the run was written to "),
        output_folder(out, overwrite=True) as folder,
    ):
        folder.fill(write("new", "a", "d", "run.json"))
    assert moves[0] > fails_at + 2
    assert contents(out) == {"a": "old", "run.json": "old", "mine": "old"}
    (kept,) = spare.iterdir()
    assert contents(kept) == {"a": "new", "d": "new", "run.json": "new"}
    assert names(tmp_path) == {"out", "temporary"}


def test_of_a_run_that_no_disk_takes_what_could_be_saved_is_named(tmp_path: Path, spare: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "half").write_text("ha")
        raise FULL

    sentence = "cannot be written: No space left on device; what could be saved was written to "
    with pytest.raises(ValueError, match=sentence), output_folder(tmp_path / "a" / "out", overwrite=False) as folder:
        folder.fill([*write("new", "a"), full, *write("new", "run.json")])
    (kept,) = spare.iterdir()
    assert contents(kept) == {"a": "new", "run.json": "new"}
    assert names(tmp_path) == {"temporary"}
    sentence = "cannot be written: No space left on device; nothing could be saved"
    with pytest.raises(ValueError, match=sentence), output_folder(tmp_path / "a" / "out", overwrite=False) as folder:
        folder.fill([full])
    assert names(tmp_path) == {"temporary"}


def test_a_folder_that_was_filled_meanwhile_is_left_alone(tmp_path: Path, spare: Path) -> None:
    out = tmp_path / "out"

    def meanwhile(_: Path) -> None:
        (out / "run.json").write_text("another's")

    sentence = r"run\.json was put there meanwhile; the run was written to "
    with pytest.raises(ValueError, match=sentence), output_folder(out, overwrite=False) as folder:
        folder.fill([meanwhile, *write("new", "a", "run.json")])
    assert contents(out) == {"run.json": "another's"}
    assert contents(spare) != {}


def test_what_the_file_system_refuses_is_one_sentence(
    cli: Cli, tiny: Path, tmp_path: Path, spare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device", "run.json")

    monkeypatch.setattr("paradiff.app.run_json.write_json", full)
    found = cli("sample", tiny, *SHORT, "--out", tmp_path / "out").sentence
    start = f"the output '{tmp_path / 'out'}' cannot be written: no space left on device; what could be saved was written to '"
    assert found.startswith(start)
    assert names(Path(found.removeprefix(start).rstrip("'"))) == {"samples.png", "seed-0.png"}
    assert names(tmp_path) == {"temporary"}


@pytest.mark.parametrize("killed_at", range(6))
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_was_whole_when_a_run_was_killed_is_moved_on_by_the_next(
    killed_at: int, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if overwrite:
        (out / "a").write_text("old")
        (out / "run.json").write_text("old")
    replace, moves = os.replace, [0]

    def end(source: Path, target: Path) -> None:
        moves[0] += 1
        if moves[0] > 1 + killed_at:
            raise SystemExit  # and so does every later one: nothing is put back
        replace(source, target)

    monkeypatch.setattr("os.replace", end)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    with suppress(SystemExit), output_folder(out, overwrite) as folder:
        folder.fill(write("new", "a", "d", "run.json"))
    monkeypatch.undo()
    seen = {text for name, text in contents(out).items() if not name.startswith(".")}
    assert len(seen) <= 1, "files of two runs"
    with pytest.raises(Taken, match="is not empty"), output_folder(out, overwrite=False):
        pass
    assert contents(out) == {"a": "new", "d": "new", "run.json": "new"}


def test_what_a_killed_run_had_not_finished_is_removed_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".paradiff" / "new").mkdir(parents=True)
    (out / ".paradiff" / "new" / "a").write_text("ha")
    with output_folder(out, overwrite=False) as folder:
        folder.fill(write("new", "b", "run.json"))
    assert contents(out) == {"b": "new", "run.json": "new"}
    assert names(out) == {"b", "run.json"}


def test_a_folder_with_a_run_at_work_is_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for overwrite in ([], ["--overwrite"]):
        with output_folder(out, overwrite=False) as folder:
            found = cli("sample", tiny, *SHORT, "--out", out, *overwrite).sentence
            assert found == f"the output folder '{out}' is in use by another run; wait until it ends, or give another folder"
            folder.fill(write("new", "run.json"))
        assert contents(out) == {"run.json": "new"}
        (out / "run.json").unlink()
        out.rmdir()


def test_a_folder_keeps_its_mode_and_its_place(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o750)
    (out / "lost+found").mkdir()
    before = out.stat()
    assert cli("sample", tiny, *SHORT, "--out", out).code == 0
    assert cli("sample", tiny, *SHORT, "--out", out, "--overwrite").code == 0
    after = out.stat()
    assert (before.st_mode, before.st_ino) == (after.st_mode, after.st_ino)
    assert names(out) == {"lost+found", "samples.png", "seed-0.png", "run.json"}


@pytest.mark.parametrize("there", [False, True])
def test_a_link_is_followed(there: bool, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    if there:
        (tmp_path / "far").mkdir()
    (tmp_path / "out").symlink_to("far")
    (tmp_path / "round").symlink_to("round")
    assert cli("sample", tiny, *SHORT, "--out", tmp_path / "out").code == 0
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "far") == {"samples.png", "seed-0.png", "run.json"}
    assert "'; give a folder" in cli("sample", tiny, *SHORT, "--out", tmp_path / "round").sentence.replace(" is a file", "'")


def test_a_folder_where_a_file_goes_is_refused_before_the_run(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "seed-3.png").mkdir()
    found = cli("sample", tiny, *SHORT, "--out", tmp_path, "--overwrite")
    assert "holds a folder named seed-3.png, where the run writes a file; remove it, or give another folder" in found.sentence
    assert found.out == ""
    assert names(tmp_path) == {"seed-3.png"}


# -- an interrupt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_ends_a_run_with_one_sentence_and_no_files(sent: int, code: int, word: str, tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-c", "from paradiff.app.cli import main; main()", "sample", "digits"]
    command += ["--method", "sequential", "--steps", "1000", "--seeds", "0-63", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while (
                not (tmp_path / "out" / ".paradiff" / "lock").exists()
                and process.poll() is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.05)
            assert names(tmp_path / "out") == {".paradiff"}
            time.sleep(2)  # Into the chain, which takes far longer.
            assert process.poll() is None
            process.send_signal(sent)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code, err
    assert err == f"{word}: nothing was written\n"
    assert "Traceback" not in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_while_the_files_are_written_loses_no_run(
    sent: int, code: int, word: str, cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run_json.write_json

    def interrupted(*given: Any) -> None:
        signal.raise_signal(sent)
        write(*given)

    monkeypatch.setattr("paradiff.app.run_json.write_json", interrupted)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    found = cli("sample", tiny, *SHORT, "--out", tmp_path / "out")
    assert (found.code, found.err) == (code, f"{word}: the run was whole and is written to {tmp_path / 'out'}\n")
    assert read(tmp_path / "out")["status_code"] == "converged"
    assert names(tmp_path / "out") == {"samples.png", "seed-0.png", "run.json"}
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_after_the_files_were_written_says_where_they_are(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paradiff.app.run.show", lambda *_: signal.raise_signal(signal.SIGTERM))
    found = cli("sample", tiny, *SHORT, "--out", tmp_path / "out")
    assert (found.code, found.err) == (143, f"terminated: the run was whole and is written to {tmp_path / 'out'}\n")
    assert names(tmp_path / "out") == {"samples.png", "seed-0.png", "run.json"}


class Finalized:
    """An object that is signalled while it goes, where Python drops exceptions."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@pytest.mark.parametrize(("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_while_an_object_goes_is_not_lost(
    sent: int, code: int, word: str, cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computing(*_: Any) -> Any:
        Finalized(sent)
        time.sleep(10)

    monkeypatch.setattr("paradiff.app.pixels.make_table", computing)
    found = cli("sample", tiny, *SHORT, "--out", tmp_path / "out")
    assert (found.code, found.err) == (code, f"{word}: nothing was written\n")
    assert names(tmp_path) == set()


def test_a_second_signal_while_the_files_are_written_ends_the_run(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("paradiff.app.run_json.write_json", interrupted)
    found = cli("sample", tiny, *SHORT, "--out", tmp_path / "out")
    assert (found.code, found.err) == (130, "interrupted: nothing was written\n")
    assert names(tmp_path) == set()


# -- a stream that ends --------------------------------------------------------------------------------------------------


class Broken(io.StringIO):
    """Standard output that takes no text."""

    def __init__(self, error: Exception, flushes: bool) -> None:
        super().__init__()
        self.error, self.flushes = error, flushes

    def write(self, text: str) -> int:
        if not self.flushes:
            raise self.error
        return len(text)

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("flushes", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError(), FULL, ValueError("I/O operation on closed file")], ids=repr)
def test_a_run_outlives_its_output_stream(
    error: Exception, flushes: bool, cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(error, flushes))
    assert cli("sample", tiny, *SHORT, "--out", tmp_path / "out").code == 0
    assert "run.json" in names(tmp_path / "out")


def test_a_run_needs_no_streams(cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python starts with standard output closed
    monkeypatch.setattr(sys, "stderr", None)
    assert cli("sample", tiny, *SHORT, "--out", tmp_path / "out").code == 0
    assert "run.json" in names(tmp_path / "out")


def test_a_stream_escapes_what_its_encoding_lacks(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w", encoding="ascii") as file:
        assert Stream(file).write("a\u2500b\udc80") == 4
    assert (tmp_path / "file").read_text() == "a\\u2500b\\udc80"

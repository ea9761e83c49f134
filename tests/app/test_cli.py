"""The command line: what it writes, what stays as it was, and what is counted."""

from __future__ import annotations

import copy
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import Cli

from paradiff import Keyed, Schedule, piadm_sde, sample
from paradiff.app.plots import save_history
from paradiff.methods import PararealMethod, WindowMethod
from paradiff.methods import presets as methods
from paradiff.models.pixel import load
from paradiff.samplers import ddpm
from paradiff.solver import PararealRecord

# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "run_json.schema.json").read_text(encoding="utf-8"))
SHORT = ("--sampler", "ddim", "--steps", 10, "--device", "cpu")


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
    parts = [SCHEMA, SCHEMA["properties"]["environment"], SCHEMA["properties"]["sequential"], SCHEMA["properties"]["speedup"]]
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
    for option in ("blocks", "coarse", "schedule", "iterations", "rows", "prompt", "negative_prompt", "guidance", "argument"):
        assert f"`{option}`" in page.split("## `arguments`")[1].split("##")[0], option


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
    assert contents["status"].startswith("converged: ")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("compare", [False, True])
def test_only_compare_fills_what_a_sequential_run_measures(compare: bool, cli: Cli, tmp_path: Path) -> None:
    steps = ("--sampler", "ddpm", "--steps", 30, "--device", "cpu")
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
        ("--rule", "change", "--slope", "freeze-clean-data", "--warmup", 0),
        ("--stride", 3, "--slope", "shifted:0.5", "--max-rows", 2),
        ("--sampler", "heun", "--noise", "keyed"),
        ("--sampler", "dpmpp_2m", "--stride", 2),
        ("--sampler", "ddpm", "--window", 1),
        ("--sampler", "euler_ancestral", "--tolerance", 0),
        ("--eta", 1, "--dtype", "bfloat16", "--tolerance", 0.1),
        ("--method", "piadm_ode", "--blocks", 3, "--sweeps", 2),
        ("--method", "piadm_sde", "--blocks", 3, "--stagger", 1, "--sampler", "exponential_sde", "--form", "score"),
        ("--method", "piadm_ode", "--blocks", 2, "--corrector", "3x2", "--sampler", "exponential_ode", "--grid", "uniform"),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_the_counts_of_a_run_agree(options: tuple, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    assert cli("sample", tiny, *SHORT, "--seeds", "0-2", "--threads", 1, "--out", tmp_path / "out", *options).code == 0
    contents = read(tmp_path / "out")
    samples, history = contents["samples"], contents["history"]
    assert contents["evaluations"] == sum(s["evaluations"] for s in samples)
    assert contents["rounds"] == max(s["rounds"] for s in samples)
    stride = contents["arguments"]["stride"] or 1
    steps = 19 if "heun" in options else 10
    nodes = steps if stride == 1 else -(-steps // stride)
    for one in samples:
        own = [h for h in history if h["seed"] == one["seed"]]
        assert sum(h["passed"] for h in own) == nodes
        assert own[-1]["round"] == one["rounds"]
        if stride == 1:
            # Of a corrector's two sweeps, of 1 and 2 rows, one number is listed; the last block ends clean, without one.
            unlisted = 2 if "--corrector" in options else 0
            assert sum(len(h["change"]) for h in own) + unlisted == one["evaluations"]
    if options[-1] == "sequential" or options[-2:] in (("--window", 1), ("--tolerance", 0)):
        assert contents["status"].startswith("exact: ")
        assert [s["estimated_error"] for s in samples] == [0, 0, 0]


def test_a_corrected_chain_is_compared_with_its_own_sequential_chain(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    chain = ("--sampler", "exponential_ode", "--steps", 12, "--device", "cpu", "--threads", 1)
    piadm = ("--method", "piadm_ode", "--blocks", 3, "--corrector", "4x4", "--sweeps", 12)
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
    "--blocks 3 --iterations 3": (3, "exact"),
    "--schedule batched --tolerance 2": (3, "converged"),
    "--schedule batched --blocks 3 --iterations 3": (3, "exact"),
    "--coarse one-step --schedule pipelined --blocks 2 --sampler ddpm": (2, "exact"),
    "--coarse two-step --tolerance 2": (4, "converged"),
    "--steps 20 --blocks 3 --coarse 2 --iterations 1": (3, "stopped"),
    "--coarse freeze-epsilon --blocks 3 --rule change --tolerance 1e-4": (3, "exact"),
    "--coarse shifted:0.5 --tolerance 20": (4, "converged"),
    "--rows 2 --blocks 3 --tolerance 2": (3, "converged"),
    "--window 2 --steps 20 --blocks 5 --tolerance 20 --sampler euler_ancestral": (5, "converged"),
    "--iterations 0": (3, "stopped"),
    "--rule image --tolerance 200 --sampler dpmpp_2m --max-rows 3": (4, "converged"),
    "--rule sample --sampler heun --noise keyed --blocks 3": (3, "converged"),
}


@pytest.mark.parametrize("line", WAVES)
def test_the_counts_of_a_wavefront_agree(line: str, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    srds = (*SHORT, "--method", "srds", "--seeds", "0-2", "--threads", 1, *line.split())
    result = cli("sample", tiny, *srds, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    blocks, status = WAVES[line]
    assert f"{3 * blocks}/{3 * blocks} blocks" in result.out
    contents = read(tmp_path / "out")
    samples, history, asked = contents["samples"], contents["history"], contents["arguments"]
    words = line.split()
    for option, value in zip(words[::2], words[1::2], strict=True):
        assert str(asked[option[2:].replace("-", "_")]) == str(float(value) if option == "--tolerance" else value)
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
                assert first[0] == 0 or asked["window"]  # Which opens with the newest value before it.
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
    "pipelined": ("--blocks", 4),
    "batched": ("--blocks", 4, "--schedule", "batched"),
    "two-step": ("--coarse", "two-step"),
    "slope": ("--coarse", "freeze-clean-data"),
    "window": ("--window", 2),
    "all iterations": ("--blocks", 5, "--iterations", 5, "--sampler", "ddpm"),
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
    assert one["error"]["rms"] < (1e-5 if "--iterations" in options else 2e-3)


def test_without_enough_iterations_the_picture_is_another(cli: Cli, tmp_path: Path) -> None:
    cli("sample", "digits", *SHORT, "--method", "srds", "--iterations", 0, "--compare", "--out", tmp_path / "out")
    contents = read(tmp_path / "out")
    assert contents["status"] == "stopped: 0 iterations were made, as asked"
    assert contents["samples"][0]["error"]["rms"] > 1e-2


def test_the_trace_of_a_wavefront_is_that_of_its_slowest_sample(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    srds = ("--method", "srds", "--blocks", 3, "--tolerance", 0.3, "--seeds", "3,0,4")
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
def test_the_widest_round_is_known_beforehand(method: WindowMethod | PararealMethod, rows: int) -> None:
    assert method.width(ddpm(Schedule.linear(), 8)) == rows


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

    monkeypatch.setattr("paradiff.app.cli.write_json", full)
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


# -- an interrupt ------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_a_run_with_one_sentence_and_no_files(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-c", "from paradiff.app.cli import main; main()", "sample", "digits"]
    command += ["--method", "sequential", "--steps", "1000", "--seeds", "0-63", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 60
            while not any(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            assert [p.name[:5] for p in tmp_path.iterdir()] == [".out-"]  # The run's scratch folder.
            time.sleep(2)  # Into the chain, which takes far longer.
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert err == "interrupted: nothing was written\n"
    assert "Traceback" not in out
    assert list(tmp_path.iterdir()) == []

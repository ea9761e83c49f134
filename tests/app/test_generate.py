# SPDX-License-Identifier: Apache-2.0
"""Bulk runs: which seed lies where, what is written, what goes on after an end of any kind, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import signal
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import jsonschema
import pytest
import torch
from pipelines import Cli, save_pipeline, tiny_unet
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import CASES
from tiny.case import quiet

from paradiff.app import environment, makers, store
from paradiff.app.bulk import Shard, in_turn, shards_of
from paradiff.chain.noise import Recorded
from paradiff.lock import locked
from paradiff.methods.presets import parasolver, sequential
from paradiff.models.pixel import load
from paradiff.solver.loop import sample

# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

DOCS = Path(__file__).parents[2] / "docs"
SCHEMA = json.loads((DOCS / "manifest.schema.json").read_text(encoding="utf-8"))
CHAIN = ("--sampler", "ddim", "--steps", 8, "--device", "cpu")
CUT = ("--seeds", "0-13", "--shard", 8, "--batch", 4, "--window", 2)
"""Three shards: seeds 0 to 7 and 8 to 11 in batches of 4, and 12 and 13, which fill no batch."""


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def manifest(folder: Path) -> dict[str, Any]:
    """manifest.json, checked."""
    contents = json.loads((folder / "manifest.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    jsonschema.Draft202012Validator(SCHEMA).validate(contents)
    return contents


@pytest.fixture
def whole(cli: Cli, tiny: Path, tmp_path: Path) -> Path:
    """The folder of a run that was let alone."""
    found = cli("generate", tiny, *CHAIN, *CUT, "--out", tmp_path / "whole")
    assert (found.code, found.err) == (0, "")
    return tmp_path / "whole"


# -- which seed lies where ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "shard", "batch", "last", "together"), [(14, 8, 4, 2, 2), (5, 2, 3, 5, 2), (7, 10, 3, 0, 1)])
def test_every_seed_lies_in_one_shard_in_order(count: int, shard: int, batch: int, last: int, together: int) -> None:
    seeds = list(range(100, 100 + count))
    found = shards_of(seeds, shard=shard, batch=batch, last=last, together=together, format="png")
    assert [seed for one in found for seed in one.seeds] == seeds
    assert [seed for one in found for part in one.batches for seed in part] == seeds
    assert sum(len(one.seeds) for one in found if one.mode == "parallel") == last
    assert [one.name for one in found] == [f"shard-{k:05}.tar" for k in range(len(found))]
    assert all(len(part) <= one.batch for one in found for part in one.batches)


def test_names_sort_as_shards_do() -> None:
    found = shards_of(range(100_001), shard=1, batch=1, last=0, together=1, format="safetensors")
    assert sorted(one.name for one in found) == [one.name for one in found]


def test_ranks_begin_with_shares_of_their_own_and_try_all() -> None:
    shards = [Shard(name=str(k), mode="batched", seeds=(k,), batch=1) for k in range(7)]
    orders = [[one.name for one in in_turn(shards, rank, 3)] for rank in range(3)]
    assert orders[1] == ["1", "4", "2", "5", "0", "3", "6"]
    assert all(sorted(order) == [one.name for one in shards] for order in orders)
    assert in_turn(shards, 0, 1) == shards


# -- what is written ---------------------------------------------------------------------------------------------------


def test_batched_seeds_are_the_sequential_chains_and_the_last_the_methods(whole: Path, tiny: Path) -> None:
    assert set(bytes_of(whole)) == {"manifest.json", *(f"shard-0000{k}.safetensors" for k in range(3))}
    model = load(str(tiny))
    table = model.table("ddim", 8)
    for number, parts, method in ((0, [(0, 1, 2, 3), (4, 5, 6, 7)], sequential()), (2, [(12, 13)], parasolver(window=2))):
        found = load_file(whole / f"shard-0000{number}.safetensors")
        assert found["seeds"].tolist() == [seed for part in parts for seed in part]
        for k, part in enumerate(parts):
            generators = [torch.Generator().manual_seed(seed) for seed in part]
            solution = sample(model, table, Recorded(model.shape, generators), method)
            assert torch.equal(found["samples"][k * len(part) :][: len(part)], solution.sample)
            errors = [estimate.estimated_error for estimate in solution.error_estimates]
            assert found["estimated_error"][k * len(part) :][: len(part)].tolist() == errors
    with safe_open(whole / "shard-00002.safetensors", "pt") as file:
        about = json.loads(file.metadata()["paradiff"])
    assert about == {"mode": "parallel", "status": ["converged"] * 2}


def test_the_manifest_says_what_is_there(whole: Path, tiny: Path) -> None:
    contents = manifest(whole)
    assert contents["complete"]
    assert contents["request"]["model"] == str(tiny)
    assert (contents["request"]["batch"], contents["request"]["last"], contents["request"]["threads"]) == (4, 2, 1)
    assert [(one["mode"], one["samples"], one["first_seed"]) for one in contents["shards"]] == [
        ("batched", 8, 0),
        ("batched", 4, 8),
        ("parallel", 2, 12),
    ]
    for one in contents["shards"]:
        assert one["sha256"] == store.digest_of(whole / one["name"])


def test_every_field_of_the_manifest_is_explained() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    page = (DOCS / "generate.md").read_text(encoding="utf-8")
    for part in (SCHEMA, SCHEMA["properties"]["environment"], SCHEMA["properties"]["shards"]["items"]):
        for field in part["properties"]:
            assert f"`{field}`" in page, field


def test_pictures_are_those_of_sample(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    given = (tiny, *CHAIN, "--seeds", "3,1,8", "--method", "sequential")
    assert cli("generate", *given, "--batch", 3, "--format", "png", "--out", tmp_path / "bulk").code == 0
    assert cli("sample", *given, "--out", tmp_path / "one").code == 0
    with tarfile.open(tmp_path / "bulk" / "shard-00000.tar") as tar:
        assert tar.getnames() == ["shard.json", "seed-3.png", "seed-1.png", "seed-8.png"]
        for member in tar.getmembers()[1:]:
            data = tar.extractfile(member)
            assert data is not None
            assert data.read() == (tmp_path / "one" / member.name).read_bytes()
            assert (member.mtime, member.uid) == (0, 0)


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_bytes_are_the_same_on_any_rank(
    whole: Path, cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "none"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    found = cli("generate", tiny, *CHAIN, *CUT, "--out", tmp_path / "other")
    assert (found.code, found.out, found.err) == (0, "", "")
    assert bytes_of(tmp_path / "other") == bytes_of(whole)


def test_a_shard_of_another_process_is_waited_for(whole: Path, cli: Cli, tiny: Path) -> None:
    (whole / "shard-00001.safetensors").unlink()
    (whole / ".paradiff").mkdir()
    with locked(whole / ".paradiff" / "shard-00001.safetensors.lock", 0):
        found = cli("generate", tiny, *CHAIN, *CUT, "--out", whole, "--deadline", 0.3)
    assert found.code == 3
    assert f"2 of 3 shards are whole in {str(whole)!r}; run the same command again" in found.out
    assert not (whole / "shard-00001.safetensors").exists()
    assert cli("generate", tiny, *CHAIN, *CUT, "--out", whole).code == 0
    assert manifest(whole)["complete"]
    assert len(bytes_of(whole)) == 4


# -- going on ----------------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_made_again(whole: Path, cli: Cli, tiny: Path) -> None:
    before = bytes_of(whole)
    (whole / "shard-00000.safetensors").unlink()
    found = cli("generate", tiny, *CHAIN, *CUT, "--out", whole)
    assert found.code == 0
    assert "2 of 3 shards are in" in found.out
    assert "8 of them made by this process" in found.out
    assert bytes_of(whole) == before


def end_after(shards: int, end: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls a function when that many shards are whole, and another one is about to be written."""
    put, count = store.Store.put, [0]

    def put_or_end(self: store.Store, shard: Shard, data: bytes) -> None:
        if count[0] == shards:
            end()
        count[0] += 1
        put(self, shard, data)

    monkeypatch.setattr(store.Store, "put", put_or_end)


@pytest.mark.parametrize(("sent", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_keeps_the_shards_that_are_whole(
    sent: int, code: int, word: str, whole: Path, cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, out = ("generate", tiny, *CHAIN, *CUT, "--out", tmp_path / "out"), tmp_path / "out"
    before = signal.signal(sent, signal.default_int_handler)  # which shells turn off for what they run in the background
    with monkeypatch.context() as patched:
        end_after(1, lambda: signal.raise_signal(sent), patched)
        found = cli(*given)
    signal.signal(sent, before)
    assert found.code == code
    assert found.err == f"{word}: 1 of 3 shards are whole in {str(out)!r}; run the same command again for the others\n"
    assert not list(out.glob(".paradiff/shard*"))
    assert not manifest(out)["complete"]
    assert cli(*given).code == 0
    assert bytes_of(out) == bytes_of(whole)


def test_a_full_disk_keeps_the_shards_that_are_whole(
    whole: Path, cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, out = ("generate", tiny, *CHAIN, *CUT, "--out", tmp_path / "out"), tmp_path / "out"
    sync, count = os.fsync, [0]

    def full(place: int) -> None:
        count[0] += 1
        if count[0] > 4:  # the manifest and a shard, each with its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        found = cli(*given).sentence
    assert found == (
        f"the output {str(out)!r} cannot be written: No space left on device; 1 of 3 shards are whole in {str(out)!r}; run the "
        "same command again for the others"
    )
    assert {path.name for path in out.iterdir()} - {".paradiff"} == {"manifest.json", "shard-00000.safetensors"}
    assert not list(out.glob(".paradiff/*.part"))
    assert cli(*given).code == 0
    assert bytes_of(out) == bytes_of(whole)


def test_the_deadline_begins_no_shard_that_it_is_over_for(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    found = cli("generate", tiny, *CHAIN, *CUT, "--out", tmp_path / "out", "--deadline", 1e-9)
    assert found.code == 3
    assert "the deadline of 1e-09 s ended it: 0 of 3 shards are whole" in found.out
    assert not manifest(tmp_path / "out")["complete"]


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (("--steps", 7), "was begun with steps 8, and this run asks for 7: give the same, or another folder"),
        (("--seeds", "0-14"), 'was begun with seeds "0-13", and this run asks for "0-14"'),
        (("--window", 3), "was begun with window 2, and this run asks for 3"),
        (("--shard", 4), "was begun with shard 8, and this run asks for 4"),
        (("--last", 3), "was begun with last 2, and this run asks for 3"),
        (("--format", "png"), 'was begun with format "safetensors", and this run asks for "png"'),
        (("--threads", 2), "was begun with threads 1, and this run asks for 2"),
    ],
)
def test_a_run_with_other_options_is_no_going_on(
    other: tuple[object, ...], sentence: str, cli: Cli, tiny: Path, tmp_path: Path
) -> None:
    given = ("generate", tiny, *CHAIN, *CUT, "--out", tmp_path / "out")
    assert cli(*given, "--deadline", 1e-9).code == 3
    before = bytes_of(tmp_path / "out" / ".paradiff"), (tmp_path / "out" / "manifest.json").read_bytes()
    assert sentence in cli(*given, *other).sentence
    assert (bytes_of(tmp_path / "out" / ".paradiff"), (tmp_path / "out" / "manifest.json").read_bytes()) == before


def test_a_refusal_to_go_on_leaves_a_whole_run_as_it_is(whole: Path, cli: Cli, tiny: Path) -> None:
    before = bytes_of(whole), sorted(whole.iterdir())
    assert "was begun with steps 8" in cli("generate", tiny, *CHAIN, *CUT, "--steps", 7, "--out", whole).sentence
    assert (bytes_of(whole), sorted(whole.iterdir())) == before


def test_options_that_decide_on_no_byte_may_differ(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    given = ("generate", tiny, *CHAIN, *CUT, "--out", tmp_path / "out")
    assert cli(*given, "--deadline", 1e-9).code == 3
    assert cli(*given, "--deadline", 100).code == 0


def test_another_model_under_the_same_name_is_no_going_on(cli: Cli, tmp_path: Path) -> None:
    model = save_pipeline(tmp_path / "model")
    given = ("generate", model, *CHAIN, *CUT, "--out", tmp_path / "out")
    assert cli(*given, "--deadline", 1e-9).code == 3
    unet = tiny_unet()
    with torch.no_grad():
        next(unet.parameters()).mul_(1.5)
    save_pipeline(model, unet)
    assert "was begun with other files of the model: give the same, or another folder" in cli(*given).sentence


def test_another_version_of_torch_is_no_going_on(cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("generate", tiny, *CHAIN, *CUT, "--out", tmp_path / "out")
    assert cli(*given, "--deadline", 1e-9).code == 3
    own = environment.environment
    monkeypatch.setattr(environment, "environment", lambda device: {**own(device), "torch": "99.0"})
    assert 'and this run has "99.0", which may round otherwise: use the same, or another folder' in cli(*given).sentence


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_version": 1}', '{"schema_version": 9, "request": {}}'])
def test_a_manifest_that_is_none_is_refused(text: str, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(text)
    found = cli("generate", tiny, *CHAIN, *CUT, "--out", tmp_path / "out").sentence
    assert "is no manifest of a run that this version can go on with; give another folder" in found
    assert (tmp_path / "out" / "manifest.json").read_text() == text
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["manifest.json"]


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "--shard 0": "--shard is 0; it must be a whole number, at least 1",
    "--batch 0": "--batch is 0; it must be a whole number, at least 1",
    "--last 15": "--last is 15; it must be a whole number, at least 0 and at most 14, since --seeds names 14",
    "--format jpeg": "format is 'jpeg'; it must be one of safetensors, png",
    "--prompt cat": "--prompt was given, but",
    "--window 9": "the window is 9; the chain has 8 sub-intervals",
    "--seeds 1,1": "seeds are '1,1', which names seed 1 twice",
    "--deadline 0": "the deadline, in seconds, is 0.0",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_refusal_leaves_nothing(line: str, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    assert REFUSED[line] in cli("generate", tiny, *CHAIN, *CUT, "--out", tmp_path / "a" / "out", *line.split()).sentence
    assert not (tmp_path / "a").exists()


def test_what_is_refused_in_the_midst_of_a_first_shard_leaves_nothing(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, seeds: Sequence[int]) -> None:
        raise ValueError("no")

    monkeypatch.setattr(makers.PixelMaker, "batched", refuse)
    assert cli("generate", tiny, *CHAIN, *CUT, "--out", tmp_path / "a" / "out").sentence == "no"
    assert not (tmp_path / "a").exists()


def test_calls_that_do_not_fit_are_not_cut(cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = makers.load(str(tiny)).unet.forward.__func__

    def small(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(x) > 3:
            raise torch.OutOfMemoryError
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr("diffusers.UNet2DModel.forward", small)
    found = cli("generate", tiny, *CHAIN, *CUT, "--out", tmp_path / "out").sentence
    assert "memory ran out at a network call of more than 2 rows; give --max-rows 2, or a smaller --batch" in found
    assert not (tmp_path / "out").exists()


def test_other_folders_and_files_are_left_alone(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "run.json").write_text("{}")
    given = ("generate", tiny, *CHAIN, *CUT, "--out")
    assert cli(*given, tmp_path / "file").sentence == f"the output {str(tmp_path / 'file')!r} is a file; give a folder"
    assert "is not empty, and has no manifest.json of a run to go on with" in cli(*given, tmp_path / "full").sentence
    assert bytes_of(tmp_path / "full") == {"run.json": b"{}"}


def test_seeds_and_a_folder_have_to_be_given(cli: Cli, tiny: Path) -> None:
    assert "--seeds" in cli("generate", tiny, "--out", "x").sentence
    assert "--out" in cli("generate", tiny, "--seeds", "0").sentence


# -- pipelines ---------------------------------------------------------------------------------------------------------

TEXT = ("--prompt", "a cat", "--steps", 4, "--size", "16x16", "--device", "cpu")


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("bulk") / "sd"
    with quiet():
        CASES["sd"].make().save_pretrained(folder)
    return folder


def test_a_pipelines_batches_are_its_calls(cli: Cli, stable: Path, tmp_path: Path) -> None:
    given = ("generate", stable, *TEXT, "--seeds", "0-4", "--method", "sequential")
    found = cli(*given, "--batch", 2, "--out", tmp_path / "two")
    assert (found.code, found.err) == (0, "")
    assert cli(*given, "--batch", 1, "--last", 0, "--out", tmp_path / "one").code == 0
    one = load_file(tmp_path / "one" / "shard-00000.safetensors")
    two = [load_file(tmp_path / "two" / f"shard-0000{k}.safetensors") for k in range(2)]
    assert [two[0]["seeds"].tolist(), two[1]["seeds"].tolist()] == [[0, 1, 2, 3], [4]]
    assert one["samples"].shape == (5, 3, 16, 16)
    # A batch of two rounds otherwise than one; samples differ by their own size from each other.
    assert (torch.cat([part["samples"] for part in two]) - one["samples"]).abs().max() < 1e-3
    assert (one["samples"][0] - one["samples"][1]).abs().max() > 0.1


def test_batches_that_are_other_samples_are_refused(
    cli: Cli, stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = makers.timed

    def shifted(pipeline: Any, arguments: Any, generator: Any) -> Any:
        return timed(pipeline, arguments, generator[::-1] if isinstance(generator, list) else generator)

    monkeypatch.setattr(makers, "timed", shifted)
    found = cli("generate", stable, *TEXT, "--seeds", "0-3", "--batch", 2, "--out", tmp_path / "out").sentence
    assert "makes another sample of seed 1 in a batch of 2 than by itself (RMS difference 0." in found
    assert found.endswith("; give --batch 1")
    assert not (tmp_path / "out").exists()


def test_a_parallel_call_that_does_not_fit_is_a_plain_one(
    cli: Cli, stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("generate", stable, *TEXT, "--seeds", "0-1", "--window", 4, "--batch", 1)
    assert cli(*given, "--last", 0, "--out", tmp_path / "plain").code == 0
    assert cli(*given, "--last", 2, "--out", tmp_path / "parallel").code == 0
    own, rows = diffusers.UNet2DConditionModel.forward, []

    def small(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(x))
        if len(x) > 4:
            raise torch.OutOfMemoryError
        return own(self, x, *args, **kwargs)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", small)
    found = cli(*given, "--last", 2, "--out", tmp_path / "small")
    assert (found.code, found.err) == (0, "")
    assert max(rows) > 4
    assert found.out.count("warning: memory ran out at network calls of more than 4 rows, so samples were made by plain") == 1
    plain = load_file(tmp_path / "plain" / "shard-00000.safetensors")["samples"]
    for k in range(2):
        sample, parallel = (
            load_file(tmp_path / name / f"shard-0000{k}.safetensors")["samples"] for name in ("small", "parallel")
        )
        assert torch.equal(sample[0], plain[k])
        assert not torch.equal(sample, parallel)

# SPDX-License-Identifier: Apache-2.0
"""The command with several devices of one process: the pictures of one, each device with its part, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pipelines import Cli
from tiny import CASES
from tiny.case import quiet

from paradiff.app.launched import NEEDED
from paradiff.solver.replicas import Replicas

SHORT = ("--steps", 8, "--window", 4)
PROMPT = ("--prompt", "a cat", "--size", "16x16")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The devices of each round."""
    seen: list[tuple[str, ...]] = []
    own = Replicas.parts

    def noted(self: Replicas, *given: Any, **more: Any) -> Any:
        seen.append(tuple(map(str, self.devices)))
        return own(self, *given, **more)

    monkeypatch.setattr(Replicas, "parts", noted)
    return seen


@pytest.mark.parametrize("names", ["all", "{0}:0,{0}:1", "{0}:0, {0}:1"])
def test_two_devices_give_the_pictures_of_the_cpu(
    names: str, cli: Cli, tiny: Path, device: str, tmp_path: Path, places: list[tuple[str, ...]]
) -> None:
    line = ("sample", tiny, "--sampler", "ddim", *SHORT, "--noise", "keyed")
    found = cli(*line, "--device", names.format(device), "--out", tmp_path / "two")
    assert (found.code, found.err) == (0, "")
    assert set(places) == {(f"{device}:0", f"{device}:1")}
    assert cli(*line, "--device", "cpu", "--out", tmp_path / "one").code == 0
    assert (tmp_path / "one/seed-0.png").read_bytes() == (tmp_path / "two/seed-0.png").read_bytes()
    assert json.loads((tmp_path / "two/run.json").read_text())["arguments"]["device"] == names.format(device)


def test_a_pipelines_call_is_shared_by_devices(cli: Cli, device: str, tmp_path: Path, places: list[tuple[str, ...]]) -> None:
    with quiet():
        CASES["sd"].make().save_pretrained(tmp_path / "sd")
    named = (*PROMPT, *SHORT, "--method", "parasolver")
    found = cli("sample", tmp_path / "sd", *named, "--device", f"{device}:1,{device}:0", "--out", tmp_path / "two")
    assert (found.code, found.err) == (0, "")
    assert set(places) == {(f"{device}:1", f"{device}:0")}
    assert cli("sample", tmp_path / "sd", *named, "--device", "cpu", "--out", tmp_path / "one").code == 0
    assert (tmp_path / "one/seed-0.png").read_bytes() == (tmp_path / "two/seed-0.png").read_bytes()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("--device", "cuda:0,,"), "the device is 'cuda:0', which is not available here; give cpu, cuda or another"),
        (("--device", "{0}:0,"), "the device is '', which is not available here; give cpu, cuda or another"),
        (("--device", "{0}:0,{0}:7"), "the device is '{0}:7', which is not available here; give cpu, cuda or another"),
    ],
)
def test_other_devices_are_refused(
    given: tuple[str, ...], sentence: str, cli: Cli, tiny: Path, device: str, tmp_path: Path
) -> None:
    texts = [text.format(device) for text in given]
    found = cli("sample", tiny, *SHORT, *texts, "--out", tmp_path / "out")
    assert found.sentence == sentence.format(device)
    assert not (tmp_path / "out").exists()


def test_several_devices_are_for_one_process(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NEEDED:
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "0")
    monkeypatch.setattr("paradiff.app.cli.leave", exit_with)
    found = cli("sample", tiny, *SHORT, "--device", "all")
    assert found.sentence.startswith("--device is 'all', which is for one process, but torchrun started 2 ranks; leave it out")


def exit_with(code: int) -> None:
    raise SystemExit(code)


def test_without_an_accelerator_all_is_refused(cli: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paradiff.solver.accelerator.kind", lambda: None)
    found = cli("sample", tiny, *SHORT, "--device", "all")
    assert found.sentence.startswith("devices is 'all', but there is no accelerator here")

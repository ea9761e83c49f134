# SPDX-License-Identifier: Apache-2.0
"""Files of plans and calibrations: whole or not there, and refused before anything is spent."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pipelines import Cli

from paradiff.whole_file import held_places, require_place, write_whole

PLACES = {
    "folder": "is a folder; give the path of a file",
    "no/where": "is in a folder that does not exist; make it, or give another path",
    "loop": "cannot be written: Too many levels of symbolic links; give another path",
    "n" * 300: "cannot be written: File name too long; give another path",
    "pipe": "is a pipe that nobody reads; begin to read it first, or give another path",
    "nul\0": "holds a NUL character, which no name, number or prompt has; leave it out",
}


def _made(folder: Path) -> Path:
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["plan --json", "plan --plot", "calibrate --method jacobi --json"])
def test_what_cannot_be_written_is_refused_before_the_model_is_read(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, place: str
) -> None:
    name, *given = command.split()

    def unread(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was read")

    monkeypatch.setattr(f"paradiff.app.{name}.load", unread)
    assert PLACES[place] in cli(name, "digits", *given, str(_made(tmp_path) / place)).sentence


def test_a_place_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    for name in ("new", "old", "dangling"):
        (tmp_path / "old").write_text("old")
        (tmp_path / "dangling").symlink_to(tmp_path / "target")
        require_place(tmp_path / name)
        assert sorted(os.listdir(tmp_path)) == ["dangling", "old"]
        assert (tmp_path / "old").read_text() == "old"
        (tmp_path / "dangling").unlink()


def test_who_reads_a_pipe_waits_for_what_is_written_later(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with held_places(None, tmp_path / "pipe"):
        with pytest.raises(BlockingIOError):  # it has not ended
            os.read(reader, 10)
        write_whole(tmp_path / "pipe", b"read")
    assert (os.read(reader, 10), os.read(reader, 10)) == (b"read", b"")
    os.close(reader)


@pytest.mark.parametrize(
    "write", [require_place, lambda path: write_whole(path, b"x"), lambda path: held_places(path).__enter__()]
)
def test_a_path_that_no_file_has_is_refused_in_words(tmp_path: Path, write: Any) -> None:
    with pytest.raises(ValueError, match="holds a NUL character, which no file's name has; give another path"):
        write(tmp_path / "a\0b")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(path)
    write_whole(link, b"one")
    assert (path.read_bytes(), path.stat().st_mode & 0o777, link.is_symlink()) == (b"one", 0o644, True)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match="cannot be written: No space left on device"):
        write_whole(path, b"two")
    assert (path.read_bytes(), sorted(os.listdir(tmp_path))) == (b"one", ["file", "link"])


def test_a_device_is_written_to() -> None:
    write_whole(Path("/dev/null"), b"gone")
    assert not Path("/dev/null").is_file()
    with pytest.raises(ValueError, match="cannot be written: No space left on device"):
        write_whole(Path("/dev/full"), b"x")


def test_a_pipe_is_written_to_where_somebody_reads(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="cannot be written: No such device or address"):
        write_whole(tmp_path / "pipe", b"x")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", b"read")
    assert os.read(reader, 10) == b"read"
    os.close(reader)

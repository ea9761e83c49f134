# SPDX-License-Identifier: Apache-2.0
"""The folder of results of one run: claimed before anything is computed, and filled when everything is.

While a run lasts, its folder holds a hidden one, `.paradiff`, with a lock and with the files in the making. The files of a run
that is whole are moved from there into the folder itself, `run.json` last: where it lies, the run is whole. A killed run leaves
`.paradiff` behind. The next run into the folder finds the lock free, moves on what was whole, and removes the rest.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from paradiff.app.outcome import Writer
from paradiff.app.signals import held
from paradiff.lock import locked
from paradiff.whole_file import require_named

SCRATCH = ".paradiff"
LAST = "run.json"
OURS = re.compile(r"run\.json|samples\.png|trace\.png|seed-[0-9]+\.(png|mp4|wav)")
"""Names of the files of runs."""

NOT_OURS = frozenset({SCRATCH, "lost+found"})
"""Entries of a folder that is empty all the same: the second is that of a file system's own root."""


class Taken(ValueError):
    """An output folder that is not empty, or in use by another run. The text is a sentence for the user."""


class Unwritten(ValueError):
    """A folder that the file system refused to be filled, after all was computed. The text is a sentence for the user."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A claimed output folder.

    Attributes:
        path: As it was given.
        real: Where it lies: the end of symbolic links.
        overwrite: Whether files of the same name are replaced.
        made: The folders that were made for it, the innermost first; they go again unless the run is written.
    """

    path: Path
    real: Path
    overwrite: bool
    made: list[Path] = field(default_factory=list)

    @property
    def scratch(self) -> Path:
        """The hidden folder."""
        return self.real / SCRATCH

    def fill(self, writers: Sequence[Writer]) -> None:
        """Writes the files of a run: all, or none. Others stay, and `run.json` is the last that comes.

        What the file system refuses is written to a folder of its own instead, as far as that goes.

        Raises:
            Unwritten: Then; the sentence names that folder.
        """
        fresh, whole = self.scratch / "new", self.scratch / "whole"
        try:
            fresh.mkdir()
            for write in writers:
                write(fresh)
            if not self.overwrite:
                self._refuse_present(fresh)
            os.replace(fresh, whole)
            _exchange(whole, self.real, self.scratch / "old")
        except OSError as error:
            shutil.rmtree(whole, ignore_errors=True)
            shutil.rmtree(fresh, ignore_errors=True)  # which may be what the disk lacks
            raise Unwritten(f"{_refusal(self.path.absolute(), error)}; {rescued(writers, 'the run')}") from error
        self.made.clear()

    def _refuse_present(self, fresh: Path) -> None:
        """Refuses files that somebody else has put there meanwhile."""
        for name in sorted(os.listdir(fresh)):
            if os.path.lexists(self.real / name):
                raise FileExistsError(f"{name} was put there meanwhile")


@contextmanager
def output_folder(path: Path, overwrite: bool) -> Iterator[Folder]:
    """Claims a folder, made if it does not exist, for as long as the block lasts.

    A folder that exists stays what it is: a mount point, the target of a symbolic link, with its mode. Where the block does not
    fill it, it is left as it was found, and one that was made goes again.

    Raises:
        Taken: If another run is at work in the folder, or it is not empty (without `overwrite`).
        ValueError: If `path` is a file, holds a folder where a run's file goes, or cannot be written.
    """
    given, path = path, path.absolute()
    real = Path(os.path.realpath(path))
    made: list[Path] = []
    with _writing(path):
        if os.path.lexists(real) and not real.is_dir():
            raise ValueError(f"the output {str(path)!r} is a file; give a folder")
        if real.is_dir() and not (real / SCRATCH).exists():
            _check_contents(path, real, overwrite)  # before anything is touched
    claimed = ExitStack()
    try:
        with held(), _writing(path):
            claimed.enter_context(_claimed(path, real, made))
            claimed.callback(shutil.rmtree, real / SCRATCH, ignore_errors=True)
            _tidy(real)
            _check_contents(path, real, overwrite)
        yield Folder(path=given, real=real, overwrite=overwrite, made=made)
    finally:
        with held():
            claimed.close()
            for one in made:
                with suppress(OSError):
                    one.rmdir()


@contextmanager
def next_folder(first: Path) -> Iterator[Folder]:
    """Claims `first`, or `first-2`, `first-3`, ...: the first that is not there, or is an empty folder without a run at work.

    Raises:
        ValueError: If it cannot be written.
    """
    names = itertools.chain([first], (first.with_name(f"{first.name}-{k}") for k in itertools.count(2)))
    with ExitStack() as claimed:
        for path in names:
            if path.exists() and not path.is_dir():
                continue
            try:
                folder = claimed.enter_context(output_folder(path, overwrite=False))
            except Taken:
                continue
            yield folder
            return


@contextmanager
def _claimed(path: Path, real: Path, made: list[Path]) -> Iterator[None]:
    """Holds the lock of a folder, which is made if it does not exist."""
    file = real / SCRATCH / "lock"
    try:
        with locked(file, 0, lambda: make_folders(file.parent, made)):
            yield
    except TimeoutError as busy:
        raise Taken(
            f"the output folder {str(path)!r} is in use by another run; wait until it ends, or give another folder"
        ) from busy


@contextmanager
def made_folder(folder: Path, what: str) -> Iterator[None]:
    """A folder that is there for as long as the block lasts. Those that were made for it go again where the block leaves them
    empty.

    Args:
        folder: The folder.
        what: What it is, the subject of a sentence.

    Raises:
        ValueError: If it cannot be made, or no file can be written into it.
    """
    made: list[Path] = []
    try:
        try:
            require_named(folder)
            make_folders(folder, made)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(
                f"{what} {str(folder)!r} cannot be written: {error.strerror or error}; give another one"
            ) from error
        yield
    finally:
        for one in made:
            with suppress(OSError):
                one.rmdir()


def make_folders(folder: Path, made: list[Path]) -> None:
    """Makes a folder and those above it, and adds them to `made`, the innermost first."""
    missing = list(itertools.takewhile(lambda one: not one.exists(), (folder, *folder.parents)))
    for one in reversed(missing):
        with suppress(FileExistsError):
            one.mkdir()
            made.insert(0, one)


def _tidy(real: Path) -> None:
    """Moves on the files of a run that was whole when it was killed, and removes what else such runs left."""
    scratch = real / SCRATCH
    whole = scratch / "whole"
    if whole.is_dir():
        if (whole / LAST).exists():
            (real / LAST).unlink(missing_ok=True)
        for name in _in_order(whole):
            os.replace(whole / name, real / name)
    for left in ("new", "whole", "old"):
        if (scratch / left).is_dir():
            shutil.rmtree(scratch / left)


def _exchange(whole: Path, real: Path, old: Path) -> None:
    """Moves all files of one folder into another, or none; those that they replace go first, `run.json` before the others."""
    names = _in_order(whole)
    old.mkdir()
    try:
        for name in reversed(names):
            if os.path.lexists(real / name):
                os.replace(real / name, old / name)
        for name in names:
            os.replace(whole / name, real / name)
    except BaseException:
        for name in reversed(names):
            if not os.path.lexists(whole / name):
                os.replace(real / name, whole / name)
        for name in _in_order(old):
            os.replace(old / name, real / name)
        raise


def _in_order(folder: Path) -> list[str]:
    """The names in a folder, `run.json` last."""
    return sorted(os.listdir(folder), key=lambda name: (name == LAST, name))


def _check_contents(path: Path, real: Path, overwrite: bool) -> None:
    """Refuses a folder that holds what the run would replace."""
    names = sorted(set(os.listdir(real)) - NOT_OURS)
    if names and not overwrite:
        raise Taken(f"the output folder {str(path)!r} is not empty; give another one, or --overwrite to replace its files")
    for name in names:
        if OURS.fullmatch(name) and (real / name).is_dir() and not (real / name).is_symlink():
            raise ValueError(
                f"the output folder {str(path)!r} holds a folder named {name}, where the run writes a file; remove it, or give "
                "another folder"
            )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes one sentence of what the file system refuses."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{_refusal(path, error)}; give another folder") from error


def _refusal(path: Path, error: OSError) -> str:
    return f"the output {str(path)!r} cannot be written: {error.strerror or error}"


def rescued(writers: Sequence[Writer], what: str) -> str:
    """Writes what can be written into a folder for temporary files; the clause that says so.

    Args:
        writers: What writes each part.
        what: All of it, the subject of the clause.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="paradiff-"))
    except OSError:
        return "nothing could be saved"
    left = 0
    for write in writers:
        part = folder / SCRATCH
        try:
            part.mkdir()
            write(part)
            for name in os.listdir(part):
                os.replace(part / name, folder / name)
        except OSError:
            left += 1
        shutil.rmtree(part, ignore_errors=True)
    names = _in_order(folder)
    if not names:
        shutil.rmtree(folder, ignore_errors=True)
        return "nothing could be saved"
    return f"{'what could be saved' if left else what} was written to {str(folder)!r}"

# SPDX-License-Identifier: Apache-2.0
"""A file that is written whole or not at all, and is refused before anything is spent on it where it cannot be written."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from paradiff.errors import shown


@contextmanager
def held_places(*paths: Path | None) -> Iterator[None]:
    """Refuses what cannot be written later, and holds pipes open for as long as the block lasts, so that who reads them waits.

    Args:
        paths: Of files; None for one that is not wanted.

    Raises:
        ValueError: If a path is a folder, lies in none, is a pipe that nobody reads, or the file system refuses it.
    """
    with ExitStack() as held:
        for path in paths:
            if path is not None:
                require_place(path)
                if _is_pipe(path):
                    held.callback(os.close, _opened(path))
        yield


def require_place(path: Path) -> None:
    """Refuses what cannot be written later. Whether anybody reads a pipe is not seen here (`held_places`).

    Raises:
        ValueError: If the path is a folder, lies in none, or the file system refuses it.
    """
    name = shown(str(path))
    require_named(path)
    try:
        if not path.parent.is_dir():
            raise ValueError(f"{name} is in a folder that does not exist; make it, or give another path")
        if path.is_dir():
            raise ValueError(f"{name} is a folder; give the path of a file")
        if path.is_symlink():
            with suppress(FileNotFoundError):  # a link to what is not there yet
                path.stat()
            path = Path(os.path.realpath(path))
        if path.exists():
            if not os.access(path, os.W_OK):
                raise ValueError(f"{name} may not be written; give another path")
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"{name} cannot be written: {error.strerror or error}; give another path") from error


def require_named(path: Path) -> None:
    """Refuses a path that no file can have.

    Raises:
        ValueError: If it holds a NUL character.
    """
    if "\0" in str(path):
        raise ValueError(f"{shown(str(path))} holds a NUL character, which no file's name has; give another path")


def _is_pipe(path: Path) -> bool:
    return path.exists() and stat.S_ISFIFO(path.stat().st_mode)


def _opened(pipe: Path) -> int:
    """A pipe, opened for writing.

    Raises:
        ValueError: If nobody reads it.
    """
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(
            f"{shown(str(pipe))} is a pipe that nobody reads; begin to read it first, or give another path"
        ) from error


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file in place of an older one, whole or not at all; a device or a pipe is written to.

    Raises:
        ValueError: If the file system refuses it.
    """
    require_named(path)
    try:
        if path.exists() and not path.is_file():
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # refused where nobody reads a pipe
            os.set_blocking(handle, True)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            return
        put_whole(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise ValueError(f"{shown(str(path))} cannot be written: {error.strerror or error}") from error


def put_whole(path: Path, data: bytes) -> None:
    """Writes a scratch file and moves it to a path that is no link.

    Raises:
        OSError: If the file system refuses it.
    """
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".paradiff-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(scratch).chmod(0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise

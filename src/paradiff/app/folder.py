# SPDX-License-Identifier: Apache-2.0
"""The folder of results of one run, written whole or not at all."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def next_folder(first: Path) -> Path:
    """`first`, or `first-2`, `first-3`, ...: the first that is not there, or is an empty folder."""
    names = itertools.chain([first], (first.with_name(f"{first.name}-{k}") for k in itertools.count(2)))
    return next(path for path in names if not path.exists() or (path.is_dir() and not any(path.iterdir())))


@contextmanager
def output_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A scratch folder beside `path` whose files become `path`'s when the block ends well, and vanish when it does not.

    With `overwrite` the files of the run replace those of the same name, each whole; others stay. If one of them cannot be
    replaced, those before it are put back.

    Raises:
        ValueError: If `path` is a file, a folder that is not empty (without `overwrite`), or cannot be written.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"the output {str(path)!r} is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ValueError(f"the output folder {str(path)!r} is not empty; give another one, or --overwrite to replace its files")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = _beside(path)
        os.chmod(scratch, 0o777 & ~_umask())
    try:
        yield scratch
        with _writing(path):
            if overwrite and path.is_dir() and any(path.iterdir()):
                _replace_files(scratch, path)
            else:
                os.replace(scratch, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Makes one sentence of what the file system refuses."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"the output {str(path)!r} cannot be written: {reason}; give another folder") from error


def _replace_files(source: Path, target: Path) -> None:
    """Moves all files of one folder into another, or none: what was replaced is kept until the last one is in its place."""
    kept = _beside(target)
    replaced: list[Path] = []
    try:
        for name in sorted(file.relative_to(source) for file in source.rglob("*") if file.is_file()):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if (target / name).exists():
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(target / name, kept / name)
            replaced.append(name)
            os.replace(source / name, target / name)
    except BaseException:
        for name in replaced:
            if (kept / name).exists():
                os.replace(kept / name, target / name)
            elif not (source / name).exists():
                (target / name).unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(kept, ignore_errors=True)


def _beside(path: Path) -> Path:
    """A new hidden folder beside a path."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

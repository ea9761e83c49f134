# SPDX-License-Identifier: Apache-2.0
"""The folder of a bulk run: a manifest, and shards that are whole or not there.

    manifest.json      what was asked for, and every shard; written before the first shard, and again when the last is there
    shard-00000. ...   the shards
    .paradiff/         while shards are missing: locks, and files in the making

A shard is written under a temporary name, handed to the disk (fsync), and renamed. Whoever computes one holds its lock, which
the operating system lets go when a process ends, however that is. So any number of processes may work on a folder, and each may
be killed at any moment: a shard that is there is whole, and one that is not is computed by whoever is left, or by the next run.
Nothing in the folder says when, by whom or in what order shards were computed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from paradiff.app.bulk import Shard, differing
from paradiff.app.folder import NOT_OURS, SCRATCH, make_folders
from paradiff.app.signals import held
from paradiff.lock import locked
from paradiff.models.files import digest_of

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1

PATIENCE = 60.0
"""Seconds that another process is given to write the manifest, which takes it milliseconds."""

COMPARED = ("request", "model", "environment")
"""Parts of the manifest that bytes depend on: each a dict, in which a run that goes on has to agree."""


class Store:
    """The folder of a bulk run.

    Args:
        path: As it was given.

    Raises:
        ValueError: If it is a file, or holds something else than a bulk run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._real = Path(os.path.realpath(path.absolute()))
        self._shards: Sequence[Shard] = ()
        self._began, self._made = False, list[Path]()
        with self._writing():
            if os.path.lexists(self._real) and not self._real.is_dir():
                raise ValueError(f"the output {str(path)!r} is a file; give a folder")
            names = set(os.listdir(self._real)) - NOT_OURS if self._real.is_dir() else set()
        if names and MANIFEST not in names:
            raise ValueError(
                f"the output folder {str(path)!r} is not empty, and has no {MANIFEST} of a run to go on with; give another one"
            )

    # -- manifest ------------------------------------------------------------------------------------------------------

    def begun(self) -> dict[str, Any] | None:
        """The manifest; None before there is one.

        Raises:
            ValueError: If it cannot be read.
        """
        if not (self._real / MANIFEST).exists():
            return None
        with self._writing():
            text = (self._real / MANIFEST).read_text(encoding="utf-8", errors="replace")
        try:
            found = json.loads(text)
            if found["schema_version"] == SCHEMA_VERSION and all(isinstance(found[name], dict) for name in COMPARED):
                return found
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(
            f"{str(self.path / MANIFEST)!r} is no manifest of a run that this version can go on with; give another folder"
        )

    def begin(self, contents: Mapping[str, Any], shards: Sequence[Shard]) -> None:
        """Writes the manifest, or goes on with the run whose manifest is there.

        Args:
            contents: The parts of COMPARED, and others that follow from them.
            shards: The shards that follow from the request.

        Raises:
            ValueError: If the run that is there was begun with another request, on another model, or elsewhere; or if the
                folder cannot be written.
        """
        self._shards = shards
        try:
            with self._writing(), self._lock("manifest", PATIENCE):
                found = self.begun()
                if found is None:
                    self._put(MANIFEST, self._manifest(contents, None))
                    self._began = True
                    return
            for part in COMPARED:
                self._refuse_other(part, contents[part], found[part])
        except ValueError:
            self._unmake()
            raise

    def abandon(self) -> None:
        """Removes the manifest of a run that was refused after all, if this process wrote it and no shard is there."""
        if self._began and len(self.missing()) == len(self._shards):
            with suppress(OSError, TimeoutError), self._lock("manifest", PATIENCE):
                (self._real / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(self._scratch, ignore_errors=True)
            self._unmake()

    def _unmake(self) -> None:
        """Removes the folders that this process has made, as far as they are empty."""
        for one in self._made:
            with suppress(OSError):
                one.rmdir()

    def _refuse_other(self, part: str, asked: dict[str, Any], begun: dict[str, Any]) -> None:
        """Refuses to go on with a run that differs in a part of the manifest."""
        name = differing(asked, begun)
        if name is None:
            return
        one, two = (json.dumps(found.get(name), ensure_ascii=False) for found in (begun, asked))
        what = {
            "request": f"was begun with {name.replace('_', '-')} {one}, and this run asks for {two}: give the same",
            "model": "was begun with other files of the model: give the same",
            "environment": f"was begun with {name} {one}, and this run has {two}, which may round otherwise: use the same",
        }[part]
        raise ValueError(f"the run in {str(self.path)!r} {what}, or another folder")

    def _manifest(self, contents: Mapping[str, Any], digests: Sequence[str] | None) -> bytes:
        shards = [
            {
                "name": shard.name,
                "mode": shard.mode,
                "samples": len(shard.seeds),
                "first_seed": shard.seeds[0],
                "last_seed": shard.seeds[-1],
                "batch": shard.batch,
                "sha256": None if digests is None else digests[k],
            }
            for k, shard in enumerate(self._shards)
        ]
        manifest = {"schema_version": SCHEMA_VERSION, "complete": digests is not None, **contents, "shards": shards}
        return (json.dumps(manifest, indent=1, allow_nan=False) + "\n").encode()

    # -- shards --------------------------------------------------------------------------------------------------------

    def missing(self) -> list[Shard]:
        """The shards that are not there, in order."""
        with self._writing():
            names = set(os.listdir(self._real))
        return [shard for shard in self._shards if shard.name not in names]

    @contextmanager
    def claimed(self, shard: Shard) -> Iterator[bool]:
        """Claims a shard for as long as the block lasts; True if it is to be computed: nobody else is, and it is not there."""
        with ExitStack() as claim:
            try:
                with self._writing():
                    claim.enter_context(self._lock(shard.name, 0))
            except TimeoutError:
                yield False
                return
            yield not (self._real / shard.name).exists()

    def put(self, shard: Shard, data: bytes) -> None:
        """Writes a shard that is claimed: whole, or not at all.

        Raises:
            ValueError: If the file system refuses it.
        """
        with held(), self._writing():
            self._put(shard.name, data)

    def finish(self, contents: Mapping[str, Any]) -> None:
        """Once all shards are there: writes the manifest with their digests, and removes what else there is.

        Raises:
            ValueError: If the file system refuses it.
        """
        with self._writing(), self._lock("manifest", PATIENCE):
            found = self.begun()
            if found is None or not found["complete"]:
                digests = [digest_of(self._real / shard.name) for shard in self._shards]
                self._put(MANIFEST, self._manifest(contents, digests))
            shutil.rmtree(self._scratch, ignore_errors=True)

    # -- files ---------------------------------------------------------------------------------------------------------

    @property
    def _scratch(self) -> Path:
        return self._real / SCRATCH

    def _lock(self, name: str, patience: float) -> AbstractContextManager[None]:
        return locked(self._scratch / f"{name}.lock", patience, lambda: make_folders(self._scratch, self._made))

    def _put(self, name: str, data: bytes) -> None:
        """Writes a file of the folder: whole, or not at all."""
        part = self._scratch / f"{name}.part"
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self._real / name)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        _settle(self._real)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Makes one sentence of what the file system refuses."""
        try:
            yield
        except TimeoutError:  # of a lock
            raise
        except OSError as error:
            raise ValueError(f"the output {str(self.path)!r} cannot be written: {error.strerror or error}") from error


def _settle(folder: Path) -> None:
    """Hands a folder's names to the disk, where the system can."""
    with suppress(OSError):
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)

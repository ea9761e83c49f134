# SPDX-License-Identifier: Apache-2.0
"""The folder of a server's results: what was accepted, and what came of it, each file whole or not there.

    requests/ID.json      a request that was accepted and has not ended; written before its client is answered
    ID.safetensors        its sample, a tensor `sample`
    ID.json               how it ended; where it lies, the request has ended and its sample is whole

So a server that is killed loses nothing: the next one on the folder solves what is left in `requests` again, and a request has
the same sample whoever solves it, up to its method's tolerance.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from paradiff.lock import locked
from paradiff.serving import Job, SampleRequest

REQUESTS, SCRATCH = "requests", ".paradiff"
ID = re.compile(r"[0-9a-f]{16}")
"""Names of requests."""

MOST_BYTES = 2**20
"""Bytes of a request's file, or of a report."""


class Shelf:
    """The folder.

    Args:
        path: As it was given.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def claimed(self) -> Iterator[Shelf]:
        """Holds the folder, made if it does not exist, for as long as the block lasts.

        Raises:
            ValueError: If another server holds it, or it cannot be written.
        """
        with ExitStack() as claim:
            try:
                (self.path / REQUESTS).mkdir(parents=True, exist_ok=True)
                scratch = self.path / SCRATCH
                claim.enter_context(locked(scratch / "lock", 0, lambda: scratch.mkdir(exist_ok=True)))
                for part in self.path.glob("**/*.part"):
                    part.unlink(missing_ok=True)
            except TimeoutError as error:
                raise ValueError(f"another server writes to {str(self.path)!r}; give another folder") from error
            except OSError as error:
                raise ValueError(f"the output {str(self.path)!r} cannot be written: {error.strerror or error}") from error
            yield self

    def accept(self, id: str, request: SampleRequest) -> None:
        """Writes a request down.

        Raises:
            ValueError: If the file system refuses it.
        """
        self._put(f"{REQUESTS}/{id}.json", json.dumps(request.to_json()).encode())

    def forget(self, id: str) -> None:
        """Takes back a request that was not accepted after all."""
        with suppress(OSError):
            (self.path / REQUESTS / f"{id}.json").unlink(missing_ok=True)

    def keep(self, job: Job) -> None:
        """Writes what came of a request; one that is lost stays among those that are to be solved.

        Raises:
            ValueError: If the file system refuses it.
        """
        if job.state == "lost":
            return
        if job.finished is not None:
            self._put(f"{job.id}.safetensors", save({"sample": job.finished.sample.contiguous()}))
        self._put(f"{job.id}.json", json.dumps(job.to_json()).encode())
        self.forget(job.id)

    def left(self) -> list[tuple[str, SampleRequest]]:
        """The requests that have not ended, oldest first.

        Raises:
            ValueError: If one of the files is no request.
        """
        files = [file for file in (self.path / REQUESTS).glob("*.json") if ID.fullmatch(file.stem)]
        found = []
        for file in sorted(files, key=lambda file: (file.lstat().st_mtime_ns, file.name)):
            if (self.path / file.name).exists():  # killed between the two
                self.forget(file.stem)
                continue
            try:
                found.append((file.stem, SampleRequest.of_json(_read(file))))
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(f"{str(file)!r} is no request ({error}); remove it") from error
        return found

    def report(self, id: str) -> dict[str, Any] | None:
        """What is told of a request that has ended; None where there is none."""
        try:
            found = _read(self.path / f"{id}.json")
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) and "state" in found else None

    def sample(self, id: str) -> Tensor | None:
        """The sample of a request; None where there is none."""
        file = self.path / f"{id}.safetensors"
        try:
            return load_file(file)["sample"] if file.is_file() else None
        except (OSError, SafetensorError, KeyError):
            return None

    def _put(self, name: str, data: bytes) -> None:
        """Writes a file: whole, or not at all."""
        file = self.path / name
        part = file.with_name(f"{file.name}.part")
        try:
            with open(part, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(part, file)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise ValueError(f"{str(file)!r} cannot be written: {error.strerror or error}") from error


def _read(file: Path) -> Any:
    """The JSON of a file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no regular file, too large to be one of ours, or no JSON.
        RecursionError: If it is nested too deep.
    """
    if not file.is_file():
        file.stat()  # which says why, where it is nothing at all
        raise ValueError("it is no regular file")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError("it is too large to be one of ours")
    return json.loads(file.read_bytes())

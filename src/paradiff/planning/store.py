# SPDX-License-Identifier: Apache-2.0
"""What was measured before, in the user's cache folder: one small JSON file an entry.

An entry has a key, of what it is about (a model, the shape of its states), and facts, such as the device and the versions,
under which it holds. An entry under other facts, and a file that is none, is left out with a sentence that says so. Nothing
here is needed: without a folder that can be written, everything is measured anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paradiff.errors import shown
from paradiff.lock import locked

FOLDER = "PARADIFF_CACHE"
"""The environment variable that names another folder than the user's cache; empty for none at all."""

FORMAT = 1
MOST_BYTES = 2**22
PATIENCE = 2.0
"""Seconds that a file is waited for which another process writes."""


def cache_folder() -> Path | None:
    """Where entries lie; None where the user wants none.

    Raises:
        ValueError: If the folder is that of a user whom this machine does not know.
    """
    named = os.environ.get(FOLDER)
    if named is not None:
        try:
            return Path(named).expanduser() if named.strip() else None
        except RuntimeError as error:
            raise ValueError(
                f"{FOLDER} is {shown(named)}, and the home of that user is not known; name another folder, or none, as ''"
            ) from error
    from platformdirs import user_cache_path

    return user_cache_path("paradiff", appauthor=False)


def digest(*values: Any) -> str:
    """A short digest of values, by their JSON or their texts."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:20]


class Store:
    """The entries of one kind. Stores are compared by identity.

    Args:
        kind: The kind, a word such as `curve`.
        folder: The folder; None for that of the user.
        renewed_by: What writes an entry anew, as the sentence on one that was left out says it.
    """

    def __init__(self, kind: str, folder: Path | None = None, *, renewed_by: str = "a run") -> None:
        self._kind, self._renewed_by = kind, renewed_by
        self._folder = cache_folder() if folder is None else folder

    def path(self, key: str) -> Path | None:
        """The file of an entry; None where there is no folder."""
        return None if self._folder is None else self._folder / f"{self._kind}-{key}.json"

    @property
    def empty(self) -> bool:
        """Whether there is no entry of this kind."""
        try:
            return self._folder is None or next(self._folder.glob(f"{self._kind}-*.json"), None) is None
        except OSError:  # such as a name that is too long
            return True

    def read(self, key: str, facts: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
        """An entry, and a sentence where a file was there and was left out.

        Args:
            key: What the entry is about.
            facts: What has to be as it was when the entry was written.
        """
        path = self.path(key)
        if path is None:
            return None, None
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                return None, self._ignored(path, "it is no regular file")
            if found.st_size > MOST_BYTES:
                return None, self._ignored(path, "it is too large to be one of ours")
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None, None
        except (OSError, ValueError, RecursionError) as error:
            return None, self._ignored(path, f"it cannot be read ({type(error).__name__})")
        if not isinstance(found, dict) or found.get("format") != f"paradiff {self._kind} {FORMAT}":
            return None, self._ignored(path, f"it does not say 'paradiff {self._kind} {FORMAT}'")
        content, then = found.get("content"), found.get("facts")
        if not isinstance(content, dict) or not isinstance(then, dict):
            return None, self._ignored(path, "it has no content")
        now = json.loads(json.dumps(dict(facts), default=str))
        other = next((name for name in (*now, *then) if now.get(name) != then.get(name)), None)
        if other is not None:
            return None, self._ignored(path, f"its {other} is {then.get(other)}, and here it is {now.get(other)}")
        return content, None

    def write(self, key: str, facts: Mapping[str, Any], content: Mapping[str, Any]) -> str | None:
        """Writes an entry in place of an older one: whole or not at all. A sentence where it could not be written."""
        path = self.path(key)
        if path is None:
            return None
        whole = {"format": f"paradiff {self._kind} {FORMAT}", "facts": dict(facts), "content": dict(content)}
        try:
            with locked(path.with_name(f".{path.name}.lock"), PATIENCE, lambda: path.parent.mkdir(parents=True, exist_ok=True)):
                _replace(path, json.dumps(whole, default=str))
        except OSError as error:  # TimeoutError among them
            return f"the {self._kind} was not kept in {str(path.parent)!r}: {error.strerror or error}"
        return None

    def _ignored(self, path: Path, why: str) -> str:
        return f"the stored {self._kind} {str(path)!r} was left out, since {why}; {self._renewed_by} replaces it"


def _replace(path: Path, text: str) -> None:
    """Writes a scratch file and moves it into place."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise

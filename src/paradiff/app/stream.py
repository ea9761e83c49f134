# SPDX-License-Identifier: Apache-2.0
"""Standard output, which a run outlives: what cannot be shown is left out."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, TextIO


class Stream:
    """A text stream that takes every text: a pipe that was closed or a full disk end it without a word.

    Args:
        stream: What is written to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text; characters that the stream's encoding lacks are escaped."""
        encoding = self._stream.encoding or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):
            self._end()
        return len(text)

    def flush(self) -> None:
        """Hands on what was written."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._end()

    def _end(self) -> None:
        """Sends all further text nowhere, that which waits in the stream's buffer too."""
        with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())

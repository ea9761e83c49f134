# SPDX-License-Identifier: Apache-2.0
"""What the processes of test_workers.py do. Importing this module loads nothing but Python's own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def note(path: str) -> None:
    Path(path).write_text(str(os.getpid()))


def fail(_: str) -> None:
    raise ValueError("it broke\nhere")


def die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(path: str) -> None:
    note(path)
    time.sleep(600)

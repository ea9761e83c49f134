# SPDX-License-Identifier: Apache-2.0
"""A lock between processes: a file that is there while it is held."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TRIES = 20
"""Times that a lock is tried for whose file another process removes as it lets it go."""


@contextmanager
def locked(file: Path, patience: float, prepare: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Holds a lock for as long as the block lasts; on a file system that has none, it holds nothing.

    Whoever lets a lock go removes its file. A process that had opened the file just before would then hold a lock that nobody
    else can see, so that the file has to be the same one before and after. A killed process leaves its file, but no lock.

    Args:
        file: The lock's own file.
        patience: Seconds to wait for another process.
        prepare: Makes the file's folder, if that may be missing.

    Raises:
        TimeoutError: If another process holds the lock for longer.
        OSError: If the file cannot be made.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    missing: FileNotFoundError | None = None
    for _ in range(TRIES):
        try:
            prepare()
            file.touch()
            before = file.stat().st_ino
            lock.acquire(timeout=patience)
        except Timeout as busy:
            if file.exists():
                raise TimeoutError(f"another process holds {str(file)!r}") from busy
            continue
        except FileNotFoundError as error:  # another process has removed it, or it cannot be made
            missing = error
            continue
        except NotImplementedError:
            yield
            return
        with suppress(FileNotFoundError):
            if file.stat().st_ino == before:
                break
        lock.release()
        time.sleep(0.01)
    else:
        raise missing or TimeoutError(f"other processes hold {str(file)!r}")
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()

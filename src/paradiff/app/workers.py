# SPDX-License-Identifier: Apache-2.0
"""The processes of `paradiff generate` for further devices of a machine, one for each.

They meet in the folder as ranks do (store.py). One that fails leaves its shards to the others, and all end with the process
that started them, however that is.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

WITHIN = 10.0
"""Seconds in which a process is expected to end that was told to."""


class Workers:
    """Processes that work beside this one.

    Args:
        work: What each does: a function of a module, called with the process's arguments.
        given: The arguments of each.
        names: What each is called.
    """

    def __init__(self, work: Callable[..., None], given: Sequence[tuple[Any, ...]], names: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.names, self.failures = list(names), list[str]()
        self._lines: list[Connection] = []
        self._processes: list[Any] = []
        for arguments in given:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, work, arguments), daemon=True)
            process.start()
            theirs.close()
            self._lines.append(ours)
            self._processes.append(process)

    def finish(self, *, wait: bool) -> None:
        """Ends all, once there is nothing left to do; `failures` then has a sentence of each that failed.

        Args:
            wait: Whether to wait for what they are doing.
        """
        for name, line, process in zip(self.names, self._lines, self._processes, strict=True):
            if not wait and not line.poll() and process.is_alive():
                continue
            told = None
            with contextlib.suppress(EOFError, OSError):
                told = line.recv()
            process.join(WITHIN)
            if told is None:
                told = f"its process ended with code {process.exitcode}"
            if told:
                self.failures.append(f"{name}: {told}")
        self.end()

    def end(self) -> None:
        """Ends all that are left."""
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        for process in self._processes:
            process.join(WITHIN)
            if process.is_alive():
                process.kill()


@contextlib.contextmanager
def working(work: Callable[..., None], given: Sequence[tuple[Any, ...]], names: Sequence[str]) -> Iterator[Workers]:
    """Processes for as long as a block lasts; arguments as of `Workers`."""
    workers = Workers(work, given, names)
    try:
        yield workers
    finally:
        workers.end()


def _serve(line: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What a process runs: its work, and a sentence of how that failed, empty where it did not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the terminal sends to all; the first process ends the others
    threading.Thread(target=_end_with, args=(line,), daemon=True).start()
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for as long as the process lasts)
    said = ""
    try:
        work(*arguments)
    except Exception as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
    line.send(said)


def _end_with(line: Connection) -> None:
    """Ends this process when the one at the other end of the line has ended."""
    with contextlib.suppress(EOFError, OSError):
        line.recv()
    os._exit(1)

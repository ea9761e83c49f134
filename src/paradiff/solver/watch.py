# SPDX-License-Identifier: Apache-2.0
"""The watch over the ranks of a run: which of them died, hangs or was ended, told in one sentence on every rank.

A rank that waits for others in vain cannot say whom it waits for. So every rank has a thread that looks at a board, a few keys
in the store of `torch.distributed`, several times a second. A rank that meets a fault posts it; the thread of each rank that is
alive posts an answer: what its main thread is doing, and since when. The rank that posted the fault collects the answers and
posts the verdict, a sentence. A rank without an answer is gone; one that is in a network call for longer than the time-out
hangs. A main thread that waits raises the verdict; one that does not return is ended with its process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Unanswered
from typing import Any, NamedTuple

LOOK = 0.15
"""Seconds between two looks at the board."""

ENDING = 15.0
"""Seconds of the time-out that are kept for ending all ranks; half of a time-out that is shorter than twice as long."""

ANSWERS = 0.4, 1.5, 3.0
"""Seconds that ranks have for an answer: a share of those for ending, the least and the most."""

GRACE = 0.3, 1.0, 5.0
"""The same of the seconds between a verdict and the end of a process whose main thread did not take note of it, and between the
two signals that end it."""

CALL, WAIT, OWN, SIGNALLED, ENDED = "call", "wait", "own", "signalled", "ended"
"""What a rank's main thread does: it computes a network's outputs, it waits for others, it does something else, it was ended by
a signal, it has ended its run."""


class Process(NamedTuple):
    """The process of a rank.

    Attributes:
        name: What the rank is called in sentences.
        host: The name of its machine.
        id: Its number there.
        launcher: That of the process that started it.
    """

    name: str
    host: str
    id: int
    launcher: int


def this_process(rank: int, size: int) -> Process:
    """The process of this rank."""
    return Process(name_of(rank, size), socket.gethostname(), os.getpid(), os.getppid())


class Board:
    """Keys and values that all ranks of a run see.

    Of a process that a signal has stopped, or whose machine is cut off, a store gives no answer and no error. So each call is
    made in a thread of its own, which is given up.

    Args:
        store: A store of `torch.distributed`, under a prefix of the run's own.
        patience: Seconds in which the store has to answer.

    Raises:
        TimeoutError: By every method, if it does not.
    """

    def __init__(self, store: Any, patience: float) -> None:
        self._store, self._patience = store, patience

    def post(self, name: str, value: Any, within: float | None = None) -> None:
        """Sets a key, within so many seconds, or the board's own."""
        self._answer(lambda: self._store.set(name, json.dumps(value)), within)

    def first(self, name: str, value: Any, within: float | None = None) -> Any:
        """Sets a key unless it is set; what it holds then. In seconds as of `post`."""
        return json.loads(self._answer(lambda: self._store.compare_set(name, "", json.dumps(value)), within))

    def read(self, name: str) -> Any:
        """The value of a key; None where it is not set."""
        found = self._answer(lambda: self._store.get(name) if self._store.check([name]) else None)
        return None if found is None else json.loads(found)

    def drawn(self, name: str) -> int:
        """How many times this was called with the name, on any rank, this call included."""
        return int(self._answer(lambda: self._store.add(name, 1)))

    def _answer(self, ask: Callable[[], Any], within: float | None = None) -> Any:
        found: Future[Any] = Future()

        def asking() -> None:
            try:
                found.set_result(ask())
            except BaseException as error:
                found.set_exception(error)

        threading.Thread(target=asking, name="paradiff-board", daemon=True).start()
        seconds = self._patience if within is None else within
        try:
            return found.result(seconds)
        except Unanswered as error:
            raise TimeoutError(f"no word for {seconds:.3g} s") from error


class Watch:
    """One rank's part of the watch.

    Args:
        board: The board.
        rank: This rank's place among the ranks of the run.
        processes: The ranks' processes, by place.
        timeout: Seconds after which all ranks have ended since one stopped or hung.

    Attributes:
        patience: Seconds after which a rank that is waited for hangs.
        doing: What the main thread does, in which exchange of the run, and since when.
        fault: The fault, once there is one.
        verdict: The sentence, once there is one.
        heard: Set when the main thread has taken note of the verdict.
    """

    def __init__(self, board: Board, rank: int, processes: Sequence[Process], timeout: float) -> None:
        self._board, self._rank, self._processes = board, rank, processes
        self._names = [process.name for process in processes]
        self.patience = patience_of(timeout)
        ending = timeout - self.patience
        self._answers, self._grace = (min(max(share * ending, least), most) for share, least, most in (ANSWERS, GRACE))
        self.doing: tuple[str, int, float] = (OWN, 0, time.monotonic())
        self.fault: Mapping[str, Any] | None = None
        self.verdict: str | None = None
        self.heard = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="paradiff-watch", daemon=True)
        self._thread.start()

    def does(self, what: str, step: int) -> None:
        """Notes what the main thread does."""
        self.doing = (what, step, time.monotonic())

    def report(self, why: str, text: str = "") -> str:
        """Posts a fault and waits for the verdict.

        Args:
            why: `error`, with a text that is the verdict; `lost`, of ranks; `late`, after the time-out; `signal`.
            text: What was met.
        """
        try:
            self._board.first("fault", {"by": self._rank, "why": why, "text": text, "step": self.doing[1]}, self._answers)
        except Exception as error:  # The store is gone, and with it the process that keeps it.
            self.verdict = self.verdict or storeless(text or str(error))
        return self.await_verdict()

    def await_verdict(self) -> str:
        """The verdict on a fault that was posted; the board's own end is one, too."""
        end = time.monotonic() + 3 * self._answers
        while self.verdict is None and time.monotonic() < end and self._thread.is_alive():
            time.sleep(LOOK / 3)
        self.heard.set()
        return self.verdict or f"{self._names[self._rank]} lost the other ranks at exchange {self.doing[1]}"

    def stop(self) -> None:
        """Ends the watch, and says so to the others."""
        if self._stopped.is_set():
            return
        self.heard.set()
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(2 * LOOK)
        try:
            if self.verdict is None:
                self._board.post(f"end/{self._rank}", self.doing[1], self._answers)
        except Exception:
            return  # The store is gone: the others have ended before.

    def _look(self) -> None:
        """Looks for a fault, answers it, and sees the main thread to its end."""
        while not self._stopped.wait(LOOK):
            try:
                self.fault = self._board.read("fault")
                if self.fault is not None:
                    self._answer()
                    found = self._found()
                    self._wake()
                    self._board.post(f"heard/{self._rank}", True)
                    if self._rank == 0:
                        self._await_others()
                    self.verdict = found
            except Exception as error:
                if self.doing[0] == OWN:
                    return  # Between two runs, the others may end.
                self.verdict = self._give_up(storeless(str(error)))
            if self.verdict is not None:
                self._see_to_the_end()
                return

    def _answer(self) -> None:
        what, step, since = self.doing
        self._board.post(f"answer/{self._rank}", {"doing": what, "step": step, "for": time.monotonic() - since})

    def _found(self) -> str:
        """The verdict: this rank's where it posted the fault, that rank's else."""
        fault, end = self.fault, time.monotonic() + self._answers
        assert fault is not None
        if fault["by"] != self._rank:
            end += self._answers / 2
            while time.monotonic() < end:
                if (found := self._board.read("verdict")) is not None:
                    return found
                time.sleep(LOOK / 3)
        answers = self._collected(end)
        return self._board.first("verdict", verdict(fault, answers, self._names, self.patience))

    def _give_up(self, sentence: str) -> str:
        """The verdict where the store gives no answer, or an error. If a stopped rank kept it, that one and others are told."""
        if self._wake():
            with contextlib.suppress(Exception):
                fault = {"by": self._rank, "why": "error", "text": sentence, "step": self.doing[1]}
                self._board.first("fault", fault, self._answers)
                return self._board.first("verdict", sentence, self._answers)
        return sentence

    def _wake(self) -> bool:
        """Has ranks that a signal has stopped go on to their end: no other signal but SIGKILL ends them, for which launchers
        wait long. They are found among the processes that this one's launcher has started. Whether there was one."""
        found = False
        for process in self._processes:
            alike = (process.host, process.launcher) == (socket.gethostname(), os.getppid())
            if alike and _state(process.id) == ("T", process.launcher):
                with contextlib.suppress(OSError):
                    os.kill(process.id, signal.SIGCONT)
                    found = True
        return found

    def _await_others(self) -> None:
        """Waits until all ranks that answered have the verdict: the first one often keeps the store, which ends with it."""
        end = time.monotonic() + self._answers
        alive = [rank for rank in range(len(self._names)) if self._board.read(f"answer/{rank}") is not None]
        while time.monotonic() < end and any(self._board.read(f"heard/{rank}") is None for rank in alive):
            time.sleep(LOOK / 3)

    def _collected(self, end: float) -> dict[int, Mapping[str, Any]]:
        answers: dict[int, Mapping[str, Any]] = {}
        while len(answers) < len(self._names):
            for rank in range(len(self._names)):
                if rank not in answers:
                    ended = self._board.read(f"end/{rank}")
                    found = self._board.read(f"answer/{rank}") if ended is None else {"doing": ENDED, "step": ended, "for": 0.0}
                    if found is not None:
                        answers[rank] = found
            if time.monotonic() > end:
                break
            time.sleep(LOOK / 3)
        return answers

    def _see_to_the_end(self) -> None:
        """Ends the process where the main thread takes no note of the verdict: it hangs."""
        what, _, since = self.doing
        if what == OWN:
            return  # The next exchange raises the verdict.
        if self.heard.wait(max(self._grace, self.patience - (time.monotonic() - since) if what == CALL else 0.0)):
            return
        print(f"error: {self.verdict}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self.heard.wait(self._grace):
            os.kill(os.getpid(), signal.SIGKILL)


def _state(process: int) -> tuple[str, int] | None:
    """A process's state, such as T for a stopped one, and its parent; None where that is not to be had."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return None
    return state, int(parent)


def end_stopped() -> list[int]:
    """Ends the processes of this one's launcher that a signal has stopped, for which it would wait long; which these were."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        found += [int(name) for name in os.listdir("/proc") if name.isdecimal() and _state(int(name)) == ("T", os.getppid())]
    for process in found:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    return found


def verdict(fault: Mapping[str, Any], answers: Mapping[int, Mapping[str, Any]], names: Sequence[str], patience: float) -> str:
    """The sentence on a fault.

    Args:
        fault: What was posted.
        answers: What the ranks that answered do, by rank.
        names: What the ranks are called.
        patience: Seconds after which a rank that is waited for hangs.
    """
    step = fault["step"]
    if fault["why"] == "error":
        return fault["text"]
    if gone := [names[rank] for rank in range(len(names)) if rank not in answers]:
        return f"{joined(gone)} {_does(gone, 'does', 'do')} not answer at exchange {step}: died, stopped or cut off"
    if ended := [names[rank] for rank, answer in answers.items() if answer["doing"] == ENDED]:
        at = min(answer["step"] for answer in answers.values() if answer["doing"] == ENDED)
        return (
            f"{joined(ended)} ended after exchange {at}, while others wait: start all ranks with the same script and "
            "arguments, and let all take the same decisions"
        )
    if fault["why"] == "signal":
        return f"{names[fault['by']]} was ended by a signal at exchange {step}"
    if hung := [names[rank] for rank, answer in answers.items() if answer["doing"] == CALL]:
        most = max(answer["for"] for answer in answers.values() if answer["doing"] == CALL)
        return (
            f"{joined(hung)} {_does(hung, 'hangs', 'hang')} at exchange {step}: in a network call for {most:.0f} s, where "
            f"others wait for {patience:g} s"
        )
    last = min(answer["step"] for answer in answers.values())
    if behind := [names[rank] for rank, answer in answers.items() if answer["step"] < step or answer["doing"] == OWN]:
        came = f"{_does(behind, 'does', 'do')} not come to exchange {step} within {patience:g} s"
        return f"{joined(behind)} {came}, and was last at {last}"
    return f"the ranks lost each other at exchange {step} ({fault['text']})"


def patience_of(timeout: float) -> float:
    """Seconds that ranks wait for another one, of those within which all have ended."""
    return timeout - min(ENDING, timeout / 2)


def name_of(rank: int, size: int) -> str:
    """What a rank is called in sentences."""
    return f"rank {rank} of {size} (process {os.getpid()} on {socket.gethostname()})"


def joined(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _does(names: Sequence[str], one: str, several: str) -> str:
    return one if len(names) == 1 else several


def storeless(text: str) -> str:
    """The sentence on a store that gives no answer, or this error."""
    line = next(iter(text.splitlines()), "")
    return f"rank 0, or the launcher that keeps the ranks' store, is gone: it does not answer ({line[:120]})"

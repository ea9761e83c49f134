# SPDX-License-Identifier: Apache-2.0
"""Bulk runs of the command line that are killed at random moments and gone on with, by one and two ranks.

    python tests/app/generate_storm.py --cycles 20 --seed 0

After each kill -9, of both ranks or of one whose other goes on, every shard that lies in the folder has to be that of a run
that was let alone, byte for byte. A folder that was gone on with to its end has to be equal to that run's folder, with its
manifest and nothing beside; the next cycle then begins a new folder. Each rank is a fork of this process, which has imported
what it needs, and writes slowly, so that half of the kills meet a file that is written in part.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paradiff.app import cli, generate, store  # noqa: F401  (what a run imports)

GIVEN = ["generate", "digits", "--sampler", "ddim", "--steps", "12", "--seeds", "0-42,90", "--shard", "8", "--batch", "4"]
GIVEN += ["--last", "6", "--window", "2", "--device", "cpu"]


PIECE, PAUSE = 256, 0.002
"""Bytes that are written at once, and seconds until the next."""


def slow(path: Path, mode: str) -> Any:
    """A file that is written a piece at a time."""
    file = open(path, mode, buffering=0)  # noqa: SIM115  (closed by what is returned)
    write = file.write

    class Slow:
        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None:
            file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

        def write(self, data: bytes) -> int:
            for first in range(0, len(data), PIECE):
                write(data[first : first + PIECE])
                time.sleep(PAUSE)
            return len(data)

    return Slow()


def start(out: Path, rank: int, size: int, log: Path) -> int:
    """Starts a rank; its process."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        store.open = slow  # pyright: ignore[reportAttributeAccessIssue]  (in place of the builtin)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="none", MASTER_PORT="0")
        sys.argv = ["paradiff", *GIVEN, "--out", str(out)]
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """The exit code of a process; of one that a signal ended, its number below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def ended(process: int) -> bool:
    """Whether a process has ended; it is still to be waited for."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def visible(out: Path) -> dict[str, bytes]:
    """What lies in a folder, but for the hidden one of a run at work."""
    return {path.name: path.read_bytes() for path in sorted(out.glob("*")) if path.name != ".paradiff"}


def check(found: dict[str, bytes], whole: dict[str, bytes], case: str) -> None:
    """Compares what lies in a folder with the folder of a run that was let alone.

    Raises:
        AssertionError: If a file is another one.
    """
    for name, data in found.items():
        assert name in whole, f"{case}: {name} is left"
        if name == "manifest.json":
            contents, expected = json.loads(data), json.loads(whole[name])
            if not contents["complete"]:
                expected["complete"] = False
                for shard in expected["shards"]:
                    shard["sha256"] = None
            assert contents == expected, f"{case}: another manifest"
        else:
            assert data == whole[name], f"{case}: {name} has other bytes"


def storm(cycles: int, seed: int, place: Path) -> Counter[str]:
    """Kills and goes on that many times; what became of it.

    Raises:
        AssertionError: If something is lost, doubled, or of other bytes.
    """
    draw, log = random.Random(seed), place / "log"
    begin = time.monotonic()
    assert wait(start(place / "whole", 0, 1, log)) == 0, log.read_text()
    seconds = time.monotonic() - begin
    whole = visible(place / "whole")
    counts, number = Counter[str](), 0
    out = place / f"out-{number}"
    for cycle in range(cycles):
        size = 1 + cycle % 2
        case = f"cycle {cycle} of seed {seed}, {size} rank{'s' * (size > 1)}"
        ranks = [start(out, rank, size, log) for rank in range(size)]
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0, 0.8 * seconds / size))
            when = "at any time"
        else:
            begin, last = time.monotonic(), draw.uniform(0, 0.5 * seconds / size)
            while not (time.monotonic() - begin > last and any(out.glob(".paradiff/*.part"))) and not all(map(ended, ranks)):
                time.sleep(0.0002)
            when = "while it wrote"
        spared = ranks[1:] if size == 2 and draw.random() < 0.4 else []
        for process in ranks:
            if process not in spared:
                os.kill(process, signal.SIGKILL)
        codes = [wait(process) for process in ranks]
        check(visible(out), whole, case)
        done = len(visible(out)) - (out / "manifest.json").exists()
        counts[f"{size} rank{'s' * (size > 1)}, {'one' if spared else 'all'} killed {when}"] += 1
        if any(code == 0 for code in codes):
            assert visible(out) == whole, f"{case}: something is missing or another"
            assert {path.name for path in out.iterdir()} == set(whole), f"{case}: something is left"
            counts["gone on with to the end"] += 1
            number += 1
            out = place / f"out-{number}"
        elif spared:
            raise AssertionError(f"{case}: the spared rank ended with {codes}: {log.read_text()}")
        print(f"{case}, {when}: exit codes {codes}, {done} of {len(whole) - 1} shards", file=sys.stderr, flush=True)
    ranks = [start(out, rank, 2, log) for rank in range(2)]
    assert [wait(process) for process in ranks] == [0, 0], log.read_text()
    assert visible(out) == whole, "something is missing or another at the end"
    assert {path.name for path in out.iterdir()} == set(whole), "something is left at the end"
    assert "Traceback" not in log.read_text()
    shutil.rmtree(out)
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """The script."""
    parser = argparse.ArgumentParser(description="Kill bulk runs of the command line at random moments, and go on with them.")
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        for what, count in sorted(storm(given.cycles, given.seed, Path(place)).items()):
            print(f"{count:5d}  {what}")
    print(f"{given.cycles} kills in {time.monotonic() - begin:.0f} s: nothing lost, nothing doubled, the same bytes")


if __name__ == "__main__":
    main()

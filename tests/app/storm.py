# SPDX-License-Identifier: Apache-2.0
"""Runs of the command line that are killed at random moments, half of them while they write.

    python tests/app/storm.py sample --kills 100 --seed 0
    python tests/app/storm.py generate --kills 20 --seed 0
    python tests/app/storm.py restart --kills 3

- `sample`: two runs that differ take turns in one folder, with KILL and TERM. After each end, what lies in the folder has to be
  readable and of one run, all of it beside a run.json; a run that was terminated leaves nothing of itself; and after a run that
  is let alone nothing but its files may be there.
- `generate`: bulk runs, gone on with by one and two ranks. After each kill -9, of both ranks or of one whose other goes on,
  every shard that lies in the folder has to be that of a run that was let alone, byte for byte. A folder that was gone on with
  to its end has to be equal to that run's folder, with its manifest and nothing beside; the next kill then meets a new folder.
- `restart`: a bulk run of two ranks that torchrun started, and starts again (`--max-restarts`) after each kill -9 of one
  of them within a shard.

But for `restart` each run is a fork of this process, which has imported what it needs; bulk runs write slowly, so that half of
the kills meet a file that is written in part.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from paradiff.app import cli, generate, pixels, store  # noqa: F401  (what a run imports)

SAMPLE = ["sample", "digits", "--sampler", "ddim", "--seeds", "0-2", "--device", "cpu", "--trace", "--overwrite"]
STEPS = (12, 15)
"""Of the two runs."""

NAMES = {"run.json", "samples.png", "seed-0.png", "seed-1.png", "seed-2.png", "trace.png"}
ENDED = {0, 128 + signal.SIGTERM}

BULK = ["generate", "digits", "--sampler", "ddim", "--steps", "12", "--seeds", "0-42,90", "--shard", "8", "--batch", "4"]
BULK += ["--last", "6", "--window", "2", "--device", "cpu"]
LONG = ["generate", "digits", "--sampler", "ddim", "--steps", "60", "--seeds", "0-79", "--shard", "8", "--batch", "4"]
LONG += ["--last", "6", "--window", "4", "--device", "cpu"]

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


def start(given: Sequence[str], log: Path, *, rank: int = 0, size: int = 1, slowly: bool = False) -> int:
    """Starts a run, or a rank of one; its process."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if slowly:
            store.open = slow  # pyright: ignore[reportAttributeAccessIssue]  (in place of the builtin)
        if size > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="none", MASTER_PORT="0")
        sys.argv = ["paradiff", *given]
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
    """What lies in a folder, all of it readable, but for the hidden folder of a run at work."""
    found = {}
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if path.name == ".paradiff":
            continue
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".json":
            json.loads(path.read_text())
        found[path.name] = path.read_bytes()
    return found


def scratch(out: Path) -> dict[str, int]:
    """What a folder's hidden one holds, with the times of its last changes."""
    hidden = out / ".paradiff"
    return {str(path): path.lstat().st_mtime_ns for path in [hidden, *hidden.rglob("*")]} if hidden.exists() else {}


def one(out: Path, steps: int, log: Path) -> int:
    """Starts a run; its process."""
    log.unlink(missing_ok=True)
    return start([*SAMPLE, "--steps", str(steps), "--out", str(out)], log)


def whose(found: dict[str, bytes], whole: dict[int, dict[str, bytes]]) -> set[int]:
    """The runs that files may be of, each by its own bytes; run.json, which has a date, by its arguments."""
    runs = set(whole)
    for name, contents in found.items():
        if name == "run.json":
            runs &= {json.loads(contents)["arguments"]["steps"]}
        else:
            runs = {steps for steps in runs if whole[steps][name] == contents}
    return runs


def samples(kills: int, seed: int, place: Path) -> Counter[str]:
    """Kills that many runs; what became of them.

    Raises:
        AssertionError: If something is unreadable, mixed, or left behind.
    """
    draw = random.Random(seed)
    whole, seconds = {}, 0.0
    for steps in STEPS:
        begin = time.monotonic()
        assert wait(one(place / f"whole-{steps}", steps, place / "log")) == 0, (place / "log").read_text()
        seconds = max(seconds, time.monotonic() - begin)
        whole[steps] = visible(place / f"whole-{steps}")
        assert set(whole[steps]) == NAMES
    assert len(set(map(str, whole.values()))) == len(STEPS)
    out, counts = place / "a" / "out", Counter[str]()
    for kill in range(kills):
        steps, sent = draw.choice(STEPS), draw.choice([signal.SIGKILL, signal.SIGTERM])
        case = f"kill {kill} of seed {seed}, {sent.name}, {steps} steps"
        if draw.random() < 0.3:
            shutil.rmtree(place / "a", ignore_errors=True)
        before, waiting, left = visible(out), visible(out / ".paradiff" / "whole"), scratch(out)
        process = one(out, steps, place / "log")
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0, 1.1 * seconds))
            when = "while it ran"
        else:
            while not (out / ".paradiff" / "new").exists() and not ended(process):
                time.sleep(0.0005)
            time.sleep(draw.choice([draw.uniform(0, 0.02), draw.uniform(0, 0.7 * seconds)]))
            when = "while it wrote"
        os.kill(process, sent)
        code = wait(process)
        found = visible(out)
        runs = whose(found, whole)
        assert not found or runs, f"{case}: files of two runs: {sorted(found)}"
        assert "run.json" not in found or set(found) == NAMES, f"{case}: run.json beside {sorted(found)}"
        assert code in ENDED | {-sent}, f"{case}: exit code {code}: {(place / 'log').read_text()}"
        if code in ENDED:
            text = (place / "log").read_text()
            assert "Traceback" not in text
            written = code == 0 or "the run was whole" in text
            assert written or "terminated: nothing was written" in text, f"{case}: {text}"
            assert scratch(out) in ({}, left), f"{case}: scratch is left"  # an earlier kill's, if it ended before it began
            if written:
                assert runs == {steps}, case
            else:
                # An earlier run that was killed when it was whole, this one may have moved on.
                told = [
                    {name: whose({name: data}, whole) for name, data in files.items()} for files in (before, waiting, found)
                ]
                assert found in (before, before | waiting), f"{case}: {told}"
        counts[f"{sent.name} {when}: {'ended by it' if code < 0 else f'exit code {code}'}"] += 1
        if draw.random() < 0.3 or kill == kills - 1:
            steps = draw.choice(STEPS)
            assert wait(one(out, steps, place / "log")) == 0, f"{case}: {(place / 'log').read_text()}"
            assert set(visible(out)) == NAMES, case
            assert whose(visible(out), whole) == {steps}, case
            assert {path.name for path in out.iterdir()} == NAMES, f"{case}: left behind"
            assert {path.name for path in out.parent.iterdir()} == {"out"}, f"{case}: left behind"
            counts["let alone"] += 1
    return counts


def bulk(out: Path, rank: int, size: int, log: Path) -> int:
    """Starts a rank of a bulk run; its process."""
    return start([*BULK, "--out", str(out)], log, rank=rank, size=size, slowly=True)


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


def bulks(kills: int, seed: int, place: Path) -> Counter[str]:
    """Kills and goes on that many times; what became of it.

    Raises:
        AssertionError: If something is lost, doubled, or of other bytes.
    """
    draw, log = random.Random(seed), place / "log"
    begin = time.monotonic()
    assert wait(bulk(place / "whole", 0, 1, log)) == 0, log.read_text()
    seconds = time.monotonic() - begin
    whole = visible(place / "whole")
    counts, number = Counter[str](), 0
    out = place / f"out-{number}"
    for kill in range(kills):
        size = 1 + kill % 2
        case = f"kill {kill} of seed {seed}, {size} rank{'s' * (size > 1)}"
        ranks = [bulk(out, rank, size, log) for rank in range(size)]
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
    ranks = [bulk(out, rank, 2, log) for rank in range(2)]
    assert [wait(process) for process in ranks] == [0, 0], log.read_text()
    assert visible(out) == whole, "something is missing or another at the end"
    assert {path.name for path in out.iterdir()} == set(whole), "something is left at the end"
    assert "Traceback" not in log.read_text()
    shutil.rmtree(out)
    return counts


def restarts(kills: int, seed: int, place: Path) -> Counter[str]:
    """Kills one of two ranks that many times within a shard; torchrun starts both again.

    Raises:
        AssertionError: If the folder is another one in the end.
    """
    draw, log, out = random.Random(seed), place / "log", place / "out"
    assert wait(start([*LONG, "--out", str(place / "whole")], log)) == 0, log.read_text()
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        str(kills),
    ]
    line += ["--log-dir", str(place / "logs"), "-m", "paradiff", *LONG, "--out", str(out)]
    counts, gone = Counter[str](), set[int]()
    with open(log, "a") as file:
        launcher = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT)
    for kill in range(kills):
        ranks = set[int]()
        while not (ranks and len(list(out.glob("shard-*"))) >= kill) and launcher.poll() is None:
            ranks = ranks_at_work(launcher.pid, out) - gone
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        if launcher.poll() is None and ranks:
            chosen = draw.choice(sorted(ranks))
            os.kill(chosen, signal.SIGKILL)
            gone |= ranks
            counts["ranks killed within a shard"] += 1
            print(f"kill {kill}: {len(list(out.glob('shard-*')))} shards were there", file=sys.stderr, flush=True)
    assert launcher.wait() == 0, log.read_text()
    assert visible(out) == visible(place / "whole"), "something is missing or another at the end"
    assert {path.name for path in out.iterdir()} == set(visible(out)), "something is left at the end"
    assert counts.total() == kills, f"the run was over after {counts.total()} kills"
    return counts


def ranks_at_work(launcher: int, out: Path) -> set[int]:
    """The processes that a launcher has started, where each holds a shard; none before."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    found = {int(one) for one in children.read_text().split()} if children.exists() else set()
    return found if len(list(out.glob(".paradiff/shard-*.lock"))) >= 2 else set()


STORMS = {"sample": samples, "generate": bulks, "restart": restarts}


def main(arguments: Sequence[str] | None = None) -> None:
    """The script."""
    parser = argparse.ArgumentParser(description="Kill runs of the command line at random moments.")
    parser.add_argument("what", choices=STORMS)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        for what, count in sorted(STORMS[given.what](given.kills, given.seed, Path(place)).items()):
            print(f"{count:5d}  {what}")
    print(f"{given.kills} kills in {time.monotonic() - begin:.0f} s: nothing lost, unreadable, mixed or left behind")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Runs of the command line that are killed at random moments, half of them while they write.

    python tests/app/kill_storm.py --kills 100 --seed 0

Two runs that differ take turns in one folder, with KILL and TERM. After each end, what lies in the folder has to be readable
and of one run, all of it beside a run.json; a run that was terminated leaves nothing of itself; and after a run that is let
alone nothing but its files may be there. Each run is a fork of this process, which has imported what it needs.
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

from PIL import Image

from paradiff.app import cli, pixels  # noqa: F401  (what a run imports)

STEPS = (12, 15)
"""Of the two runs."""

NAMES = {"run.json", "samples.png", "seed-0.png", "seed-1.png", "seed-2.png", "trace.png"}
ENDED = {0, 128 + signal.SIGTERM}


def start(out: Path, steps: int, log: Path) -> int:
    """Starts a run; its process."""
    given = ["sample", "digits", "--sampler", "ddim", "--steps", str(steps), "--seeds", "0-2", "--device", "cpu"]
    given += ["--trace", "--overwrite", "--out", str(out)]
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["paradiff", *given]
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def wait(process: int) -> int:
    """The exit code of a process; of one that a signal ended, its number below 0."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def visible(out: Path) -> dict[str, bytes]:
    """What lies in a folder, all of it readable."""
    found = {}
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if path.name == ".paradiff":
            continue
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        else:
            json.loads(path.read_text())
        found[path.name] = path.read_bytes()
    return found


def whose(found: dict[str, bytes], whole: dict[int, dict[str, bytes]]) -> set[int]:
    """The runs that files may be of, each by its own bytes; run.json, which has a date, by its arguments."""
    runs = set(whole)
    for name, contents in found.items():
        if name == "run.json":
            runs &= {json.loads(contents)["arguments"]["steps"]}
        else:
            runs = {steps for steps in runs if whole[steps][name] == contents}
    return runs


def storm(kills: int, seed: int, place: Path) -> Counter[str]:
    """Kills that many runs; what became of them.

    Raises:
        AssertionError: If something is unreadable, mixed, or left behind.
    """
    draw = random.Random(seed)
    whole, seconds = {}, 0.0
    for steps in STEPS:
        begin = time.monotonic()
        assert wait(start(place / f"whole-{steps}", steps, place / "log")) == 0, (place / "log").read_text()
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
        before = visible(out)
        process = start(out, steps, place / "log")
        if draw.random() < 0.5:
            time.sleep(draw.uniform(0, 1.1 * seconds))
            when = "while it ran"
        else:
            while (
                not (out / ".paradiff" / "new").exists()
                and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
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
            assert not (out / ".paradiff").exists(), f"{case}: scratch is left"
            if written:
                assert runs == {steps}, case
            else:
                # Unless an earlier run had been killed when it was whole, which this one moved on.
                assert found == before or "run.json" not in before, case
        counts[f"{sent.name} {when}: {'ended by it' if code < 0 else f'exit code {code}'}"] += 1
        if draw.random() < 0.3 or kill == kills - 1:
            steps = draw.choice(STEPS)
            assert wait(start(out, steps, place / "log")) == 0, f"{case}: {(place / 'log').read_text()}"
            assert set(visible(out)) == NAMES, case
            assert whose(visible(out), whole) == {steps}, case
            assert {path.name for path in out.iterdir()} == NAMES, f"{case}: left behind"
            assert {path.name for path in out.parent.iterdir()} == {"out"}, f"{case}: left behind"
            counts["let alone"] += 1
    return counts


def main(arguments: Sequence[str] | None = None) -> None:
    """The script."""
    parser = argparse.ArgumentParser(description="Kill runs of the command line at random moments.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        for what, count in sorted(storm(given.kills, given.seed, Path(place)).items()):
            print(f"{count:5d}  {what}")
    print(f"{given.kills} kills in {time.monotonic() - begin:.0f} s: nothing unreadable, nothing mixed, nothing left behind")


if __name__ == "__main__":
    main()

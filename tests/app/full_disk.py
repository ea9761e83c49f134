# SPDX-License-Identifier: Apache-2.0
"""Runs of the command line that write to a disk too small for them.

    sudo python tests/app/full_disk.py

A small tmpfs of each size is mounted (which needs root), and a run of the digits writes into a folder on it. A run that does
not fit has to end with one sentence that names the disk, and what lies in the folder has to be readable. On a disk that is
large enough the run is written whole. What the disk does not take is saved under the temporary folder, and named.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

SIZES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 1024)
"""Sizes of the disk in KiB; a page is 4 KiB."""
RUN = ["sample", "digits", "--sampler", "ddim", "--steps", "6", "--seeds", "0-2", "--device", "cpu", "--trace"]
WRITTEN = {"run.json", "samples.png", "seed-0.png", "seed-1.png", "seed-2.png", "trace.png"}


def verdict(disk: Path, temporary: Path) -> str:
    """What became of a run on the disk: `written`, `refused`, or what was wrong."""
    out = disk / "out"
    command = [sys.executable, "-m", "paradiff", *RUN, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(temporary), timeout=300)
    left = {path.name for path in out.iterdir()} if out.is_dir() else set[str]()
    for picture in left & {name for name in WRITTEN if name.endswith(".png")}:
        try:
            Image.open(out / picture).load()
        except OSError as error:
            return f"WRONG: {picture} cannot be read: {error}"
    if done.returncode == 0:
        return "written" if left == WRITTEN and not done.stderr else f"WRONG: {left}, {done.stderr}"
    lines = done.stderr.strip().splitlines()
    if len(lines) != 1 or "No space left on device" not in lines[0]:
        return f"WRONG: exit code {done.returncode}: {done.stderr[-400:]}"
    if "run.json" in left:
        return "WRONG: a run that was not written has its run.json"
    return f"refused: {lines[0]}"


def _environment(temporary: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(temporary)}


def storm(sizes: Sequence[int]) -> int:
    """Runs on disks of these sizes; how many were wrong."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        disk, temporary = Path(folder) / "disk", Path(folder) / "temporary"
        disk.mkdir()
        temporary.mkdir()
        for size in sizes:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], check=True)
            try:
                told = verdict(disk, temporary)
            finally:
                subprocess.run(["umount", str(disk)], check=True)
            wrong += told.startswith("WRONG")
            print(f"{size} KiB: {told}", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    return min(storm(parser.parse_args().sizes), 1)


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""What the benchmark scripts share: the command line, the JSON file, the record of where it was measured, printed tables."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Sheet

from paradiff.app.environment import environment

ROOT = Path(__file__).resolve().parent.parent
SAVE_SECONDS = 30.0  # between two writes of the JSON file while rows come in
console = Console(stderr=True, width=160, highlight=False)

Row = dict[str, Any]


def options(
    description: str | None,
    parts: Sequence[str] = (),
    *,
    draws: bool = False,
    clocks: bool = False,
    extra: tuple[str, str] | None = None,
    minutes: float | None = None,
    resumes: bool = False,
) -> argparse.Namespace:
    """The command line of a benchmark script, and the threads it asks for.

    Args:
        description: The script's docstring.
        parts: Names of its parts, of which `--only` selects some.
        draws: Whether the script draws, so that `--draw-only` is offered.
        clocks: Whether the script times its best settings by themselves, so that `--clock` is offered.
        extra: Name and help of an option that names a file.
        minutes: How long the script takes at most, unless `--minutes` says so.
        resumes: Whether the script can go on with its file, so that `--resume` is offered.

    Returns:
        The options; `only` holds the names of the parts to measure, and `keep` says whether the rows of the file stay.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version, within a few minutes on one core")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file, and pictures beside it")
    parser.add_argument("--seeds", type=int, default=sys.maxsize, metavar="N", help="at most this many seeds of each problem")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    if parts:
        text = f"parts to measure; rows of others in the file stay. A pattern may have * and ?. Parts: {', '.join(parts)}"
        parser.add_argument("--only", nargs="+", metavar="PART", help=text.replace("%", "%%"))
    if draws:
        parser.add_argument("--draw-only", action="store_true", help="draw from the JSON file, and measure nothing")
    if clocks:
        parser.add_argument("--clock", action="store_true", help="only time the best settings that the JSON file names")
    if extra is not None:
        parser.add_argument(extra[0], type=Path, metavar="FILE", help=extra[1])
    if minutes is not None:
        parser.add_argument("--minutes", type=float, default=minutes, metavar="N", help="what is not begun by then is left out")
    if resumes:
        parser.add_argument("--resume", action="store_true", help="go on with the file, whose rows stay")
    given = parser.parse_args()
    reads = [name for name in ("draw_only", "clock") if getattr(given, name, False)]
    if reads and not (given.json and given.json.is_file()):
        parser.error(f"--{reads[0].replace('_', '-')} reads a JSON file, and there is none; give it by --json FILE")
    if given.seeds < 1:
        parser.error(f"--seeds is {given.seeds}; give at least 1")
    patterns = getattr(given, "only", None)
    given.keep = bool(patterns or reads)
    given.only = [part for part in parts if not patterns or any(fnmatchcase(part, pattern) for pattern in patterns)]
    strange = next((p for p in patterns or () if not any(fnmatchcase(part, p) for part in parts)), None)
    if strange is not None:
        parser.error(f"--only is {strange!r}, and no part has such a name; parts are {', '.join(parts)}")
    torch.set_num_threads(given.threads)
    return given


def commit() -> str:
    """The commit of this checkout, marked if files differ from it."""
    line = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measured_on(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Hardware, threads, versions and commit."""
    return {**environment(device), "commit": commit()}


class Results:
    """The contents of a benchmark's JSON file.

    The file is written every `SAVE_SECONDS` while rows come in, and moved into place: a run that is cut loses the rows of the
    last half minute, and the file is never a torn one.

    Args:
        path: The file; None where nothing is to be written.
        keep: Whether to begin with what the file holds.
        stamp: Whether the hardware and the commit stand at the top of the file.
        device: Where the networks are.
    """

    def __init__(
        self, path: Path | None, keep: bool = False, *, stamp: bool = True, device: torch.device | str = "cpu"
    ) -> None:
        self.path = path
        self.contents: dict[str, Any] = {"environment": {}, "rows": []} if stamp else {}
        if keep and path and path.is_file():
            self.contents |= json.loads(path.read_text(encoding="utf-8"))
        self._stamp = measured_on(device) if stamp else None
        self._saved = time.perf_counter()

    @property
    def rows(self) -> list[Row]:
        """The rows."""
        return self.contents["rows"]

    def drop(self, kept: Iterable[Row]) -> None:
        """Leaves only the rows that are kept; those that are measured anew follow them."""
        self.contents["rows"] = list(kept)

    def add(self, row: Row) -> None:
        """Appends a row; writes the file if the last write is long enough ago."""
        self.rows.append(row)
        self.tick()

    def tick(self) -> None:
        """Writes the file if the last write is long enough ago."""
        if time.perf_counter() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self, **more: Any) -> None:
        """Writes the file now, with `more` beside the rows."""
        self.contents |= more
        if self._stamp is not None:
            self.contents["environment"] = self._stamp
        self._saved = time.perf_counter()
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.contents, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, self.path)


def show(rows: Sequence[Row], columns: Sequence[str], title: str | None = None) -> None:
    """Prints some columns of the rows as a table."""
    sheet = Sheet(*columns, title=title)
    for row in rows:
        sheet.add_row(*(number(row.get(column)) for column in columns))
    Console(width=220).print(sheet)


def number(value: Any) -> str:
    """A table's cell: four digits of a float."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

# SPDX-License-Identifier: Apache-2.0
"""A type checker sees what is no solver, no run or no method: protocols.py, under pyright."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def test_what_breaks_a_protocol_is_reported_where_it_is_handed_over() -> None:
    pytest.importorskip("pyright")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(FOLDER)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    reported: dict[int, str] = {}
    for finding in json.loads(found.stdout)["generalDiagnostics"]:
        assert Path(finding["file"]).name == "protocols.py", finding
        reported[finding["range"]["start"]["line"]] = finding["message"]
    wanted: dict[int, str] = {}
    for number, line in enumerate((FOLDER / "protocols.py").read_text().splitlines()):
        _, comment, text = line.partition("  # wrong: ")
        if comment:
            wanted[number] = text
    assert len(wanted) == 8
    assert set(reported) == set(wanted), reported
    for number, text in wanted.items():
        assert text in reported[number]

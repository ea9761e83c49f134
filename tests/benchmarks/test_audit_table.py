# SPDX-License-Identifier: Apache-2.0
"""The page's table of the audit's cost is that of the file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import audit


def test_the_pages_table_is_the_files() -> None:
    rows = json.loads(audit.JSON.read_text(encoding="utf-8"))["rows"]
    page = audit.PAGE.read_text(encoding="utf-8")
    assert audit.with_table(page, rows) == page
    assert audit.with_table(page, rows[1:]) != page

# SPDX-License-Identifier: Apache-2.0
"""Every file of Python says under which license it is."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
LINE = "# SPDX-License-Identifier: Apache-2.0\n"


def test_the_first_line_of_every_file_names_the_license() -> None:
    files = [path for folder in ("src", "tests", "benchmarks", "training") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert [str(path.relative_to(ROOT)) for path in files if not path.read_text(encoding="utf-8").startswith(LINE)] == []

# SPDX-License-Identifier: Apache-2.0
"""What an index of packages shows: metadata whose links lead somewhere."""

from __future__ import annotations

import re
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(([^)]*)\)")


def test_the_long_description_has_no_link_to_a_file_beside_it() -> None:
    written = (ROOT / "README.md").read_text(encoding="utf-8")
    assert any(not link.startswith(("https:", "#")) for link in LINK.findall(written))
    shown = str(metadata("paradiff").get_payload() or metadata("paradiff")["Description"])  # pyright: ignore[reportAttributeAccessIssue]
    assert "docs/choosing.md" in shown
    assert [link for link in LINK.findall(shown) if not link.startswith(("https:", "#"))] == []


def test_the_project_names_addresses() -> None:
    addresses = metadata("paradiff").get_all("Project-URL") or []
    assert len(addresses) >= 3
    assert all(re.fullmatch(r"[^,]+, https://\S+", address) for address in addresses)

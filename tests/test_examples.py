# SPDX-License-Identifier: Apache-2.0
"""The examples: each script runs from its beginning, and a notebook is its script."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
]

named = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def cells(path: Path) -> list[tuple[str, str]]:
    """The kind and the text of each cell."""
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


@named
def test_a_script_runs_and_draws_its_pictures(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    runpy.run_path(str(script))
    plt.close("all")
    assert (tmp_path / f"{script.stem}.png").stat().st_size > 5000
    assert {file.name for file in tmp_path.glob("*.png")} <= set(re.findall(r'"(\w+\.png)"', script.read_text()))


@named
def test_a_notebook_is_its_script_without_outputs(script: Path) -> None:
    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    nbformat.validate(notebook)
    assert cells(script) == [(cell.cell_type, cell.source) for cell in notebook.cells], "run make notebooks"
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


def test_every_notebook_has_a_script() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == {path.stem for path in SCRIPTS}

# SPDX-License-Identifier: Apache-2.0
"""The examples: each notebook runs from its beginning, and is its script."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))

named = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def cells(path: Path) -> list[tuple[str, str]]:
    """The kind and the text of each cell."""
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


@named
def test_a_notebook_runs_and_draws_its_pictures(script: Path, tmp_path: Path) -> None:
    shutil.copy(script.with_suffix(".ipynb"), tmp_path)
    own = {name: str(tmp_path / "own") for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "PARADIFF_CACHE")}
    execute = "from nbclient.cli import main; main()"  # in a process of its own: it leaves sockets to the collector
    words = [sys.executable, "-c", execute, "--timeout=-1", "--kernel_name=python3", f"{script.stem}.ipynb"]
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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

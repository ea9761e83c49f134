"""Modules of the pipelines package import each other in one direction."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import paradiff.pipelines

ROOT = Path(paradiff.pipelines.__file__).parents[2]


def imports(file: Path, names: set[str]) -> set[str]:
    """The modules among `names` that a file imports anywhere, also within functions and for annotations."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & names


def test_no_module_imports_itself_through_others() -> None:
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOT.glob("paradiff/pipelines/**/*.py")}
    modules = {name: file for name, file in files.items() if file.name != "__init__.py"}  # these only re-export names
    assert "paradiff.pipelines.run" in modules
    graph = {name: imports(file, set(modules)) for name, file in modules.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError

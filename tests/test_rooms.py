# SPDX-License-Identifier: Apache-2.0
"""Imports run one way: no circle between files, and no arrow against the order of the rooms."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import paradiff

SOURCE = Path(paradiff.__file__).parent

ORDER = [
    {"errors", "lock", "version"},
    {"lazy", "whole_file"},
    {"chain"},
    {"samplers", "solver"},
    {"methods", "models"},
    {"planning"},
    {"pipelines", "serving"},
    {"app"},
    {"__main__"},
]
"""A room imports from rooms before its own place only; rooms at one place do not import each other."""

LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def name_of(path: Path) -> str:
    """The module that a file is."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(["paradiff", *(parts[:-1] if parts[-1] == "__init__" else parts)])


MODULES = {name_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imported(tree: ast.AST, module: str, package: bool) -> Iterator[str]:
    """The modules of the package that a file names in an import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                if f"{base}.{alias.name}" in MODULES:
                    yield f"{base}.{alias.name}"
                elif base in MODULES:
                    yield base


@functools.cache
def arrows() -> dict[str, set[str]]:
    """For each file the files that it imports; the root, which only hands on names, is left out."""
    found = {}
    for module, path in MODULES.items():
        if module != "paradiff":
            names = set(imported(ast.parse(path.read_text()), module, path.name == "__init__.py"))
            found[module] = names - {module}
    return found


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of files that reach each other."""

    def reach(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for other in graph.get(todo.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return seen

    reached = {module: reach(module) for module in graph}
    found = []
    for module in graph:
        together = {other for other in reached[module] if module in reached[other]}
        if together and together not in found:
            found.append(together)
    return found


def room(module: str) -> str:
    """The room of a module."""
    return module.split(".")[1] if "." in module else module


def test_every_room_has_a_place_in_the_order() -> None:
    assert {room(module) for module in MODULES} - {"paradiff"} == set(LEVEL)


def test_no_file_imports_the_root() -> None:
    assert [module for module, others in arrows().items() if "paradiff" in others] == []


def test_no_files_import_each_other() -> None:
    graph = arrows()
    assert circles(graph) == []


def test_rooms_import_from_rooms_before_them_only() -> None:
    found = {
        (room(module), room(other))
        for module, others in arrows().items()
        for other in others
        if room(module) != room(other) and LEVEL[room(other)] >= LEVEL[room(module)]
    }
    assert found == set()


@pytest.mark.parametrize(
    "text",
    [
        "from paradiff.chain.table import Table",
        "from paradiff.chain import table",
        "import paradiff.chain.table",
        "from .table import Table",
        "from . import table",
        "def f():\n    from paradiff.chain.table import Table",
        "if TYPE_CHECKING:\n    from paradiff.chain.table import Table",
    ],
)
def test_an_import_is_seen_wherever_and_however_it_is_written(text: str) -> None:
    assert list(imported(ast.parse(text), "paradiff.chain.step", package=False)) == ["paradiff.chain.table"]


def test_an_import_from_a_package_itself_is_resolved_there() -> None:
    assert list(imported(ast.parse("from .table import Table"), "paradiff.chain", package=True)) == ["paradiff.chain.table"]


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"f"}, "f": {"a", "e"}}
    assert circles(graph) == [{"b", "c"}, {"e", "f"}]

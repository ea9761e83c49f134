# SPDX-License-Identifier: Apache-2.0
"""An object has all its attributes from its birth: what a method of it assigns, `__init__` or the class assigns too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import paradiff

ROOT = Path(paradiff.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def assigned(body: ast.AST) -> Iterator[str]:
    """The names x of all `self.x` that a function assigns."""
    for node in ast.walk(body):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


def born_late(source: str) -> set[str]:
    """`Class.x` for the attributes that are first assigned outside `__init__` and the class's own fields."""
    found = set()
    for cls in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)):
        methods = [node for node in cls.body if isinstance(node, ast.FunctionDef)]
        fields = (node.target for node in cls.body if isinstance(node, ast.AnnAssign))
        born = {field.id for field in fields if isinstance(field, ast.Name)}
        for method in methods:
            if method.name == "__init__":
                born |= {*assigned(method)}
        for method in methods:
            found |= {f"{cls.name}.{name}" for name in {*assigned(method)} - born}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_attribute_is_born_outside_init(path: Path) -> None:
    assert not born_late(path.read_text())


def test_an_attribute_that_is_born_late_is_seen() -> None:
    born = "class A:\n    y: int\n    def __init__(self):\n        self.x = 1\n"
    late = born + "    def f(self):\n        self.x, self.y, self.z = 1, 2, 3\n"
    assert born_late(born) == set()
    assert born_late(late) == {"A.z"}

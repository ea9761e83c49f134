# SPDX-License-Identifier: Apache-2.0
"""Signatures of functions read off their source, where an import would load torch.

Names and defaults are in the function's own syntax tree. The names in its annotations are followed through the package's
modules: aliases are evaluated, and every class, and whatever other packages define, is an empty class of that name.
"""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
"""The package's folder."""


def parameters(module: str, name: str) -> dict[str, inspect.Parameter]:
    """The arguments of a function of this package, with annotations that are types; every default is `...`.

    Args:
        module: The module's full name.
        name: The function.
    """
    function = next(node for node in _source(module).body if isinstance(node, ast.FunctionDef) and node.name == name)
    given = function.args
    positional = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(given.defaults)) + [*given.defaults, *given.kw_defaults]
    names, found = _Names(module), {}
    for argument, default in zip([*positional, *given.kwonlyargs], defaults, strict=True):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if argument in positional else inspect.Parameter.KEYWORD_ONLY
        annotation = inspect.Parameter.empty if argument.annotation is None else names.value(argument.annotation)
        end = inspect.Parameter.empty if default is None else ...
        found[argument.arg] = inspect.Parameter(argument.arg, kind, default=end, annotation=annotation)
    return found


@functools.cache
def _source(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


class _Names(Mapping[str, Any]):
    """The names of a module, each evaluated when it is asked for."""

    def __init__(self, module: str) -> None:
        self._module = module

    def value(self, expression: ast.expr) -> Any:
        """The value of an annotation, or of the right side of an alias."""
        return eval(compile(ast.Expression(expression), self._module, "eval"), {}, self)

    def __getitem__(self, name: str) -> Any:
        for node in _source(self._module).body:
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
                other = next((one.name for one in node.names if (one.asname or one.name) == name), None)
                if other is not None:
                    return _imported(node.module, other)
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return self.value(node.value)
            if isinstance(node, ast.ClassDef) and node.name == name:
                return _stand_in(name)
        return getattr(builtins, name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _imported(module: str, name: str) -> Any:
    root = module.partition(".")[0]
    if root == "paradiff":
        return _Names(module)[name]
    return getattr(importlib.import_module(module), name) if root in sys.stdlib_module_names else _stand_in(name)


@functools.cache
def _stand_in(name: str) -> type:
    return type(name, (), {})

# SPDX-License-Identifier: Apache-2.0
"""Whether a function reads a variable or an attribute, or only writes to it, decided from its source.

A hook that counts calls or lists shapes keeps something from one call to the next, and no result depends on it. A name is only
written to where it is assigned, added to in place, or has one of the methods of containers called that return nothing.
"""

from __future__ import annotations

import ast
import functools
import linecache
import types
from typing import Any

WRITERS = {"append", "appendleft", "extend", "add", "update", "insert", "clear"}
"""Methods of containers that change them and return None."""


def is_read(name: str, function: types.FunctionType) -> bool:
    """Whether a function may read the variable or attribute `name`. True where its source is not to be had."""
    code = function.__code__
    if name not in names(code):
        return False
    nodes = _nodes(code.co_filename, code.co_firstlineno, code.co_name)
    return not nodes or any(_reads(node, name) for node in nodes)


def names(code: types.CodeType) -> set[str]:
    """The names of variables and attributes in a function's code and in the functions within, and its texts."""
    inner = [names(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    texts = {part for part in code.co_consts if isinstance(part, str) and part.isidentifier()}  # as for setattr
    return {*code.co_names, *code.co_varnames, *code.co_freevars, *code.co_cellvars, *texts}.union(*inner)


@functools.lru_cache(maxsize=32)
def _tree(filename: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return None


def _nodes(filename: str, line: int, name: str) -> list[ast.AST]:
    """The functions of this name that begin in a line of a file."""
    tree = _tree(filename)
    found: list[ast.AST] = []
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Lambda):
            same = name == "<lambda>" and node.lineno == line
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            same = node.name == name and line in (first, node.lineno)
        else:
            continue
        found += [node] if same else []
    return found


def _reads(function: ast.AST, name: str) -> bool:
    written: set[int] = set()
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Attribute(value=target, attr=method)) if method in WRITERS:
                written |= _chain(target)
            case ast.AugAssign(target=target):
                written |= _chain(target)
            case ast.Assign(targets=targets):
                for target in targets:
                    written |= _chain(target)
            case _:
                pass
    return any(_is_load(node, name) and id(node) not in written for node in ast.walk(function))


def _is_load(node: ast.AST, name: str) -> bool:
    match node:
        case ast.Name(id=found, ctx=ast.Load()) | ast.Attribute(attr=found, ctx=ast.Load()):
            return found == name
        case ast.Constant(value=found):
            return found == name
        case _:
            return False


def _chain(target: Any) -> set[int]:
    """The nodes of `a`, `a.b` and `a.b[...]` in `a.b[...]`, without those within the brackets."""
    found: set[int] = set()
    while isinstance(target, ast.Attribute | ast.Subscript | ast.Name):
        found.add(id(target))
        target = None if isinstance(target, ast.Name) else target.value
    return found

# SPDX-License-Identifier: Apache-2.0
"""Questions about the syntax tree of a loop over timesteps."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import TypeIs

UNCOUNTED = ("progress", "pbar", "callback", "mark_step", "logger", "logging", "warn", "print")
"""Parts of the names of functions that may be given the step number."""

GIVEN = 3
"""Arguments of a scheduler's `step`, at least: an output, a time and a state."""


def body(loop: ast.For) -> Iterator[ast.AST]:
    """All nodes in a loop's body."""
    for statement in loop.body:
        yield from ast.walk(statement)


def statements(loop: ast.For) -> Iterator[ast.stmt]:
    """All statements in a loop's body, in the order of the text."""
    waiting: list[ast.AST] = list(loop.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.stmt):
            yield node
        waiting[:0] = ast.iter_child_nodes(node)


def names(loop: ast.For, context: type[ast.expr_context]) -> list[ast.Name]:
    """The names that a loop's body reads (`ast.Load`) or sets (`ast.Store`)."""
    return [node for node in body(loop) if isinstance(node, ast.Name) and isinstance(node.ctx, context)]


def is_self(node: ast.AST) -> bool:
    """Whether a node is the name `self`."""
    return is_named(node, "self")


def is_named(node: ast.AST, name: str) -> bool:
    """Whether a node is this name."""
    return isinstance(node, ast.Name) and node.id == name


def last(node: ast.AST) -> str:
    """The last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def inner(node: ast.AST) -> ast.AST:
    """A value without the indices and attributes that are taken of it, as the call in `f(x)[0]`."""
    while isinstance(node, ast.Subscript | ast.Attribute):
        node = node.value
    return node


def called_like(node: ast.AST, names: set[str]) -> bool:
    """Whether a node is an attribute with one of these names."""
    return isinstance(node, ast.Attribute) and node.attr in names


def is_helper_call(node: ast.AST) -> bool:
    """Whether a node calls a method of the pipeline."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_self(node.func.value)


def over_timesteps(loop: ast.For) -> bool:
    """Whether a loop iterates something named timesteps."""
    return any("timesteps" in last(node) for node in ast.walk(loop.iter))


def steps_in(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls of a scheduler's `step` anywhere in a tree."""
    yield from (node for node in ast.walk(tree) if is_step(node))


def is_step(node: ast.AST) -> TypeIs[ast.Call]:
    """Whether a node is a call of a scheduler's `step`: by the scheduler's name, or by the three things that it is given."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    if node.func.attr == "step" and len(node.args) + len(node.keywords) >= GIVEN:
        return True
    return node.func.attr.startswith("step") and "scheduler" in ast.unparse(node.func.value)


def steps(loop: ast.For | ast.expr, inner: bool = True) -> Iterator[ast.Call]:
    """The calls of a scheduler's `step` in a loop's body; with `inner` False, without those in inner loops."""
    waiting: list[ast.AST] = list(loop.body) if isinstance(loop, ast.For) else [loop]
    while waiting:
        node = waiting.pop(0)
        if is_step(node):
            yield node
        if inner or not isinstance(node, (ast.For, ast.While)):
            waiting.extend(ast.iter_child_nodes(node))


def given_states(loop: ast.For) -> set[str]:
    """The names in the states that a loop's steps are given."""
    given = [part for step in steps(loop) for part in [*step.args[2:3], *(k.value for k in step.keywords if k.arg == "sample")]]
    return {name.id for part in given for name in ast.walk(part) if isinstance(name, ast.Name)}


def indices(loop: ast.For) -> list[str]:
    """The names in a loop's target for the step's number, or for another quantity of the step than its time."""
    target, iterated = loop.target, loop.iter
    while isinstance(iterated, ast.Call) and last(iterated.func) in ("progress_bar", "tqdm", "trange") and iterated.args:
        iterated = iterated.args[0]
    if not isinstance(iterated, ast.Call) or not isinstance(iterated.func, ast.Name):
        return []
    name = iterated.func.id
    if name == "enumerate" and isinstance(target, ast.Tuple):
        inner = ast.For(target=target.elts[1], iter=iterated.args[0], body=[], orelse=[])
        return [*target_names(target.elts[0]), *indices(inner)]
    if name == "zip" and isinstance(target, ast.Tuple):
        pairs = zip(target.elts, iterated.args, strict=False)
        others = [part for part, source in pairs if not any("timesteps" in last(node) for node in ast.walk(source))]
        return [found for part in others for found in target_names(part)]
    return target_names(target) if name == "range" else []


def target_names(target: ast.AST) -> list[str]:
    """The names that an assignment to this target sets."""
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name) and node.id != "_"]


def sets_data(node: ast.AST) -> bool:
    """Whether a node sets the `data` of a tensor, past the reach of a windowed one."""
    return isinstance(node, ast.Attribute) and node.attr == "data" and isinstance(node.ctx, ast.Store)


def written_into(node: ast.AST) -> str | None:
    """The variable that a statement adds to, or writes into: `k += 1`, `v[i] = x`, `v.add_(x)`; None for another one."""
    targets: list[ast.AST] = []
    match node:
        case ast.AugAssign(target=target):
            targets = [target]
        case ast.Assign(targets=[*given]):
            targets = [target for target in given if isinstance(target, ast.Subscript)]
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr=name) as function)) if name.endswith("_") and name[0] != "_":
            targets = [function.value]
        case _:
            pass
    for target in targets:
        while isinstance(target, ast.Subscript):
            target = target.value
        if isinstance(target, ast.Name):
            return target.id
    return None


def about_callback(node: ast.AST) -> bool:
    """Whether a name with `callback` in it occurs within a node."""
    return any("callback" in last(part) for part in ast.walk(node))


def uncounted_call(call: ast.Call) -> bool:
    """Whether a call is for a progress bar, a callback or a log."""
    name = ast.unparse(call.func)
    return any(word in name for word in UNCOUNTED)


def idle(node: ast.stmt) -> bool:
    """Whether a statement only moves a progress bar, calls back, or logs."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call) and uncounted_call(node.value)
    if isinstance(node, ast.If):
        return about_callback(node.test) or all(idle(part) for part in [*node.body, *node.orelse])
    return isinstance(node, ast.Pass)

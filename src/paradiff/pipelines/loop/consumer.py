# SPDX-License-Identifier: Apache-2.0
"""Who is given what each pass of a loop makes, beside the loop itself.

A loop may hand on its states one by one: a generator yields them, an iterator's `__next__` makes a pass, a function is mapped
over the times. What gathers them, `list`, `sum` or a `for` in another function, is given those of a parallel run's passes,
which are others, and fewer. Whether there is such a consumer is read from the frames of the call at the loop's first step, and
from the source of their functions. One that keeps the last value alone may stay.
"""

from __future__ import annotations

import ast
import dataclasses
import dis
import inspect
import types
from collections.abc import Iterable, Iterator, Sequence

from paradiff.pipelines.loop import syntax
from paradiff.pipelines.loop.reader import LoopSource, MethodSource

COMPREHENDED = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
"""Names of the code of comprehensions."""
YIELDING = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR
GATHERING = ("list", "tuple", "set", "deque")
"""Functions that make a container of all that they go through."""
REDUCING = (*GATHERING, "any", "all", "sum", "max", "min")
"""Functions that go through all, and may be called for that alone."""
PASSED_ON = ("SEND", "YIELD_FROM", "YIELD_VALUE")
"""Instructions by which a generator passes on what another one yields, or a coroutine awaits another one."""


@dataclasses.dataclass(frozen=True)
class Pull:
    """A frame when the loop asked for its first time, and the instruction that it was at."""

    frame: types.FrameType
    instruction: int

    @classmethod
    def of(cls, stack: Iterable[types.FrameType]) -> list[Pull]:
        """That of each frame."""
        return [cls(frame, frame.f_lasti) for frame in stack]


def consuming(stack: Sequence[types.FrameType], pulls: Sequence[Pull]) -> Iterator[tuple[str, LoopSource | None]]:
    """The lines that are given what each pass makes, and for a line that opens a loop what is read of it. A `while` that makes
    the passes is among them.

    Args:
        stack: The frames of the call at the loop's first step, the innermost first.
        pulls: Those when the loop asked for its first time.
    """
    asked = {id(pull.frame): pull.instruction for pull in pulls}
    walking = next((frame for frame in stack if id(frame) in asked), None)
    found = handed = False  # whether the loop lies within a frame, and whether that hands on a value in each pass
    for frame in stack:
        if found and not handed:
            return
        asks, source = frame is walking and not found, MethodSource.at(object, frame.f_code)
        opened, around = _opened(source, frame), _innermost(source, frame, ast.For, ast.While)
        passes_on = bool(frame.f_code.co_flags & YIELDING) and _name(frame, frame.f_lasti) in PASSED_ON
        if frame.f_code.co_name in COMPREHENDED:
            found = handed = handed or asks
        elif opened is not None and source is not None:
            yield source.line(opened), source.loop_of(opened)
            found, handed = True, _yields(source, frame, opened)
        elif handed and passes_on:
            continue
        elif handed or (asks and _in_one(source, frame, asked[id(frame)], around)):
            if (line := _kept_by(source, frame)) is not None:
                yield line, None
            return
        elif around is not None and source is not None:
            if isinstance(around, ast.While) and not any(isinstance(above, ast.For) for above in source.around(around)):
                yield source.line(around), source.loop_of(around)
            found, handed = True, _yields(source, frame, around)
        elif asks:  # in a loop that cannot be read, or for the one pass that it makes
            found, handed = True, source is not None or _yields(source, frame, None)


def _in_one(source: MethodSource | None, frame: types.FrameType, asked: int, around: ast.stmt | None) -> bool:
    """Whether one expression asks for the times and makes the passes: a function of C that calls another one, or a
    comprehension without a frame of its own.

    Args:
        source: The source of the frame's function; None where it cannot be read.
        frame: The frame that asked.
        asked: The instruction at which it did.
        around: The loop around it.
    """
    return frame.f_lasti == asked or (source is not None and around is None and _name(frame, asked) == "FOR_ITER")


def _name(frame: types.FrameType, instruction: int) -> str:
    """The name of an instruction of a frame's code."""
    return dis.opname[frame.f_code.co_code[instruction]]


def _innermost(source: MethodSource | None, frame: types.FrameType, *kinds: type[ast.stmt]) -> ast.stmt | None:
    """The innermost statement of some kinds around the line that a frame is at."""
    place = frame.f_lineno - frame.f_code.co_firstlineno + 1
    nodes = () if source is None else source.nodes
    held = [n for n in nodes if isinstance(n, kinds) and n.lineno <= place <= (n.end_lineno or n.lineno)]
    return max(held, key=lambda node: (node.lineno, node.col_offset)) if held else None


def _opened(source: MethodSource | None, frame: types.FrameType) -> ast.For | None:
    """The `for` that asks for its next value where a frame is."""
    found = _innermost(source, frame, ast.For)
    return found if isinstance(found, ast.For) and _name(frame, frame.f_lasti) == "FOR_ITER" else None


def _yields(source: MethodSource | None, frame: types.FrameType, loop: ast.AST | None) -> bool:
    """Whether the passes of a loop yield, in a generator; those of an unknown loop may."""
    if not frame.f_code.co_flags & YIELDING:
        return False
    if source is None or loop is None:
        return True
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    yields = (node for node in ast.walk(loop) if isinstance(node, ast.Yield | ast.YieldFrom))
    return any(next(above for above in source.around(node) if isinstance(above, functions)) is source.tree for node in yields)


def _kept_by(source: MethodSource | None, frame: types.FrameType) -> str | None:
    """The line of the statement that a frame is at; None if it keeps none of the values that it is given but the last."""
    statement = _innermost(source, frame, ast.stmt)
    if source is None or statement is None:
        return frame.f_code.co_name
    alone = not hasattr(statement, "body") and _keeps_the_last(statement, source.tree)
    return None if alone else source.line(statement)


def _keeps_the_last(statement: ast.stmt, function: ast.AST) -> bool:
    """Whether a statement of a function keeps the last of the values that an expression in it goes through, or none."""
    match statement:
        case ast.Expr(value=ast.ListComp()):
            return True
        case ast.Expr(value=ast.Call(func=ast.Name() | ast.Attribute() as called)) if syntax.last(called) in REDUCING:
            return True
        case ast.Assign(targets=[ast.Tuple(elts=parts) | ast.List(elts=parts)]):
            read = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
            if any(isinstance(part, ast.Starred) and syntax.is_named(part.value, "_") for part in parts) and "_" not in read:
                return True
        case _:
            pass
    return any(_takes_the_last(node) for node in ast.walk(statement))


def _takes_the_last(node: ast.AST) -> bool:
    """Whether an expression is the last item of what is gathered, as `list(values)[-1]`, or a `reduce` by a step."""
    match node:
        case ast.Subscript(value=ast.ListComp() | ast.Call() as made, slice=ast.UnaryOp(ast.USub(), ast.Constant(1))):
            return isinstance(made, ast.ListComp) or syntax.last(made.func) in GATHERING
        case ast.Call(func=called, args=[ast.Lambda(body=body), *_]) if syntax.last(called) == "reduce":
            return syntax.is_step(syntax.inner(body))
        case _:
            return False

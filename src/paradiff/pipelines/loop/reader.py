# SPDX-License-Identifier: Apache-2.0
"""The loops over timesteps of a pipeline class, read from the source of its methods."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import textwrap
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from paradiff.pipelines.by_class import by_class
from paradiff.pipelines.loop import syntax

GRADIENTS = {"enable_grad", "autograd", "backward"}
RANDOM = {"randn_tensor", "randn", "randn_like", "rand", "rand_like", "randint", "normal", "normal_"}


@dataclass(frozen=True, kw_only=True)
class LoopSource:
    """A loop over timesteps.

    Attributes:
        line: The line that opens it.
        index_reads: The lines that use the step number for anything but a progress bar, a callback or a log.
        outer: The lines that open loops around it, outermost first. A call then solves several chains.
        inner_steps: Whether the scheduler steps within an inner loop, several times in a pass.
        gradients: Lines that compute gradients.
        numpy: Lines that leave torch.
        random: Lines that draw random numbers.
        told: Names of arguments that passes call for what they do, and not for what they return.
        left: Names of values that are set in some passes only and read after the loop.
        gathered: Names of values that passes add to, or write into, and that are read after the loop.
        outliving: Names of values that passes add to, or write into, and that outlive the function: arguments, and variables
            that are declared `global` or `nonlocal`.
        arrays: Names of arrays that the states of all passes are written into.
        kept: Names of values that a pass sets and that are read after the loop, except the state and the time.
        carried: Names of values that one pass sets and the next one reads, except the state and values that callbacks replace.
    """

    line: str
    index_reads: list[str]
    outer: list[str]
    inner_steps: bool
    gradients: list[str]
    numpy: list[str]
    random: list[str]
    carried: list[str]
    left: list[str]
    gathered: list[str]
    outliving: list[str]
    told: list[str]
    arrays: list[str]
    kept: list[str]


def read_loops(pipeline: type) -> list[LoopSource]:
    """The loops over timesteps of a pipeline class: those of `__call__`, or else of the methods that it calls."""
    seen: set[str] = set()
    names = ["__call__"]
    while names:
        sources = [source for name in names if (source := MethodSource.of(pipeline, name)) is not None]
        loops = [loop for source in sources for loop in source.loops()]
        if loops:
            return loops
        seen.update(names)
        names = [name for name in dict.fromkeys(name for source in sources for name in source.called()) if name not in seen]
    return []


def loop_at(pipeline: type, code: types.CodeType, line: int) -> LoopSource | None:
    """The innermost loop around a line of a function, whose pass that line ends by a call in which the scheduler steps.

    Args:
        pipeline: The pipeline class.
        code: The function's.
        line: The line of the call.
    """
    source = MethodSource.at(pipeline, code)
    if source is None:
        return None
    place = line - code.co_firstlineno + 1
    around = [node for node in source.nodes if isinstance(node, ast.For) and _holds(node, place)]
    if not around:
        return None
    loop = max(around, key=lambda node: node.lineno)
    statements = [node for node in syntax.statements(loop) if _holds(node, place)]
    if not statements:
        return None
    statement = max(statements, key=lambda node: node.lineno)
    call = next((node for node in ast.walk(statement) if isinstance(node, ast.Call)), None)
    return None if call is None else source.read(loop, call)


def has_source(code: types.CodeType) -> bool:
    """Whether there is source of a function to read."""
    try:
        return bool(inspect.getsource(code))
    except (TypeError, OSError, IndexError):
        return False


def _holds(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def collected(pipeline: type) -> list[str]:
    """Clauses against loops that hand on what each of their passes makes, which a parallel run does not make in order."""
    found, seen, names = [], set[str](), ["__call__"]
    while names:
        name = names.pop()
        seen.add(name)
        source = MethodSource.of(pipeline, name)
        if source is None:
            continue
        names += [other for other in source.called() if other not in seen and other not in names]
        found += source.handed_on(name)
    return found


def other_form(pipeline: type) -> str | None:
    """A clause for how a pipeline class's loop goes that does not walk over its times in a `for`; None if that is not seen."""
    seen, names = set[str](), ["__call__"]
    while names:
        name = names.pop(0)
        seen.add(name)
        source = MethodSource.of(pipeline, name)
        if source is None:
            continue
        called = source.called()
        names += [other for other in called if other not in seen and other not in names]
        for step in syntax.steps_in(source.tree):
            if name in called:
                return f"the loop's calls of the scheduler are in a recursion, of {name}"
            around = [node for node in source.around(step) if isinstance(node, ast.For | ast.While)]
            if around and isinstance(around[0], ast.While):
                return f"the loop is a `while`, whose place in the chain a parallel run cannot set: {source.line(around[0])}"
            if around and isinstance(around[0], ast.For):
                return f"the loop walks over something else than scheduler.timesteps: {source.line(around[0])}"
    return None


_PARSER = threading.RLock()  # CPython builds one syntax tree at a time (gh-106905), and trees are changed while they are read
READ = 64  # sources of methods that are kept


class MethodSource:
    """The source of one method and the loops in it."""

    def __init__(self, pipeline: type, tree: ast.FunctionDef, lines: list[str]) -> None:
        self._pipeline, self.tree, self.lines = weakref.ref(pipeline), tree, lines
        self.nodes: list[ast.AST] = [tree]  # as ast.walk goes through them, which takes most of the time of a reading
        self.parents: dict[ast.AST, ast.AST] = {}
        for node in self.nodes:
            children = list(ast.iter_child_nodes(node))
            self.parents.update(dict.fromkeys(children, node))
            self.nodes += children

    @property
    def pipeline(self) -> type:
        """The class, which is not kept by what is known of it."""
        found = self._pipeline()
        assert found is not None, "nobody reads the sources of a class that is gone"
        return found

    @classmethod
    def of(cls, pipeline: type, name: str) -> MethodSource | None:
        """The source of a method; None if there is none to read. It is read once, for a function with its code as it is."""
        method: Any = inspect.getattr_static(pipeline, name, None)
        try:
            function = inspect.unwrap(getattr(method, "__func__", method))
            return _read(pipeline, function.__code__)
        except (AttributeError, TypeError, OSError, SyntaxError, IndexError, ValueError):
            return None

    @classmethod
    def at(cls, pipeline: type, code: types.CodeType) -> MethodSource | None:
        """The source of a running function; None if there is none to read."""
        try:
            return _read(pipeline, code)
        except (TypeError, OSError, SyntaxError, IndexError, ValueError):
            return None

    @functools.lru_cache(maxsize=READ)  # noqa: B019  (sources are few, and kept anyway)
    def read(self, loop: ast.For, step: ast.Call) -> LoopSource:
        """A loop whose step is in this call, whatever its name."""
        with _PARSER:
            own = ast.parse("scheduler.step", mode="eval").body
            named, step.func = step.func, own
            try:
                return self._loop(loop)
            finally:
                step.func = named

    @functools.lru_cache(maxsize=READ)  # noqa: B019
    def loop_of(self, loop: ast.For | ast.While) -> LoopSource:
        """A loop of this method, of any form."""
        if isinstance(loop, ast.For):
            return self._loop(loop)
        with _PARSER:
            tree = _AsFor().visit(copy.deepcopy(self.tree))
        fors = (node for node in ast.walk(tree) if isinstance(node, ast.For))
        found = next(node for node in fors if (node.lineno, node.col_offset) == (loop.lineno, loop.col_offset))
        return MethodSource(self.pipeline, tree, self.lines)._loop(found)

    def around(self, node: ast.AST) -> Iterator[ast.AST]:
        """The nodes around a node, the innermost first."""
        while (above := self.parents.get(node)) is not None:
            yield above
            node = above

    def line(self, node: Any) -> str:
        return self.lines[node.lineno - 1].strip()

    @functools.lru_cache(maxsize=READ)  # noqa: B019
    def called(self) -> list[str]:
        """The methods of the pipeline that are called, in order."""
        return [
            node.func.attr
            for node in self.nodes
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and syntax.is_self(node.func.value)
        ]

    @functools.lru_cache(maxsize=READ)  # noqa: B019
    def loops(self) -> list[LoopSource]:
        """The loops over timesteps in which a scheduler steps; if there are none, those that call a method in each pass."""
        every = [node for node in self.nodes if isinstance(node, ast.For)]
        fors = [node for node in every if syntax.over_timesteps(node)]
        stepping = [node for node in fors if any(syntax.steps(node))]
        stepping = stepping or [node for node in every if any(syntax.steps(node, inner=False))]
        # A loop around the loop of the steps is its outer loop.
        inner = [node for node in stepping if not any(other is not node and other in ast.walk(node) for other in stepping)]
        calling = [node for node in fors if not isinstance(node.iter, ast.Call) or not syntax.is_named(node.iter.func, "range")]
        calling = [node for node in calling if any(syntax.is_helper_call(part) for part in syntax.body(node))]
        return [self._loop(node) for node in sorted(inner or calling, key=lambda node: node.lineno)]

    @functools.lru_cache(maxsize=READ)  # noqa: B019
    def handed_on(self, name: str) -> list[str]:
        """Clauses against its loops that hand on what each pass makes; `name` is the method's."""
        found = [
            f"its loop is a comprehension, which keeps the states of all passes: {self.line(node)}"
            for node in self.nodes
            if isinstance(node, COMPREHENSIONS) and any(syntax.steps(node))
        ]
        functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        yields = (node for node in self.nodes if isinstance(node, ast.Yield | ast.YieldFrom))
        own = (next(above for above in self.around(node) if isinstance(above, functions)) for node in yields)
        if self.loops() and any(function is self.tree for function in own):
            found.append(f"its loop yields the states of its passes to another function: {name}")
        return found

    def _loop(self, loop: ast.For) -> LoopSource:
        around: list[str] = []
        parent = self.parents.get(loop)
        while parent is not None:
            if isinstance(parent, (ast.For, ast.While)):
                around.insert(0, self.line(parent))
            parent = self.parents.get(parent)
        counted = set(syntax.indices(loop)) | self._counters(loop)
        uses = [
            node
            for node in syntax.names(loop, ast.Load)
            if node.id in counted and not (self._uncounted(node, loop) or self._counts(node) or self._bound_inside(node, loop))
        ]
        inner_steps = any(
            isinstance(above, (ast.For, ast.While)) for step in syntax.steps(loop) for above in self._above(step, loop)
        )
        return LoopSource(
            line=self.line(loop),
            index_reads=self._unique([*uses, *self._after(loop, counted), *self._deep(loop, syntax.sets_data)])
            or self._unique(self._copies(loop)),
            outer=around,
            inner_steps=inner_steps,
            gradients=self._unique(self._deep(loop, lambda node: syntax.called_like(node, GRADIENTS))),
            numpy=self._unique([n for n in syntax.body(loop) if syntax.is_named(n, "np") or syntax.is_named(n, "numpy")]),
            random=self._unique([n for n in syntax.body(loop) if isinstance(n, ast.Call) and syntax.last(n.func) in RANDOM]),
            carried=self._carried(loop),
            left=self._left(loop),
            gathered=self._gathered(loop),
            outliving=self._outliving(loop),
            told=self._told_arguments(loop),
            arrays=self._arrays(loop),
            kept=self._kept(loop),
        )

    def _unique(self, nodes: list[Any]) -> list[str]:
        lines = {node.lineno: self.line(node) for node in sorted(nodes, key=lambda node: node.lineno) if node is not None}
        return list(dict.fromkeys(lines.values()))

    def _above(self, node: ast.AST, loop: ast.For) -> Iterator[ast.AST]:
        while (node := self.parents[node]) is not loop:
            yield node

    def _uncounted(self, node: ast.AST, loop: ast.For) -> bool:
        """Whether a name is used for a progress bar, a callback or a log."""
        for above in self._above(node, loop):
            if isinstance(above, ast.Call) and syntax.uncounted_call(above):
                return True
            if isinstance(above, ast.If) and (syntax.about_callback(above.test) or syntax.idle(above)):
                return True
        return False

    def _counters(self, loop: ast.For) -> set[str]:
        """Names that count passes: `k += 1`."""
        return {
            node.target.id
            for node in syntax.body(loop)
            if isinstance(node, ast.AugAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, int)
            and not self._within_for(node, loop)
        }

    def _within_for(self, node: ast.AST, loop: ast.For) -> bool:
        return any(isinstance(above, (ast.For, ast.While)) for above in self._above(node, loop))

    def _counts(self, node: ast.Name) -> bool:
        return isinstance(self.parents[node], ast.AugAssign)

    def _carried(self, loop: ast.For) -> list[str]:
        """Names that are read in a pass before they are set in it."""
        state = set(syntax.indices(loop)) | self._state(loop)
        carried = []
        stores = [
            node for node in syntax.names(loop, ast.Store) if not self._uncounted(node, loop) and not self._replaced(node, loop)
        ]
        order = {part: place for place, part in enumerate(syntax.statements(loop))}
        for name in dict.fromkeys(node.id for node in stores if node.id not in state):
            first = min(order[self._statement(node)] for node in stores if node.id == name)
            loads = [node for node in syntax.names(loop, ast.Load) if node.id == name]
            if any(not self._uncounted(node, loop) for node in loads):  # `k += 1` reads k, of which nothing else may depend
                loads += [node for node in stores if node.id == name and self._counts(node)]
            if any(order[self._statement(node)] <= first and not self._local(node, loop) for node in loads):
                carried.append(name)
        if len(carried) == 1 and not any(syntax.steps(loop)) and self._advanced(carried[0], stores):
            return []
        return carried

    def _left(self, loop: ast.For) -> list[str]:
        """Names that are set in some passes only, and read after the loop but not in another branch of it."""
        stores: dict[str, list[ast.Name]] = {}
        for node in syntax.names(loop, ast.Store):
            stores.setdefault(node.id, []).append(node)
        state = {name.id for step in syntax.steps(loop) for name in ast.walk(step) if isinstance(name, ast.Name)}
        sometimes = [
            name
            for name, nodes in stores.items()
            if name not in state and all(self._in_a_branch(n, loop) and not self._uncounted(n, loop) for n in nodes)
        ]
        last = loop.end_lineno or loop.lineno
        later = [
            node
            for node in self.nodes
            if isinstance(node, ast.Name) and node.id in sometimes and node.lineno > last and not self._put_away(node)
        ]
        first: dict[str, ast.Name] = {}
        for node in sorted(later, key=lambda node: (node.lineno, isinstance(node.ctx, ast.Store), node.col_offset)):
            first.setdefault(node.id, node)
        return [name for name in sometimes if name in first and isinstance(first[name].ctx, ast.Load)]

    def _after(self, loop: ast.For, names: set[str]) -> list[ast.Name]:
        """For each of some names its first occurrence after the loop, if it is read there."""
        last = loop.end_lineno or loop.lineno
        nodes = [node for node in self.nodes if isinstance(node, ast.Name) and node.id in names and node.lineno > last]
        first: dict[str, ast.Name] = {}
        for node in sorted(nodes, key=lambda node: (node.lineno, isinstance(node.ctx, ast.Store), node.col_offset)):
            if not self._put_away(node) and not self._told(node):
                first.setdefault(node.id, node)
        return [node for node in first.values() if isinstance(node.ctx, ast.Load)]

    def _told(self, node: ast.AST) -> bool:
        """Whether a name is used for a progress bar, a callback or a log, anywhere in the method."""
        above = self.parents.get(node)
        while above is not None:
            if isinstance(above, ast.Call) and syntax.uncounted_call(above):
                return True
            above = self.parents.get(above)
        return False

    def _gathered(self, loop: ast.For) -> list[str]:
        """Names that a pass adds to, or writes into, and that are read after the loop."""
        return [node.id for node in self._after(loop, self._written_into(loop))]

    def _written_into(self, loop: ast.For) -> set[str]:
        """Names that a pass adds to, or writes into, except the state."""
        found = {
            name
            for node in syntax.body(loop)
            if (name := syntax.written_into(node)) is not None and not self._uncounted(node, loop)
        }
        return found - self._state(loop)

    def _outliving(self, loop: ast.For) -> list[str]:
        """Names that a pass adds to, or writes into, and that outlive the function."""
        function, names = self._arguments(loop)
        declared = (node for node in ast.walk(function) if isinstance(node, ast.Global | ast.Nonlocal))
        return sorted(self._written_into(loop) & {*names, *(name for node in declared for name in node.names)})

    def _told_arguments(self, loop: ast.For) -> list[str]:
        """Names of arguments that are called by statements of their own, other than a bar, a callback and a log."""
        calls = [node.value for node in syntax.body(loop) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
        called = {
            syntax.last(call.func) for call in calls if isinstance(call.func, ast.Name) and not syntax.uncounted_call(call)
        }
        return sorted(called & self._arguments(loop)[1])

    def _arguments(self, loop: ast.For) -> tuple[ast.AST, set[str]]:
        """The function around a loop, and the names of its arguments, but for those that it gives another value."""
        function = next(above for above in self.around(loop) if isinstance(above, ast.FunctionDef | ast.AsyncFunctionDef))
        given = function.args
        names = {one.arg for one in [*given.posonlyargs, *given.args, *given.kwonlyargs]}
        stored = (node for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        return function, names - {node.id for node in stored}

    def _arrays(self, loop: ast.For) -> list[str]:
        """Names of what a step's result is written into at a place that changes, as in `states[i + 1] = step(...)`, or added to
        where the loop reads it, as in `states.append(step(..., states[-1]))`."""
        targets = [
            target
            for step in syntax.steps(loop)
            for above in self._above(step, loop)
            if isinstance(above, ast.Assign)
            for target in above.targets
        ]
        subscripts = [target for target in targets if isinstance(target, ast.Subscript)]
        changing = [target for target in subscripts if not isinstance(target.slice, ast.Constant | ast.UnaryOp)]
        read = {ast.unparse(n.value) for n in syntax.body(loop) if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Load)}
        calls = [above for step in syntax.steps(loop) for above in self._above(step, loop) if isinstance(above, ast.Call)]
        lists = [
            ast.unparse(call.func.value)
            for call in calls
            if isinstance(call.func, ast.Attribute) and call.func.attr == "append"
        ]
        return list(dict.fromkeys([*(ast.unparse(target.value) for target in changing), *(n for n in lists if n in read)]))

    def _kept(self, loop: ast.For) -> list[str]:
        """Names, also of attributes, that a pass sets and that are read after the loop, except the state and the time."""
        stores = {node.id for node in syntax.names(loop, ast.Store) if not self._uncounted(node, loop)}
        stores -= {*syntax.target_names(loop.target), *self._results(loop), *syntax.given_states(loop)}
        last = loop.end_lineno or loop.lineno
        set_there = {ast.unparse(n) for n in syntax.body(loop) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
        attributes = [
            ast.unparse(node)
            for node in self.nodes
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node.lineno > last
        ]
        return [*(node.id for node in self._after(loop, stores)), *dict.fromkeys(a for a in attributes if a in set_there)]

    def _copies(self, loop: ast.For) -> list[ast.AST]:
        """The calls in a loop's head that walk over its times beside something else, over a copy of them, or over indices."""
        calls = (node for node in ast.walk(loop.iter) if isinstance(node, ast.Call))
        return [node for node in calls if isinstance(node.func, ast.Name) and node.func.id in ("zip", "list", "tuple", "range")]

    def _state(self, loop: ast.For) -> set[str]:
        """The names in the loop's steps, and those that a step's result is given to."""
        found = {name.id for step in syntax.steps(loop) for name in ast.walk(step) if isinstance(name, ast.Name)}
        return found | self._results(loop)

    def _results(self, loop: ast.For) -> set[str]:
        """The names that a step's result is given to."""
        found = set[str]()
        for step in syntax.steps(loop):
            for above in self._above(step, loop):
                if isinstance(above, ast.Assign):
                    found |= {name.id for target in above.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        return found

    def _put_away(self, node: ast.Name) -> bool:
        """Whether a value is only compared with None, or told something, as in `cache.clear()`."""
        above = self.parents[node]
        if isinstance(above, ast.Compare):
            return all(isinstance(part, ast.Is | ast.IsNot) for part in above.ops)
        call = self.parents.get(above)
        return isinstance(above, ast.Attribute) and isinstance(call, ast.Call) and isinstance(self.parents.get(call), ast.Expr)

    def _in_a_branch(self, node: ast.AST, loop: ast.For) -> bool:
        return any(isinstance(above, ast.If | ast.Try | ast.While | ast.Match) for above in self._above(node, loop))

    def _advanced(self, name: str, stores: list[ast.Name]) -> bool:
        """Whether a name is set by calls that are given it alone, as `x = self.advance(v, t, x)` sets the state."""
        made = [self._statement(node) for node in stores if node.id == name]
        calls = [node.value for node in made if isinstance(node, ast.Assign)]
        return len(calls) == len(made) and all(
            isinstance(syntax.inner(call), ast.Call) and any(syntax.is_named(part, name) for part in ast.walk(call))
            for call in calls
        )

    def _bound_inside(self, node: ast.Name, loop: ast.For) -> bool:
        """Whether a name is a comprehension's own."""
        kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        return any(
            node.id in syntax.target_names(part.target)
            for above in self._above(node, loop)
            if isinstance(above, kinds)
            for part in above.generators
        )

    def _statement(self, node: ast.AST) -> ast.stmt:
        """The statement that holds a node; of a compound one, the node is in its head."""
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def _replaced(self, node: ast.AST, loop: ast.For) -> bool:
        """Whether an assignment only hands on what a callback returned."""
        return any(isinstance(above, ast.Assign) and syntax.about_callback(above.value) for above in self._above(node, loop))

    def _local(self, node: ast.AST, loop: ast.For) -> bool:
        """Whether a name belongs to a comprehension, a lambda or an inner loop."""
        kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
        return any(isinstance(above, kinds) for above in self._above(node, loop))

    def _deep(self, loop: ast.For, wanted: Callable[[ast.AST], bool]) -> list[Any]:
        """The wanted nodes of a loop, and its calls of methods of the pipeline that contain a wanted node."""
        found = []
        for node in syntax.body(loop):
            if wanted(node):
                found.append(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and syntax.is_self(node.func.value):
                source = MethodSource.of(self.pipeline, node.func.attr)
                if source is not None and any(wanted(part) for part in source.nodes):
                    found.append(node)
        return found


class _AsFor(ast.NodeTransformer):
    """Makes each `while` a `for` that goes through its condition."""

    def visit_While(self, node: ast.While) -> ast.For:
        self.generic_visit(node)
        target = ast.copy_location(ast.Name("_", ast.Store()), node)
        return ast.copy_location(ast.For(target=target, iter=node.test, body=node.body, orelse=node.orelse), node)


@by_class
def _sources(pipeline: type) -> dict[types.CodeType, MethodSource | None]:
    """The sources of a class's functions that were read, by their code: a function may be given other code."""
    return {}


def _read(pipeline: type, code: types.CodeType) -> MethodSource | None:
    """The source of a function, read once."""
    known = _sources(pipeline)
    if code not in known:
        text = textwrap.dedent(inspect.getsource(code))
        with _PARSER:
            tree = ast.parse(text).body[0]
        known[code] = MethodSource(pipeline, tree, text.splitlines()) if isinstance(tree, ast.FunctionDef) else None
    return known[code]

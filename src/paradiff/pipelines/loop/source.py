"""What a pipeline's loop does with its step number, read from its source.

In the vector executor a pass of the loop is a round, so the counter of `enumerate(timesteps)` is no step number. That is right
for a loop that only counts its passes: for the progress bar, a callback, a log. Whether it does is seen in its syntax tree.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

UNCOUNTED = ("progress", "pbar", "callback", "mark_step", "logger", "logging", "warn", "print")
"""Calls of functions with these in their names may take the step number."""
GRADIENTS = {"enable_grad", "autograd", "backward"}
RANDOM = {"randn_tensor", "randn", "randn_like", "rand", "rand_like", "randint", "normal", "normal_"}


@dataclass(frozen=True)
class LoopSource:
    """A loop over timesteps, as read.

    Attributes:
        line: The line that opens it.
        index_reads: The lines that use the step number, but for progress bars, callbacks and logs.
        outer: The lines that open loops around it, outermost first; with one, the chain is solved several times.
        inner_steps: Whether the scheduler steps within a further loop, so several times in a pass.
        gradients: Lines that compute gradients.
        numpy: Lines that leave torch.
        random: Lines that draw random numbers.
        carried: Names of values that a pass leaves to the next one, without the state and what callbacks replace.
    """

    line: str
    index_reads: list[str]
    outer: list[str]
    inner_steps: bool
    gradients: list[str]
    numpy: list[str]
    random: list[str]
    carried: list[str]


def reads_index(pipeline: type) -> list[str] | None:
    """The lines in which a pipeline class's loop uses its step number; None if there is no readable loop.

    Progress bars, callbacks, logs and XLA's marks do not count.
    """
    loops = read_loops(pipeline)
    return [line for loop in loops for line in loop.index_reads] if loops else None


def obstacles(pipeline: type) -> list[str]:
    """What in a pipeline class's loop has no parallel form, as clauses: its passes are more than steps of one state."""
    found: list[str] = []
    for loop in read_loops(pipeline):
        coupled = [name for name in loop.carried if name != "latents"]
        found += ["its scheduler steps several times in a pass"] if loop.inner_steps else []
        found += [f"its loop computes gradients: {line}" for line in loop.gradients[:1]]
        found += [f"its loop leaves torch for numpy: {line}" for line in loop.numpy[:1]]
        found += [f"its loop draws random numbers: {line}" for line in loop.random[:1]]
        found += [f"its passes leave {', '.join(coupled)} to the next one"] if coupled else []
    return list(dict.fromkeys(found))


def outer_loops(pipeline: type) -> list[str]:
    """The lines that open loops around a pipeline class's loop, which then solves several chains in a call."""
    return list(dict.fromkeys(line for loop in read_loops(pipeline) for line in loop.outer))


def read_loops(pipeline: type) -> list[LoopSource]:
    """The loops over timesteps of a pipeline class: those of `__call__`, or else of the methods that it calls."""
    seen: set[str] = set()
    names = ["__call__"]
    while names:
        sources = [source for name in names if (source := _Source.of(pipeline, name)) is not None]
        loops = [loop for source in sources for loop in source.loops()]
        if loops:
            return loops
        seen.update(names)
        names = [name for name in dict.fromkeys(name for source in sources for name in source.called()) if name not in seen]
    return []


_PARSER = threading.Lock()  # CPython's builds one syntax tree at a time (gh-106905)


class _Source:
    """The source of one method."""

    def __init__(self, pipeline: type, tree: ast.FunctionDef, lines: list[str]) -> None:
        self.pipeline, self.tree, self.lines = pipeline, tree, lines
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    @classmethod
    def of(cls, pipeline: type, name: str) -> _Source | None:
        method: Any = inspect.getattr_static(pipeline, name, None)
        method = getattr(method, "__func__", method)
        try:
            text = textwrap.dedent(inspect.getsource(inspect.unwrap(method)))
            with _PARSER:
                tree = ast.parse(text).body[0]
        except (TypeError, OSError, SyntaxError, IndexError, ValueError):
            return None
        return cls(pipeline, tree, text.splitlines()) if isinstance(tree, ast.FunctionDef) else None

    def line(self, node: Any) -> str:
        return self.lines[node.lineno - 1].strip()

    def called(self) -> list[str]:
        """The methods of the pipeline that are called, in order."""
        return [
            node.func.attr
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_self(node.func.value)
        ]

    def loops(self) -> list[LoopSource]:
        """The loops over timesteps in which a scheduler steps; where none does here, those whose passes call a method."""
        every = [node for node in ast.walk(self.tree) if isinstance(node, ast.For)]
        fors = [node for node in every if _over_timesteps(node)]
        stepping = [node for node in fors if any(_steps(node))]
        stepping = stepping or [node for node in every if any(_steps(node, inner=False))]
        # A loop around the loop of the steps is its outer loop.
        inner = [node for node in stepping if not any(other is not node and other in ast.walk(node) for other in stepping)]
        calling = [node for node in fors if not isinstance(node.iter, ast.Call) or not _is_named(node.iter.func, "range")]
        calling = [node for node in calling if any(_is_helper_call(part) for part in _body(node))]
        return [self._loop(node) for node in sorted(inner or calling, key=lambda node: node.lineno)]

    def _loop(self, loop: ast.For) -> LoopSource:
        around: list[str] = []
        parent = self.parents.get(loop)
        while parent is not None:
            if isinstance(parent, (ast.For, ast.While)):
                around.insert(0, self.line(parent))
            parent = self.parents.get(parent)
        counted = set(_indices(loop)) | self._counters(loop)
        uses = [
            node
            for node in _names(loop, ast.Load)
            if node.id in counted and not (self._uncounted(node, loop) or self._counts(node) or self._bound_inside(node, loop))
        ]
        inner_steps = any(isinstance(above, (ast.For, ast.While)) for step in _steps(loop) for above in self._above(step, loop))
        return LoopSource(
            self.line(loop),
            self._unique(uses),
            around,
            inner_steps,
            self._unique(self._deep(loop, lambda node: _called_like(node, GRADIENTS))),
            self._unique([node for node in _body(loop) if _is_named(node, "np") or _is_named(node, "numpy")]),
            self._unique(
                [node for node in _body(loop) if isinstance(node, ast.Call) and _last(node.func) in RANDOM],
            ),
            self._carried(loop),
        )

    def _unique(self, nodes: list[Any]) -> list[str]:
        lines = {node.lineno: self.line(node) for node in sorted(nodes, key=lambda node: node.lineno) if node is not None}
        return list(dict.fromkeys(lines.values()))

    def _above(self, node: ast.AST, loop: ast.For) -> Iterator[ast.AST]:
        while (node := self.parents[node]) is not loop:
            yield node

    def _uncounted(self, node: ast.AST, loop: ast.For) -> bool:
        """Whether a use is for a progress bar, a callback or a log."""
        for above in self._above(node, loop):
            if isinstance(above, ast.Call) and _uncounted_call(above):
                return True
            if isinstance(above, ast.If) and (_about_callback(above.test) or _idle(above)):
                return True
        return False

    def _counters(self, loop: ast.For) -> set[str]:
        """Names that count passes: `k += 1`."""
        return {
            node.target.id
            for node in _body(loop)
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
        state = set(_indices(loop)) | {
            name.id for step in _steps(loop) for name in ast.walk(step) if isinstance(name, ast.Name)
        }
        for step in _steps(loop):
            for above in self._above(step, loop):
                if isinstance(above, ast.Assign):
                    state |= {name.id for target in above.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        carried = []
        stores = [
            node for node in _names(loop, ast.Store) if not self._uncounted(node, loop) and not self._replaced(node, loop)
        ]
        for name in dict.fromkeys(node.id for node in stores if node.id not in state):
            first = min(self._statement(node, loop) for node in stores if node.id == name)
            loads = [node for node in _names(loop, ast.Load) if node.id == name]
            if any(self._statement(node, loop) <= first and not self._local(node, loop) for node in loads):
                carried.append(name)
        return carried

    def _bound_inside(self, node: ast.Name, loop: ast.For) -> bool:
        """Whether a name is a comprehension's own."""
        kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        return any(
            node.id in _target_names(part.target)
            for above in self._above(node, loop)
            if isinstance(above, kinds)
            for part in above.generators
        )

    def _statement(self, node: ast.AST, loop: ast.For) -> int:
        """The line of the statement that holds a node."""
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node.lineno

    def _replaced(self, node: ast.AST, loop: ast.For) -> bool:
        """Whether an assignment only hands on what a callback returned."""
        return any(isinstance(above, ast.Assign) and _about_callback(above.value) for above in self._above(node, loop))

    def _local(self, node: ast.AST, loop: ast.For) -> bool:
        """Whether a name belongs to a comprehension, a lambda or an inner loop."""
        kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)
        return any(isinstance(above, kinds) for above in self._above(node, loop))

    def _deep(self, loop: ast.For, wanted: Callable[[ast.AST], bool]) -> list[Any]:
        """Nodes of a loop that are wanted, or that call a method of the pipeline whose source has such nodes."""
        found = []
        for node in _body(loop):
            if wanted(node):
                found.append(node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_self(node.func.value):
                source = _Source.of(self.pipeline, node.func.attr)
                if source is not None and any(wanted(part) for part in ast.walk(source.tree)):
                    found.append(node)
        return found


def _body(loop: ast.For) -> Iterator[ast.AST]:
    for statement in loop.body:
        yield from ast.walk(statement)


def _names(loop: ast.For, context: type[ast.expr_context]) -> list[ast.Name]:
    return [node for node in _body(loop) if isinstance(node, ast.Name) and isinstance(node.ctx, context)]


def _is_self(node: ast.AST) -> bool:
    return _is_named(node, "self")


def _is_named(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _last(node: ast.AST) -> str:
    """The last part of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _called_like(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in names


def _is_helper_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_self(node.func.value)


def _over_timesteps(loop: ast.For) -> bool:
    return any("timesteps" in _last(node) for node in ast.walk(loop.iter))


def _steps(loop: ast.For, inner: bool = True) -> Iterator[ast.Call]:
    """The calls of a scheduler's `step` in a loop's body; with `inner` False not those in further loops."""
    waiting: list[ast.AST] = list(loop.body)
    while waiting:
        node = waiting.pop(0)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr.startswith("step")
            and "scheduler" in ast.unparse(node.func.value)
        ):
            yield node
        if inner or not isinstance(node, (ast.For, ast.While)):
            waiting.extend(ast.iter_child_nodes(node))


def _indices(loop: ast.For) -> list[str]:
    """The names in a loop's target that tell the step's number, or another quantity of the step than its time."""
    target, iterated = loop.target, loop.iter
    while isinstance(iterated, ast.Call) and _last(iterated.func) in ("progress_bar", "tqdm", "trange") and iterated.args:
        iterated = iterated.args[0]
    if not isinstance(iterated, ast.Call) or not isinstance(iterated.func, ast.Name):
        return []
    name = iterated.func.id
    if name == "enumerate" and isinstance(target, ast.Tuple):
        inner = ast.For(target=target.elts[1], iter=iterated.args[0], body=[], orelse=[])
        return [*_target_names(target.elts[0]), *_indices(inner)]
    if name == "zip" and isinstance(target, ast.Tuple):
        pairs = zip(target.elts, iterated.args, strict=False)
        others = [part for part, source in pairs if not any("timesteps" in _last(node) for node in ast.walk(source))]
        return [found for part in others for found in _target_names(part)]
    return _target_names(target) if name == "range" else []


def _target_names(target: ast.AST) -> list[str]:
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name) and node.id != "_"]


def _about_callback(node: ast.AST) -> bool:
    return any("callback" in _last(part) for part in ast.walk(node))


def _uncounted_call(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    return any(word in name for word in UNCOUNTED)


def _idle(node: ast.stmt) -> bool:
    """Whether a statement does no more than to move a progress bar, call back, or log."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call) and _uncounted_call(node.value)
    if isinstance(node, ast.If):
        return _about_callback(node.test) or all(_idle(part) for part in [*node.body, *node.orelse])
    return isinstance(node, ast.Pass)

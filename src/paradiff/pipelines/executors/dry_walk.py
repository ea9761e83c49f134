# SPDX-License-Identifier: Apache-2.0
"""The dry walk: whether a pass of the loop depends on the passes before it, seen without its networks.

A loop can keep a value anywhere: in a variable, an object, a module, the environment, a file, another thread. Wherever it is,
the loop gives its networks or its scheduler's step something else after other passes. So at its first step a call is made once
more, on a copy of the pipeline, with its networks' outputs and its states held fixed as functions of the node,

    m[i] = a(i) m[0],    x[i] = b(i) x[0],

with m[0] and x[0] those of the first pass. All nodes are passed in order. Then some are passed again, each after the node
before it with other outputs. What the loop gives to its networks and to the step at a node must be the same both times, up to
rounding.

What passes leave in places that outlive the call must be what the last one alone would leave (left_behind.py).

The networks that precede the loop are not called either: their outputs, and those of their other methods such as an
autoencoder's `encode`, come from a log (network/call_log.py). A walk costs the loop's own arithmetic. A walk that cannot be
made, such as that of a loop that ends early for its states, shows nothing.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import greenlet
import torch
from torch import Tensor
from torch.utils import _pytree

from paradiff.errors import Carried, Unsupported
from paradiff.pipelines.executors.left_behind import LeftBehind
from paradiff.pipelines.host.host import Host
from paradiff.pipelines.loop.audit import KEEPS, granted, relative_difference
from paradiff.pipelines.loop.driver import AFTER_THE_STEP, LoopSolver
from paradiff.pipelines.loop.ledger import Ledger, differing, ledger
from paradiff.pipelines.loop.random_state import Snapshot, clone
from paradiff.pipelines.loop.scheduler_proxy import first_index, make_proxy, place, real_scheduler, seal
from paradiff.pipelines.loop.timesteps import Iterations
from paradiff.pipelines.loop.torch_modes import Modes
from paradiff.pipelines.loop.waiting import refuse_waiting
from paradiff.pipelines.network.batching import Batching, refuse_transforms
from paradiff.pipelines.network.call_log import Player, signature
from paradiff.pipelines.tensor.windowed import first_line
from paradiff.solver.accelerator import read

AGAIN = 6
"""Nodes that are passed a second time, at most."""
PERIODS = (2, 3, 5, 7)
"""Periods, in passes, that the choice of these nodes tells from a constant."""


class _Ended(BaseException):
    """The walk has made all its passes; the rest of the call is left out."""


class Start:
    """What a call finds at its beginning, so that it can be made once more.

    Args:
        host: What owns the chain.
        arguments: The call's arguments by name.
    """

    def __init__(self, host: Host, arguments: Mapping[str, Any]) -> None:
        self.host, self.arguments = host, arguments
        self.modes = Modes.now()
        self.random = Snapshot({})
        leaves = _pytree.tree_leaves(arguments)
        self._generators = [(leaf, leaf.get_state()) for leaf in leaves if isinstance(leaf, torch.Generator)]

    def keywords(self) -> dict[str, Any]:
        """The call's arguments, with generators and tensors of their own."""
        copies = {id(g): clone(g, state) for g, state in self._generators}

        def own(leaf: Any) -> Any:
            return leaf.clone() if type(leaf) is Tensor else copies.get(id(leaf), leaf)

        return _pytree.tree_map(own, dict(self.arguments))


def refuse_memory(start: Start, solver: LoopSolver, batching: Batching) -> None:
    """Walks through a loop whose solver has started.

    Args:
        start: The call's beginning.
        solver: The call's solver.
        batching: The run's batching, whose log has the loop's first pass.

    Raises:
        Carried: If a pass depends on the passes before it.
        Unsupported: If the loop may wait for another thread.
    """
    if solver.done or solver.width == 1 or solver.table.steps < 3:
        return
    refuse_waiting()
    walk = DryWalk(start, solver, batching)
    now = Snapshot({})
    start.random.restore()
    try:
        try:
            with start.modes.entered():
                walk.switch()
        finally:
            now.restore()
        walk.judge(max(batching.eps, torch.finfo(solver.first.output.dtype).eps, torch.finfo(solver.first.sample.dtype).eps))
    finally:
        vars(walk).clear()  # A greenlet in a cycle, such as that with its scheduler, is never collected.


class DryWalk(greenlet.greenlet):
    """A call of a pipeline without its networks, and the handler of its scheduler's requests (see `LoopHandler`).

    Args:
        start: The call's beginning.
        solver: The call's solver.
        batching: The run's batching.
    """

    quiet = True
    """A walk shows no progress bar."""

    def __init__(self, start: Start, solver: LoopSolver, batching: Batching) -> None:
        super().__init__(self._walk)
        self.gr_context = contextvars.copy_context()
        self._start, self._solver, self._batching = start, solver, batching
        self.owner: Any = None  # what answers for the object in the walk (owner.py)
        self.scheduler = make_proxy(start.host.scheduler, self)
        self._steps = solver.table.steps
        self._node, self._visit = 0, ""
        self._chosen = second_visits(self._steps)
        self._seen: dict[int, list[tuple[str, Any]]] = {}
        self._differences: list[tuple[int, str, Any]] = []
        self._inside = self._stepped = self._within = False
        self._iterations = Iterations()
        self._player, self._turn = Player(batching.log), 0
        self._learned = dict[Any, Any]()
        self._time: Tensor | None = None
        self._index: int | None = None
        self._entries: list[tuple[str, Any]] = []
        self._broken: str | None = None
        self._ledgers: dict[tuple[int, str], Ledger] = {}
        self._arguments: dict[str, Any] = {}
        self._left: LeftBehind | None = None

    def judge(self, eps: float) -> None:
        """Compares the two visits of each node. Waits once for each device.

        Raises:
            Carried: If they differ by more than rounding, or a second one could not be made.
        """
        bound = granted(eps)
        values = read([value for _, _, value in self._differences])
        if self._visit not in ("", "first") and self._broken is not None:
            used = self._used_up()
            told = "" if used is None else f"; {used} shrinks from pass to pass"
            raise Carried(
                f"{KEEPS}: with its networks' outputs held fixed, {self._broken} where step {self._node} is passed again{told}"
            )
        for (node, what, _), value in zip(self._differences, values, strict=True):
            if not value <= bound:
                one, other = (self._ledgers[node, visit] for visit in ("first", "again"))
                path = differing(one, other, bound)
                told = "" if path is None else f"; {path} is {one[path]} in one pass of it and {other[path]} in another"
                raise Carried(
                    f"{KEEPS}: with its networks' outputs held fixed, {what} at step {node} depends on the passes before{told}"
                )
        if self._left is not None and self._left.found is not None:
            raise Carried(
                f"its passes leave {self._left.found}, which outlives the call, as the last one alone would not, and a "
                "parallel run makes other passes, and more of them"
            )

    def _used_up(self) -> str | None:
        """The first path whose number or length shrinks from one of the first visits to the next; None if there is none."""
        ledgers = [self._ledgers[node, visit] for node, visit in sorted(self._ledgers) if visit == "first"]
        for path in ledgers[0] if len(ledgers) > 1 else ():
            found = [entries.get(path) for entries in ledgers]
            values = [value for value in found if isinstance(value, int)]
            if len(values) == len(found) and all(a > b for a, b in itertools.pairwise(values)):
                return path
        return None

    def _walk(self) -> None:
        host = self._start.host
        self.owner = host.copied(self.scheduler)
        try:
            self._arguments = self._start.keywords()
            host.call(self.owner, **self._arguments)
            self._broken = "it ends"
        except (_Ended, Unsupported):
            pass
        except Exception as error:
            text = first_line(error)
            self._broken = f"it meets {type(error).__name__}{f' ({text})' if text else ''}"

    def rounds(self, timesteps: Tensor) -> Iterator[Tensor]:
        """The iteration over `timesteps`: in order, then the second visits."""
        return self._iterations.walk(timesteps, self._passes)

    def _passes(self) -> Iterator[Tensor]:
        times = self._solver.first.timesteps
        seal(self.scheduler, self._solver.first.running)
        for node, visit in self._turns():
            self._node, self._visit = node, visit
            self._stepped, self._turn, self._entries = False, 0, []
            if self._index is not None:
                place(self.scheduler, self._index + self._node)
            self._time = times[self._node]
            yield self._time
            if not self._stepped:
                raise _Ended
        raise _Ended

    def _turns(self) -> Iterator[tuple[int, str]]:
        """The nodes in the order in which they are passed, each with the kind of its visit."""
        self._left = LeftBehind(self._start.host, self.owner, self._arguments, self.scheduler)
        yield from ((node, "first") for node in range(1, self._steps))
        leaves = self._left.note()
        for node in self._chosen:
            yield from ((node - 1, "before"), (node, "again"))
        if leaves:
            yield self._steps - 2, "before"
            self._left.restore()
            yield self._steps - 1, "alone"
            self._left.compare()

    def place_of(self, position: int, value: Any) -> int:
        """The number of a time in its iteration: that of its node where it is the time of the pass, else its position."""
        return self._node if self._inside and value is self._time else position

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        """The scheduler's `scale_model_input` at the node."""
        if not self._inside:
            return real_scheduler(self.scheduler).scale_model_input(sample, timestep)
        factor = float(self._solver.scale(torch.tensor([self._node], device="cpu"))[0])
        return (
            sample if factor == 1 else (sample.to(torch.promote_types(sample.dtype, torch.float32)) * factor).to(sample.dtype)
        )

    def step(self, output: Tensor, timestep: Any, sample: Tensor, kwargs: dict[str, Any]) -> Any:
        """Ends a pass; returns the state of the next node."""
        if not self._inside:
            timesteps = self._iterations.begin()
            self._index = first_index(self.scheduler, timesteps[0])
            self._inside = True
        elif self._stepped:
            raise Unsupported("the loop takes several steps in one iteration")
        self._note("the network's output given to the scheduler", output)
        self._note("the state given to the scheduler", sample)
        self._compare()
        self._stepped = True
        if self._index is not None:
            place(self.scheduler, self._index + self._node + 1)
        with torch.inference_mode(False), torch.no_grad():
            state = self._solver.first.sample * (1 + 0.2 * math.sin(1.3 * (self._node + 1)))
        return self._solver.result(state)

    def route(self, module: Any, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A network call, whose output is that of the log, or of the first pass times a factor of the node."""
        del module
        if self._within:
            return forward(*args, **kwargs)
        called = signature(forward, args, kwargs)
        if not self._player.over:
            entry = self._player.forward(forward, args, kwargs)
            return self._real(forward, args, kwargs) if entry.anew else entry.play(args, kwargs)
        if self._stepped:
            raise Unsupported(AFTER_THE_STEP)
        refuse_transforms()
        self._note_arguments(args, kwargs)
        known = [entry.output for entry in self._batching.log.first if entry.signature == called and entry.output is not None]
        if not known and called not in self._learned:
            self._learned[called] = self._real(forward, args, kwargs)
        output = known[min(self._turn, len(known) - 1)] if known else self._learned[called]
        self._turn += 1
        factor = 1 + 0.1 * math.sin(1.7 * self._node) + 0.05 * (self._visit == "before")
        return _pytree.tree_map_only(Tensor, lambda leaf: leaf * factor if leaf.is_floating_point() else leaf.clone(), output)

    def route_other(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shared: bool) -> Any:
        """A call of another method of a network, whose output is that of the log before the loop."""
        make = functools.partial(self._batching.other, method, args, kwargs, shared)
        entry = None if self._within else self._player.other(method, args, kwargs)
        if entry is None:
            return make()
        return self._real(make, (), {}) if entry.anew else entry.play(args, kwargs)

    def _real(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the network gives itself, for a call that is unlike those of the first pass."""
        self._within = True
        try:
            return forward(*args, **kwargs)
        finally:
            self._within = False

    def _note_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._node not in self._chosen or self._visit == "before":
            return
        for leaf in _pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor | int | float):
                self._note("what a network is given", leaf)

    def _note(self, what: str, value: Any) -> None:
        """Records something that the loop hands on in this pass."""
        if self._node in self._chosen and self._visit != "before":
            kept = (value, value._version if not value.is_inference() else -1, value.clone()) if _floats(value) else value
            self._entries.append((what, kept))

    def _compare(self) -> None:
        """Compares the pass with the first one at its node, if there was one."""
        if self._node not in self._chosen or self._visit == "before":
            return
        self._ledgers[self._node, self._visit] = ledger()
        if self._visit == "first":
            self._seen[self._node] = self._entries
            return
        first, again = self._seen[self._node], self._entries
        if [what for what, _ in first] != [what for what, _ in again]:
            self._differences.append((self._node, "the number of network calls", torch.tensor(math.inf)))
            return
        for (what, a), (_, b) in zip(first, again, strict=True):
            self._differences.append((self._node, what, _difference(a, b)))


def second_visits(steps: int) -> list[int]:
    """The nodes that are passed a second time, from late to early, the first one after node 0 among them.

    The k-th of them, k = 1, 2, ..., is passed as number steps + 2k, where it was number node + 1 before. The difference is no
    multiple of the PERIODS where there is such a node.
    """
    count = min(AGAIN, steps - 1)
    chosen: list[int] = []
    for k in range(1, count):
        high = steps - 1 - (k - 1) * (steps - 2) // (count - 1)
        low = max(steps - 1 - k * (steps - 2) // (count - 1), 1)
        able = [node for node in range(high, low, -1)]
        late = {node: steps + 2 * k - node - 1 for node in able}
        chosen.append(min(able, key=lambda node: sum(late[node] % period == 0 for period in PERIODS)))
    return [*chosen, 1]


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _difference(a: Any, b: Any) -> Tensor:
    """How far two things are apart that a pass handed on: 0 for the same, infinite where they are no tensors of one shape."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        (one, version, kept), (other, later, value) = a, b
        if one is other and version == later >= 0:
            return torch.zeros(())
        if kept.shape == value.shape:
            kept, value = (torch.view_as_real(v) if v.is_complex() else v for v in (kept, value))
            return relative_difference(value[None, None], kept[None, None])[0]
    elif isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
        return torch.where((a == b).all(), 0.0, torch.inf)
    elif not isinstance(a, Tensor | tuple) and not isinstance(b, Tensor | tuple):
        return torch.tensor(0.0 if a == b else math.inf)
    return torch.tensor(math.inf)

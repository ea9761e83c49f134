# SPDX-License-Identifier: Apache-2.0
"""The size of a run's network calls, the choice of those that are checked, and their cost."""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils import _pytree

from paradiff.errors import Unsupported, shown
from paradiff.pipelines.loop.random_state import Snapshot
from paradiff.pipelines.network.call_log import CallLog
from paradiff.pipelines.network.devices import Devices
from paradiff.pipelines.network.memory import Memory
from paradiff.pipelines.network.tree import each
from paradiff.pipelines.tensor.windowed import Windowed
from paradiff.solver.crew import Crew
from paradiff.solver.evaluator import RowBound
from paradiff.solver.ranks import Ranks
from paradiff.solver.sharded import Sharded

Check = Literal["first", "every", "off"]
"""Which network calls are checked: `first`, one state of each network's first call with its shapes; `every`, all states of all
calls; `off`, none. Where calls are checked, so is what a network keeps from one call to the next."""


PLAIN = (int, float, str, bytes, complex, torch.dtype, torch.device, torch.Generator, type(None))
"""Kinds of arguments that a call does not write into, or that tell all ranks' states alike."""


def refuse_transforms() -> None:
    """Refuses a network's call within a transform of torch.func, whose tensors hold what cannot be taken out of it.

    Raises:
        Unsupported: If there is one.
    """
    if peek_interpreter_stack() is not None:
        raise Unsupported(
            "its loop calls a network within a transform of torch.func (vmap, grad, jvp, ...), out of which no states of a "
            "window can be taken"
        )


class Rest(Exception):
    """The loop has ended, and the first rank alone goes on."""


class Batching:
    """How the windows of one run are batched for its networks, and the cost of that.

    Args:
        max_rows: Largest number of rows in one network call, at least 1; None for no bound. A state's rows stay together.
        pad: Whether each call is filled with copies of its last state up to one of at most four widths (solver/widths.py),
            for networks that are compiled for a shape.
        check: See `Check`. A checked state costs a network call of its own and a wait for the device; in a network's first
            checked call, two of each.
        shares: Stretches of equal length that a window's states are cut into (`RowBound`).
        crew: What deals states out over ranks or devices; None for one device.
        alone: Networks whose weights the first rank alone holds. Where there are any, that rank alone goes on after the loop.

    Attributes:
        bound: The bound on rows, halved when the device runs out of memory.
        rows: Rows that the networks were given in the loop, those of padding and checks included.
        widest: States of the widest pass, from which padded calls have their widths; None where it is not known.
        copies: Networks that need inputs of their own for each row: they write into them, or fail with views of one row.
        filled: Those of padding among them.
        calls: Network calls in the loop, checks included.
        checks: The calls among them that evaluate one state again, to compare it.
        seconds: Duration of these calls, as seen from the host: on an asynchronous device that of their launch.
        looping: Whether the loop runs; network calls before and after it are not counted.
        over: Whether it has ended.
        replaced: Tells a network whose boundary is no longer in place; None if all are.
        noted: Makes the context of a network call with states of a window.
        met: Told of a module that a network's method returned, which the pipeline may call by itself.
        lost: What that told at the loop's end. After it networks may be hooked anew, as diffusers' offloading does.
        readers: The pipeline's own methods, which may read what a network keeps; without those of diffusers.
        hooks: The memory of the hooks on the networks, as it was before the loop; None where there are none.
        layouts: How networks lay out their inputs where the rule of batched_call.py does not hold, by the signature of a call.
        refused: What an executor refused where the loop may not hand it on, as in another thread; None for nothing.
        eps: That of the coarsest dtype in which a network was computed so far; 0 before the first call.
        log: The network calls before the loop and in its first pass.

    Raises:
        ValueError: If `max_rows` is below 1, `pad` is neither True nor False, or `check` is unknown.
    """

    def __init__(
        self,
        *,
        max_rows: int | None = None,
        pad: bool = False,
        check: Check = "first",
        shares: int = 1,
        crew: Crew | None = None,
        alone: Collection[nn.Module] = (),
    ) -> None:
        if not isinstance(pad, bool):
            raise ValueError(f"pad is {shown(pad)}; give True or False")
        if check not in ("first", "every", "off"):
            raise ValueError(f"check is {check!r}; it must be first, every or off")
        self.bound = RowBound(max_rows, shares=shares, crew=crew)
        self.pad, self.check = pad, check
        self.rows = self.filled = self.calls = self.checks = 0
        self.widest: int | None = None
        self.copies: set[Any] = set()
        self.seconds = self.eps = 0.0
        self.looping = self.over = False
        self.alone = {id(module): module for module in alone}
        self.replaced: Callable[[], str | None] = _none_replaced
        self.met: Callable[[nn.Module], None] = _met_by_nobody
        self.noted: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self.lost: str | None = None
        self.refused: Exception | None = None
        self.log = CallLog()
        self.hooks: Memory | None = None
        self.readers: list[FunctionType] = []
        self._inside = self._shared = False
        self.layouts: dict[Any, dict[int, int | None]] = {}
        self._widest = 1
        self._checked: set[Any] = set()
        self._networks: set[Any] = set()
        self._kept: dict[int, tuple[weakref.ref[Tensor], int, Any, Tensor | None]] = {}

    def begin_loop(self) -> None:
        """Counts from here on. What was counted before belongs to another iteration over the times, which was not the loop."""
        self.rows = self.filled = self.calls = self.checks = 0
        self.seconds, self.looping = 0.0, True

    def end_loop(self) -> None:
        """The loop's last pass is made; what follows are the pipeline's own calls."""
        self.looping, self.over, self.lost = False, True, self.replaced()

    def leave(self) -> None:
        """Lets go of the networks, whose boundaries were removed: what is in a cycle with greenlets is never collected."""
        self.replaced, self.met, self.hooks, self.readers = _none_replaced, _met_by_nobody, None, []
        self._checked.clear()
        self._networks.clear()
        self._kept.clear()
        self.layouts.clear()

    def count(self, rows: int, *, filled: int = 0, check: bool = False) -> None:
        """Counts a network call with so many rows, of which `filled` are padding."""
        self.calls += 1
        self.rows += rows
        self.filled += filled
        self.checks += check

    def ordinary(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A network call without a window, which is counted if it is in the loop and not within another one.

        Its outputs are copies then: the solver keeps them, and a network may return the same memory at every call.
        """
        if self._inside:
            return forward(*args, **kwargs)
        if not (self.looping or self.log.open):
            return self.for_all(forward, args, kwargs)
        if self.looping:
            refuse_transforms()
            sizes = [len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0]
            self.count(sizes[0] if sizes else 1)
        with self.timed():
            make = functools.partial(self.for_all, forward, args, kwargs)
            outputs = self.log.made(forward, args, kwargs, make) if self.log.open else make()
        return each(lambda leaf, _: leaf.clone() if isinstance(leaf, Tensor) else leaf, outputs) if self.looping else outputs

    def other(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], shared: bool) -> Any:
        """A call of another method of a network than `forward`, which is recorded if it precedes the loop.

        Network calls within a recorded one are a part of it.

        Args:
            method: The method.
            args: Its arguments.
            kwargs: Its named arguments.
            shared: Whether one of several ranks makes the call for all.
        """
        make = functools.partial(self.for_all if shared else _called, method, args, kwargs)
        if self._inside or self.looping or not self.log.open:
            return make()
        self._inside = True
        try:
            return self.log.made(method, args, kwargs, make)
        finally:
            self._inside = False

    @property
    def ranks(self) -> Ranks | None:
        """The ranks that share the work; None for one process."""
        return self.bound.crew.ranks if isinstance(self.bound.crew, Sharded) else None

    def here(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A network call with states of a window, on the device of this thread."""
        crew = self.bound.crew
        with self.noted():
            return crew.called(forward, args, kwargs) if isinstance(crew, Devices) else forward(*args, **kwargs)

    def for_all(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call without a window, which on several ranks one of them makes (methods.py).

        Raises:
            Rest: On ranks that do not go on after the loop.
        """
        if self.ranks is None or self._shared:
            return call(*args, **kwargs)
        if self.alone and self.over:
            if self.ranks.place > 0:
                raise Rest
            self.ranks.keep_waiting()
            return call(*args, **kwargs)
        device = self.home(call, args, kwargs) or _device_of(args, kwargs)
        if device is None:
            return call(*args, **kwargs)
        before = Snapshot({**kwargs, "": args})

        def drawn() -> tuple[Any, tuple[Any, ...] | None]:
            result = call(*args, **kwargs)
            return result, None if before.same else Snapshot({**kwargs, "": args}).states

        self._shared = True
        try:
            result, states = self.ranks.on_one(drawn, device)
        finally:
            self._shared = False
        if states is not None:
            before.take(states)
        return result

    def home(self, call: Callable[..., Any], args: Any, kwargs: Any) -> torch.device | None:
        """The device of a network that the first rank alone holds; None for another one.

        Raises:
            Unsupported: If that is called with a window.
        """
        module = self.alone.get(id(getattr(call, "__self__", None)))
        if module is None:
            return None
        if any(isinstance(leaf, Windowed) for leaf in _pytree.tree_leaves((args, kwargs))):
            raise Unsupported(f"its loop calls a {type(module).__name__}, which the first rank alone holds")
        return next(module.parameters()).device

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the duration of a network call; calls within it are a part of it."""
        begin, outer, self._inside = time.perf_counter(), self._inside, True
        try:
            yield
        finally:
            self._inside = outer
            self.seconds += time.perf_counter() - begin

    def first(self, network: Any) -> bool:
        """Whether this is the first checked call of a network."""
        known = network in self._networks
        self._networks.add(network)
        return not known

    def widths(self, states: int, rows: int) -> tuple[int, ...] | None:
        """The numbers of states that calls of a network may have, for a window of `states` states; None for any.

        Args:
            states: The states of the window.
            rows: The network's rows of one state.
        """
        self._widest = max(self._widest, states)
        return self.bound.widths(self.widest or self._widest, rows) if self.pad else None

    def first_window(
        self,
        name: str,
        forward: Any,
        states: int,
        part: Callable[[slice], tuple[Any, list[Tensor]]],
        repeated: Callable[[], int],
    ) -> None:
        """Told of a network's call with a window before it is made, for a batching that times calls (timing.py).

        Args:
            name: The network's name.
            forward: The network.
            states: The states of the window.
            part: The structure and the tensors of its output for some of the states.
            repeated: Bytes of the inputs that are repeated for each further state.
        """

    def wants(self, signature: Any, states: int) -> list[int]:
        """The indices of the states to check in a call with this signature."""
        if self.check == "every" and states > 1:
            return list(range(states))
        if self.check == "off" or states == 1 or signature in self._checked:
            return []
        self._checked.add(signature)
        # Far from the first one, whose time a network may use for all rows; the last one has its place in any order of rows.
        return [max(states - 2, states // 2)]

    def repeated(self, leaf: Tensor, key: Any, repeat: Callable[[], Tensor]) -> Tensor:
        """`repeat()`, cached for an input that is repeated again with the same `key`.

        The result is cached from the input's second use on, so that an input made anew in each round takes no memory after
        its call. A result that a network wrote into is made anew.
        """
        if leaf.is_inference() or torch.is_inference_mode_enabled():
            return repeat()
        name = id(leaf)
        seen = self._kept.get(name)
        known = seen is not None and seen[0]() is leaf and seen[1] == leaf._version
        if known and seen is not None and seen[2] == key and seen[3] is not None and seen[3]._version == 0:
            return seen[3]
        kept = self._kept
        reference = weakref.ref(leaf, lambda _: kept.pop(name, None)) if not known or seen is None else seen[0]
        seen = kept[name] = reference, leaf._version, key, None  # so that an earlier result is gone before the next is made
        result = repeat()
        if known:
            kept[name] = reference, leaf._version, key, result
        return result


def _none_replaced() -> str | None:
    """What nothing is asked of when no boundary is installed."""


def _met_by_nobody(module: nn.Module) -> None:
    """What nobody is told when no boundary is installed."""


def _called(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return method(*args, **kwargs)


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device of a call's tensors; None where it has none, or is handed an object that it may write into."""
    leaves = _pytree.tree_leaves((args, kwargs))
    if any(isinstance(leaf, Windowed) or not isinstance(leaf, (Tensor, *PLAIN)) for leaf in leaves):
        return None
    found = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
    return next((device for device in found if device.type != "cpu"), found[0] if found else None)

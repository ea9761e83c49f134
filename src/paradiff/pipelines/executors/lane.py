# SPDX-License-Identifier: Apache-2.0
"""A lane: one ordinary call of the pipeline, resumed pass by pass.

A lane's `__call__` runs its loop as in a plain call. Three requests of the loop end up here: the next time, which is that of
the lane's next node; a network call, which waits for the other lanes; and a step, which waits for the solver.
"""

from __future__ import annotations

import contextvars
import functools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import Tensor
from torch.utils import _pytree

from paradiff.errors import Carried, Unsupported
from paradiff.pipelines.executors.builtins import Scope, uncounted
from paradiff.pipelines.executors.coalesce import Key, Known, NetworkCall
from paradiff.pipelines.executors.dry_walk import refuse_memory
from paradiff.pipelines.executors.owner import same
from paradiff.pipelines.executors.shared_call import Result, SharedCall
from paradiff.pipelines.executors.torch_variables import is_torchs
from paradiff.pipelines.loop import interrupt
from paradiff.pipelines.loop.audit import KEEPS
from paradiff.pipelines.loop.driver import AFTER_THE_STEP, SECOND_LOOP
from paradiff.pipelines.loop.first_step import FirstStep, refuse_other_generator, refuse_other_time
from paradiff.pipelines.loop.given import WRITTEN, Given
from paradiff.pipelines.loop.ledger import Ledger, differing, ledger, variables
from paradiff.pipelines.loop.random_watch import RandomWatch
from paradiff.pipelines.loop.scheduler_proxy import (
    first_index,
    make_proxy,
    passed_over,
    place,
    real_scheduler,
    refuse_changes,
    seal,
    settings,
)
from paradiff.pipelines.loop.timesteps import Iterations
from paradiff.pipelines.loop.torch_modes import Modes
from paradiff.pipelines.loop.waiting import refuse_held
from paradiff.pipelines.network.batching import refuse_transforms
from paradiff.pipelines.network.call_log import Player

OTHER_START = "the call comes to its loop with another state when it is made again"
"""The reason against a call whose lanes start differently."""

OTHER_START_OR_EDIT = f"{OTHER_START}, or it edits its state before its networks by the step's time or number"
"""The same where the lane's first pass is not that of node 0."""

ELSEWHERE = "the loop takes its scheduler's step in another thread, where a lane cannot wait for the others"
"""The reason against a loop whose step does not return to the lane."""

SWITCHES = "the call switches to another greenlet, to which a lane comes back only when it waits for the others"
"""The reason against a call that leaves its lane by itself."""

UNSET = object()
"""Stands for the value of a context variable that has none."""


@dataclass(frozen=True, eq=False)
class Ending:
    """The chain's last pass, as a lane makes it once more.

    Attributes:
        final: `[B, ...]` the sample, which its step returns.
        results: What its network calls return.
    """

    final: Tensor
    results: list[Result]


class Elsewhere(BaseException):
    """The loop is in another module, whose `enumerate` must be replaced too."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope


class Lane(greenlet.greenlet):
    """One call of the pipeline, and the handler of its scheduler's requests (see `LoopHandler`).

    Args:
        shared: What the lanes of the call have in common.
        number: The lane's number; lane 0 is the user's call.
        keywords: The call's arguments, with the lane's own generators.

    Attributes:
        quiet: Whether the lane shows no progress bar.
        node: The node of the present pass, and the number that `enumerate` yields.
        dry: Whether the present pass is a dry one (lanes.py).
        walked: Nodes whose passes the lane made one after the other up to the present one, dry ones left out.
        seen: Nodes of all passes that the lane ever made.
        turns: The next passes, as (node, dry).
        state: The state that the step before the next pass that is not dry returns.
        call: The network call for which the lane waits, or None.
        result: The call's result.
        waits: Whether the lane waits for the others.
        task: A function to run within the lane, in its modes and context, when it is resumed; or None.
        output: The model output that the loop gave its step in the present pass.
        sample: The sample that the loop gave its step.
        audited: Whether the present pass is compared with that of another lane.
        ledger: What the loop counts and collects (ledger.py), at the step of an audited pass.
        results: What the network calls of the present pass returned, each with its signature.
        replayed: What those of a dry pass return, in place of half of the first outputs.
        ending: What its last dry pass has, at the end of the loop; None before.
        modes: torch's modes within the lane.
    """

    def __init__(self, shared: SharedCall, number: int, keywords: dict[str, Any]) -> None:
        self.scheduler = make_proxy(shared.host.scheduler, self, shared.times)
        self.owner = shared.host.copied(self.scheduler)
        shared.hide(self.owner)
        super().__init__(functools.partial(shared.host.call, self.owner, **keywords))
        self.quiet = number > 0
        self.gr_context = contextvars.copy_context()
        self._shared, self.number = shared, number
        self.modes = Modes.now()
        self.node, self.dry, self.turns = 0, False, deque[tuple[int, bool]]()
        self.walked, self.seen = range(0), set[int]()
        self.state: Tensor | None = None
        self.call: NetworkCall | None = None
        self.result: Any = None
        self.waits = False
        self.task: Callable[[], Any] | None = None
        self.output: Any = None
        self.sample: Any = None
        self.audited, self.ledger = False, Ledger()
        self.results: list[Result] = []
        self.replayed = deque[Result]()
        self.ending: Ending | None = None
        self._inside = self._over = self._leading = False
        self._iterations = Iterations()
        self._begun = 0
        self._marks: dict[int, tuple[int, RandomWatch, Scope | None]] = {}
        self._stepped = True
        self._settings: dict[str, Any] = {}
        self._variables: dict[int, Any] = {}
        self._drawn_from: tuple[Any] | None = None
        self._time: Tensor | None = None
        self._handed: Tensor | None = None
        self._generators = [g for g in _pytree.tree_leaves(keywords) if isinstance(g, torch.Generator)]
        self._watch = RandomWatch(self._generators)
        self._calls: list[Any] = []
        self._player = Player(shared.batching.log)
        self._known: dict[Key, Known] = {}
        self._real: Any = None
        self._given = Given(False)

    @property
    def circumstance(self) -> str:
        """In which the present pass is another than the plain call's, as a clause; empty where it is the same."""
        if self.dry:
            return ", where half of the first step's outputs stand in for its networks'"
        return ", in a pass from a state that is not final" if self.node >= self._shared.own else ""

    def rounds(self, timesteps: Tensor) -> Iterator[Tensor]:
        """The iteration over `timesteps`. For the loop it yields the first time, then those of the lane's passes."""
        number, self._begun = self._begun, self._begun + 1
        if not self._shared.solver.started:
            self._shared.batching.begin_loop()
        if self.number and not self._over and number == self._shared.loop:
            return self._passes()
        return self._walk(number, timesteps, uncounted())

    def _walk(self, number: int, timesteps: Tensor, scope: Scope | None) -> Iterator[Tensor]:
        """An iteration that may turn out to be the loop."""
        for position, time in enumerate(self._iterations.walk(timesteps, self._passes)):
            if position == 0 and not self._inside:
                watch = RandomWatch(self._generators)
                self._shared.batching.log.mark(timesteps)
                self._marks[id(timesteps)] = number, watch, scope
                self._calls, self._stepped, self.results = [], False, []
                self._settings, self._variables = settings(self.scheduler), variables()
            yield time
        if not self._shared.solver.started:
            self._shared.batching.looping = self._iterations.timesteps is not None

    def _passes(self) -> Iterator[Tensor]:
        """The times of the lane's passes."""
        shared = self._shared
        if not self._inside:
            self._inside = True
            seal(self.scheduler, shared.running)
            self._settings, self._variables = settings(self.scheduler), variables()
            if self.number and not self._player.over:
                raise Unsupported("the call takes another way to its loop when it is made again")
        elif not self._stepped:
            raise passed_over(shared.host.present(self.owner, self.scheduler), self.scheduler, self.circumstance)
        else:
            self._watch.check()
        while self.turns:
            self._turn(*self.turns.popleft())
            self._calls, self._stepped = [], False
            if shared.index is not None:
                place(self.scheduler, shared.index + self.node)
            self._time = shared.solver.first.timesteps[self.node]
            self._watch.mark()
            yield self._time
            if not self._stepped:
                raise passed_over(shared.host.present(self.owner, self.scheduler), self.scheduler, self.circumstance)
            self._watch.check()
        self._inside, self._over = False, True

    def _turn(self, node: int, dry: bool) -> None:
        """Begins the pass of a node."""
        straight = bool(self.walked) and node == self.walked.stop
        self.walked = range(0) if dry else range(self.walked.start if straight else node, node + 1)
        self.seen.add(node)
        self.node, self.dry = node, dry
        if self.number or node:
            self.results = []
        if dry and self._handed is None:
            self.replayed = deque(self._shared.first_results)
        if self.ending is not None:
            self.replayed = deque(() if self.turns else self.ending.results)

    def place_of(self, position: int, value: Any) -> int:
        """The number of a time in its iteration: that of its node where it is the time of the pass, else its position."""
        return self.node if self._inside and value is self._time else position

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        """The scheduler's `scale_model_input` at the lane's node."""
        if not self._inside:
            self._real = self._real or real_scheduler(self.scheduler)
            return self._real.scale_model_input(sample, timestep)
        factor = float(self._shared.solver.scale(torch.tensor([self.node], device="cpu"))[0])
        if factor == 1:
            return sample
        return (sample.to(torch.promote_types(sample.dtype, torch.float32)) * factor).to(sample.dtype)

    def step(self, output: Tensor, timestep: Any, sample: Tensor, kwargs: dict[str, Any]) -> Any:
        """Ends a pass with its output; returns the state of the next pass, or the sample."""
        shared = self._shared
        if greenlet.getcurrent() is not self:
            shared.batching.refused = Unsupported(ELSEWHERE)
            raise shared.batching.refused
        if self._over:
            raise Unsupported(SECOND_LOOP)
        if not self._inside:
            self._begin(output, timestep, sample, kwargs)
        else:
            self._watch.check()
        if self._stepped:
            raise Unsupported("the loop takes several steps in one iteration")
        refuse_other_time(timestep, shared.solver.first.timesteps[self.node] if self._time is None else self._time)
        shared.solver.first.check_options(kwargs, shared.solver.first.timesteps[self.node])
        self._drawn_from = self._drawn_from or (kwargs.get("generator"),)
        refuse_other_generator(kwargs.get("generator"), self._drawn_from[0])
        refuse_changes(self.scheduler, self._settings, shared.flags)
        self._stepped = True
        if self._handed is None:
            reason = OTHER_START_OR_EDIT if self.node else OTHER_START
            shared.flags.append((_near(sample, shared.solver.first.sample), reason))
        if not self.number and not self.dry:
            self._look_again(output, sample)
        if not self.dry:
            self.output, self.sample = output, sample
            self.ledger = ledger(tensors=self._variables) if self.audited else {}
            self._wait()
        elif self.ending is not None and not self.turns:
            self.state = self.ending.final
        assert self.state is not None
        if shared.index is not None:
            place(self.scheduler, shared.index + self.node + 1)
        with torch.inference_mode(False), torch.no_grad():
            self._handed = self.state.clone()
        return shared.solver.result(self._handed)

    def _look_again(self, output: Tensor, sample: Tensor) -> None:
        """Compares what earlier steps of the lane were given with what it holds now, where the scheduler keeps it."""
        unchanged = self._given.unchanged()
        if unchanged is not None:
            self._shared.flags.append((unchanged, WRITTEN))
        self._given.note(lambda: output, lambda: sample)

    def _begin(self, output: Tensor, timestep: Any, sample: Tensor, kwargs: dict[str, Any]) -> None:
        """Starts the solver, at lane 0's first step."""
        shared = self._shared
        timesteps = self._iterations.begin()
        shared.loop, watch, scope = self._marks[id(timesteps)]
        if scope is not None:
            raise Elsewhere(scope)
        watch.check(shared.batching.log.drawing)
        refuse_changes(self.scheduler, self._settings)
        shared.batching.log.divide(timesteps)
        self._inside = True
        scheduler = real_scheduler(self.scheduler)
        first = FirstStep(
            scheduler=scheduler, timesteps=timesteps, output=output, sample=sample, timestep=timestep, kwargs=kwargs
        )
        shared.first_results = list(self.results)
        if shared.solver.calls_back:
            shared.keep(self.owner, left=interrupt.NAMES)  # for the callback
            shared.solver.show(self.scheduler)
        owner, self.owner = self.owner, None  # A callback sees the user's object, not the lane's copy (owner.py).
        try:
            with Modes.exact().entered():
                shared.solver.begin(first, own=shared.own, pulls=self._iterations.pulls)
        finally:
            self.owner, self._iterations.pulls = owner, []
        shared.index = first_index(self.scheduler, timesteps[0])
        shared.running, self._given = first.running, Given(first.keeps)
        seal(self.scheduler, shared.running)
        self._settings = settings(self.scheduler)
        if shared.batching.check != "off":
            refuse_memory(shared.start, shared.solver, shared.batching)
            shared.mark()
        shared.solver.see(shared.batching.log.made_first)
        shared.batching.log.close(keep=True)
        self._turn(0, False)

    def route(self, module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Makes a network call of this lane: from the log before the loop, with other lanes in it, a stand-in in a dry pass."""
        shared = self._shared
        if self._leading:
            return forward(*args, **kwargs)
        if self._over:
            return shared.batching.ordinary(forward, args, kwargs)
        if self._inside and self._stepped:
            raise Unsupported(AFTER_THE_STEP)
        if self._inside:
            refuse_transforms()
            shared.refuse_settings()
        call = NetworkCall.of(module, forward, args, kwargs, len(self._calls), self._known, users=self.number == 0)
        for earlier in self._calls:
            shared.order.add((id(earlier), id(module)))
        self._calls.append(module)
        if not self._inside and self.number:
            entry = self._player.forward(forward, args, kwargs)
            return self._alone(forward, args, kwargs) if entry.anew else entry.play(args, kwargs)
        if not self._inside and not shared.solver.started and shared.batching.looping:
            refuse_held()
        if not self._inside or (self.dry and call.signature not in shared.known):
            output = self._alone(self._shared.batching.ordinary, (forward, args, kwargs), {})
            shared.learn(call, output)
            shared.mark()
            if not self._inside:
                self.results.append((call.signature, output))
            return output
        if self.dry and self.replayed and self.replayed[0][0] == call.signature:
            return _pytree.tree_map_only(Tensor, torch.clone, self.replayed.popleft()[1])
        if self.dry:
            return shared.stand_in(call)
        self.call = call
        before = ledger(identities=True) if shared.attributes is not None else {}
        self._wait()
        if before and (path := differing(before, ledger(identities=True))) is not None:
            raise Carried(f"{KEEPS}: {path} is set by each pass, in an object that the states of a window share")
        self.call, result, self.result = None, self.result, None
        self.results.append((call.signature, _pytree.tree_map_only(Tensor, torch.clone, result)))
        return result

    def route_other(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], shared: bool) -> Any:
        """A call of another method of a network than `forward`: before the loop lane 0 makes it, the others play it."""
        batching = self._shared.batching
        make = functools.partial(batching.other, method, args, kwargs, shared)
        if self._leading or self._inside or self._over:
            return make()
        if self.number:
            entry = self._player.other(method, args, kwargs)
            if entry is None:
                return make()
            return self._alone(make, (), {}) if entry.anew else entry.play(args, kwargs)
        return make() if batching.looping else self._alone(make, (), {})

    def surrounded_as(self, other: Lane) -> bool:
        """Whether torch's modes and the context variables, but for torch's own, are those of another lane, while both wait."""
        one, two = self.gr_context, other.gr_context
        assert one is not None
        assert two is not None
        differing = (key for key in {*one, *two} if one.get(key, UNSET) is not two.get(key, UNSET))
        return self.modes == other.modes and all(
            is_torchs(key) or (key in one and key in two and same(one[key], two[key])) for key in differing
        )

    def _alone(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call within which networks are called as they are."""
        self._leading = True
        try:
            return call(*args, **kwargs)
        finally:
            self._leading = False

    def end(self) -> None:
        """Ends the lane's call where it waits, by GreenletExit."""
        if not self.dead:
            with self.modes.entered():
                self.throw()
        vars(self).clear()  # breaks the cycles that would keep tensors until they are collected

    def _wait(self) -> None:
        """Switches to the other lanes until this one is resumed without a task."""
        if not self._stepped:
            self._watch.check()
        while True:
            self.modes, self.waits = Modes.now(), True
            self._shared.greenlet.switch()
            self.waits = False
            if self.task is None:
                self._watch.mark()
                return
            task, self.task, self._leading = self.task, None, True
            try:
                self.result = task()
            finally:
                self._leading = False


def _near(sample: Tensor, origin: Tensor) -> Tensor:
    """`[]` whether two calls start their loop at the same state, up to 2 percent of its norm; on the states' device.

    Encoders that are not deterministic stay within that; other noise changes a state by much more.
    """
    if sample.shape != origin.shape:
        return torch.tensor(False).to(origin.device, non_blocking=True)
    return (sample - origin).to(torch.float32).norm() <= 0.02 * origin.to(torch.float32).norm()

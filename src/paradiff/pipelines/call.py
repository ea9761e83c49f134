# SPDX-License-Identifier: Apache-2.0
"""One call of a pipeline in parallel: its executors, tried in order, and the plain call after them.

Three executors are tried: `vector` where the loop allows it, `lanes` where each state needs a loop of its own, and the plain
call, with a warning, where there is no parallel form. What a try changed is put back before the next one (tries.py).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack
from torch.utils import _pytree

from paradiff.errors import (
    ChosenPlain,
    Edited,
    MixedWindows,
    NeedsLanes,
    NeedsOrder,
    NotHere,
    NotWalked,
    RanksFailed,
    Unsupported,
)
from paradiff.models.absent import is_absent
from paradiff.pipelines.account import Account
from paradiff.pipelines.calibrated import bounded
from paradiff.pipelines.executors.bars import one_bar
from paradiff.pipelines.executors.dry_walk import Start
from paradiff.pipelines.executors.lanes import run_lanes
from paradiff.pipelines.executors.vector import Vector
from paradiff.pipelines.host.host import Host
from paradiff.pipelines.known import CallKnown
from paradiff.pipelines.loop.callback import Callback
from paradiff.pipelines.loop.driver import ENDED_EARLY, NO_STEP, LoopSolver
from paradiff.pipelines.loop.first_step import READS_MORE, Unread
from paradiff.pipelines.loop.interrupt import Interrupt
from paradiff.pipelines.loop.reader import other_form
from paradiff.pipelines.loop.source import handed_on
from paradiff.pipelines.loop.whole_call import call_and_last_state, difference, interrupted_call
from paradiff.pipelines.model_name import model_name
from paradiff.pipelines.network import boundary
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.network.call_log import CallLog, Entry
from paradiff.pipelines.network.hooks import caches
from paradiff.pipelines.network.methods import called_names
from paradiff.pipelines.network.origin import users_methods
from paradiff.pipelines.network.weights import Weights
from paradiff.pipelines.report import Report
from paradiff.pipelines.settings import Settings
from paradiff.pipelines.tensor.makers import making
from paradiff.pipelines.tensor.windowed import Windowed, first_line
from paradiff.pipelines.tries import Beginning, Watched, hooks_memory, is_refusal, users_error
from paradiff.pipelines.watched_call import WatchedCall
from paradiff.planning.auto import AutoMethod
from paradiff.solver.accelerator import random_states
from paradiff.solver.agreement import described, versions, weights_of
from paradiff.solver.protocol import Chooses, Method
from paradiff.solver.sharded import Sharded

CALLERS_LINE = 4
"""The frame to which warnings point: that of the user, above `Call.made` and two of the run (run.py)."""


class Call:
    """A call of a host, such as a pipeline, made once.

    Args:
        host: What owns the chain.
        settings: The settings of the run.
        arguments: The call's arguments by name (signature.py).

    Attributes:
        trying: Whether an executor is being tried.
    """

    def __init__(self, host: Host, settings: Settings, arguments: dict[str, Any]) -> None:
        self._host, self._kind, self._settings, self._arguments = host, host.kind, settings, arguments
        self._networks = host.networks
        self._account = Account(host.name, type(host.scheduler).__name__, settings.method.name, model_name(host))
        self.trying = False
        self._before: list[Entry] = []  # the network calls before the loop of the last try
        self._alone: dict[str, nn.Module] = {}
        self._crew = self._agree()
        self._method = settings.method
        if settings.ranks is not None and isinstance(self._method, Chooses):
            self._method = self._method.on_ranks(settings.ranks)
        self._known: CallKnown | None = None
        if isinstance(self._method, AutoMethod) and self._method.clocked and self._method.plan is None:
            self._known = CallKnown(host, arguments)

    def made(self) -> tuple[Any, Report]:
        """Makes the call; what it returns, and its report."""
        account, settings = self._account, self._settings
        cold = settings.start is None and not settings.keep_trajectory
        known = self._known if settings.observer is None and cold else None
        if known is not None and (reason := known.plain(settings.method)) is not None:
            return self._plainly(reason)
        if known is not None and (found := self._watched(known)) is not None:
            return found
        self._method = self._choosing()
        executors = self._executors()
        callback = Callback.of(self._host.owner, self._arguments, self._kind)
        beginning = Beginning(self._host, self._arguments) if executors else None
        if beginning is not None and beginning.lasting is not None:
            account.notes.append(f"{beginning.lasting} could not be put back after a try")
            executors = []
        interrupt: Interrupt | None = None
        met = False  # whether a try met an error of which nothing is known
        while executors:
            executor = executors.pop(0)
            observer = None if settings.observer is None else Watched(settings.observer)
            watched = beginning.weights if beginning is not None and settings.check != "off" else None
            solver, batching = self._new_solver(callback, observer, watched), self._new_batching()
            try:
                result = self._try(executor, Callback.without(self._arguments), solver, batching)
            except Exception as met_error:
                error = batching.refused or met_error
                if isinstance(error, RanksFailed | NotHere):
                    raise
                if isinstance(error, ChosenPlain):
                    assert beginning is not None
                    beginning.restore()
                    account.refused.append(batching)
                    if self._known is not None:
                        self._known.keep_plain(settings.method, str(error))
                    return self._plainly(str(error))
                own = users_error(callback, observer)
                if own is error and not isinstance(own, Unsupported):
                    raise
                if is_refusal(error):
                    assert beginning is not None
                    beginning.restore()
                    raise
                if own is not None and not isinstance(own, Unsupported):
                    raise own from None  # Python put another error around it
                met |= not isinstance(error, Unsupported) or error.__cause__ is not None
                reason = str(error) if isinstance(error, Unsupported) else _met(error)
                if isinstance(error, NotWalked):
                    reason = other_form(self._kind) or reason
                go_on = (solver.started and not isinstance(error, NeedsOrder)) or isinstance(error, NeedsLanes)
                if isinstance(error, MixedWindows) and settings.check == "off":
                    go_on = False  # It may be an edit, which lanes can follow, or a kept value: the audit would tell.
            else:
                if settings.check == "every" and solver.done and not solver.interrupted:
                    assert beginning is not None
                    beginning.restore()
                    plain, wrong = self._plain_beside(Callback.without(self._arguments), solver, batching)
                    if wrong is not None:
                        result = plain
                        account.notes.append(f"{executor}: {wrong}; the plain call's result is returned")
                        warnings.warn(account.notes[-1], RuntimeWarning, stacklevel=CALLERS_LINE)
                if solver.started:
                    if self._known is not None and solver.done and settings.start is None:
                        self._known.keep(solver)
                        self._known.keep_parallel(settings.method)
                    if self._crew is not None:
                        self._crew.warn_of_idle(solver.width)
                    report = account.parallel(executor, solver, batching)
                    return result, bounded(report, self._host, self._arguments, settings)
                account.notes.append("the call was interrupted before its first step")
                return result, account.sequential()
            assert beginning is not None
            assert solver.interrupt is not None
            if isinstance(error, Edited) and isinstance(self._method, Chooses):
                beginning.restore()
                account.refused.append(batching)
                self._method, executors = self._method.for_edits(), [executor, *executors]
                continue
            if solver.started and callback is None and solver.interrupt:
                interrupt = solver.interrupt  # set from outside while the try ran
            beginning.restore()
            account.refused.append(batching)
            account.notes.append(f"{executor}: {reason}")
            if not go_on or interrupt is not None:
                break  # a scheduler without parallel form, a network with memory, or an error before the loop
        if settings.executor != "sequential":
            reason = "; ".join(account.notes) or "there is no executor for its loop"
            if settings.start is not None:
                reason += "; the trajectory that was given to begin from was of no use"
            account.notes = [f"the {self._host.name} was called sequentially, {reason}"]
            if not met:
                warnings.warn(account.notes[0], RuntimeWarning, stacklevel=CALLERS_LINE)
        call = functools.partial(self._host.call, self._host.owner, **self._arguments)
        if interrupt is not None:
            call = functools.partial(interrupted_call, self._host.scheduler, interrupt, call)
        result = self._by_first(call)
        if met:  # An error that the plain call meets too is the user's, and is not warned of beside.
            warnings.warn(account.notes[0], RuntimeWarning, stacklevel=CALLERS_LINE)
        return result, account.sequential()

    def _choosing(self) -> Method:
        """The method, with what it has to know of the call where it chooses."""
        method = self._method
        if isinstance(method, Chooses) and self._host.kept() != []:
            method = method.for_states()
        settings = self._settings
        if isinstance(method, Chooses) and (settings.start is not None or settings.keep_trajectory):
            method = method.remembering(begins=settings.start is not None, keeps=settings.keep_trajectory)
        return method if self._known is None or not isinstance(method, AutoMethod) else method.looking_up(self._known)

    def _watched(self, known: CallKnown) -> tuple[Any, Report] | None:
        """The plain call, where its first passes show that no other pays; None where a parallel call is to be made."""
        settings, asked = self._settings, self._settings.method
        assert isinstance(asked, AutoMethod)
        plain = settings.executor == "auto" and settings.check != "every" and settings.devices is None
        latency = asked.objective in (None, "latency") and asked.deadline is None
        if not (plain and latency) or known.parallel(asked) or not WatchedCall.fits(self._host):
            return None
        if Callback.of(self._host.owner, self._arguments, self._kind) is not None:
            return None
        watched = WatchedCall(self._host, known, asked, self._choosing, self._arguments)
        result = watched.made()
        if watched.wider is not None:
            self._account.refused.append(watched.wider.batching)
        if watched.reason is None:
            return None
        reason = f"sequential(), {watched.reason}"
        if watched.tried:
            known.keep_plain(asked, reason)
        return result, self._account.sequential(reason)

    def _plainly(self, reason: str) -> tuple[Any, Report]:
        """The plain call, which was chosen."""
        result = self._by_first(functools.partial(self._host.call, self._host.owner, **self._arguments))
        return result, self._account.sequential(reason)

    def _plain_beside(self, arguments: dict[str, Any], solver: LoopSolver, batching: Batching) -> tuple[Any, str | None]:
        """What the plain call returns, and a clause if its sample is not the parallel call's."""
        solution = solver.solution
        assert solution is not None
        call = functools.partial(self._host.call, self._host.owner, **arguments)
        plain, last = self._by_first(lambda: call_and_last_state(self._host.scheduler, call))
        estimate = solution.error_estimates[0].estimated_error
        return plain, difference(solver.final, last, estimate, batching.eps)

    def _executors(self) -> list[str]:
        """The executors to try, in order; if there is none, the reason is noted."""
        if self._settings.executor == "sequential":
            return []
        if peek_interpreter_stack() is not None:
            self._account.notes.append(
                "it is called within a transform of torch.func (grad, vmap, jvp, ...), which no solver follows"
            )
            return []
        cached = caches(self._networks)
        if cached:
            self._account.notes.append(f"{'; '.join(cached)}, which needs them in order")
            return []
        found = self._host.obstacles()
        if found:
            self._account.notes.append(found[0])
            return []
        if (clause := handed_on(self._host.kept(), self._settings.method)) is not None:
            self._account.notes.append(clause)
            return []
        reads = self._host.index_reads()
        if self._settings.executor == "vector" and reads:
            self._account.notes.append(
                f"vector: its loop reads its step number, for which each state needs a lane of its own: {reads[0].strip()}"
            )
            return []
        if self._settings.executor != "auto":
            return [self._settings.executor]
        return ["vector", "lanes"] if reads == [] else ["lanes"]

    def _try(self, executor: str, arguments: dict[str, Any], solver: LoopSolver, batching: Batching) -> Any:
        """The pipeline's own call, with a scheduler proxy and boundaries before its networks."""
        self.trying = True
        try:
            if not self._alone:
                return self._run(executor, arguments, solver, batching)
            result, error = None, None
            try:
                result = self._run(executor, arguments, solver, batching)
            except Exception as met:
                if not batching.over:
                    raise  # all ranks met it
                error = met
            return self._by_first(functools.partial(_given, result, error))
        finally:
            self.trying = False
            self._before = batching.log.before
            batching.leave()
            batching.log = CallLog()

    def _run(self, executor: str, arguments: dict[str, Any], solver: LoopSolver, batching: Batching) -> Any:
        host, interrupt, rounds = self._host, solver.interrupt, list[weakref.ref[Any]]()
        assert interrupt is not None
        if self._settings.check != "off":
            batching.readers = users_methods(self._kind)
            batching.hooks = hooks_memory(host, batching.readers)
        modules = self._networks.values()
        with boundary.install(modules, batching, called_names(self._kind)) as installed:
            batching.replaced = installed.replaced
            if executor == "lanes":
                interrupt.clear()  # Each lane clears that of its own copy of the pipeline.
                with host.trying(), one_bar():
                    result = run_lanes(host, arguments, solver, batching)
                if solver.interrupted:
                    interrupt.set()
            else:
                generators = [leaf for leaf in _pytree.tree_leaves(arguments) if isinstance(leaf, torch.Generator)]
                with host.trying():
                    loop = Vector(host.scheduler, solver, batching, Start(host, arguments), generators)
                    rounds = loop.made
                    try:
                        with host.standing(loop.scheduler), loop.mixing(), making(), one_bar():
                            result = host.call(host.owner, **arguments)
                        loop.settle(host.owner)
                    finally:
                        vars(loop).clear()  # Its scheduler is in a cycle, which would keep the call's states until collected.
            lost = installed.replaced() if batching.looping else batching.lost
            if lost is not None:
                raise NeedsOrder(f"the forward of {lost} is replaced in the call")
        if not solver.started and interrupt:
            return result  # The loop passed over all its steps, as that of the plain call does.
        kept = getattr(host.owner, "__dict__", {}).values()
        if _holds(Unread, result) or any(_holds(Unread, value, 1) for value in kept):
            raise Unsupported(READS_MORE)
        if _holds(Windowed, result):
            raise NeedsLanes("the loop edits its last state, or returns tensors, with the states of a window")
        if _lives(rounds):
            raise NeedsLanes("the loop leaves tensors of the states of a window in an object that outlives the call")
        if not solver.done:
            raise Unsupported(NO_STEP if not solver.started else ENDED_EARLY.format(""))
        return result

    def _by_first(self, call: Callable[[], Any]) -> Any:
        """What a call returns; where the first rank alone holds some of the networks, it alone makes the call."""
        if self._crew is None or not self._alone:
            return call()
        return self._crew.ranks.by_first(call, self._host.device)

    def _new_solver(self, callback: Callback | None, observer: Watched | None, weights: Weights | None = None) -> LoopSolver:
        interrupt = Interrupt(self._host.owner, self._kind)
        settings = self._settings
        return LoopSolver(
            self._method,
            dtype=settings.dtype,
            callback=callback,
            observer=observer,
            interrupt=interrupt,
            weights=weights,
            kind=self._kind,
            begin=settings.start,
            keep=settings.keep_trajectory,
        )

    def _new_batching(self) -> Batching:
        settings = self._settings
        crew = self._crew if settings.devices is None else settings.devices
        batching = Batching(
            max_rows=settings.max_rows,
            pad=settings.pad,
            check=settings.check,
            shares=settings.shares or 1,
            crew=crew,
            alone=self._alone.values(),
        )
        batching.log = CallLog(self._before)
        return batching

    def _agree(self) -> Sharded | None:
        """What deals states out over ranks, once all have come with the same call; None for one process.

        Raises:
            RanksFailed: If ranks were called with different arguments, or have other weights.
        """
        ranks, settings = self._settings.ranks, self._settings
        if ranks is None:
            return None
        ranks.carries(self._host.device)
        leaves = _pytree.tree_leaves(self._arguments)
        random = {} if any(isinstance(leaf, torch.Generator) for leaf in leaves) else {"random state": random_states()[0]}
        arguments = {name: value for name, value in self._arguments.items() if not callable(value)}
        facts = {"pipeline": self._host.name, "method": settings.method, "settings": settings.compared(), **random}
        ranks.agree(
            versions("diffusers", "transformers") | {name: described(value) for name, value in (facts | arguments).items()}
        )
        absent = [name for name, network in self._networks.items() if is_absent(network)]
        somewhere = {name for data in ranks.gather_bytes(json.dumps(absent).encode()) for name in json.loads(data)}
        self._alone = {name: network for name, network in self._networks.items() if name in somewhere}
        held = {name: network for name, network in self._networks.items() if name not in somewhere}
        return Sharded(ranks, lambda: weights_of(held), shares=settings.shares)


def _given(result: Any, error: Exception | None) -> Any:
    """A result, or an error, which says to other ranks whether it refuses an argument."""
    if error is None:
        return result
    vars(error)["refuses"] = is_refusal(error)
    raise error


def _met(error: Exception) -> str:
    """The clause for an error that a try met."""
    text = first_line(error)
    return f"the parallel run met {type(error).__name__}{f': {text}' if text else ''}"


def _lives(rounds: list[weakref.ref[Any]]) -> bool:
    """Whether a tensor of the states of one of these rounds is referred to still."""
    if all(found() is None for found in rounds):
        return False
    gc.collect()  # They may be in a cycle, which nobody refers to.
    return any(found() is not None for found in rounds)


def _holds(kind: type, result: Any, depth: int = 8) -> bool:
    """Whether there are objects of a kind in dicts, lists, tuples and dataclasses, nested to some depth."""
    if isinstance(result, kind):
        return True
    if not depth:
        return False
    if isinstance(result, dict):
        return any(_holds(kind, value, depth - 1) for value in result.values())
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return any(_holds(kind, getattr(result, field.name, None), depth - 1) for field in dataclasses.fields(result))
    return isinstance(result, list | tuple) and any(_holds(kind, value, depth - 1) for value in result)

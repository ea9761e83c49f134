# SPDX-License-Identifier: Apache-2.0
"""`parallelize`: the same pipeline call, in parallel over time.

A parallel call is the pipeline's own `__call__` with all its arguments. For its length the pipeline has a scheduler proxy
(scheduler_proxy.py), whose steps the solver takes, and a boundary before each network (boundary.py), which accepts windows.
Three executors are tried in order: `vector` where the loop allows it, `lanes` where each state needs a loop of its own, and
the plain call, with a warning, where there is no parallel form. What a try changed is put back before the
next one (tries.py).
"""

from __future__ import annotations

import functools
import inspect
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils import _pytree

from paradiff.errors import MixedWindows, NeedsLanes, NeedsOrder, Unsupported
from paradiff.methods.presets import parasolver
from paradiff.pipelines.executors.lanes import run_lanes
from paradiff.pipelines.executors.vector import Vector
from paradiff.pipelines.loop.callback import Callback
from paradiff.pipelines.loop.driver import LoopSolver
from paradiff.pipelines.loop.interrupt import Interrupt
from paradiff.pipelines.loop.source import obstacles, reads_index
from paradiff.pipelines.loop.whole_call import call_and_last_state, difference
from paradiff.pipelines.network import boundary
from paradiff.pipelines.network.batching import Batching, Check
from paradiff.pipelines.network.hooks import stateful_hooks
from paradiff.pipelines.network.memory import users_methods
from paradiff.pipelines.report import Report
from paradiff.pipelines.settings import Executor, Settings
from paradiff.pipelines.tensor.windowed import Windowed, first_line
from paradiff.pipelines.tries import Beginning, Watched, hooks_memory, is_refusal, users_error
from paradiff.solver.protocol import Method, Observer
from paradiff.solver.solution import Status

NOTHING_GAINED = (
    "it took as many rounds as steps, so nothing was gained: the tolerance may be finer than the networks' answers allow, the "
    "window too narrow, or the loop may keep more than its state from one pass to the next, which check='every' looks for"
)


def parallelize(
    pipeline: DiffusionPipeline,
    method: Method | None = None,
    *,
    executor: Executor = "auto",
    max_rows: int | None = None,
    pad: bool = False,
    check: Check = "first",
    dtype: torch.dtype = torch.float32,
    observer: Observer | None = None,
) -> Run:
    """Makes a pipeline's calls run in parallel over time.

    Within a `with` block every call of the pipeline is parallel:

        with paradiff.parallelize(pipe, paradiff.parasolver(window=16)) as run:
            image = pipe("a lighthouse", num_inference_steps=100, generator=g).images[0]
        print(run.report)

    Without one, the run itself is called like the pipeline, or switches the pipeline on and off:

        run = paradiff.parallelize(pipe)
        image = run("a lighthouse").images[0]  # this call is parallel; the pipeline is left as it was
        run.enable()  # from here on pipe(...) is parallel
        run.disable()

    Every argument of the pipeline keeps its meaning. The same seed gives the image of the plain call, up to the method's
    tolerance. The loop's first pass is at x[0] alone, which is a warm-up step for methods that take one.

    Args:
        pipeline: Any diffusers pipeline whose loop calls `scheduler.step(output, t, latents)`.
        method: The method (methods/presets.py); `parasolver()` by default.
        executor: `vector`, `lanes`, `sequential`, or `auto`: the first of them that the loop allows.
        max_rows: Largest number of rows in one network call, at least 1; an image with guidance has two rows a state. None for
            no bound. Halved when the device runs out of memory.
        pad: Fill every network call up to the window's full width, for compiled networks and CUDA graphs.
        check: Which batched network calls are compared, row by row, with calls of their own: each network's `first` one,
            `every` one (slow; for tests), or none with `off`. Unless it is off, passes of the loop are audited, which costs
            rows and with lanes up to two passes; with `every` the sample is compared with that of a plain call.
        dtype: Dtype of the solver's states, float32 or float64; the networks keep theirs.
        observer: Called after each round (`Observer` of paradiff.solver); it may ask the run to stop. When an executor fails
            and the next one is tried, rounds are counted from 1 again.

    Raises:
        ValueError: If the argument is no pipeline, has no scheduler or is already parallel, or an option is unknown.
    """
    settings = Settings(
        method=parasolver() if method is None else method,
        executor=executor,
        max_rows=max_rows,
        pad=pad,
        check=check,
        dtype=dtype,
        observer=observer,
    )
    run = Run(pipeline, settings)
    run.warn_if_dropped()
    return run


class _Parallel:
    """The base of the classes that pipelines have while they are run in parallel."""


class Run:
    """A pipeline and the settings of its parallel calls; `parallelize` returns one. Runs are compared by identity.

    Args:
        pipeline: The pipeline.
        settings: The settings.

    Attributes:
        pipeline: The pipeline.
        settings: The settings.
        reports: The report of each call, in order.

    Raises:
        ValueError: If the argument is no pipeline, has no scheduler, or is already parallel.
    """

    def __init__(self, pipeline: DiffusionPipeline, settings: Settings) -> None:
        if not isinstance(pipeline, DiffusionPipeline):
            raise ValueError(
                f"parallelize was given a {type(pipeline).__name__}; it takes a diffusers pipeline object. For a network of "
                "your own use paradiff.sample(model, table, noise, method)"
            )
        if getattr(pipeline, "scheduler", None) is None:
            raise ValueError(
                f"the {type(pipeline).__name__} has no scheduler, so it has no chain to be solved in parallel; give it one, "
                "pipe.scheduler = ..., or call it as it is"
            )
        self.pipeline, self.settings = pipeline, settings
        self.reports: list[Report] = []
        self._parallel_class: type | None = None
        self._warning: weakref.finalize[Any, Any] | None = None
        self._turn = threading.Lock()  # held by the thread whose call runs
        self._caller: int | None = None
        self._trying = False
        self._refuse_a_second_run()

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "not enabled"
        calls = f"{len(self.reports)} call{'' if len(self.reports) == 1 else 's'}"
        settings = self.settings
        return f"Run({self._plain_class.__name__}, {settings.method.name}, executor={settings.executor!r}, {state}, {calls})"

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the warning of an unused run and the lock of its calls.

        Raises:
            ValueError: If the run is enabled: the pipeline has a class of its own then, which does not pickle.
        """
        if self.enabled:
            raise ValueError("this run is enabled; call disable() before it is pickled or copied, or leave its `with` block")
        return {name: value for name, value in vars(self).items() if name != "_turn"} | {"_warning": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes the state of another run, with a lock of its own."""
        vars(self).update(state, _turn=threading.Lock())

    @property
    def report(self) -> Report:
        """The report of the last call.

        Raises:
            ValueError: If there was none.
        """
        if not self.reports:
            raise ValueError("the pipeline has not been called yet; call it within the `with` block, or call the run itself")
        return self.reports[-1]

    @property
    def enabled(self) -> bool:
        """Whether calls of the pipeline object are parallel calls of this run."""
        return type(self.pipeline) is self._parallel_class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the pipeline in parallel, also where it is not enabled, and returns what it returns.

        Raises:
            ValueError: If the pipeline is enabled by another run, or as its own call does.
        """
        if not self.enabled:
            self._used()
            self._refuse_a_second_run()
        return self._call(args, kwargs)

    def enable(self) -> Run:
        """Makes every call of the pipeline object parallel until `disable()`; returns the run.

        Raises:
            ValueError: If the pipeline is enabled already, by this run or another one.
        """
        self._used()
        self._refuse_a_second_run()
        real = type(self.pipeline)
        run = self

        def call(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
            return run._call(args, kwargs)

        call.__wrapped__ = real.__call__  # pyright: ignore[reportFunctionMemberAccess]  (keeps the signature)
        namespace = {"__call__": call, "__module__": real.__module__, "__doc__": real.__doc__}
        self._parallel_class = type(real.__name__, (_Parallel, real), namespace)
        self.pipeline.__class__ = self._parallel_class
        return self

    def disable(self) -> None:
        """Gives the pipeline object its own class and its plain call back; without effect where the run is not enabled."""
        if self.enabled:
            self.pipeline.__class__ = self._plain_class
        self._parallel_class = None

    def __enter__(self) -> Run:
        return self.enable()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.disable()

    def warn_if_dropped(self) -> None:
        """Warns once, with a `UserWarning`, if the run is deleted before it was entered, called or enabled."""
        self._warning = weakref.finalize(self, _warn_of_a_dropped_run, self._plain_class.__name__)
        self._warning.atexit = False

    def _used(self) -> None:
        if self._warning is not None:
            self._warning.detach()

    def _refuse_a_second_run(self) -> None:
        if isinstance(self.pipeline, _Parallel):
            raise ValueError(
                f"this {type(self.pipeline).__name__} is already run in parallel; leave the other `with` block first, call "
                "disable() of the run that enabled it, or use a second pipeline made of the same components"
            )

    @property
    def _plain_class(self) -> Any:
        """The pipeline's own class, whether or not it is enabled."""
        kind = type(self.pipeline)
        return kind.__bases__[1] if issubclass(kind, _Parallel) else kind

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the pipeline. Calls of several threads wait for each other, since they share the scheduler."""
        if self._caller == threading.get_ident():  # The call, or a callback within it, calls its own pipeline.
            if self._trying:
                raise Unsupported(f"the {self._plain_class.__name__} is called within its own call")
            return self._plain_class.__call__(self.pipeline, *args, **kwargs)
        with self._turn:
            self._caller = threading.get_ident()
            try:
                return self._parallel_or_plain(self._bound(args, kwargs))
            finally:
                self._caller = None

    def _parallel_or_plain(self, arguments: dict[str, Any]) -> Any:
        begin = time.perf_counter()
        notes: list[str] = []
        executors = self._executors(notes)
        callback = Callback.of(self.pipeline, arguments)
        beginning = Beginning(self.pipeline, self._modules(), arguments) if executors else None
        if beginning is not None and beginning.lasting is not None:
            notes.append(f"{beginning.lasting} is a Python generator, whose position could not be put back after a try")
            executors = []
        refused: list[Batching] = []
        met = False  # whether a try met an error of which nothing is known
        for executor in executors:
            observer = None if self.settings.observer is None else Watched(self.settings.observer)
            solver, batching = self._new_solver(callback, observer), self._new_batching()
            try:
                result = self._try(executor, Callback.without(arguments), solver, batching)
            except Exception as error:
                own = users_error(callback, observer)
                if (own is error and not isinstance(own, Unsupported)) or is_refusal(error):
                    raise
                if own is not None and not isinstance(own, Unsupported):
                    raise own from None  # Python put another error around it
                met |= not isinstance(error, Unsupported) or error.__cause__ is not None
                reason = str(error) if isinstance(error, Unsupported) else _met(error)
                go_on = (solver.started and not isinstance(error, NeedsOrder)) or isinstance(error, NeedsLanes)
                if isinstance(error, MixedWindows) and self.settings.check == "off":
                    go_on = False  # It may be an edit, which lanes can follow, or a kept value: the audit would tell.
            else:
                if self.settings.check == "every" and solver.done and not solver.interrupted:
                    assert beginning is not None
                    beginning.restore()
                    plain, wrong = self._plain_beside(Callback.without(arguments), solver, batching)
                    if wrong is not None:
                        result, notes = plain, [*notes, f"{executor}: {wrong}; the plain call's result is returned"]
                        warnings.warn(notes[-1], RuntimeWarning, stacklevel=4)
                if solver.started:
                    self.reports.append(self._report(executor, solver, batching, refused, time.perf_counter() - begin, notes))
                else:
                    notes.append("the call was interrupted before its first step")
                    self.reports.append(self._sequential_report(refused, time.perf_counter() - begin, notes))
                return result
            assert beginning is not None
            beginning.restore()
            refused.append(batching)
            notes.append(f"{executor}: {reason}")
            if not go_on:
                break  # a scheduler without parallel form, a network with memory, or an error before the loop
        if self.settings.executor != "sequential":
            reason = "; ".join(notes) or "there is no executor for its loop"
            notes = [f"the {self._plain_class.__name__} was called sequentially, {reason}"]
            if not met:
                warnings.warn(notes[0], RuntimeWarning, stacklevel=4)
        result = self._plain_call(self.pipeline, **arguments)
        if met:  # An error that the plain call meets too is the user's, and is not warned of beside.
            warnings.warn(notes[0], RuntimeWarning, stacklevel=4)
        self.reports.append(self._sequential_report(refused, time.perf_counter() - begin, notes))
        return result

    def _plain_beside(self, arguments: dict[str, Any], solver: LoopSolver, batching: Batching) -> tuple[Any, str | None]:
        """What the plain call returns, and a clause if its sample is not the parallel call's."""
        scheduler, solution = cast(Any, self.pipeline).scheduler, solver.solution
        assert solution is not None
        plain, last = call_and_last_state(scheduler, functools.partial(self._plain_call, self.pipeline, **arguments))
        estimate = solution.error_estimates[0].estimated_error
        return plain, difference(solver.final, last, estimate, batching.eps)

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; those of `*args` as a tuple."""
        signature = inspect.signature(self._plain_class.__call__)
        arguments = dict(signature.bind(self.pipeline, *args, **kwargs).arguments)
        own, *others = signature.parameters.values()
        itself = arguments.pop(own.name)
        if own.kind is own.VAR_POSITIONAL:
            arguments[own.name] = itself[1:]
        for parameter in others:
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
        return arguments

    @property
    def _plain_call(self) -> Callable[..., Any]:
        """The pipeline's own `__call__`, as a function of the pipeline and of what `_bound` returns."""
        call = self._plain_class.__call__
        parameters = list(inspect.signature(call).parameters.values())
        spread = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        if spread is None:
            return call
        ahead = [p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]

        @functools.wraps(call)
        def spreading(pipeline: Any, **named: Any) -> Any:
            rest = named.pop(spread, ())
            return call(pipeline, *[named.pop(name) for name in ahead if rest], *rest, **named)

        return spreading

    def _executors(self, notes: list[str]) -> list[str]:
        """The executors to try, in order; if there is none, the reason is appended to `notes`."""
        if self.settings.executor == "sequential":
            return []
        cached = self.cached()
        if cached:
            notes.append(f"{'; '.join(cached)}, which needs them in order")
            return []
        found = obstacles(self._plain_class)
        if found:
            notes.append(found[0])
            return []
        reads = reads_index(self._plain_class)
        if self.settings.executor == "vector" and reads:
            notes.append(
                f"vector: its loop reads its step number, for which each state needs a lane of its own: {reads[0].strip()}"
            )
            return []
        if self.settings.executor != "auto":
            return [self.settings.executor]
        return ["vector", "lanes"] if reads == [] else ["lanes"]

    def _try(self, executor: str, arguments: dict[str, Any], solver: LoopSolver, batching: Batching) -> Any:
        """The pipeline's own call, with a scheduler proxy and boundaries before its networks."""
        self._trying = True
        try:
            return self._run(executor, arguments, solver, batching)
        finally:
            self._trying = False

    def _run(self, executor: str, arguments: dict[str, Any], solver: LoopSolver, batching: Batching) -> Any:
        pipeline, scheduler, interrupt = self.pipeline, cast(Any, self.pipeline).scheduler, solver.interrupt
        assert interrupt is not None
        if self.settings.check != "off":
            batching.readers = users_methods(self._plain_class)
            batching.hooks = hooks_memory(self._modules(), batching.readers)
        with boundary.install(self._modules().values(), batching) as installed:
            if executor == "lanes":
                interrupt.clear()  # Each lane clears that of its own copy of the pipeline.
                result = run_lanes(functools.partial(self._plain_call, **arguments), pipeline, solver, batching)
                if solver.interrupted:
                    interrupt.set()
            else:
                generators = [leaf for leaf in _pytree.tree_leaves(arguments) if isinstance(leaf, torch.Generator)]
                loop = Vector(scheduler, solver, batching, generators)
                object.__setattr__(pipeline, "scheduler", loop.scheduler)
                try:
                    with loop.mixing():
                        result = self._plain_call(pipeline, **arguments)
                finally:
                    object.__setattr__(pipeline, "scheduler", scheduler)
            if (replaced := installed.replaced()) is not None:
                raise NeedsOrder(f"the forward of {replaced} is replaced in the call")
        if not solver.started and interrupt:
            return result  # The loop passed over all its steps, as that of the plain call does.
        if _holds_windows(result):
            raise NeedsLanes("the loop edits its last state, or returns tensors, with the states of a window")
        if not solver.done:
            raise Unsupported("its loop took no step" if not solver.started else "its loop ended before its states were solved")
        return result

    def cached(self) -> list[str]:
        """A clause for each component that keeps a cache, or values of another kind, from one step to the next."""
        found: list[str] = []
        for name, module in self._modules().items():
            hooks = stateful_hooks(module)
            if hooks:
                found.append(f"{name} keeps values across steps in a hook ({', '.join(hooks)})")
            elif getattr(module, "is_cache_enabled", False):
                found.append(f"{name} keeps a cache across steps")
        return found

    def _modules(self) -> dict[str, nn.Module]:
        """The pipeline's networks by name, whether or not they are registered as components."""
        return {name: part for name, part in vars(self.pipeline).items() if isinstance(part, nn.Module)}

    def _new_solver(self, callback: Callback | None, observer: Watched | None) -> LoopSolver:
        interrupt = Interrupt(self.pipeline, self._plain_class)
        settings = self.settings
        return LoopSolver(settings.method, dtype=settings.dtype, callback=callback, observer=observer, interrupt=interrupt)

    def _new_batching(self) -> Batching:
        return Batching(max_rows=self.settings.max_rows, pad=self.settings.pad, check=self.settings.check)

    def _report(
        self,
        executor: str,
        solver: LoopSolver,
        batching: Batching,
        refused: list[Batching],
        seconds: float,
        notes: list[str],
    ) -> Report:
        solution = solver.solution
        assert solution is not None
        notes = [*notes, *solver.shortened]
        if solver.raised_tolerance is not None:
            notes = [*notes, f"the tolerance was raised to {solver.raised_tolerance:g}, which the networks' dtype resolves"]
        status, message = solution.status, solution.message
        if solver.ended < solver.table.steps:
            status, message = Status.STOPPED, Status.STOPPED.message(f"the call was interrupted after step {solver.ended}")
        parts, unit = solver.fitted.progress(solver.table)
        if solver.passes + batching.checks >= solver.table.steps and solver.width > 1:
            notes = [*notes, NOTHING_GAINED]
        return Report(
            pipeline=self._plain_class.__name__,
            scheduler=type(cast(Any, self.pipeline).scheduler).__name__,
            method=self.settings.method.name,
            executor=executor,
            steps=solver.table.steps,
            tolerance=solver.fitted.tolerance,
            window=solver.fitted.width(solver.table),
            parts=parts,
            unit=unit,
            rounds=solver.passes + batching.checks,
            rows=solver.rows + batching.checks,
            checks=batching.checks,
            network_calls=batching.calls,
            network_rows=batching.rows,
            refused_calls=sum(one.calls for one in refused),
            refused_rows=sum(one.rows for one in refused),
            seconds=seconds,
            network_seconds=batching.seconds,
            status=status,
            message=message,
            error_estimate=solution.error_estimates[0],
            warnings=notes,
            history=solution.history,
        )

    def _sequential_report(self, refused: list[Batching], seconds: float, notes: list[str]) -> Report:
        return Report(
            pipeline=self._plain_class.__name__,
            scheduler=type(cast(Any, self.pipeline).scheduler).__name__,
            method=self.settings.method.name,
            executor="sequential",
            steps=None,
            tolerance=None,
            window=None,
            parts=None,
            unit=None,
            rounds=0,
            rows=0,
            checks=0,
            network_calls=0,
            network_rows=0,
            refused_calls=sum(one.calls for one in refused),
            refused_rows=sum(one.rows for one in refused),
            seconds=seconds,
            network_seconds=0.0,
            status=Status.SEQUENTIAL,
            message=Status.SEQUENTIAL.message("the plain call"),
            error_estimate=None,
            warnings=notes,
            history=[],
        )


def _met(error: Exception) -> str:
    """The clause for an error that a try met."""
    text = first_line(error)
    return f"the parallel run met {type(error).__name__}{f': {text}' if text else ''}"


def _holds_windows(result: Any) -> bool:
    """Whether there are windowed tensors in nested dicts, lists and tuples."""
    if isinstance(result, dict):
        return any(map(_holds_windows, result.values()))
    return isinstance(result, Windowed) or (isinstance(result, list | tuple) and any(map(_holds_windows, result)))


def _warn_of_a_dropped_run(kind: str) -> None:
    warnings.warn(
        f"a run of a {kind} was made with parallelize and never used, so no call was parallel; write `with "
        "paradiff.parallelize(pipe): pipe(...)`, call what parallelize returns as you would the pipeline, or call its enable()",
        UserWarning,
        stacklevel=3,  # above weakref.finalize: the place where the run was dropped
    )

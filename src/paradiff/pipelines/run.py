# SPDX-License-Identifier: Apache-2.0
"""`parallelize`: the same pipeline call, in parallel over time.

A parallel call is the pipeline's own `__call__` with all its arguments. For its length the pipeline has a scheduler proxy
(scheduler_proxy.py), whose steps the solver takes, and a boundary before each network (boundary.py), which accepts windows.
Three executors are tried in order: `vector` where the loop allows it, `lanes` where each state needs a loop of its own, and
the plain call, with a warning, where there is no parallel form. The generators are reset between two tries.
"""

from __future__ import annotations

import inspect
import time
import warnings
import weakref
from functools import partial
from types import TracebackType
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import nn

from paradiff.errors import NeedsLanes, Unsupported
from paradiff.methods.presets import parasolver
from paradiff.pipelines.executors.lanes import run_lanes
from paradiff.pipelines.executors.vector import Vector
from paradiff.pipelines.loop.callback import Callback
from paradiff.pipelines.loop.driver import LoopSolver
from paradiff.pipelines.loop.random_state import Snapshot
from paradiff.pipelines.loop.source import obstacles, reads_index
from paradiff.pipelines.network import boundary
from paradiff.pipelines.network.batching import Batching, Check
from paradiff.pipelines.report import Report
from paradiff.pipelines.settings import Executor, Settings
from paradiff.solver.protocol import Method, Observer
from paradiff.solver.solution import Status


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
            `every` one (slow; for tests), or none with `off`.
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
    """A pipeline and the settings of its parallel calls; `parallelize` returns one.

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
        self._refuse_a_second_run()

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "not enabled"
        calls = f"{len(self.reports)} call{'' if len(self.reports) == 1 else 's'}"
        settings = self.settings
        return f"Run({self._plain_class.__name__}, {settings.method.name}, executor={settings.executor!r}, {state}, {calls})"

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
        begin = time.perf_counter()
        arguments = self._bound(args, kwargs)
        notes: list[str] = []
        snapshot = Snapshot(arguments)
        callback = Callback.of(self.pipeline, arguments)
        for executor in self._executors(notes):
            solver, batching = self._new_solver(callback), self._new_batching()
            try:
                result = self._run(executor, Callback.without(arguments), solver, batching)
            except Unsupported as unsupported:
                snapshot.restore()
                notes.append(f"{executor}: {unsupported}")
                if not solver.started and not isinstance(unsupported, NeedsLanes):
                    break  # the scheduler has no parallel form, whatever the executor
            else:
                self.reports.append(self._report(executor, solver, batching, time.perf_counter() - begin, notes))
                return result
        if self.settings.executor != "sequential":
            reason = "; ".join(notes) or "there is no executor for its loop"
            notes = [f"the {self._plain_class.__name__} was called sequentially, {reason}"]
            warnings.warn(notes[0], RuntimeWarning, stacklevel=3)
        result = self._plain_class.__call__(self.pipeline, **arguments)
        self.reports.append(self._sequential_report(time.perf_counter() - begin, notes))
        return result

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        signature = inspect.signature(self._plain_class.__call__)
        arguments = dict(signature.bind(self.pipeline, *args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        arguments.pop("self")
        return arguments

    def _executors(self, notes: list[str]) -> list[str]:
        """The executors to try, in order; if there is none, the reason is appended to `notes`."""
        if self.settings.executor == "sequential":
            return []
        cached = self.cached()
        if cached:
            notes.append(f"{', '.join(cached)} keeps a cache across steps, which needs them in order")
            return []
        found = obstacles(self._plain_class)
        if found:
            notes.append(found[0])
            return []
        if self.settings.executor != "auto":
            return [self.settings.executor]
        return ["vector", "lanes"] if reads_index(self._plain_class) == [] else ["lanes"]

    def _run(self, executor: str, arguments: dict[str, Any], solver: LoopSolver, batching: Batching) -> Any:
        """The pipeline's own call, with a scheduler proxy and boundaries before its networks."""
        pipeline, scheduler = self.pipeline, cast(Any, self.pipeline).scheduler
        with boundary.install(self._modules().values()):
            if executor == "lanes":
                return run_lanes(partial(self._plain_class.__call__, **arguments), pipeline, solver, batching)
            loop = Vector(scheduler, solver, batching)
            object.__setattr__(pipeline, "scheduler", loop.scheduler)
            try:
                result = self._plain_class.__call__(pipeline, **arguments)
            finally:
                object.__setattr__(pipeline, "scheduler", scheduler)
        if not solver.done:
            raise Unsupported("its loop took no step" if not solver.started else "its loop ended before its states were solved")
        return result

    def cached(self) -> list[str]:
        """The components that keep a cache from one step to the next."""
        return [name for name, module in self._modules().items() if getattr(module, "is_cache_enabled", False)]

    def _modules(self) -> dict[str, nn.Module]:
        return {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}

    def _new_solver(self, callback: Callback | None) -> LoopSolver:
        settings = self.settings
        return LoopSolver(settings.method, dtype=settings.dtype, callback=callback, observer=settings.observer)

    def _new_batching(self) -> Batching:
        return Batching(max_rows=self.settings.max_rows, pad=self.settings.pad, check=self.settings.check)

    def _report(self, executor: str, solver: LoopSolver, batching: Batching, seconds: float, notes: list[str]) -> Report:
        solution = solver.solution
        assert solution is not None
        if solver.raised_tolerance is not None:
            notes = [*notes, f"the tolerance was raised to {solver.raised_tolerance:g}, which the networks' dtype resolves"]
        return Report(
            pipeline=self._plain_class.__name__,
            scheduler=type(cast(Any, self.pipeline).scheduler).__name__,
            method=self.settings.method.name,
            executor=executor,
            steps=solver.table.steps,
            rounds=solver.passes,
            rows=solver.rows,
            network_rows=batching.rows,
            seconds=seconds,
            network_seconds=batching.seconds,
            status=solution.status,
            message=solution.message,
            error_estimate=solution.error_estimates[0],
            warnings=notes,
            history=solution.history,
        )

    def _sequential_report(self, seconds: float, notes: list[str]) -> Report:
        return Report(
            pipeline=self._plain_class.__name__,
            scheduler=type(cast(Any, self.pipeline).scheduler).__name__,
            method=self.settings.method.name,
            executor="sequential",
            steps=None,
            rounds=0,
            rows=0,
            network_rows=0,
            seconds=seconds,
            network_seconds=0.0,
            status=Status.SEQUENTIAL,
            message=Status.SEQUENTIAL.message("the plain call"),
            error_estimate=None,
            warnings=notes,
            history=[],
        )


def _warn_of_a_dropped_run(kind: str) -> None:
    warnings.warn(
        f"a run of a {kind} was made with parallelize and never used, so no call was parallel; write `with "
        "paradiff.parallelize(pipe): pipe(...)`, call what parallelize returns as you would the pipeline, or call its enable()",
        UserWarning,
        stacklevel=3,  # above weakref.finalize: the place where the run was dropped
    )

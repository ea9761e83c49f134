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
from functools import partial
from types import TracebackType
from typing import Any, Literal, cast, get_args

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
from paradiff.solver.protocol import Method
from paradiff.solver.solution import Status

Executor = Literal["auto", "vector", "lanes", "sequential"]


def parallelize(
    pipeline: DiffusionPipeline,
    method: Method | None = None,
    *,
    executor: Executor = "auto",
    max_rows: int | None = None,
    pad: bool = False,
    check: Check = "first",
    dtype: torch.dtype = torch.float32,
) -> Run:
    """Makes a pipeline's calls run in parallel over time, within a `with` block.

        with paradiff.parallelize(pipe, paradiff.parasolver(window=16)) as run:
            image = pipe("a lighthouse", num_inference_steps=100, generator=g).images[0]
        print(run.report)

    Every argument of the pipeline keeps its meaning. The same seed gives the image of the plain call, up to the method's
    tolerance. The loop's first pass is at x[0] alone, which is a warm-up step for methods that take one.

    Args:
        pipeline: Any diffusers pipeline whose loop calls `scheduler.step(output, t, latents)`.
        method: The method (methods/presets.py); `parasolver()` by default.
        executor: `vector`, `lanes`, `sequential`, or `auto`: the first of them that the loop allows.
        max_rows: Most rows in one network call (an image with guidance has two a state); None for no bound. Halved when the
            device runs out of memory.
        pad: Fill every network call up to the window's full width, for compiled networks and CUDA graphs.
        check: Compare rows of batched network calls with calls of their own: at each network's `first` batched call, at
            `every` call (slow; for tests), or `off`.
        dtype: Dtype of the solver's states, float32 or float64; the networks keep theirs.

    Raises:
        ValueError: If the pipeline is none or has no scheduler, is already parallel, or an option is unknown.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise ValueError(
            f"parallelize was given a {type(pipeline).__name__}; it takes a diffusers pipeline object. For a network of your "
            "own use paradiff.sample(model, table, noise, method)"
        )
    if getattr(pipeline, "scheduler", None) is None:
        raise ValueError(
            f"the {type(pipeline).__name__} has no scheduler, so it has no chain to be solved in parallel; give it one, "
            "pipe.scheduler = ..., or call it as it is"
        )
    if isinstance(pipeline, _Parallel):
        raise ValueError(
            f"this {type(pipeline).__name__} is already run in parallel; leave the other `with` block first, or use a second "
            "pipeline made of the same components"
        )
    for name, value, known in (("executor", executor, get_args(Executor)), ("check", check, get_args(Check))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    if method is not None and not isinstance(method, Method):
        raise ValueError(f"method is a {type(method).__name__}; give one of paradiff's, such as paradiff.parasolver(window=16)")
    if method is not None and not method.solves_chain:
        raise ValueError(
            f"{method.name} was given another target than the chain, whose times lie between those of the pipeline's loop; "
            "leave the target at 'chain', or sample the network itself with paradiff.sample"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the solver's states were asked for in {dtype}; they are kept in float32 or float64")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows is {max_rows}; a network call needs at least 1 row, or None for no bound")
    return Run(pipeline, parasolver() if method is None else method, executor, max_rows, pad, check, dtype)


class _Parallel:
    """Marks the classes of pipelines that are run in parallel."""


class Run:
    """A pipeline run in parallel: the context that `parallelize` gives.

    Attributes:
        pipeline: The pipeline.
        reports: What each call within the context cost, in order.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        method: Method,
        executor: Executor,
        max_rows: int | None,
        pad: bool,
        check: Check,
        dtype: torch.dtype,
    ) -> None:
        self.pipeline, self.method, self.executor, self.dtype = pipeline, method, executor, dtype
        self._max_rows, self._pad = max_rows, pad
        self._check: Check = check
        self.reports: list[Report] = []
        self._class: Any = None

    @property
    def report(self) -> Report:
        """The report of the last call.

        Raises:
            ValueError: If there was none.
        """
        if not self.reports:
            raise ValueError("the pipeline has not been called yet; call it within the `with` block")
        return self.reports[-1]

    def __enter__(self) -> Run:
        if isinstance(self.pipeline, _Parallel):
            raise ValueError(
                f"this {type(self.pipeline).__name__} is already run in parallel; leave the other `with` block first"
            )
        self._class = real = type(self.pipeline)
        run = self

        def call(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
            return run._call(args, kwargs)

        call.__wrapped__ = real.__call__  # pyright: ignore[reportFunctionMemberAccess]  (keeps the signature)
        namespace = {"__call__": call, "__module__": real.__module__, "__doc__": real.__doc__}
        self.pipeline.__class__ = type(real.__name__, (_Parallel, real), namespace)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pipeline.__class__ = self._class

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
        if self.executor != "sequential":
            reason = "; ".join(notes) or "there is no executor for its loop"
            notes = [f"the {self._class.__name__} was called sequentially, {reason}"]
            warnings.warn(notes[0], RuntimeWarning, stacklevel=3)
        result = self._class.__call__(self.pipeline, **arguments)
        self.reports.append(self._sequential_report(time.perf_counter() - begin, notes))
        return result

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments by name."""
        signature = inspect.signature(self._class.__call__)
        arguments = dict(signature.bind(self.pipeline, *args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        arguments.pop("self")
        return arguments

    def _executors(self, notes: list[str]) -> list[str]:
        """The executors to try, in order; why there is none is put into `notes`."""
        if self.executor == "sequential":
            return []
        cached = self.cached()
        if cached:
            notes.append(f"{', '.join(cached)} keeps a cache across steps, which needs them in order")
            return []
        found = obstacles(self._class)
        if found:
            notes.append(found[0])
            return []
        if self.executor != "auto":
            return [self.executor]
        return ["vector", "lanes"] if reads_index(self._class) == [] else ["lanes"]

    def _run(self, executor: str, arguments: dict[str, Any], solver: LoopSolver, batching: Batching) -> Any:
        """The pipeline's own call, with another scheduler and its networks' boundaries in place."""
        pipeline, scheduler = self.pipeline, cast(Any, self.pipeline).scheduler
        with boundary.install(self._modules().values()):
            if executor == "lanes":
                return run_lanes(partial(self._class.__call__, **arguments), pipeline, solver, batching)
            loop = Vector(scheduler, solver, batching)
            object.__setattr__(pipeline, "scheduler", loop.scheduler)
            try:
                result = self._class.__call__(pipeline, **arguments)
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
        return LoopSolver(self.method, dtype=self.dtype, callback=callback)

    def _new_batching(self) -> Batching:
        return Batching(max_rows=self._max_rows, pad=self._pad, check=self._check)

    def _report(self, executor: str, solver: LoopSolver, batching: Batching, seconds: float, notes: list[str]) -> Report:
        solution = solver.solution
        assert solution is not None
        if solver.raised_tolerance is not None:
            notes = [*notes, f"the tolerance was raised to {solver.raised_tolerance:g}, which the networks' dtype resolves"]
        return Report(
            self._class.__name__,
            type(cast(Any, self.pipeline).scheduler).__name__,
            self.method.name,
            executor,
            solver.table.steps,
            solver.passes,
            solver.rows,
            batching.rows,
            seconds,
            batching.seconds,
            solution.status,
            solution.message,
            solution.error_estimates[0],
            notes,
            solution.history,
        )

    def _sequential_report(self, seconds: float, notes: list[str]) -> Report:
        scheduler = type(cast(Any, self.pipeline).scheduler).__name__
        return Report(
            self._class.__name__,
            scheduler,
            self.method.name,
            "sequential",
            None,
            0,
            0,
            0,
            seconds,
            0.0,
            Status.SEQUENTIAL,
            Status.SEQUENTIAL.message("the plain call"),
            None,
            notes,
            [],
        )

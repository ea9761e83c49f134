# SPDX-License-Identifier: Apache-2.0
"""`parallelize`: the same pipeline call, in parallel over time.

A parallel call is the pipeline's own `__call__` with all its arguments. For its length the pipeline has a scheduler proxy
(scheduler_proxy.py), whose steps the solver takes, and a boundary before each network (boundary.py), which accepts windows.
How one call is made is in call.py; the run is the pipeline with its settings, on and off.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from paradiff.errors import Unsupported, shown
from paradiff.methods.presets import collocation
from paradiff.pipelines.call import Call
from paradiff.pipelines.host.find import host_of
from paradiff.pipelines.host.host import Host
from paradiff.pipelines.host.loop_host import Function
from paradiff.pipelines.model_name import of_model
from paradiff.pipelines.network.batching import Check
from paradiff.pipelines.network.devices import Devices
from paradiff.pipelines.network.hooks import caches
from paradiff.pipelines.network.offloaded import moves
from paradiff.pipelines.report import Report
from paradiff.pipelines.settings import Executor, Settings
from paradiff.pipelines.turn import GATES, TURNS
from paradiff.planning.auto import auto
from paradiff.solver.arguments import begun
from paradiff.solver.protocol import Method, Observer
from paradiff.solver.ranks import Ranks
from paradiff.solver.replicas import devices_of
from paradiff.solver.trajectory import Trajectory

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def parallelize(
    host: Any,
    method: Method | None = None,
    *,
    entry: str | None = None,
    scheduler: Any = None,
    networks: Iterable[nn.Module] | None = None,
    executor: Executor = "auto",
    max_rows: int | None = None,
    pad: bool = False,
    check: Check = "first",
    dtype: torch.dtype = torch.float32,
    observer: Observer | None = None,
    mesh: DeviceMesh | Ranks | None = None,
    mesh_axis: str = "time",
    devices: Literal["all"] | Sequence[torch.device | str] | None = None,
    shares: int | None = None,
    start: Report | Trajectory | str | Path | None = None,
    keep_trajectory: bool = False,
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
        host: What owns the chain, whose loop calls `scheduler.step(output, t, latents)`: a diffusers pipeline or modular
            pipeline; an object with a method that walks over its scheduler's times, such as a robot's policy, or with a part
            that has one; or a function with such a loop.
        entry: The name of an object's method that walks; None to look for it.
        scheduler: The scheduler that a function or an object steps; None to look for it in the variables of the function, or
            the attributes of the object.
        networks: The torch modules that the loop of a function or an object calls; None to look for them in the same places.
        method: The method (methods/presets.py); `auto()` by default, which chooses one and says so in the report, and
            `collocation()` where there is a trajectory to begin from, or to keep.
        executor: `vector`, `lanes`, `sequential`, or `auto`: the first of them that the loop allows.
        max_rows: Largest number of rows in one network call, at least 1; an image with guidance has two rows a state. None for
            no bound. Halved when the device runs out of memory.
        pad: Fill every network call with copies of its last state up to one of at most four numbers of states, which depend on
            the window and on `max_rows`, for compiled networks and CUDA graphs (docs/devices.md).
        check: Which batched network calls are compared, row by row, with calls of their own: each network's `first` one,
            `every` one (slow; for tests), or none with `off`. Unless it is off, passes of the loop are audited, which costs
            rows and with lanes up to two passes; with `every` the sample is compared with that of a plain call.
        dtype: Dtype of the solver's states, float32 or float64; the networks keep theirs.
        observer: Called after each round (`Observer` of paradiff.solver); it may ask the run to stop. When an executor fails
            and the next one is tried, rounds are counted from 1 again.
        mesh: Ranks that each have the pipeline and share the states of a window: a DeviceMesh, or the `Ranks` along one of its
            axes. All ranks have to make the same calls, with generators of the same seeds. What networks return without a
            window, a text's embeddings or a picture, is computed on one of them. None for one process.
        mesh_axis: The name of the mesh's axis along which states are shared.
        devices: Devices of this process that share the states of a window, each with a copy of the denoiser and a thread: a
            list that begins with the pipeline's own, or `all` of this machine. None for the pipeline's own alone.
        shares: Stretches of equal length that a window's states are cut into, at least; as many as ranks, or devices, by
            default. Samples are the same, bit for bit, on any number of ranks with the same shares, and on one process.
        start: What calls begin from: the report of a call of this pipeline on the same chain that kept its trajectory, the
            trajectory, or the path of its file (docs/warm_starts.md); None for nothing.
        keep_trajectory: Whether each report has the trajectory of its call.

    Raises:
        ValueError: If the host has no chain, or several of which none was named, or is already parallel, an option is unknown,
            or the mesh has no such axis; or the method cannot begin from a trajectory, or keep one.
        RanksFailed: If a rank does not come.
    """
    found = host_of(host, entry=entry, scheduler=scheduler, networks=networks)
    _, begin = begun(start, None)
    if start is not None and begin is None:
        raise ValueError(f"start is {shown(start)}; give a call's report, a Trajectory or the path of its file, or None")
    if method is None:
        method = auto() if begin is None and not keep_trajectory else collocation()
    settings = Settings(
        start=None if begin is None else of_model(begin, found),
        keep_trajectory=keep_trajectory,
        method=method,
        executor=executor,
        max_rows=max_rows,
        pad=pad,
        check=check,
        dtype=dtype,
        observer=observer,
        ranks=Ranks(mesh, mesh_axis) if mesh is not None and not isinstance(mesh, Ranks) else mesh,
        shares=shares,
        devices=None if devices is None else Devices(_with_own(found, devices_of(devices)), shares),
    )
    run = Run(found, settings)
    run.warn_if_dropped()
    return run


def _with_own(host: Host, devices: list[torch.device]) -> list[torch.device]:
    """Devices, of which the first is the host's own.

    Raises:
        ValueError: If the pipeline's own is another one, as far as its networks stay where they are.
    """
    own = getattr(host.owner, "device", devices[0])
    if own != devices[0] and (own.type != devices[0].type or own.index is not None):
        if moving := [name for name, network in host.networks.items() if moves(network)]:
            raise ValueError(
                f"hooks of another library move the pipeline's networks ({', '.join(moving)}), of which other devices get no "
                "copy; leave out devices, or load the pipeline without offloading"
            )
        raise ValueError(f"the pipeline is on {own}, and the first of the devices is {devices[0]}; give its own first")
    return devices


class _Parallel:
    """The base of the classes that pipelines have while they are run in parallel."""

    _paradiff_run: Run


def enabled_run(host: Any) -> Run | None:
    """The run that makes the calls of an object parallel, or those of one of its parts; None if there is none.

    Args:
        host: The object.
    """
    within = [*getattr(host, "__dict__", {}).values(), *getattr(host, "_modules", {}).values()]
    found = next((part for part in [host, *within] if isinstance(part, _Parallel)), None)
    return None if found is None else found._paradiff_run


class Run:
    """A pipeline and the settings of its parallel calls; `parallelize` returns one. Runs are compared by identity.

    Args:
        host: What owns the chain.
        settings: The settings.

    Attributes:
        host: What owns the chain.
        settings: The settings.
        reports: The report of each call, in order.

    Raises:
        ValueError: If it is already parallel.
    """

    def __init__(self, host: Host, settings: Settings) -> None:
        self.host, self.settings = host, settings
        self.reports: list[Report] = []
        self._parallel_class: type | None = None
        self._warning: weakref.finalize[Any, Any] | None = None
        self._turn = TURNS.of(self.pipeline)
        self._refuse_a_second_run()

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "not enabled"
        calls = f"{len(self.reports)} call{'' if len(self.reports) == 1 else 's'}"
        settings = self.settings
        return f"Run({self.host.name}, {settings.method.name}, executor={settings.executor!r}, {state}, {calls})"

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
        vars(self).update(state)
        self._turn = TURNS.of(self.pipeline)

    @property
    def pipeline(self) -> Any:
        """The pipeline, or the object or function that was given in its place."""
        owner = self.host.owner
        return owner.function if isinstance(owner, Function) else owner

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
        return self._parallel_class in type(self.host.owner).__mro__  # lanes put a class of theirs before it

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
        owner, entry = self.host.owner, self.host.entry
        if isinstance(owner, Function):
            raise ValueError(
                f"the function {self.host.name} cannot be switched, since others hold it by its name; call what parallelize "
                "returns in its place"
            )
        real = type(owner)
        run = self

        def call(owner: Any, *args: Any, **kwargs: Any) -> Any:
            return run._call(args, kwargs)

        call.__wrapped__ = getattr(real, entry)  # pyright: ignore[reportFunctionMemberAccess]  (keeps the signature)
        namespace = {entry: call, "_paradiff_run": self, "__module__": real.__module__, "__doc__": real.__doc__}
        kind: Any = type(real)
        self._parallel_class = kind(real.__name__, (_Parallel, real), namespace)
        owner.__class__ = self._parallel_class
        return self

    def cached(self) -> list[str]:
        """A clause for each component that keeps a cache, or values of another kind, from one step to the next."""
        return caches(self.host.networks)

    def disable(self) -> None:
        """Gives the pipeline object its own class and its plain call back; without effect where the run is not enabled."""
        if self.enabled:
            self.host.owner.__class__ = self._plain_class
        self._parallel_class = None

    def __enter__(self) -> Run:
        return self.enable()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.disable()

    def keep(self) -> None:
        """Warns no more if the run is deleted unused."""
        self._used()

    def warn_if_dropped(self) -> None:
        """Warns once, with a `UserWarning`, if the run is deleted before it was entered, called or enabled."""
        self._warning = weakref.finalize(self, _warn_of_a_dropped_run, self.host.name)
        self._warning.atexit = False

    def _used(self) -> None:
        if self._warning is not None:
            self._warning.detach()

    def _refuse_a_second_run(self) -> None:
        if isinstance(self.host.owner, _Parallel):
            raise ValueError(
                f"this {type(self.host.owner).__name__} is already run in parallel; leave the other `with` block first, call "
                "disable() of the run that enabled it, or use a second pipeline made of the same components"
            )

    @property
    def _plain_class(self) -> Any:
        """The pipeline's own class, whether or not it is enabled."""
        kind = type(self.host.owner)
        while issubclass(kind, _Parallel):
            kind = kind.__bases__[-1]
        return kind

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the pipeline. Calls of several threads wait for each other, since they share the scheduler."""
        host, turn = self.host, self._turn
        if turn.caller == threading.get_ident():  # The call, or a callback within it, calls its own pipeline.
            if turn.call is not None and turn.call.trying:
                raise Unsupported(f"the {host.name} is called within its own call")
            return host.kind.__call__(host.owner, *args, **kwargs)
        with turn.lock:
            turn.caller = threading.get_ident()
            try:
                arguments = host.bound(args, kwargs)
                turn.call = call = Call(host.of(arguments), self.settings, arguments)
                switched = self.enabled or isinstance(host.owner, Function)
                with contextlib.nullcontext() if switched else GATES.at(type(host.owner), host.entry):
                    result, report = call.made()
                self.reports.append(report)
                return result
            finally:
                turn.caller = turn.call = None


def _warn_of_a_dropped_run(kind: str) -> None:
    warnings.warn(
        f"a run of a {kind} was made with parallelize and never used, so no call was parallel; write `with "
        "paradiff.parallelize(pipe): pipe(...)`, call what parallelize returns as you would the pipeline, or call its enable()",
        UserWarning,
        stacklevel=3,  # above weakref.finalize: the place where the run was dropped
    )

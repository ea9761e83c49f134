# SPDX-License-Identifier: Apache-2.0
"""What a day with a GPU is for, by itself in ten minutes: right first, then how long calls, rounds and whole runs take.

Parts, in this order, each fenced: where one fails, its row says so by name and the rest goes on; where the time is over, the
row says that. Each part has a share of the time that is left (SHARES); what runs GRACE longer, or beyond the end, is broken off
by an alarm. The device, in `environment`, is a GPU if there is one; on a CPU networks are tiny, and so is what figures say.
Training is no part: each recipe of training/ ends within half an hour on a CPU.

- `right`: every method on the bundled digits beside the sequential chain, on the device; DDPMPipeline, DDIMPipeline and the
  bundled text pipelines through parallelize beside their plain calls, executor and rounds beside those on the CPU; half
  precision; waits for the device a round, by torch.profiler; torch.compile; CUDA graphs; memory that runs out. `ok` says
  whether a row is as it has to be.
- `latency`: seconds of a network call by its rows, for the shapes that users run (gpu_shapes.py), eager, as CUDA graphs and,
  for small networks, compiled. `twice` is the number of rows at which a call costs two calls of one row. One row is one state:
  guidance doubles it inside.
- `bookkeeping`: microseconds of a round outside a network that costs nothing, and peak memory, by window, for states of each
  shape.
- `replay`: the rows of the rounds of real runs as network calls of each shape, each waited for, and the bookkeeping of such a
  round: `speedup` over the sequential chain, and `floor`, what it would be if a round cost as much as a call of one row.
- `whole`: the bundled models by each method: seconds of the whole call, rounds, error.

    python benchmarks/gpu.py --quick
    python benchmarks/gpu.py --json benchmarks/results/gpu.json
    python benchmarks/gpu.py --json benchmarks/results/gpu.json --only latency --minutes 5
"""

from __future__ import annotations

import gc
import signal
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from cluster import Trace, recording, trace_of
from gpu_shapes import SHAPES, Shape
from harness import Results, Row, options, show
from problem import rms
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from paradiff import (
    Evaluator,
    Keyed,
    Recorded,
    Schedule,
    collocation,
    jacobi,
    paradigms,
    parallelize,
    parasolver,
    quasi_newton,
    sample,
    sequential,
    srds,
)
from paradiff.methods.piadm import piadm_sde
from paradiff.models.files import BUNDLED
from paradiff.models.pipeline import load_pipeline
from paradiff.models.pixel import Model
from paradiff.models.pixel import load as load_pixels
from paradiff.samplers import ddpm
from paradiff.solver.protocol import Method

SHARES = {"right": 0.3, "latency": 0.35, "bookkeeping": 0.05, "replay": 0.2, "whole": 0.1}
"""The parts, and the share of the time that each may take; what it leaves goes to those after it."""
METHODS: dict[str, Callable[[int], Method]] = {
    "parasolver": lambda window: parasolver(window),
    "quasi_newton": lambda window: quasi_newton(window),
    "paradigms": lambda window: paradigms(window, 0.1),
    "jacobi": lambda window: jacobi(window),
    "collocation": lambda window: collocation(window),
    "srds": lambda window: srds(),
}
GRACE = 10.0
"""Seconds over a part's share after which what runs is broken off."""
PROMPT = "a red circle left of a blue square"
WAITS = {
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    "others": ("aten::_local_scalar_dense", "aten::nonzero"),
}
"""Events by which a host waits for its device; where there is no CUDA, operations that would be some, those on the host's
numbers too. A copy to the device that blocks is a copy and a cudaStreamSynchronize."""

COPIES = ("cudaMemcpyAsync", "cudaMemcpy")
"""Calls that copy."""

AT_MOST: dict[str, float] = {"collocation": 2.0}
"""Waits a round that a method may have, where that is not one."""

SETUP = 8
"""Waits beside: the start of a run, its end, and the profiler's own."""

TIGHT = 0.02
"""Most root mean square error, of pictures from -1 to 1, of a method at its own tolerance."""

LIMIT = 0.5
"""Seconds of a network call above which no more rows are tried."""


class TimeOver(BaseException):
    """The time of a part is over. No library between here and a fence catches it."""


@dataclass
class Day:
    """What all parts share.

    Attributes:
        device: The device.
        quick: Whether all is small.
        results: Where rows go.
        until: The clock at which the time of the part is over.
        traces: Rounds of real runs, by chain and window.
    """

    device: torch.device
    quick: bool
    results: Results
    until: float
    traces: dict[str, tuple[int, Trace]] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Whether the device is the CPU."""
        return self.device.type == "cpu"

    @property
    def tiny(self) -> bool:
        """Whether networks are tiny."""
        return self.small or self.quick

    @property
    def face(self) -> Any:
        """Torch's module of the device: `torch.cuda`."""
        return torch.get_device_module(self.device)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def add(self, part: str, name: str, **more: Any) -> None:
        """Adds a row, and writes the file."""
        self.results.add({"part": part, "name": name, **more})
        self.results.save()

    @contextmanager
    def fenced(self, part: str, name: str) -> Iterator[bool]:
        """Records what goes wrong in the block by name; the block is told whether there is time for it."""
        if self.left <= 0:
            self.add(part, name, skipped="the time was over")
            yield False
            return
        try:
            yield True
        except TimeOver:
            self.until = min(self.until, time.monotonic())  # nothing else of the part begins
            self.add(part, name, skipped="the time was over within it")
        except Exception as error:
            line = next(iter(str(error).splitlines()), "")
            at = traceback.extract_tb(error.__traceback__)[-1]
            self.add(part, name, failed=f"{type(error).__name__}: {line[:300]}", at=f"{at.filename.split('/')[-1]}:{at.lineno}")
        finally:
            if not self.small:
                gc.collect()
                self.face.empty_cache()

    def wait(self) -> None:
        """Waits for the device."""
        if not self.small:
            self.face.synchronize(self.device)

    def timed(self, call: Callable[[], Any], *, seconds: float = 0.3, most: int = 20) -> float:
        """The median seconds of a call, each waited for, after one that is not counted."""
        call()
        self.wait()
        found: list[float] = []
        begin = time.perf_counter()
        while not found or (len(found) < most and time.perf_counter() - begin < (0.01 if self.quick else seconds)):
            one = time.perf_counter()
            call()
            self.wait()
            found.append(time.perf_counter() - one)
        return statistics.median(found)

    def peak(self) -> float | None:
        """The most memory since the last call, in MiB."""
        if self.small:
            return None
        found = self.face.max_memory_allocated(self.device) / 2**20
        self.face.reset_peak_memory_stats(self.device)
        return found


# -- right -------------------------------------------------------------------------------------------------------------


def digits(day: Day, dtype: torch.dtype = torch.float32) -> Model:
    """The bundled digits network on the device."""
    return load_pixels("digits", device=day.device, dtype=dtype)


def right(day: Day) -> None:
    """Whether all is right on the device."""
    steps, window = (12, 4) if day.quick else (200, 16)
    for name, make in {**METHODS, "piadm_sde": lambda _: piadm_sde(blocks=3)}.items():
        with day.fenced("right", name) as begins:
            if begins:
                method_right(day, name, make(window), steps)
    for name in ("DDPMPipeline", "DDIMPipeline", "shapes", "shapes-flow"):
        halves = (torch.float16,) if name.endswith("Pipeline") else (torch.bfloat16, torch.float16)  # numpy has no bfloat16
        for dtype in (torch.float32, *(() if day.quick else halves)):
            with day.fenced("right", f"{name}, {str(dtype)[6:]}") as begins:
                if begins:
                    pipeline_right(day, name, dtype, 4 if day.quick else 50)
    for name, check in (
        ("waits", waits_right),
        ("torch.compile", compile_right),
        ("CUDA graphs", graphs_right),
        ("out of memory", memory_right),
    ):
        with day.fenced("right", name) as begins:
            if begins:
                check(day)


def method_right(day: Day, name: str, method: Method, steps: int) -> None:
    """A method on the digits beside the sequential chain, on the device; its rounds beside those on the CPU."""
    rounds = {}
    error = estimated = 0.0
    for device in dict.fromkeys((torch.device("cpu"), day.device)):
        model = load_pixels("digits", device=device)
        sde = name == "piadm_sde"
        table = model.exponential("exponential_sde", steps) if sde else model.table("ddpm", steps)
        evaluator = Evaluator(model, device=device)
        reference = sample(evaluator, table, Keyed(model.shape, [0, 1]), method.reference())
        found = sample(evaluator, table, Keyed(model.shape, [0, 1]), method)
        rounds[device.type] = found.rounds
        error, estimated = max(rms(found.sample - reference.sample)), found.estimated_error
    ok = error <= 1e-3 + 2 * estimated and max(rounds.values()) <= 2 + 1.2 * min(rounds.values())
    day.add("right", name, steps=steps, rounds=rounds, error=error, estimated=estimated, ok=ok)


def bundled(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A bundled pipeline, or the digits in a pixel pipeline, on a device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.endswith("Pipeline"):
            pipe = getattr(diffusers, name).from_pretrained(BUNDLED / "digits", torch_dtype=dtype).to(device)
        else:
            pipe = load_pipeline(name, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_call(pipe: Any, steps: int) -> Tensor:
    """A call's pictures or latents, on the host."""
    given: dict[str, Any] = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
    if "Pipeline" in type(pipe).__name__ and hasattr(pipe, "tokenizer"):
        given |= {"prompt": PROMPT, "guidance_scale": 4.0, "output_type": "latent"}
    else:
        given |= {"output_type": "np"}
    found = pipe(**given)[0]
    return torch.as_tensor(found).float().cpu()


def pipeline_right(day: Day, name: str, dtype: torch.dtype, steps: int) -> None:
    """A pipeline through parallelize beside its plain call, on the device and, in single precision, on the CPU."""
    more: dict[str, Any] = {}
    executors, rounds = set[str](), list[int]()
    devices = (torch.device("cpu"), day.device) if dtype == torch.float32 else (day.device,)
    for device in dict.fromkeys(devices):
        pipe = bundled(name, device, dtype)
        plain = pipeline_call(pipe, steps)
        with warnings.catch_warnings(), parallelize(pipe, parasolver(4 if day.quick else 16)) as run:
            warnings.simplefilter("ignore")
            found = pipeline_call(pipe, steps)
        report = run.report
        executors.add(report.executor)
        rounds.append(report.rounds)
        more |= {
            f"executor_{device.type}": report.executor,
            f"rounds_{device.type}": report.rounds,
            "error": rms((found - plain).flatten()[None])[0],
            "size": rms(plain.flatten()[None])[0],
            "warnings": report.warnings,
        }
    near = more["error"] <= (0.02 if dtype == torch.float32 else 0.1) * more["size"]
    ok = near and len(executors) == 1 and "sequential" not in executors and max(rounds) <= 2 + 1.2 * min(rounds)
    day.add("right", f"{name}, {str(dtype)[6:]}", steps=steps, **more, ok=ok)


def waits_right(day: Day) -> None:
    """How often a round waits for its device, and how much it copies from and to it, by the profiler."""
    steps = 12 if day.quick else 100
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if day.device.type == "cuda" else [])]
    events = WAITS["cuda" if day.device.type == "cuda" else "others"]
    model = digits(day)
    table = model.table("ddpm", steps)
    for name in ("parasolver",) if day.quick else METHODS:
        method = METHODS[name](4 if day.quick else 16)
        evaluator = Evaluator(model, device=day.device)
        sample(evaluator, table, Keyed(model.shape, 0), method, check="off")
        day.wait()
        with profile(activities=activities) as seen:
            solution = sample(evaluator, table, Keyed(model.shape, 0), method, check="off")
        counts = {event.key: event.count for event in seen.key_averages()}
        each = {key: counts[key] / solution.rounds for key in events if key in counts}
        copies = sum(count for key, count in counts.items() if key in COPIES) / solution.rounds
        waits = sum(each.values())
        more = {"ok": waits <= AT_MOST.get(name, 1.0) + SETUP / solution.rounds} if day.device.type == "cuda" else {}
        day.add("right", f"waits, {name}", rounds=solution.rounds, a_round=each, copies_a_round=copies, **more)


def compile_right(day: Day) -> None:
    """torch.compile of the network: graphs, seconds of a first and of a later run, error."""
    import torch._dynamo

    model = digits(day)
    table = model.table("ddim", 3 if day.quick else 50)
    method = parasolver(1 if day.quick else 8)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model.unet, **({} if day.device.type == "cuda" else {"backend": "eager"}))
    evaluator = Evaluator(lambda x, t: compiled(x, t, return_dict=False)[0], device=day.device)
    seconds, graphs, found = [], [], None
    for _ in range(2):
        begin = time.perf_counter()
        found = sample(evaluator, table, Keyed(model.shape, 0), method)
        day.wait()
        seconds.append(time.perf_counter() - begin)
        graphs.append(int(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    assert found is not None
    plain = sample(Evaluator(model, device=day.device), table, Keyed(model.shape, 0), sequential())
    error = max(rms(found.sample - plain.sample))
    backend = "inductor" if day.device.type == "cuda" else "eager"
    day.add(
        "right",
        "torch.compile",
        backend=backend,
        seconds=seconds,
        graphs=graphs,
        rounds=found.rounds,
        error=error,
        ok=error < TIGHT,
    )


class Graphed:
    """A network replayed as CUDA graphs, one for each number of rows.

    Args:
        network: The network.
        face: Torch's module of the device.
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor], face: Any) -> None:
        self._network, self._face = network, face
        self._graphs: dict[int, tuple[Any, Tensor, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The output, in memory of its own."""
        if len(x) not in self._graphs:
            own = x.clone(), t.clone()
            self._graphs[len(x)] = (*captured(lambda: self._network(*own), self._face), *own)
        graph, output, own_x, own_t = self._graphs[len(x)]
        own_x.copy_(x)
        own_t.copy_(t)
        graph.replay()
        return output.clone()


def captured(call: Callable[[], Tensor], face: Any) -> tuple[Any, Tensor]:
    """A CUDA graph of a call, and the memory of its output.

    Args:
        call: The call, always in the same memory.
        face: Torch's module of the device.
    """
    side = face.Stream()
    side.wait_stream(face.current_stream())
    with face.stream(side):
        for _ in range(3):
            call()
    face.current_stream().wait_stream(side)
    graph = face.CUDAGraph()
    with face.graph(graph):
        output = call()
    return graph, output


def graphs_right(day: Day) -> None:
    """The digits network as CUDA graphs beside the network itself."""
    if not hasattr(day.face, "CUDAGraph"):
        day.add("right", "CUDA graphs", skipped="there is no CUDA here")
        return
    model = digits(day)
    table = model.table("ddim", 8 if day.quick else 50)
    seconds = []
    for network in (model, Graphed(model, day.face)):
        evaluator = Evaluator(network, device=day.device, pad=True)
        sample(evaluator, table, Keyed(model.shape, 0), parasolver(8))
        day.wait()
        begin = time.perf_counter()
        found = sample(evaluator, table, Keyed(model.shape, 0), parasolver(8))
        day.wait()
        seconds.append(time.perf_counter() - begin)
    plain = sample(Evaluator(model, device=day.device), table, Keyed(model.shape, 0), sequential())
    error = max(rms(found.sample - plain.sample))
    day.add("right", "CUDA graphs", seconds=seconds, rounds=found.rounds, error=error, ok=error < TIGHT)


def memory_right(day: Day) -> None:
    """Memory that runs out at a large window: calls are cut, and the sample stays what it is."""
    model = digits(day)
    steps = 12 if day.quick else 200
    table = model.table("ddpm", steps)
    fits = 3 if day.tiny else 64

    def network(x: Tensor, t: Tensor) -> Tensor:
        if day.small and len(x) > fits:
            raise torch.OutOfMemoryError("provoked")
        if len(x) > fits:
            torch.empty(2**50, dtype=torch.uint8, device=x.device)  # more than any device has
        return model(x, t)

    evaluator = Evaluator(network, device=day.device)
    found = sample(evaluator, table, Keyed(model.shape, 0), parasolver())
    plain = sample(Evaluator(model, device=day.device), table, Keyed(model.shape, 0), sequential())
    error = max(rms(found.sample - plain.sample))
    day.add(
        "right", "out of memory", max_rows=evaluator.max_rows, fits=fits, rounds=found.rounds, error=error, ok=error < TIGHT
    )


# -- latency -----------------------------------------------------------------------------------------------------------


def dtype_of(day: Day) -> torch.dtype:
    """The dtype in which times are taken."""
    return torch.float32 if day.small else torch.bfloat16


def counts(day: Day) -> Sequence[int]:
    """Rows whose calls are timed."""
    return (1, 2, 4) if day.quick else tuple(2**k for k in range(9))


def latency(day: Day) -> None:
    """Seconds of network calls by their rows."""
    chosen = SHAPES[:: len(SHAPES) - 1] if day.quick else SHAPES
    for shape in chosen:
        with day.fenced("latency", shape.name) as begins:
            if begins:
                curves(day, shape)


@torch.inference_mode()
def curves(day: Day, shape: Shape) -> None:
    """The curves of a shape: eager, as CUDA graphs, and compiled."""
    dtype = dtype_of(day)
    network = shape.network(day.device, dtype, day.tiny)
    weights = sum(weight.numel() for weight in network.parameters())
    small = weights < 2e8  # what launches bound; compiling a large network takes minutes
    modes = [
        "eager",
        *(["graph"] if hasattr(day.face, "CUDAGraph") else []),
        *(["compiled"] if day.device.type == "cuda" and small and day.left > 120 else []),
    ]
    for mode in modes:
        found: dict[int, float] = {}
        called = torch.compile(network, dynamic=False) if mode == "compiled" else network
        for rows in counts(day):
            if mode == "compiled" and rows not in (1, 16):
                continue
            if day.left <= 0 or (found and max(found.values()) > LIMIT):
                break
            more: dict[str, Any] = {}
            try:
                call = shape.call(called, rows, day.tiny, day.device, dtype)
                day.peak()
                if mode == "graph":
                    graph, _ = captured(call, day.face)
                    call = graph.replay
                seconds = day.timed(call)
                found[rows] = seconds
                more = {"seconds": seconds, "peak_mib": day.peak()}
            except torch.OutOfMemoryError:
                more = {"ended": "out of memory"}
            except RuntimeError as error:  # of a capture: memory that runs out in one spoils it, and is told in other words
                more = {"failed": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"}
            day.results.add(
                {
                    "part": "latency",
                    "name": shape.name,
                    "shape": shape.name,
                    "mode": mode,
                    "rows": rows,
                    "dtype": str(dtype)[6:],
                    "weights": weights,
                    **more,
                }
            )
            if "seconds" not in more:
                break
        if 1 in found:
            twice = next((rows for rows, seconds in found.items() if seconds >= 2 * found[1]), None)
            day.add("latency", f"{shape.name}, {mode}", first=found[1], most=max(found), last=found[max(found)], twice=twice)


# -- bookkeeping -------------------------------------------------------------------------------------------------------


def bookkeeping(day: Day) -> None:
    """Microseconds of a round outside of a network that costs nothing, and peak memory."""
    for shape in SHAPES[:: len(SHAPES) - 1] if day.quick else SHAPES:
        with day.fenced("bookkeeping", shape.name) as begins:
            for window in ((4,) if day.quick else (4, 16, 64, 256)) if begins else ():
                bookkeeping_of(day, shape, window)


def bookkeeping_of(day: Day, shape: Shape, window: int) -> None:
    """A row of one window: states of a shape, on 200 steps."""
    steps = max(window, 12 if day.quick else 200)
    table = ddpm(Schedule.linear(), steps)
    own = shape.sized(day.tiny)
    evaluator = Evaluator(lambda x, t: x, device=day.device)

    def run() -> Any:
        return sample(evaluator, table, Keyed(own, 0), parasolver(window), check="off")

    run()
    day.peak()
    day.wait()
    before, begin = evaluator.seconds, time.perf_counter()
    solution = run()
    day.wait()
    seconds = time.perf_counter() - begin - (evaluator.seconds - before)
    micro = 1e6 * seconds / solution.rounds
    day.add("bookkeeping", shape.name, window=window, rounds=solution.rounds, microseconds=micro, peak_mib=day.peak())


# -- replay ------------------------------------------------------------------------------------------------------------


def real_traces(day: Day) -> dict[str, tuple[int, Trace]]:
    """Steps and rounds of real runs of the bundled networks, by name."""
    if day.traces:
        return day.traces
    chains = (
        {"DDPM 20": ("ddpm", 20, (4,))}
        if day.quick
        else {
            "DDPM 1000": ("ddpm", 1000, (8, 16, 32, 64)),
            "DDIM 50": ("ddim", 50, (8, 50)),
            "DDIM 100": ("ddim", 100, (16, 100)),
        }
    )
    model = digits(day)
    for chain, (sampler, steps, windows) in chains.items():
        table = model.table(sampler, steps)
        for name in ("parasolver", *(() if day.quick else ("quasi_newton", "collocation"))):
            if name == "collocation" and sampler != "ddpm":
                continue
            for window in windows:
                if day.left <= 0:
                    return day.traces
                noise = Recorded(model.shape, [torch.Generator().manual_seed(0)])
                with recording() as record:
                    sample(Evaluator(model, device=day.device), table, noise, METHODS[name](window))
                day.traces[f"{chain}, {name}, window {window}"] = steps, record.taken()
    for steps in () if day.quick else (28, 50):
        pipe = bundled("shapes-flow", day.device, torch.float32)
        with warnings.catch_warnings(), parallelize(pipe, parasolver(8)) as run:
            warnings.simplefilter("ignore")
            pipeline_call(pipe, steps)
        day.traces[f"flow {steps}, parasolver, window 8"] = steps, trace_of(run.report, steps)
    return day.traces


def replay(day: Day) -> None:
    """Rounds of real runs as network calls of each shape."""
    with day.fenced("replay", "rounds of real runs") as begins:
        if not begins:
            return
        traces = real_traces(day)
        for shape in SHAPES[:1] if day.quick else SHAPES:
            with day.fenced("replay", shape.name) as still:
                if still:
                    replay_of(day, shape, traces)


@torch.inference_mode()
def replay_of(day: Day, shape: Shape, traces: dict[str, tuple[int, Trace]]) -> None:
    """All traces on one shape; a call of each number of rows is captured once."""
    dtype = dtype_of(day)
    network = shape.network(day.device, dtype, day.tiny)
    calls: dict[int, Callable[[], Any]] = {}
    outside = {
        row["window"]: row["microseconds"] / 1e6
        for row in day.results.rows
        if row["part"] == "bookkeeping" and row["name"] == shape.name and "microseconds" in row
    }
    single = day.timed(shape.call(network, 1, day.tiny, day.device, dtype))
    for name, (steps, trace) in traces.items():
        expected = sum(max(single, single * rows / 8) for rows in trace.calls)
        if day.left <= min(60.0, expected):
            day.add("replay", f"{shape.name}: {name}", skipped="the time was over")
            continue
        begin = time.perf_counter()
        for rows in trace.calls:
            if rows not in calls:
                calls[rows] = shape.call(network, rows, day.tiny, day.device, dtype)
            calls[rows]()
            day.wait()
        seconds = time.perf_counter() - begin
        nearest = min(outside, key=lambda window: abs(window - max(trace.unchecked.calls)), default=None)
        rest = 0.0 if nearest is None else outside[nearest] * trace.rounds
        day.add(
            "replay",
            f"{shape.name}: {name}",
            shape=shape.name,
            steps=steps,
            rounds=trace.rounds,
            evaluations=trace.evaluations,
            sequential_seconds=steps * single,
            seconds=seconds,
            bookkeeping_seconds=rest,
            speedup=steps * single / (seconds + rest),
            floor=steps * single / (trace.rounds * single),
        )


# -- whole runs --------------------------------------------------------------------------------------------------------


def whole(day: Day) -> None:
    """The bundled models by each method: whole clocks."""
    steps, window = (12, 4) if day.quick else (1000, 32)
    with day.fenced("whole", "digits") as begins:
        if begins:
            model = digits(day)
            table = model.table("ddpm", steps)
            evaluator = Evaluator(model, device=day.device)
            reference = None
            named = ("parasolver",) if day.quick else tuple(METHODS)
            chosen = {"sequential": sequential(), **{one: METHODS[one](window) for one in named}}
            for name, method in chosen.items():
                with day.fenced("whole", f"digits, DDPM {steps}, {name}") as still:
                    if not still:
                        continue
                    sample(evaluator, table, Keyed(model.shape, 9), method)
                    begin = time.perf_counter()
                    found = sample(evaluator, table, Keyed(model.shape, 0), method)
                    day.wait()
                    seconds = time.perf_counter() - begin
                    reference = found.sample if reference is None else reference
                    error = max(rms(found.sample - reference))
                    label = f"digits, DDPM {steps}, {name}"
                    day.add("whole", label, rounds=found.rounds, evaluations=found.evaluations, seconds=seconds, error=error)
    for name, steps in (("shapes", 4),) if day.quick else (("shapes", 50), ("shapes-flow", 28)):
        with day.fenced("whole", name) as begins:
            if begins:
                whole_pipeline(day, name, steps)


def whole_pipeline(day: Day, name: str, steps: int) -> None:
    """A bundled pipeline by each method that fits it, in whole calls."""
    pipe = bundled(name, day.device, torch.float32)
    plain = pipeline_call(pipe, steps)
    single = day.timed(lambda: pipeline_call(pipe, steps), most=3)
    day.add("whole", f"{name}, {steps} steps, plain", seconds=single)
    for method in ("parasolver",) if day.quick else ("parasolver", "quasi_newton", "paradigms", "srds"):
        with day.fenced("whole", f"{name}, {steps} steps, {method}") as still:
            if not still:
                continue
            with warnings.catch_warnings(), parallelize(pipe, METHODS[method](4 if day.quick else 16)) as run:
                warnings.simplefilter("ignore")
                found = pipeline_call(pipe, steps)
                seconds = day.timed(lambda: pipeline_call(pipe, steps), most=3)
                rounds = run.report.rounds
            error = rms((found - plain).flatten()[None])[0]
            day.add(
                "whole",
                f"{name}, {steps} steps, {method}",
                rounds=rounds,
                seconds=seconds,
                speedup=single / seconds,
                error=error,
            )


# -- the table ---------------------------------------------------------------------------------------------------------


def table_of(rows: list[Row]) -> list[Row]:
    """A short table: what failed or was left out, and a line for each figure."""
    skip = ("part", "name", "shape", "mode", "rows", "dtype", "weights")
    short = []
    for row in rows:
        if row["part"] == "latency" and "rows" in row and "failed" not in row:
            continue
        said = ", ".join(f"{k} {_short(v)}" for k, v in row.items() if k not in skip and v is not None and v != [])
        short.append({"part": row["part"], "name": row["name"], "found": said})
    return short


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return " ".join(f"{key}: {_short(one)}" for key, one in value.items())
    if isinstance(value, list):
        return "/".join(map(_short, value))
    return str(value)


def main() -> None:
    given = options(__doc__, tuple(SHARES), minutes=10.0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = Results(given.json, given.keep, device=device)
    results.drop(row for row in results.rows if row["part"] not in given.only)
    run(Day(device, given.quick, results, time.monotonic()), given.only, 60 * given.minutes)
    results.save(quick=given.quick, minutes=given.minutes)
    show(table_of(results.rows), ("part", "name", "found"))
    failed = [f"{row['part']}: {row['name']}" for row in results.rows if "failed" in row or row.get("ok") is False]
    print(f"{len(results.rows)} rows, {len(failed)} failed or wrong{': ' if failed else ''}{'; '.join(failed)}")


def run(day: Day, only: Sequence[str], seconds: float) -> None:
    """Runs parts one after the other, each in its share of the time that is left."""
    end = time.monotonic() + seconds

    def over(*_: Any) -> None:
        raise TimeOver

    before = signal.signal(signal.SIGALRM, over)
    try:
        parts_of(day, only, end)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def parts_of(day: Day, only: Sequence[str], end: float) -> None:
    """The parts until a clock, each with an alarm."""
    parts = {"right": right, "latency": latency, "bookkeeping": bookkeeping, "replay": replay, "whole": whole}
    for k, part in enumerate(only):
        share = SHARES[part] / sum(SHARES[other] for other in only[k:])
        day.until = time.monotonic() + share * (end - time.monotonic())
        with day.fenced(part, part) as begins:
            if begins:
                signal.setitimer(signal.ITIMER_REAL, min(day.left + GRACE, max(end - time.monotonic(), 0.01)))
                parts[part](day)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The loop: in every round all solvers are asked for rows, one batch is evaluated, and each is told its outputs (protocol.py).

`solve` is a generator that yields a `Batch` and is sent the outputs; it returns a `Solution`. `drive` runs it with an
evaluator. One transfer a round, the numbers of all solvers together, waits for the device (a Parareal run's end waits once
more, to see that its sample is finite). Memory is O(window) states a sample, times the stride.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Generator
from typing import Any, TypeGuard

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.table import Table
from paradiff.solver.evaluator import Denoiser, Evaluator
from paradiff.solver.protocol import (
    Batch,
    EditedOutputs,
    Evaluate,
    Method,
    Observer,
    OnFinal,
    Problem,
    Round,
)
from paradiff.solver.records import Record
from paradiff.solver.solution import Solution, Status

Rounds = Generator[Batch, Tensor | EditedOutputs, Solution]


def solve(
    table: Table,
    noise: Noise,
    method: Method,
    *,
    start: Tensor | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    observer: Observer | None = None,
    shared_window: bool = False,
    on_final: OnFinal | None = None,
    resolution: float | None = None,
) -> Rounds:
    """Solves all samples of `noise`; yields batches of rows and is sent the network's outputs.

    Args:
        table: The sampler.
        noise: x[0] and the noises of every sample.
        method: The method (`paradiff.methods`).
        start: `[B, ...]` states at node 0 to use instead of the noise's.
        device: Where states live.
        dtype: Dtype of states, float32 or float64.
        observer: Called after each round; it may ask the run to stop.
        shared_window: Each sample is a batch `[b, ...]` of members that share its window (protocol.py).
        on_final: Called with the states of every stretch of nodes that became final, in order; for one sample, and methods with
            dense output.
        resolution: Relative precision of the network's outputs; that of the states by default.

    Returns:
        The solution, as the generator's value.

    Raises:
        ValueError: If an argument is of another kind, the method does not fit the table, `start` does not fit the noise,
            `dtype` is neither float32 nor float64, the model returns NaN or infinity where the sequential chain would meet it
            too, or states were changed under a method that cannot follow that.
    """
    begin = time.perf_counter()
    _refuse_other_kinds(table, noise, method)
    if on_final is not None and not method.dense_output:
        raise ValueError(
            f"{method.name} keeps the states of a few nodes only, and cannot tell those of every node; use parasolver"
        )
    problem = Problem(
        table=table,
        noise=noise,
        start=start,
        device=torch.device(device),
        dtype=dtype,
        shared_window=shared_window,
        resolution=resolution,
        on_final=on_final,
    )
    return _rounds(problem, method, observer, begin)


@torch.inference_mode()
def _rounds(problem: Problem, method: Method, observer: Observer | None, begin: float) -> Rounds:
    """The loop of `solve`, which knows no method by name."""
    run = method.prepare(problem)
    solvers = [run.solver(k) for k in range(problem.noise.samples)]
    history: list[Record] = []
    rounds = evaluations = 0
    stopped = False
    while not stopped and (active := [s for s in solvers if not s.done]):
        queries = [s.ask() for s in active]
        counts = [len(q.nodes) for q in queries]
        nodes = torch.cat([q.nodes for q in queries])
        samples = torch.cat([torch.full((n,), s.sample) for s, n in zip(active, counts, strict=True)])
        x = queries[0].rows if len(queries) == 1 else torch.cat([q.rows for q in queries])
        answer = yield Batch(x, run.t[nodes], nodes, samples)
        rounds += 1
        evaluations += len(nodes)
        edited = isinstance(answer, EditedOutputs)
        if edited and not method.follows_edits:
            raise ValueError(
                f"states were changed between steps, which {method.name} as it was given cannot follow, since it does not keep "
                "the state after every step; use parasolver or quasi_newton with a stride of 1"
            )
        outputs = (answer.outputs if edited else answer).split(counts)
        states = answer.states.split(counts) if edited else [None] * len(active)
        told = [s.tell(q, m, x) for s, q, m, x in zip(active, queries, outputs, states, strict=True)]
        swept = [(s, norms) for s, norms in zip(active, told, strict=True) if norms is not None]
        records: list[Record] = []
        if swept:
            numbers = torch.cat([norms for _, norms in swept]).tolist()  # the round's one wait for the device
            for solver, norms in swept:
                records.append(solver.advance(numbers[: len(norms)], rounds))
                numbers = numbers[len(norms) :]
        history += records
        if observer is not None:
            stopped = bool(observer(Round(rounds, records, solvers))) and not all(s.done for s in solvers)
    estimates = [s.error_estimate for s in solvers]
    if stopped:
        estimates = [
            e if s.done else dataclasses.replace(e, estimated_error=math.inf) for s, e in zip(solvers, estimates, strict=True)
        ]
        status, message = Status.STOPPED, Status.STOPPED.message(f"the observer asked for it after round {rounds}")
    else:
        run.close()
        status, message = run.status(estimates)
    sample = torch.stack([s.final if s.done else s.newest for s in solvers])
    return Solution(
        sample=sample,
        status=status,
        message=message,
        rounds=rounds,
        evaluations=evaluations,
        seconds=time.perf_counter() - begin,
        error_estimates=estimates,
        history=history,
    )


def drive(rounds: Rounds, evaluate: Callable[[Batch], Tensor | EditedOutputs]) -> Solution:
    """Runs a solver, as `solve` returns it, with an evaluator, or with any function of a batch that returns its outputs.

    Raises:
        ValueError: As the solver and the evaluator do.
        RuntimeError: If the evaluator raises StopIteration.
    """
    batch = next(rounds)
    while True:
        try:
            outputs = evaluate(batch)
        except StopIteration as error:
            raise RuntimeError("the model raised StopIteration; catch it in the model") from error
        try:
            batch = rounds.send(outputs)
        except StopIteration as end:
            return end.value


def sample(
    denoiser: Denoiser | Evaluate,
    table: Table,
    noise: Noise,
    method: Method,
    *,
    start: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    observer: Observer | None = None,
) -> Solution:
    """Samples with one model on one device: drives `solve` with an evaluator.

    Args:
        denoiser: The model as a function `(x, t) -> m` of rows (evaluator.py), or an evaluator: anything with the members of
            `Evaluate`.
        table: The sampler.
        noise: x[0] and the noises of every sample.
        method: The method (`paradiff.methods`).
        start: `[B, ...]` states at node 0 to use instead of the noise's.
        dtype: Dtype of states, float32 or float64.
        observer: Called after each round; it may ask the run to stop.

    Raises:
        ValueError: As `solve` and `Evaluator` do.
    """
    evaluate = denoiser if evaluates(denoiser) else Evaluator(_model(denoiser))
    _refuse_other_lengths(evaluate, noise)
    resolution = None if evaluate.dtype is None else torch.finfo(evaluate.dtype).eps
    rounds = solve(
        table, noise, method, start=start, device=evaluate.device, dtype=dtype, observer=observer, resolution=resolution
    )
    return drive(rounds, evaluate)


def evaluates(given: Any) -> TypeGuard[Evaluate]:
    """Whether an object is an evaluator rather than a model: it has a device and a dtype and is called with a batch alone,
    where a model is called with states and times."""
    if isinstance(given, Evaluator):
        return True
    if not (callable(given) and hasattr(given, "device") and hasattr(given, "dtype")):
        return False
    try:
        inspect.signature(given).bind(None, None)
    except TypeError:
        return True
    except ValueError:
        return False
    return False


def _model(given: Any) -> Any:
    if not callable(given):
        raise ValueError(
            f"the model is a {type(given).__name__}; give a function of states [R, ...] and times [R] that returns outputs "
            "[R, ...], or an Evaluator"
        )
    return given


def _refuse_other_kinds(table: Any, noise: Any, method: Any) -> None:
    """Refuses arguments of another kind, each by its name.

    Raises:
        ValueError: If there is one.
    """
    if not isinstance(table, Table):
        raise ValueError(
            f"the table is a {type(table).__name__}; give a Table, such as paradiff.samplers.ddpm(schedule, 1000), or "
            "paradiff.from_scheduler(scheduler) for a scheduler of diffusers"
        )
    if not all(hasattr(noise, name) for name in ("samples", "shape", "start", "draw")):
        raise ValueError(
            f"the noise is {_shown(noise)}; give a Noise, such as paradiff.Keyed(shape, seed=0) for states of a shape, or "
            "paradiff.Recorded(shape, generator)"
        )
    if not isinstance(method, Method) or isinstance(method, type):
        call = ", which has to be called" if callable(method) else ""
        raise ValueError(f"the method is {_shown(method)}{call}; give one of the presets, such as paradiff.parasolver()")


def _refuse_other_lengths(evaluate: Evaluate, noise: Any) -> None:
    """Refuses conditioning that has not one row for each sample.

    Raises:
        ValueError: If an evaluator has such.
    """
    samples = getattr(noise, "samples", None)
    for name, value in (evaluate.conditioning if isinstance(evaluate, Evaluator) else {}).items():
        if samples is not None and len(value) != samples:
            raise ValueError(
                f"the conditioning {name!r} has {len(value)} rows; the noise has {samples} samples, and each needs one row"
            )


def _shown(value: Any) -> str:
    """What was given, for a sentence."""
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}" if not isinstance(value, type) else f"the class {value.__name__}"
    return f"{value!r}" if isinstance(value, str | int | float) else f"a {type(value).__name__}"

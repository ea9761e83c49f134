# SPDX-License-Identifier: Apache-2.0
"""What the loop is handed, and what it refuses: arguments of another kind, outputs that are not one a row, and answers of a
solver that are no query, no norms or no record."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from paradiff.chain.plain import is_plain
from paradiff.chain.table import Table
from paradiff.errors import are_whole, require_whole, shown
from paradiff.solver.protocol import EditedOutputs, Evaluate, Method, Query, Remembers
from paradiff.solver.records import Record
from paradiff.solver.solution import Solution
from paradiff.solver.trajectory import Trajectory

Start = Tensor | Solution | Trajectory | str | Path | None
"""States at node 0, or what to begin from."""

NOISE = ("samples", "shape", "start", "draw")
METHOD = ("name", "tolerance", "dense_output", "solves_chain", "follows_edits")
METHOD += ("edges", "prepare", "reference", "width", "progress", "in_loop")


def evaluates(given: Any) -> TypeGuard[Evaluate]:
    """Whether an object is an evaluator rather than a model: it has a device and a dtype and is called with a batch alone,
    where a model is called with states and times."""
    if isinstance(given, type) or not (callable(given) and hasattr(given, "device") and hasattr(given, "dtype")):
        return False
    try:
        inspect.signature(given).bind(None, None)
    except TypeError:
        return True
    except ValueError:
        return False
    return False


def require_model(given: Any) -> None:
    """Refuses what is no function of states and times.

    Raises:
        ValueError: Then.
    """
    if not callable(given) or isinstance(given, type):
        raise ValueError(
            f"the model is {shown(given)}; give a function of states [R, ...] and times [R] that returns outputs [R, ...], or "
            "an Evaluator"
        )


def require_problem(table: Any, noise: Any, method: Any) -> None:
    """Refuses a table, a noise or a method of another kind, any of them within a transform of `torch.func`, which would take
    the samples, made without derivatives, for constants, and within a mode whose tensors hold no numbers.

    Raises:
        ValueError: If there is one.
    """
    if peek_interpreter_stack() is not None:
        raise ValueError(
            "samples are asked for within a transform of torch.func (grad, vmap, jvp, ...), which no solver follows: they have "
            "no derivatives, and each is stopped by its own values; sample outside of it (noises have samples=), and transform "
            "within the model, if at all"
        )
    made = torch.empty(0, device="cpu")
    if type(made) is not Tensor:
        raise ValueError(
            f"samples are asked for within a mode of torch that makes each tensor a {type(made).__name__}, of which no solver "
            "can read numbers; sample outside of it"
        )
    if not isinstance(table, Table):
        raise ValueError(
            f"the table is {shown(table)}; give a Table, such as paradiff.samplers.ddpm(schedule, 1000), or "
            "paradiff.from_scheduler(scheduler) for a scheduler of diffusers"
        )
    if isinstance(noise, type) or not all(hasattr(noise, name) for name in NOISE):
        raise ValueError(
            f"the noise is {shown(noise)}; give a Noise, such as paradiff.Keyed(shape, seed=0) for states of a shape, or "
            "paradiff.Recorded(shape, generator)"
        )
    require_whole("the noise's samples", noise.samples, 1)
    if not are_whole(noise.shape) or not noise.shape or min(noise.shape) < 1:
        raise ValueError(
            f"the noise's shape is {shown(noise.shape)}; it must be a sequence of whole numbers, one at least, each at least 1"
        )
    require_method("method", method)


def require_method(name: str, method: Any) -> None:
    """Refuses what is no method.

    Raises:
        ValueError: Then.
    """
    if isinstance(method, type) or not isinstance(method, Method):
        missing = [name for name in METHOD if not hasattr(method, name)]
        if callable(method):
            why = ", which has to be called"
        else:
            why = f", which has no {', '.join(missing)}" if len(missing) < len(METHOD) else ""
        raise ValueError(f"the {name} is {shown(method)}{why}; give one of the presets, such as paradiff.parasolver()")


def require_callable(name: str, value: Any, expected: str) -> None:
    """Refuses what is given for a function and is none.

    Raises:
        ValueError: Then.
    """
    if value is not None and (not callable(value) or isinstance(value, type)):
        raise ValueError(f"{name} is {shown(value)}; give {expected}")


def require_states(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Refuses what is no dense tensor of real numbers of a shape.

    Raises:
        ValueError: Then.
    """
    if not is_plain(value) or not value.is_floating_point():
        raise ValueError(f"{name} is {shown(value)}; give a dense tensor of real numbers of shape {shape}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; the noise has {shape}: samples, then one sample's shape")


def require_start(table: Table, start: Any, shape: tuple[int, ...]) -> None:
    """Refuses states at node 0 of another shape, and a slice of a chain without any.

    Raises:
        ValueError: Then.
    """
    if start is not None:
        require_states("start", start, shape)
    elif table.first:
        raise ValueError(
            f"table {table.name!r} begins at node {table.first} of its chain, where the states are not noise alone; give them: "
            f"start=, a tensor of shape {shape}"
        )


def begun(start: Any, trajectory: Any) -> tuple[Tensor | None, Trajectory | None]:
    """States at node 0 and a trajectory, from what `start` and `trajectory` were given.

    Raises:
        ValueError: If a solution has no trajectory, a file holds none, or two are given.
    """
    found = None
    if hasattr(start, "trajectory"):  # a solution, or a report of a pipeline's call
        if start.trajectory is None:
            raise ValueError(
                f"start is a {type(start).__name__} whose trajectory was not kept; give keep_trajectory=True to the run that "
                "it comes from"
            )
        found = start.trajectory
    elif isinstance(start, Trajectory):
        found = start
    elif isinstance(start, str | Path):
        found = Trajectory.load(start)
    if trajectory is not None and not isinstance(trajectory, Trajectory):
        raise ValueError(f"trajectory is {shown(trajectory)}; give a Trajectory, such as a solution's, or None")
    if found is None:
        return cast("Tensor | None", start), trajectory  # which `require_start` sees to
    if trajectory is not None:
        raise ValueError("start and trajectory are both trajectories; give one")
    return None, found


def require_warm(method: Method, trajectory: Trajectory | None, keep: Any) -> None:
    """Refuses a method that cannot begin from a trajectory, or keep its own.

    Raises:
        ValueError: Then.
    """
    if not isinstance(keep, bool):
        raise ValueError(f"keep_trajectory is {shown(keep)}; give True or False")
    if keep and not isinstance(method, Remembers):
        raise ValueError(f"{method.name} keeps no trajectory; use quasi_newton, parasolver or collocation")
    if trajectory is not None:
        require_begins(method)


def require_begins(method: Method) -> None:
    """Refuses a method that cannot begin from a trajectory.

    Raises:
        ValueError: Then.
    """
    why = method.cannot_begin() if isinstance(method, Remembers) else "it has no use for the states of an earlier run"
    if why is not None:
        raise ValueError(
            f"{method.name} cannot begin from a trajectory: {why}; leave start out, or use quasi_newton, parasolver or "
            "collocation"
        )


def device_of(value: Any) -> torch.device:
    """A device that tensors can be made on.

    Raises:
        ValueError: If it is none, or not to be had here.
    """
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (TypeError, ValueError, RuntimeError, AssertionError, OverflowError) as error:
        raise ValueError(f"the device is {shown(value)}, which is not available here; give cpu, cuda or another") from error
    if device.type == "meta":
        raise ValueError("the device is 'meta', which holds no numbers; give cpu, cuda or another")
    return device


def require_rows(max_rows: Any) -> None:
    """Refuses a bound on rows that is no whole number.

    Raises:
        ValueError: Then.
    """
    if max_rows is not None:
        require_whole("max_rows", max_rows, 1, ", or None for no bound")


def require_dtype(dtype: Any) -> None:
    """Refuses what is no dtype of real numbers.

    Raises:
        ValueError: Then.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"the network's dtype is {shown(dtype)}; give one of torch, such as torch.float16, or None")


def outputs_of(answer: Any, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Outputs, and edited states if there are any, of what a solver was sent for some rows `[R, ...]`.

    Raises:
        ValueError: If these are not tensors of the rows' shape, dtype and device.
    """
    edited = isinstance(answer, EditedOutputs)
    outputs, states = (answer.outputs, answer.states) if edited else (answer, None)
    for name, value in (("outputs", outputs), ("edited states", states))[: 1 + edited]:
        if not isinstance(value, Tensor):
            raise ValueError(f"the {name} of {len(rows)} rows are {shown(value)}; send one tensor, one entry for each row")
        if value.shape != rows.shape:
            raise ValueError(
                f"the {name} have shape {tuple(value.shape)} for rows of shape {tuple(rows.shape)}; send one entry for each "
                "row, of its shape"
            )
        if (value.dtype, value.device) != (rows.dtype, rows.device):
            raise ValueError(
                f"the {name} are {value.dtype} on {value.device} for rows of {rows.dtype} on {rows.device}; send them in the "
                "dtype of the rows, on their device"
            )
    return outputs, states


def query_of(answer: Any, method: str) -> Query:
    """The query that a solver's `ask` returned.

    Raises:
        ValueError: If it is none, or not a state for each of at least one node.
    """
    nodes, rows = getattr(answer, "nodes", None), getattr(answer, "rows", None)
    if not isinstance(nodes, Tensor) or not isinstance(rows, Tensor):
        raise ValueError(
            f"`ask` of a solver of {method} returned {shown(answer)}; return a Query of nodes [R] and rows [R, ...]"
        )
    if nodes.ndim != 1 or rows.ndim == 0 or len(nodes) != len(rows) or len(nodes) == 0:
        raise ValueError(
            f"`ask` of a solver of {method} returned nodes of shape {tuple(nodes.shape)} with rows of shape "
            f"{tuple(rows.shape)}; return nodes [R] with rows [R, ...], R at least 1, or be done"
        )
    return answer


def norms_of(answer: Any, method: str) -> Tensor | None:
    """The numbers that a solver's `tell` returned; None in the midst of a sweep.

    Raises:
        ValueError: If they are neither.
    """
    if answer is not None and not (isinstance(answer, Tensor) and answer.ndim == 1):
        raise ValueError(
            f"`tell` of a solver of {method} returned {shown(answer)}; return a tensor [W] of norms, or None in the midst of a "
            "sweep"
        )
    return answer


def record_of(answer: Any, method: str) -> Record:
    """The record that a solver's `advance` returned.

    Raises:
        ValueError: If it is none.
    """
    missing = [name for name in ("round", "sample", "passed", "to_json", "trace") if not hasattr(answer, name)]
    if missing:
        raise ValueError(
            f"`advance` of a solver of {method} returned {shown(answer)}, which has no {', '.join(missing)}; return a Record, "
            "such as a WindowRecord"
        )
    return answer

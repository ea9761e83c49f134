# SPDX-License-Identifier: Apache-2.0
"""Which model, chain and machine a measurement is of."""

from __future__ import annotations

import dis
import functools
import hashlib
import platform
import re
from collections.abc import Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch

from paradiff.chain.table import Table
from paradiff.planning.store import digest
from paradiff.solver.agreement import described, reach, versions
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.protocol import Evaluate

PLAIN = (bool, int, float, str)

DERIVED = re.compile(r"(^|\.)_(?!orig_mod)")
"""Names of tensors that an object keeps for itself: they may have been made since."""


def model_facts(model: Any) -> list[Any]:
    """What tells a model from others without reading its weights: its class or code, its parameters' shapes and dtypes, and its
    config."""
    found = {name: tensor for name, tensor in reach(model).items() if not DERIVED.search(name)}
    shapes = sorted((name, [*tensor.shape], str(tensor.dtype)) for name, tensor in found.items())
    config = getattr(model, "config", None)
    settings = sorted((str(k), str(v)) for k, v in config.items()) if isinstance(config, Mapping) else []
    return [_named(model), shapes, settings]


def _named(value: Any) -> Any:
    """A class by its name; a function also by its code and the plain values that it holds."""
    if isinstance(value, functools.partial):
        return ["partial", _named(value.func), [_held(v) for v in (*value.args, *value.keywords.values())]]
    if isinstance(value, MethodType):
        return [_named(value.__func__), _named(value.__self__)]
    if isinstance(value, FunctionType):
        code = value.__code__
        written = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_DEREF"}
        cells = zip(code.co_freevars, value.__closure__ or (), strict=True)
        cells = [_held(content_of(cell)) for name, cell in cells if name not in written]  # a counter is no property
        return [value.__module__, value.__qualname__, hashlib.sha256(code.co_code).hexdigest()[:16], cells]
    kind = type(value)
    return [kind.__module__, kind.__qualname__]


def _held(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    return _named(value) if callable(value) else type(value).__qualname__


def content_of(cell: Any) -> Any:
    """What a function holds in a cell; None where it was not filled yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def evaluator_key(evaluate: Evaluate) -> str:
    """The key of a model with its conditioning, dtype and kind of device."""
    return digest(_conditioned(evaluate), str(evaluate.dtype), evaluate.device.type)


def network_key(evaluate: Evaluate, dtype: torch.dtype) -> str:
    """The same where the network has the dtype of the states, unless it has its own.

    Args:
        evaluate: The model.
        dtype: Dtype of the states.
    """
    return digest(_conditioned(evaluate), str(evaluate.dtype or dtype), evaluate.device.type)


def _conditioned(evaluate: Evaluate) -> list[Any]:
    if not isinstance(evaluate, Evaluator):
        return [model_facts(evaluate)]
    given = sorted((name, [*value.shape[1:]]) for name, value in evaluate.conditioning.items())
    return [model_facts(evaluate.denoiser), given, sorted(evaluate.shared)]


def curve_key(evaluate: Evaluate, shape: Sequence[int], key: str | None = None) -> str:
    """The key of the latency curve of a model on states of a shape.

    Args:
        evaluate: The model.
        shape: Number of samples, and the shape of one.
        key: The model's, where it was made before.
    """
    return digest(evaluator_key(evaluate) if key is None else key, [*shape])


def table_key(table: Table) -> str:
    """A digest of a chain's coefficients."""
    found = hashlib.sha256(table.name.encode())
    for values in (table.t, table.alpha, table.sigma, table.a, table.b, table.c, table.scale):
        found.update(values.to(torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()[:20]


def conditioning_keys(evaluate: Evaluate) -> list[str]:
    """A digest of each sample's conditioning, with that which all samples share; none where there is no conditioning."""
    if not isinstance(evaluate, Evaluator) or not (evaluate.conditioning or evaluate.shared):
        return []
    shared = digest(described(evaluate.shared))
    count = min((len(value) for value in evaluate.conditioning.values()), default=1)
    names = sorted(evaluate.conditioning)
    return [digest(shared, [described(evaluate.conditioning[name][k]) for name in names]) for k in range(count)]


def machine_facts(device: torch.device) -> dict[str, Any]:
    """The device and the versions that times depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} {name}", "threads": torch.get_num_threads(), **versions()}

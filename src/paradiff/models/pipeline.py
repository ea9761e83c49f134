# SPDX-License-Identifier: Apache-2.0
"""Pipelines from disk or the hub: any that diffusers itself can build, from safetensors, without code that comes with them."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import logging as diffusers_logging
from torch import nn

from paradiff.errors import refuse_unknown
from paradiff.models.files import components, folder_of, is_policy, loading, read_index, weight_files
from paradiff.models.network import check_values, load_network
from paradiff.models.pixel import EXPONENTIAL, SCHEDULERS
from paradiff.models.shared import shared_network
from paradiff.solver.machine import Machine

BETAS = "beta_schedule"


def load_pipeline(
    model: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    machine: Machine | None = None,
) -> DiffusionPipeline:
    """Loads a pipeline, quietly.

    Args:
        model: The name of a bundled model, a folder in diffusers' pipeline format, or a hub id.
        device: Where the networks go.
        dtype: Their dtype.
        trust_remote_code: Whether Python code that comes with the model may be run.
        machine: This machine's ranks, of which one reads the weights of denoisers, and the first rank of all those of the other
            networks, which no other rank holds (shared.py); None where each process reads all of them.

    Raises:
        ValueError: If there is no such model, it holds pickled weights or code, a component is missing, a package that it
            needs is not installed, or it cannot be read.
    """
    index = read_index(model)
    if is_policy(index):
        raise ValueError(f"{model!r} is a policy, which needs observations; load it by paradiff.models.load_policy")
    with _quiet():
        if not trust_remote_code:
            _check_code(model, index)
            _check_class(model, index)
        with nullcontext() if machine is None else machine.in_turn():
            folder = folder_of(model, trust_remote_code=trust_remote_code)
        if not trust_remote_code:
            _check_files(model, folder)
        given: dict[str, Any] = {name: None for name, part in index.items() if part == [None, None]}
        given |= _networks(model, folder, index, dtype, device, machine)
        _check_schedulers(model, folder, index)
        with loading(model):
            pipeline = DiffusionPipeline.from_pretrained(
                folder, use_safetensors=True, torch_dtype=dtype, trust_remote_code=trust_remote_code, **given
            )
        return pipeline.to(device)


def set_sampler(pipeline: Any, name: str) -> None:
    """Gives a pipeline another scheduler (`scheduler_named`)."""
    pipeline.scheduler = scheduler_named(pipeline, name)


def scheduler_named(pipeline: Any, name: str) -> Any:
    """Another scheduler for a pipeline, made of the config of its own.

    Args:
        pipeline: The pipeline.
        name: One of `pixel.SCHEDULERS`, or a scheduler class of diffusers.

    Raises:
        ValueError: If there is no such scheduler, or it does not fit the pipeline's.
    """
    own = pipeline.scheduler
    title = f"the {type(pipeline).__name__}"
    if name in EXPONENTIAL:
        raise ValueError(
            f"sampler {name!r} is no scheduler of diffusers, which {title} needs; give one of {', '.join(SCHEDULERS)}, or "
            "leave out --sampler"
        )
    fitting = sorted({kind.__name__ for kind in getattr(own, "compatibles", [])} | {type(own).__name__})
    kind = SCHEDULERS.get(name) or (getattr(diffusers, name, None) if name.endswith("Scheduler") else None)
    if kind is None:
        refuse_unknown("sampler", name, [*SCHEDULERS, *fitting])
    assert kind is not None
    if hasattr(kind, "_backends"):
        raise ValueError(f"sampler {name!r} needs {' and '.join(kind._backends)}; install what is missing, or give another")
    if BETAS in inspect.signature(kind).parameters and BETAS not in own.config:
        raise ValueError(
            f"sampler {name!r} is for schedules of betas, but {title} is a flow model, with a {type(own).__name__}; leave out "
            f"--sampler, or give one of {', '.join(fitting)}"
        )
    if kind.__name__ not in fitting:
        raise ValueError(f"sampler {name!r} does not fit the {type(own).__name__} of {title}; give one of {', '.join(fitting)}")
    with _quiet():
        return kind.from_config(own.config)


def _check_code(model: str, index: Mapping[str, Any]) -> None:
    """Refuses a model whose index names Python code."""
    found = [str(index["_class_name"][0]) + ".py"] if isinstance(index["_class_name"], list | tuple) else []
    found += [library + ".py" for library, _ in components(index).values() if _library(library) is None]
    _refuse_code(model, found)


def _check_files(model: str, folder: Path) -> None:
    """Refuses a folder that holds Python code."""
    _refuse_code(model, sorted(str(p.relative_to(folder)) for p in folder.rglob("*.py")))


def _refuse_code(model: str, found: Sequence[str]) -> None:
    if found:
        raise ValueError(
            f"{model!r} brings code of its own ({found[0]}), which loading it would run; give --trust-remote-code if you trust "
            "its author, or another model"
        )


def _check_class(model: str, index: Mapping[str, Any]) -> None:
    """Refuses a pipeline class that this diffusers does not have."""
    name = index["_class_name"]
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is not None and hasattr(kind, "_backends"):
        raise ValueError(f"{model!r} holds a {name}, which needs {' and '.join(kind._backends)}; {INSTALL}")
    if not isinstance(kind, type) or not issubclass(kind, DiffusionPipeline):
        raise ValueError(
            f"{model!r} holds a {name}, which diffusers {diffusers.__version__} has no class for; give another model, or "
            "install the diffusers that it was saved with"
        )


INSTALL = "install what is missing, such as transformers by pip install 'paradiff[text]'"


def _networks(
    model: str, folder: Path, index: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str, machine: Machine | None
) -> dict[str, nn.Module]:
    """The networks of a pipeline by name, each with all its weights; those of code that comes with it are left out."""
    kinds: dict[str, type[nn.Module]] = {}
    for part, (library, name) in components(index).items():
        if not (folder / part).is_dir():
            raise ValueError(
                f"the folder {str(folder)!r} has no {part}/, of which its model_index.json says that it holds a {name}; save "
                "the pipeline again"
            )
        kind = getattr(_library(library), name, None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            weight_files(folder, part)
            kinds[part] = kind
    read = {part: partial(load_network, model, kind, folder, part, dtype) for part, kind in kinds.items()}
    if machine is None:
        return {part: load() for part, load in read.items()}
    return {part: shared_network(read[part], kind, folder / part, device, machine) for part, kind in kinds.items()}


def _check_schedulers(model: str, folder: Path, index: Mapping[str, Any]) -> None:
    """Refuses a scheduler whose config has values of wrong kinds."""
    for part, (library, name) in components(index).items():
        kind: Any = getattr(diffusers, name, None) if library == "diffusers" else None
        if isinstance(kind, type) and issubclass(kind, SchedulerMixin):
            with loading(model):
                config = cast(Any, kind).load_config(folder, subfolder=part)
            check_values(kind, config if isinstance(config, dict) else {}, f"{part}/scheduler_config.json of {model!r}")


def _library(name: str) -> Any:
    """The module that a component's class comes from; None where it is neither diffusers' nor transformers'."""
    if name in ("diffusers", "transformers"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"the model has components of {name}, which is not installed; {INSTALL}") from error
    return getattr(diffusers.pipelines, name, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings nor progress bars while a pipeline is built."""
    logs: list[Any] = [diffusers_logging]
    with suppress(ImportError):
        logs.append(importlib.import_module("transformers.utils.logging"))
    levels, bars = [log.get_verbosity() for log in logs], [log.is_progress_bar_enabled() for log in logs]
    for log, bar in zip(logs, bars, strict=True):
        log.set_verbosity_error()
        if bar:
            log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level, bar in zip(logs, levels, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()

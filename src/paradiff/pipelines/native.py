# SPDX-License-Identifier: Apache-2.0
"""Parallel calls in the manners of the hosts: switched on and off as diffusers' own features are, and as a decorator.

paradiff.enable_parallel_in_time(pipe, paradiff.ParallelInTimeConfig(method=paradiff.parasolver(window=16)))
paradiff.is_parallel_in_time_enabled(pipe)  # True
paradiff.disable_parallel_in_time(pipe)

@paradiff.parallel(paradiff.parasolver(window=16), scheduler=scheduler, networks=[unet])
def denoise(x, text): ...
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from paradiff.pipelines.network.batching import Check
from paradiff.pipelines.run import Run, enabled_run, parallelize
from paradiff.pipelines.settings import Executor
from paradiff.solver.protocol import Method, Observer
from paradiff.solver.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, kw_only=True)
class ParallelInTimeConfig:
    """How the calls of a host are made in parallel over time. See `parallelize` for the meaning of each field."""

    method: Method | None = None
    entry: str | None = None
    scheduler: Any = None
    networks: Iterable[nn.Module] | None = None
    executor: Executor = "auto"
    max_rows: int | None = None
    pad: bool = False
    check: Check = "first"
    dtype: torch.dtype = torch.float32
    observer: Observer | None = None
    mesh: DeviceMesh | Ranks | None = None
    mesh_axis: str = "time"
    devices: Literal["all"] | Sequence[torch.device | str] | None = None
    shares: int | None = None


def enable_parallel_in_time(host: Any, config: ParallelInTimeConfig | None = None) -> Run:
    """Makes every call of a pipeline, or of another host, parallel over time until `disable_parallel_in_time`.

    Args:
        host: The pipeline or object (see `parallelize`).
        config: The settings; those of `parallelize` by default.

    Returns:
        The run, whose `report` is that of the last call.

    Raises:
        ValueError: If the host has no chain, is a function, or is parallel already, or a setting is unknown.
    """
    config = ParallelInTimeConfig() if config is None else config
    if not isinstance(config, ParallelInTimeConfig):
        raise ValueError(
            f"config is a {type(config).__name__}; give a ParallelInTimeConfig, such as "
            "ParallelInTimeConfig(method=paradiff.parasolver(window=16))"
        )
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return parallelize(host, given.pop("method"), **given).enable()


def disable_parallel_in_time(host: Any) -> None:
    """Gives a pipeline, or another host, its plain call back; without effect where no run is enabled.

    Args:
        host: The object that was enabled, or one that has the enabled one as a part.
    """
    run = enabled_run(host)
    if run is not None:
        run.disable()


def is_parallel_in_time_enabled(host: Any) -> bool:
    """Whether calls of a pipeline, or of another host, are parallel over time."""
    return enabled_run(host) is not None


def parallel(
    method: Method | None = None,
    *,
    scheduler: Any = None,
    networks: Iterable[nn.Module] | None = None,
    **options: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that makes the calls of a function with a denoising loop parallel over time.

    Args:
        method: The method, as for `parallelize`.
        scheduler: The scheduler whose times the loop walks over; None to look for it among the function's variables and
            arguments.
        networks: The torch modules that the loop calls; None to look for them there.
        options: Further options of `parallelize`.

    Returns:
        The decorator. What it returns is called like the function; its `run` is the `Run` with the reports.

    Raises:
        ValueError: If it is given something else than a function, or an option is unknown.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(function, staticmethod | classmethod) or not hasattr(function, "__code__"):
            raise ValueError(
                f"parallel was given a {type(function).__name__}; put it above a plain function with a denoising loop, or use "
                "paradiff.parallelize(object) for a method"
            )
        run = parallelize(function, method, scheduler=scheduler, networks=networks, **options)
        run.keep()

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            return run(*args, **kwargs)

        vars(called)["run"] = run
        return called

    if callable(method) and not isinstance(method, Method):
        raise ValueError("parallel was put above a function without brackets; write @paradiff.parallel()")
    return decorate

# SPDX-License-Identifier: Apache-2.0
"""What a call finds around it, outside of its objects: environment variables, context variables, torch's settings, the umask.

Files that a try wrote, threads and processes that it started, and the state of other libraries stay as the try left them.
"""

from __future__ import annotations

import contextvars
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paradiff.chain.home import default_device


def _umask() -> int | None:
    """The umask; None where the system does not tell it without setting it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1], 8) for line in lines if line.startswith("Umask:")), None)


def _folder() -> str | None:
    """The working directory; None where it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (
        default_device,
        lambda value: torch.set_default_device(None if value.type == "cpu" else value),
    ),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
    "detection of anomalies": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "precision of products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "benchmarks of cuDNN": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    ),
    "TF32 of cuDNN": (
        lambda: torch.backends.cudnn.allow_tf32,
        lambda value: setattr(torch.backends.cudnn, "allow_tf32", value),
    ),
    "recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "working directory": (_folder, os.chdir),
    "umask": (_umask, os.umask),
}
"""What a try puts back, each with the functions that read and set it."""


class Surroundings:
    """The surroundings at the time of its making."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._context: dict[contextvars.ContextVar[Any], Any] = dict(contextvars.copy_context())
        self._settings = {name: read() for name, (read, _) in SETTINGS.items()}

    def restore(self) -> None:
        """Puts them back. A context variable that was set since, and had no value before, keeps its value."""
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        for name, value in self._environment.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
        for variable, value in self._context.items():
            if variable.get(None) is not value:
                variable.set(value)
        for name, (read, write) in SETTINGS.items():
            before = self._settings[name]
            if before is not None and read() != before:
                write(before)

# SPDX-License-Identifier: Apache-2.0
"""What a run computes on and a figure was measured on: device, hardware, threads, versions."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version

import torch

from paradiff.app import launched
from paradiff.solver.replicas import devices_of

DEVICES = re.compile(r"cpu|cuda(:[0-9]+)?|mps")
"""Names of devices, beside `auto`."""

THREADS_PER_CORE = 4
"""Most threads that a core is asked to bear: far above, the runtime of threads runs out of memory and ends the process."""


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Hardware, threads and versions of this process, as `run.json` and the benchmarks record them.

    Args:
        device: Where the network lives.
    """
    device = torch.device(device)
    found: dict[str, str | int] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in ("paradiff", "diffusers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def use_threads(threads: int | None) -> None:
    """Bounds the CPU's threads.

    Raises:
        ValueError: If the bound is below 1, or far above the machine's cores.
    """
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        cores = os.cpu_count() or 1
        if threads > THREADS_PER_CORE * cores:
            raise ValueError(f"threads is {threads}; this machine has {cores} cores: give at most {THREADS_PER_CORE * cores}")
        torch.set_num_threads(threads)


def choose_device(name: str) -> torch.device:
    """A device by name; `auto` is a GPU if there is one, and on several ranks each takes the one of its number.

    Raises:
        ValueError: If the name is no device's, or there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and launched.size() > 1:
        name = f"cuda:{launched.local_rank()}"
    if not DEVICES.fullmatch(name):
        raise ValueError(f"device is {name!r}; use cpu, cuda, cuda:1, mps or auto")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available; use cpu or auto") from error
    return device


def choose_devices(names: str) -> list[torch.device]:
    """The devices that share the rows of each round.

    Args:
        names: What `choose_device` takes, `all`, or names with commas between them.

    Raises:
        ValueError: If one of them is not to be had, or there are several and several processes.
    """
    if names != "all" and "," not in names:
        return [choose_device(names)]
    if launched.size() > 1:
        raise ValueError(
            f"--device is {names!r}, which is for one process, but torchrun started {launched.size()} ranks; leave it out: "
            "each rank takes the device of its number"
        )
    return devices_of(names if names == "all" else [name.strip() for name in names.split(",")])

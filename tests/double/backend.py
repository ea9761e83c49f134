# SPDX-License-Identifier: Apache-2.0
"""The backend of the double: compiled once for a user, and registered with torch."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from packaging.version import Version

from double import graphs

SOURCE = Path(__file__).with_name("pseudo.cpp")
OLDEST = "2.13"
"""The first torch whose interface for backends the double was written for."""


def missing() -> str | None:
    """Why the double cannot be had here; None where it can."""
    if Version(torch.__version__) < Version(OLDEST):
        return f"the device double needs the interface for backends of torch {OLDEST}; this is torch {torch.__version__}"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++")):
        return "the device double is compiled, and there is no C++ compiler here; install g++ or set CXX"
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        return "the device double is compiled by ninja, which is not installed; it is in the extra dev"
    return None


@functools.cache
def load() -> Any:
    """The extension module, with `pseudo` registered as a device of torch.

    The first call of a user compiles it, in about a minute; others wait for that, and find it in torch's folder of extensions.
    """
    extension = _compiled()
    torch.utils.rename_privateuse1_backend("pseudo")
    torch._register_device_module("pseudo", _module(extension))
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    _tell_compiler(extension)
    torch.random._fork_rng_warned_already = True  # of its time where there are several devices; other tests run in this process
    return extension


def _compiled() -> Any:
    from torch.utils import cpp_extension

    version = f"{torch.__version__} {sys.version_info[:2]}"
    name = "paradiff_pseudo_" + hashlib.sha256(SOURCE.read_bytes() + version.encode()).hexdigest()[:12]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions") / name
    folder.mkdir(parents=True, exist_ok=True)
    library, done = folder / f"{name}.so", folder / "done"
    with FileLock(folder / "one_at_a_time"):
        if not done.exists():
            _with_ninja()
            (folder / "lock").unlink(missing_ok=True)  # torch's own, which a killed run leaves behind
            extension = cpp_extension.load(name, [str(SOURCE)], extra_cflags=["-O1", "-w"], build_directory=str(folder))
            done.touch()
            return extension
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def _with_ninja() -> None:
    """Puts the environment's ninja within reach, where Python was called by its path."""
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])


def _module(extension: Any) -> types.ModuleType:
    """`torch.pseudo`, with what torch, diffusers and accelerate look for in the module of a device."""
    module = types.ModuleType("torch.pseudo")

    def index(device: Any = None) -> int:
        if device is None:
            return extension.current_device()
        found = device if isinstance(device, int) else torch.device(device).index
        return extension.current_device() if found is None else found

    class Device:
        """Makes a device the current one for a while."""

        def __init__(self, device: Any) -> None:
            self.index = index(device)

        def __enter__(self) -> None:
            self.before = extension.exchange_device(self.index)

        def __exit__(self, *error: object) -> None:
            extension.exchange_device(self.before)

    def get_rng_state(device: Any = "pseudo") -> torch.Tensor:
        return extension.default_generator(index(device)).get_state()

    def set_rng_state(state: torch.Tensor, device: Any = "pseudo") -> None:
        extension.default_generator(index(device)).set_state(state)

    def manual_seed_all(seed: int) -> None:
        for number in range(extension.device_count()):
            extension.default_generator(number).manual_seed(seed)

    vars(module).update(
        device=Device,
        **{name: getattr(graphs, name) for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph")},
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        _lazy_init=lambda: None,
        init=lambda: None,
        device_count=extension.device_count,
        current_device=extension.current_device,
        set_device=lambda device: extension.exchange_device(index(device)),
        synchronize=lambda device=None: torch.accelerator.synchronize(index(device)),
        empty_cache=lambda: None,
        memory_allocated=lambda device=None: extension.held(index(device)),
        memory_reserved=lambda device=None: extension.held(index(device)),
        max_memory_allocated=lambda device=None: extension.peak(index(device)),
        reset_peak_memory_stats=lambda device=None: extension.reset_peak(index(device)),
        manual_seed=lambda seed: extension.default_generator(extension.current_device()).manual_seed(seed),
        manual_seed_all=manual_seed_all,
        get_rng_state=get_rng_state,
        get_rng_state_all=lambda: [get_rng_state(number) for number in range(extension.device_count())],
        set_rng_state=set_rng_state,
        set_rng_state_all=lambda states: [set_rng_state(state, number) for number, state in enumerate(states)],
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        is_bf16_supported=lambda: True,
    )
    return module


def _tell_compiler(extension: Any) -> None:
    """Registers what `torch.compile` asks of a device."""
    from torch._dynamo.device_interface import DeviceInterface, register_interface_for_device

    class Interface(DeviceInterface):
        @staticmethod
        def is_available() -> bool:
            return True

        @staticmethod
        def device_count() -> int:
            return extension.device_count()

        @staticmethod
        def current_device() -> int:
            return extension.current_device()

        @staticmethod
        def set_device(device: Any) -> None:
            torch.pseudo.set_device(device)  # pyright: ignore[reportAttributeAccessIssue]

        @staticmethod
        def exchange_device(device: int) -> int:
            return extension.exchange_device(device)

        @staticmethod
        def maybe_exchange_device(device: int) -> int:
            return extension.exchange_device(device)

        @staticmethod
        def synchronize(device: Any = None) -> None:
            torch.accelerator.synchronize(device)

        @staticmethod
        def is_bf16_supported(including_emulation: bool = False) -> bool:
            return True

        @staticmethod
        def is_triton_capable(device: Any = None) -> bool:
            return False

    register_interface_for_device("pseudo", Interface)
    for number in range(extension.device_count()):
        register_interface_for_device(f"pseudo:{number}", Interface)

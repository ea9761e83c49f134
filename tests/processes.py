# SPDX-License-Identifier: Apache-2.0
"""Functions run as the ranks of a mesh, each in a process of its own with one thread, on gloo."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

PATIENCE = 90
"""Seconds after which a test's processes are killed."""

Job = Callable[..., Any]
"""`job(mesh, *arguments)`, a function of a module; what it returns pickles."""


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes:
        value: What its job returned; None where it raised.
        error: The kind and the text of what it raised; empty where it returned.
        code: The exit code of its process; of a signal the negative number.
    """

    value: Any
    error: str
    code: int | None


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    # The recorder of torch keeps the last 2000 collectives, between whose entries memory of freed tensors lies unused.
    return {"MASTER_ADDR": "127.0.0.1", "TORCH_FR_BUFFER_SIZE": "0", **{name: str(value) for name, value in names.items()}}


def on_ranks(size: int, job: Job, *arguments: Any, axes: Mapping[str, int] | None = None) -> list[Ended]:
    """Runs a job on every rank of a mesh, by default of one axis, `time`; how each ended."""
    return processes(size, _meshed, job, axes or {"time": size}, *arguments)


def processes(size: int, job: Job, *arguments: Any) -> list[Ended]:
    """Runs `job(*arguments)` in processes with torchrun's environment; how each ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.device_mesh", "diffusers", "paradiff.pipelines.run", "pytest"])
    port, started = free_port(), []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(sender, environment(rank, size, port), job, arguments))
        process.start()
        sender.close()
        started.append((process, receiver))
    return [_ended(process, receiver) for process, receiver in started]


def _rank(sender: Connection, variables: dict[str, str], job: Job, arguments: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        sender.send_bytes(pickle.dumps((job(*arguments), "")))
    except BaseException as error:
        sender.send_bytes(pickle.dumps((None, f"{type(error).__name__}: {error}")))
        if os.environ.get("PARADIFF_TRACEBACK"):
            traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out


def _meshed(job: Job, axes: Mapping[str, int], *arguments: Any) -> Any:
    dist.init_process_group("gloo")
    mesh: DeviceMesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
    value = job(mesh, *arguments)
    dist.destroy_process_group()
    return value


def _ended(process: Any, receiver: Connection) -> Ended:
    value, error = None, ""
    if receiver.poll(PATIENCE):
        try:
            value, error = pickle.loads(receiver.recv_bytes())
        except EOFError:
            error = "no word"
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        return Ended(None, "left over", None)
    return Ended(value, error, process.exitcode)

# SPDX-License-Identifier: Apache-2.0
"""A command on several ranks: `torchrun --nproc-per-node 8 -m paradiff ...` starts it once a rank, with the same arguments.

torchrun tells each process its rank by environment variables, as Slurm's `srun` can be made to. All ranks compute; the one of
rank 0 writes the files and shows the figures.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from paradiff.app.outcome import CutShort
from paradiff.errors import RanksFailed, require_whole

if TYPE_CHECKING:
    import torch

    from paradiff.solver.ranks import Ranks

TIMEOUT = 600.0
"""Seconds within which the ranks end where one of them stops or hangs."""

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets."""

LAUNCHER = "TORCHELASTIC_RUN_ID"
"""What torchrun sets besides, in processes that are all its own."""

HERE = "paradiff/here/"
"""Beginning of the keys by which ranks say that they have come."""

OWN = ("out", "device", "threads")
"""Options that ranks may be given differently."""


def rank() -> int:
    """This process's rank; 0 where it is the only one."""
    return _number("RANK") if size() > 1 else 0


def size() -> int:
    """The number of ranks that were started.

    Raises:
        ValueError: If a variable of torchrun's is no number.
    """
    return max(1, _number("WORLD_SIZE")) if all(name in os.environ for name in NEEDED) else 1


def local_rank() -> int:
    """This process's rank among those of its host."""
    return _number("LOCAL_RANK") if size() > 1 else 0


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    try:
        number = int(text)
    except ValueError:
        number = -1
    require_whole(f"the environment variable {name}", number if number >= 0 else text, 0, ", as torchrun sets it")
    return number


@contextmanager
def team(options: Mapping[str, Any], device: torch.device) -> Iterator[Ranks | None]:
    """The ranks of a command, for as long as the block lasts; None where there is one.

    An error in the block ends it on all ranks, and where another rank is at fault, its sentence is raised.

    Args:
        options: What was typed, by name; the same on all ranks, but for what each may have for itself.
        device: This rank's device.

    Raises:
        RanksFailed: If ranks do not come together, were started with different arguments, or one of them fails.
    """
    if size() == 1:
        yield None
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from paradiff.solver.agreement import versions
    from paradiff.solver.ranks import Ranks
    from paradiff.solver.watch import ENDING, end_stopped, name_of

    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")  # no records between tensors, where they keep memory from use
    timeout = TIMEOUT if options["timeout"] is None else options["timeout"]
    limit = datetime.timedelta(seconds=timeout - min(ENDING, timeout / 5))
    board = None
    try:
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        board, *_ = next(iter(dist.rendezvous("env://", timeout=limit)))
        board.set(f"{HERE}{rank()}", name_of(rank(), size()))
        dist.init_process_group(backend, store=board, rank=rank(), world_size=size(), timeout=limit)
        mesh = init_device_mesh(device.type, (size(),), mesh_dim_names=("time",))
    except (RuntimeError, ValueError) as error:
        line = next(iter(str(error).splitlines()), "")
        absent = _absent(board, end_stopped() if LAUNCHER in os.environ else [])
        raise RanksFailed(
            f"the {size()} ranks did not come together within {timeout:g} s ({absent}rank {rank()} met {type(error).__name__}: "
            f"{line[:200]}): start all of them, and see that they reach {os.environ['MASTER_ADDR']}"
        ) from error
    ranks = Ranks(mesh, timeout=timeout)
    try:
        shared = {name: repr(value) for name, value in options.items() if name not in OWN}
        ranks.agree(versions("diffusers", "transformers"))
        ranks.agree({f"--{name.replace('_', '-')}" if name != "model" else name: value for name, value in shared.items()})
        with _warnings_of_one():
            yield ranks
        ranks.agree({})  # all have come to the end
    except BaseException as error:
        cause = error.__cause__ if isinstance(error, CutShort) else error
        if cause is not None and (other := ranks.ended(cause)) is not None:
            raise other from error
        raise
    ranks.close()
    dist.destroy_process_group()


def _absent(board: Any, stopped: Sequence[int]) -> str:
    """The ranks that are at fault, as the beginning of a sentence; empty where they cannot be known.

    Args:
        board: The ranks' store; None where there is none.
        stopped: Processes that a signal had stopped.
    """
    from paradiff.solver.watch import joined

    told: list[str] = []
    with suppress(RuntimeError):
        if absent := [] if board is None else [f"rank {one}" for one in range(size()) if not board.check([f"{HERE}{one}"])]:
            told.append(f"{joined(absent)} did not come")
    if stopped:
        processes = joined([f"process {one}" for one in stopped])
        told.append(f"{processes} on this machine {'was' if len(stopped) == 1 else 'were'} stopped by a signal")
    return "".join(f"{one}; " for one in told)


@contextmanager
def _warnings_of_one() -> Iterator[None]:
    """Has rank 0 alone show warnings; that on idle ranks in a line of its own, without the place in the code."""
    from paradiff.solver.sharded import IdleRanks

    with warnings.catch_warnings():
        shown = warnings.showwarning

        def told(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, IdleRanks):
                print(f"warning: {message}", file=sys.stderr)
            else:
                shown(message, category, *where)

        if rank() > 0:
            warnings.simplefilter("ignore")
        warnings.showwarning = told
        yield


def clock_of(ranks: Ranks | None) -> Callable[[], float]:
    """A clock that tells all ranks the same."""
    return time.perf_counter if ranks is None else ranks.tell


def leave(code: int) -> None:
    """Ends the process. On ranks that could not end together, threads of `torch.distributed` may wait for others in vain."""
    if size() > 1 and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

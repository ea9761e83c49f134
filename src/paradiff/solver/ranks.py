# SPDX-License-Identifier: Apache-2.0
"""The ranks of a run: processes that each run the same solver, and share the rows of its rounds.

Ranks meet in exchanges, counted from 1 in the order in which each of them makes its calls, which is the same on all. An
exchange has two parts. Before a rank computes, it sends a few numbers that say what it is about to do, and these go while the
networks compute. After it has computed, it sees that all ranks are about to do the same, and one collective moves the bytes:
each rank's block, whose length all others know, to all ranks. A rank that waits looks at the watch (watch.py), which knows who
is gone.

The blocks go over the mesh's own group, NCCL's for a network on GPUs; the numbers go over a group of gloo on the host. No group
is made before `Ranks` is.
"""

from __future__ import annotations

import datetime
import io
import json
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from paradiff.errors import RanksFailed, require_one_of, require_real, shown
from paradiff.solver.watch import CALL, OWN, WAIT, Board, Process, Watch, joined, patience_of, storeless, this_process

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Balance = Literal["even", "speed"]
"""How rows are dealt out: `even`, in stretches of equal length, or by each rank's measured `speed`, whose stretches differ from
run to run, and with them the rounding of outputs."""

NUMBERS = 6
"""Numbers that a rank sends ahead of a block, the exchange's own left out."""

ALIGNED = 16
"""Bytes of which the place of each part in a block is a multiple."""

LONGER = 60.0
"""Seconds by which the groups' own time-out is longer than that of a run, which names the rank."""


@dataclass(frozen=True, eq=False)
class Opened:
    """An exchange whose numbers are on their way."""

    step: int
    work: Any
    numbers: Tensor


class Ranks:
    """The ranks along one axis of a mesh. All of them have to make this object, in the same order among other groups.
    Ranks are compared by identity.

    Args:
        mesh: The mesh, as `torch.distributed.device_mesh.init_device_mesh` returns it. Its other axes are left to others: data
            parallel, or diffusers' context parallelism.
        axis: The name of the axis along which rows are shared. A mesh of one axis without a name is taken as it is.
        timeout: Seconds within which the run ends on all ranks where one stops or hangs. Others wait for it for 15 seconds
            less, or for half of them.
        balance: How rows are dealt out (`Balance`).

    Attributes:
        place: This rank's place along the axis, from 0.
        size: Ranks along the axis.
        members: Their numbers among all processes, by place.
        names: What each is called.
        timeout: Seconds, as given.
        balance: As given.
        exchanges: Exchanges so far.
        received: Bytes of blocks that this rank received from others so far.
        clock: Seconds on the clock of the rank at place 0 as it told them last, by `tell` or with the outputs of a round: the
            same on all ranks.

    Raises:
        ValueError: If the argument is no mesh, or has no axis of that name, or another one is of another kind.
        RanksFailed: If a rank does not come.
    """

    def __init__(self, mesh: DeviceMesh, axis: str = "time", *, timeout: float = 600.0, balance: Balance = "even") -> None:
        import torch.distributed as dist

        require_real("the time-out, in seconds,", timeout, positive=True)
        require_one_of("balance", balance, get_args(Balance))
        self.balance: Balance = balance
        self._group = _group_of(mesh, axis)
        self.members = members = dist.get_process_group_ranks(self._group)
        self.place, self.size, self.timeout = members.index(dist.get_rank()), len(members), float(timeout)
        self.exchanges = self.received = 0
        self.clock = 0.0
        self._told = time.monotonic()
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}
        self._backend = str(dist.get_backend(self._group))
        try:
            board = _board(members, patience_of(self.timeout))
            board.post(f"process/{self.place}", this_process(dist.get_rank(), dist.get_world_size()))
            processes = _processes(board, members, self.timeout)
        except (RuntimeError, TimeoutError) as error:
            raise RanksFailed(storeless(str(error))) from error
        self.names = [process.name for process in processes]
        limit = datetime.timedelta(seconds=self.timeout + LONGER)
        self._control = dist.new_group(members, timeout=limit, backend="gloo", use_local_synchronization=True)
        self._watch = Watch(board, self.place, processes, self.timeout)
        self.close = weakref.finalize(self, self._watch.stop)

    def __repr__(self) -> str:
        return f"Ranks({self.size}, place {self.place}, {self._backend}, time-out {self.timeout:g} s)"

    def carries(self, device: torch.device) -> None:
        """Refuses a device whose tensors the mesh's group does not move.

        Raises:
            ValueError: Then.
        """
        moved = self._backend.lower()
        if ("nccl" in moved and "gloo" not in moved and device.type == "cpu") or (moved == "gloo" and device.type == "cuda"):
            kind = "cuda" if device.type == "cpu" else "cpu"
            raise ValueError(
                f"the ranks of the mesh communicate by {moved}, which does not move tensors on {device.type}; put the network "
                f"on {kind}, or make the mesh for {device.type}: init_device_mesh({device.type!r}, ...)"
            )

    # Exchanges.

    def open(self, *numbers: int) -> Opened:
        """Begins an exchange: sends numbers on which all ranks have to agree, and returns before they have gone."""
        import torch.distributed as dist

        self._heed()
        self.exchanges += 1
        mine = torch.zeros(NUMBERS + 1, dtype=torch.int64)
        mine[: len(numbers) + 1] = torch.tensor([self.exchanges, *numbers])
        every = torch.empty(self.size * len(mine), dtype=torch.int64)
        with torch.inference_mode(False):
            work = dist.all_to_all_single(every, mine.repeat(self.size), group=self._control, async_op=True)
        self._watch.does(CALL, self.exchanges)
        return Opened(self.exchanges, work, every)

    def gather(self, opened: Opened, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """The blocks of all ranks, by place, in memory that the next exchange writes into. Waits for the device.

        Args:
            opened: What `open` returned.
            parts: Contiguous tensors on one device, whose bytes one after the other are this rank's block; each begins at a
                multiple of ALIGNED.
            lengths: The bytes of every rank's block.

        Raises:
            RanksFailed: If the numbers of the ranks differ, or one does not come.
        """
        import torch.distributed as dist

        self._watch.does(WAIT, opened.step)
        self.finish(opened.work)
        rows = opened.numbers.view(self.size, -1)
        if bool((rows != rows[0]).any()):
            self._disagree(rows.tolist())
        with torch.inference_mode(False):
            device, own = parts[0].device, lengths[self.place]
            every = self._buffer("received", sum(lengths), device)
            sent = self._buffer("sent", self.size * own, device)
            at = 0
            for part in parts:
                data = part.view(-1).view(torch.uint8)
                sent.view(self.size, own)[:, at : at + len(data)] = data
                at += aligned(len(data))
            group = self._control if device.type == "cpu" else self._group
            sizes = [own] * self.size
            work = dist.all_to_all_single(every, sent, list(lengths), sizes, group=group, async_op=True)
            self.finish(work)
        self.received += sum(lengths) - own
        self._watch.does(OWN, opened.step)
        return list(every.split(list(lengths)))

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Bytes of every rank, by place."""
        sizes = self.gather(self.open(1), [torch.tensor([len(data)])], [8] * self.size)
        lengths = [int(size.view(torch.int64)) for size in sizes]
        blocks = self.gather(self.open(2), [_bytes(data)], lengths)
        return [block.numpy().tobytes() for block in blocks]

    def agree(self, facts: Mapping[str, str]) -> None:
        """Sees that facts are the same on all ranks.

        Args:
            facts: Texts by what they are the text of, the subject of a sentence: "the method".

        Raises:
            RanksFailed: If one differs; the sentence names the ranks and the fact.
        """
        every: list[dict[str, str]] = [json.loads(data) for data in self.gather_bytes(json.dumps(dict(facts)).encode())]
        for fact in every[0]:
            values = [found.get(fact, "") for found in every]
            if len(set(values)) > 1:
                usual = max(values, key=values.count)
                odd = [place for place, value in enumerate(values) if value != usual]
                raise self.failed(
                    f"{self.named(odd)} {'was' if len(odd) == 1 else 'were'} started with another {fact} than "
                    f"{self.named([values.index(usual)])}: {_excerpt(values[odd[0]], usual)} in place of "
                    f"{_excerpt(usual, values[odd[0]])}; start all ranks with the same"
                )

    def on_one(self, call: Callable[[], Any], device: torch.device) -> Any:
        """What a call returns on the rank at place 0, on all ranks; the others do not make it.

        Args:
            call: The call. It may return anything that pickles, with tensors in it.
            device: Where the other ranks want the tensors.

        Raises:
            Exception: What the call raised, on all ranks.
        """
        opened, result, error = self.open(3), None, None
        if self.place == 0:
            try:
                result = call()
            except Exception as met:
                error = met
        data = packed((result, error)) if self.place == 0 else b""
        sizes = self.gather(opened, [torch.tensor([len(data)])], [8] * self.size)
        length = int(sizes[0].view(torch.int64))
        blocks = self.gather(self.open(4), [_bytes(data)], [length] + [0] * (self.size - 1))
        if self.place > 0:
            result, error = unpacked(blocks[0].numpy().tobytes(), device)
        if error is not None:
            raise error
        return result

    def by_first(self, call: Callable[[], Any], device: torch.device) -> Any:
        """What a longer call returns on the rank at place 0, on all ranks; while it makes calls of modules, the others wait.

        Args:
            call: As of `on_one`. Each call of a module in it has to come within the time-out.
            device: As of `on_one`.

        Raises:
            Exception: What the call raised, on all ranks.
        """
        if self.place > 0:
            while self._goes_on(True):
                pass
            return self.on_one(call, device)
        result, error = None, None
        with register_module_forward_pre_hook(lambda *_: self.keep_waiting()):
            try:
                result = call()
            except Exception as met:
                error = met
        self._goes_on(False)

        def ended() -> Any:
            if error is not None:
                raise error
            return result

        return self.on_one(ended, device)

    def keep_waiting(self) -> None:
        """Tells the other ranks, which wait in `by_first`, that this one still computes; seldom, and without effect else."""
        if time.monotonic() - self._told > self.timeout / 4:
            self._goes_on(True)

    def _goes_on(self, this: bool) -> bool:
        """Whether the rank at place 0 still computes by itself; an exchange of its own."""
        blocks = self.gather(self.open(7), [torch.tensor([int(this)])], [8] * self.size)
        self._told = time.monotonic()
        return bool(blocks[0].view(torch.int64))

    def any(self, this: bool) -> bool:
        """Whether something is so on any rank; an exchange of its own."""
        blocks = self.gather(self.open(6), [torch.tensor([int(this)])], [8] * self.size)
        return any(bool(block.view(torch.int64)) for block in blocks)

    def tell(self) -> float:
        """The seconds on the clock of the rank at place 0, on all ranks; an exchange of its own."""
        mine = torch.tensor([time.monotonic()], dtype=torch.float64)
        self.clock = float(self.gather(self.open(5), [mine], [8] * self.size)[0].view(torch.float64))
        return self.clock

    def heard(self) -> float:
        """`clock`, without an exchange: after a round, when the rank at place 0 had its own outputs."""
        return self.clock

    def finish(self, work: Any) -> None:
        """Waits for a collective, for the time-out at most, less what is kept of it for ending all ranks.

        Args:
            work: What the collective returned, with `async_op=True`.

        Raises:
            RanksFailed: If a rank does not come, or is gone.
        """
        end, pause = time.monotonic() + self._watch.patience, 2e-5
        try:
            while not work.is_completed():
                self._heed()
                if time.monotonic() > end:
                    raise RanksFailed(self._watch.report("late"))
                time.sleep(pause)
                pause = min(1.5 * pause, 1e-3)
            work.wait()
        except RuntimeError as error:  # of torch.distributed: a rank is gone
            raise RanksFailed(self._watch.report("lost", next(iter(str(error).splitlines()), ""))) from error

    # Faults.

    def named(self, places: Sequence[int]) -> str:
        """What ranks are called in a sentence."""
        return joined([self.names[place] for place in places])

    def failed(self, sentence: str) -> RanksFailed:
        """The error for a fault that every rank finds by itself, in the same words."""
        self._watch.verdict = sentence
        self._watch.heard.set()
        return RanksFailed(sentence)

    def ended(self, error: BaseException) -> RanksFailed | None:
        """Tells the other ranks that this one ends with an error; the error that was at fault, where it is another one.

        Args:
            error: Why it ends.
        """
        if isinstance(error, RanksFailed):
            return None
        if isinstance(error, Exception):
            line = next(iter(str(error).splitlines()), "")
            said = line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"
            mine = f"{self.names[self.place]} failed: {said}"
            sentence = self._watch.report("error", mine)
            return None if sentence == mine else RanksFailed(sentence)
        self._watch.does("signalled", self.exchanges)
        sentence = self._watch.report("signal")
        return None if "was ended by a signal" in sentence else RanksFailed(sentence)

    def _buffer(self, name: str, length: int, device: torch.device) -> Tensor:
        """Memory for so many bytes, kept from one exchange to the next."""
        kept = self._buffers.get((name, device))
        if kept is None or len(kept) < length:
            kept = self._buffers[name, device] = torch.empty(length, dtype=torch.uint8, device=device)
        return kept[:length]

    def _heed(self) -> None:
        """Raises the verdict if there is one."""
        if self._watch.fault is not None or self._watch.verdict is not None:
            raise RanksFailed(self._watch.await_verdict())

    def _disagree(self, rows: list[list[int]]) -> NoReturn:
        """Raises for numbers that differ."""
        usual = max(rows, key=rows.count)
        odd = [place for place, row in enumerate(rows) if row != usual]
        mine, theirs = rows[odd[0]], usual
        what = (
            f"asked for {mine[2]} rows, and the others for {theirs[2]}"
            if mine[1] == theirs[1] and mine[2] != theirs[2]
            else "does something else than the others"
        )
        raise self.failed(
            f"{self.named(odd)} {what} at exchange {self.exchanges}: start all ranks with the same versions, arguments, "
            "weights and seeds, and let all take the same decisions"
        )


def _group_of(mesh: Any, axis: str) -> Any:
    """The group of an axis.

    Raises:
        ValueError: If the argument is no mesh, or has no axis of that name.
    """
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise ValueError(
            f"the mesh is {shown(mesh)}; give a DeviceMesh, such as "
            "torch.distributed.device_mesh.init_device_mesh('cuda', (8,), mesh_dim_names=('time',))"
        )
    names = mesh.mesh_dim_names
    if not names:
        if mesh.ndim > 1:
            raise ValueError(
                f"the mesh has {mesh.ndim} axes and no names, so none of them is {axis!r}; give mesh_dim_names to "
                "init_device_mesh"
            )
        return mesh.get_group()
    if axis not in names:
        raise ValueError(
            f"the mesh has no axis {axis!r}; its axes are {', '.join(map(repr, names))}: give one of them as mesh_axis"
        )
    return mesh.get_group(axis)


def _board(members: Sequence[int], patience: float) -> Board:
    """A board that the members of a group have for themselves: that of their n-th run, which all of them count alike."""
    from torch.distributed import PrefixStore, distributed_c10d, get_rank

    store: Any = distributed_c10d._get_default_store()
    group = "-".join(map(str, members))
    run = Board(PrefixStore(f"paradiff/{group}", store), patience).drawn(f"runs/{get_rank()}")
    return Board(PrefixStore(f"paradiff/{group}/{run}", store), patience)


def _processes(board: Board, members: Sequence[int], timeout: float) -> list[Process]:
    """The processes of all ranks, once all have come.

    Raises:
        RanksFailed: If one does not come.
    """
    found: dict[int, Process] = {}
    end, pause = time.monotonic() + timeout, 1e-3
    while len(found) < len(members):
        for place in range(len(members)):
            if place not in found and (told := board.read(f"process/{place}")) is not None:
                found[place] = Process(*told)
        if len(found) < len(members) and time.monotonic() > end:
            late = joined([f"rank {member}" for place, member in enumerate(members) if place not in found])
            raise RanksFailed(f"{late} did not come to the start of the run within {timeout:g} s: it died, hangs or runs else")
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return [found[place] for place in range(len(members))]


def aligned(size: int) -> int:
    """The next multiple of ALIGNED."""
    return -(-size // ALIGNED) * ALIGNED


def _bytes(data: bytes) -> Tensor:
    """Bytes as a tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def packed(value: Any) -> bytes:
    """A value as bytes; of an error that does not pickle, one with its text."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception:
        error = value[1] if isinstance(value, tuple) else value
        if not isinstance(error, Exception):
            raise
        told = RuntimeError(f"{type(error).__name__}: {error}")
        buffer = io.BytesIO()
        torch.save((None, told) if isinstance(value, tuple) else told, buffer)
    return buffer.getvalue()


def unpacked(data: bytes, device: torch.device | str = "cpu") -> Any:
    """The value of bytes, its tensors on a device. They come from a rank of the same run, which is as trusted as this one."""
    return torch.load(io.BytesIO(data), map_location=device, weights_only=False)


def _excerpt(text: str, other: str) -> str:
    """Where a text differs from another one."""
    first = next((k for k, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    begin = max(0, first - 20)
    return f"{'...' if begin else ''}{text[begin : first + 40]}{'...' if first + 40 < len(text) else ''}"

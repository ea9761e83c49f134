# SPDX-License-Identifier: Apache-2.0
"""The evaluator: rows in, network outputs out. The only object that knows devices exist.

A solver yields a `Batch` of rows, states [R, ...] at times [R] of samples [R], and receives the outputs [R, ...]. The
evaluator moves dtypes, indexes the conditioning of each row, keeps to a row bound, and counts. On several ranks the row bound
deals the rows out (sharded.py).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

from paradiff.chain.plain import is_dense, is_plain, plain
from paradiff.errors import require_whole, shown
from paradiff.solver.accelerator import empty_cache
from paradiff.solver.agreement import described, versions, weights_of
from paradiff.solver.arguments import device_of, require_dtype, require_model, require_rows
from paradiff.solver.by_row import ByRow
from paradiff.solver.crew import Crew, shares_of
from paradiff.solver.location import elsewhere, location_of
from paradiff.solver.protocol import Batch
from paradiff.solver.ranks import Ranks
from paradiff.solver.replicas import Replicas, devices_of, replicas_of
from paradiff.solver.seen import MODELS, Look
from paradiff.solver.sharded import Sharded, taken
from paradiff.solver.widths import widths_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Denoiser = Callable[..., Tensor]
"""`denoiser(x, t, **conditioning) -> m`: x `[R, ...]` states as the network sees them, t `[R]` times, conditioning `[R, ...]`
rows; m `[R, ...]` of the shape of x. Times are int64 where all times of the chain are whole numbers, else float64 for states in
float64 and float32 for others. Rows must not influence each other."""


Part = TypeVar("Part")


class RowBound:
    """Keeps network calls to a number of rows that the device has memory for, and deals them out over ranks.

    Args:
        max_rows: Largest number of rows in one network call; None for no bound.
        shares: Stretches of equal length that the items are cut into before, as for so many ranks.
        crew: What deals the items out over ranks (sharded.py) or devices (replicas.py); None for one device.

    Attributes:
        given: The bound as it was given.
        max_rows: The bound now: smaller than the given one after a call ran out of memory.
        shares: As given.
        crew: As given.

    Raises:
        ValueError: If `max_rows` or `shares` is below 1.
    """

    def __init__(self, max_rows: int | None = None, *, shares: int = 1, crew: Crew | None = None) -> None:
        require_rows(max_rows)
        require_whole("shares", shares, 1)
        self.given = self.max_rows = max_rows
        self.shares, self.crew = shares, crew

    def widths(self, most: int, rows: int = 1) -> tuple[int, ...]:
        """The widths of padded calls (widths.py): the same ones before and after a call ran out of memory.

        Args:
            most: The most items of a round.
            rows: Rows of one item.
        """
        most = -(-most // (self.shares if self.crew is None else self.crew.even))
        return widths_of(most if self.given is None else min(most, max(1, self.given // rows)))

    def parts(
        self,
        count: int,
        call: Callable[[slice], Part],
        device: torch.device,
        *,
        rows: int = 1,
        widths: Sequence[int] | None = None,
        inputs: Sequence[Tensor] = (),
        key: Hashable = None,
        mark: int = 0,
        alone: bool = False,
        made: Callable[[int, int], None] | None = None,
    ) -> list[Part]:
        """`call(part)` for the consecutive parts of `range(count)`, in order; on ranks, all outputs in one part.

        Where a call runs out of memory, the bound is halved, or lowered to the next width, and kept, and the part is called
        again.

        Args:
            count: Number of items.
            call: The network call for the items of a slice. With `widths`, its stop may lie beyond the items. On
                ranks it returns nested lists and dicts of tensors `[items, ...]`.
            device: Where the network lives.
            rows: Rows of one item; an item of more rows than the bound is called alone.
            widths: The numbers of items that calls may have, 1 among them, in increasing order; None for any number.
            inputs: `[items, ...]` tensors on which all ranks have to agree.
            key: What the form of the output depends on; None where nothing is known of it.
            mark: A number on which all ranks have to agree.
            alone: Whether this rank makes all calls by itself.
            made: Told the items of each call that was made, by any rank, and how many of them fill it up to a width.

        Raises:
            torch.OutOfMemoryError: If one item alone does not fit.
            RanksFailed: If a rank fails, or ranks disagree.
        """
        if self.crew is not None and not alone:
            return self.crew.parts(
                self, count, call, device, rows=rows, widths=widths, inputs=inputs, key=key, mark=mark, made=made
            )
        if alone or self.shares == 1:
            return [part for part, _ in self.stretch(range(count), call, device, rows=rows, widths=widths, made=made)]
        return [
            taken(part, items)
            for stretch in shares_of(count, self.shares)
            for part, items in self.stretch(stretch, call, device, rows=rows, widths=widths, made=made)
        ]

    def stretch(
        self,
        items: range,
        call: Callable[[slice], Part],
        device: torch.device,
        *,
        rows: int = 1,
        widths: Sequence[int] | None = None,
        made: Callable[[int, int], None] | None = None,
    ) -> list[tuple[Part, int]]:
        """The parts of consecutive items, each with the number of items that it is for; as `parts` on one process."""
        done: list[tuple[Part, int]] = []
        first = items.start
        while first < items.stop:
            width, own = self.next_call(items.stop - first, rows, widths)
            try:
                done.append((call(slice(first, first + width)), own))
            except torch.OutOfMemoryError as error:
                if width == 1:
                    raise
                error.__traceback__ = None  # Whoever keeps the error would keep the tensors of the failed call.
                self.max_rows = rows * ((width + 1) // 2 if widths is None else max(w for w in widths if w < width))
            else:
                if made is not None:
                    made(width, width - own)
                first += own
                continue
            # Outside of the handler, since the error's traceback holds the tensors of the failed call.
            empty_cache(device)
        return done

    def next_call(self, left: int, rows: int, widths: Sequence[int] | None) -> tuple[int, int]:
        """The items of the next call where so many are left, and how many of them are of these: others fill the call."""
        most = left if self.max_rows is None else min(left, max(1, self.max_rows // rows))
        if widths is None:
            return most, most
        fit = [width for width in widths if self.max_rows is None or width * rows <= self.max_rows] or [1]
        width = next((width for width in fit if width >= left), fit[-1])
        return width, min(width, left)


@dataclass(frozen=True, eq=False)
class Held:
    """A network on one device, and what it is called with there."""

    denoiser: Denoiser
    device: torch.device
    conditioning: Mapping[str, Tensor]
    shared: Mapping[str, Any]


class Evaluator:
    """Evaluates rows with one network on one device, in chunks of at most `max_rows`.

    On an accelerator that runs out of memory the chunk is halved and the rows are evaluated again; the smaller chunk is
    kept. Nothing here waits for the device. Evaluators are compared by identity.

    Args:
        denoiser: The network behind its calling convention (see `Denoiser`).
        conditioning: Tensors `[B, ...]`, handed to the denoiser by name, one row for each row of the batch. Where all rows are
            of one sample, they are one row in memory (`Tensor.expand`). To a denoiser that writes into them, or fails with
            them, copies are handed.
        shared: Values that all rows share, such as a prefix or its keys and values, handed to the denoiser by name as they are.
        max_rows: Largest number of rows in one network call; None for no bound. A round of more rows takes several calls
            and still counts as one round.
        pad: Fill network calls with copies of their last row up to one of at most four widths (widths.py), for compiled
            networks and CUDA graphs. The widths depend on `max_rows`, the method's width and the number of samples.
        device: Where the network lives; states are kept there too. None for the device of its weights, if they lie on one, and
            can be found (location.py); else the CPU.
        dtype: The network's dtype; states are cast to it, outputs back. None leaves states as they are.
        mesh: Ranks that each have the network and share the rows of a round (sharded.py): a DeviceMesh, or the `Ranks` along
            one of its axes. All ranks have to make the same calls. None for one process.
        mesh_axis: The name of the mesh's axis along which rows are shared.
        devices: Devices of this process that share the rows of a round in place of `device`, each with a copy of the network
            and a thread (replicas.py): a list, or `all` of this machine. The states are kept on the first. Copies are made
            here, and later changes of the network do not reach them.
        shares: Stretches of equal length that the rows of a round are cut into, at least; as many as ranks, or devices, by
            default. Samples are the same, bit for bit, on any number of ranks with the same shares, and on one process.

    Attributes:
        rounds: Rounds so far.
        evaluations: Their rows so far; those of checks are not counted.
        filled: Rows so far that calls were filled with, those of checks included.
        seconds: Time spent in network calls, those of checks included, as seen from the host: on an asynchronous device only
            their launch.
        alike: Whether its outputs are the model's alone; of kinds of evaluators whether they say so.

    Raises:
        ValueError: If an argument is of another kind, `max_rows` is below 1, or the device is not to be had.
    """

    alike: ClassVar[bool] = True

    def __init_subclass__(cls, *, alike: bool = False) -> None:
        """A kind of evaluator; `alike` if its outputs are those of the model alone, too, so that what was seen of the model in
        earlier runs (seen.py) counts in its own."""
        super().__init_subclass__()
        cls.alike = alike

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        conditioning: Mapping[str, Tensor] | None = None,
        shared: Mapping[str, Any] | None = None,
        max_rows: int | None = None,
        pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        mesh: DeviceMesh | Ranks | None = None,
        mesh_axis: str = "time",
        devices: Literal["all"] | Sequence[torch.device | str] | None = None,
        shares: int | None = None,
    ) -> None:
        require_model(denoiser)
        require_dtype(dtype)
        if conditioning is not None and not isinstance(conditioning, Mapping):
            raise ValueError(f"the conditioning is {shown(conditioning)}; give tensors by name, such as {{'y': labels}}")
        for name, value in (conditioning or {}).items():
            if not isinstance(name, str):
                raise ValueError(
                    f"a part of the conditioning has the name {shown(name)}; give the name of the model's argument"
                )
            if not is_dense(value) or value.ndim == 0:
                raise ValueError(
                    f"the conditioning {name!r} is {shown(value)}; give a tensor with a row for each sample, a dense one"
                )
        if shared is not None and not isinstance(shared, Mapping):
            raise ValueError(f"what rows share is {shown(shared)}; give values by name, such as {{'prefix': prefix}}")
        if twice := sorted({*(conditioning or {})} & {*(shared or {})}):
            raise ValueError(f"{twice[0]!r} is given as conditioning and as shared; give it once")
        if not isinstance(pad, bool):
            raise ValueError(f"pad is {shown(pad)}; give True or False")
        if shares is not None:
            require_whole("shares", shares, 1, ", or None for as many as ranks")
        require_rows(max_rows)
        self.denoiser = denoiser
        self.conditioning = dict(conditioning or {})
        self.shared = dict(shared or {})
        self.pad = pad
        given = None if devices is None else devices_of(devices)
        if given is not None and mesh is not None:
            raise ValueError("mesh and devices are both given; give ranks, or the devices of one process")
        self.device = device_of(location_of(denoiser) if device is None else device) if given is None else given[0]
        self.dtype = dtype
        self.rounds = 0
        self.evaluations = 0
        self.filled = 0
        self.seconds = 0.0
        self._widest = 1  # rows of the widest round of the run, or so far
        self._copies = False  # whether the denoiser needs conditioning of its own for each row
        crew = None
        self._elsewhere: list[Held] = []  # what is held on each of several devices
        if given is not None:
            crew = Replicas(given, shares)
            models = replicas_of(denoiser, given)
            self._elsewhere = [
                Held(model, at, _on(at, self.conditioning), _on(at, self.shared))
                for model, at in zip(models, given, strict=True)
            ]
        if mesh is not None:
            ranks = mesh if isinstance(mesh, Ranks) else Ranks(mesh, mesh_axis)
            ranks.carries(self.device)
            crew = Sharded(ranks, self._facts, shares=shares)
        self.bound = RowBound(max_rows, shares=shares or 1, crew=crew)

    def __repr__(self) -> str:
        name = getattr(self.denoiser, "__name__", type(self.denoiser).__name__)
        bound = "any number of rows" if self.max_rows is None else f"at most {self.max_rows} rows"
        kind = "the states' dtype" if self.dtype is None else str(self.dtype)
        cost = f"{self.rounds} rounds, {self.evaluations} evaluations"
        return f"Evaluator({name} on {self.device}, {kind}, {bound} a call;\n          {cost})"

    @property
    def max_rows(self) -> int | None:
        """Largest number of rows in one network call now; None for no bound."""
        return self.bound.max_rows

    def __call__(self, batch: Batch) -> Tensor:
        """Outputs `[R, ...]` in the dtype of the states.

        The model is given copies of the states, into which it may write, and its outputs are copied, so that it may return the
        same memory at every call. Gradients are off, and a model that turns them on finds ordinary tensors, not inference ones.

        Raises:
            ValueError: If the network returns something else than one floating-point tensor of the shape of its input.
        """
        self._widest = max(self._widest, len(batch.x)) if batch.widest is None else batch.widest
        outputs = self._evaluate(batch)
        self.rounds += 1
        self.evaluations += len(batch.x)
        return outputs

    def evaluate_again(self, batch: Batch) -> Tensor:
        """As a call, for rows of a check (row_check.py): it is no round, and its rows are not counted. Each rank evaluates them
        by itself, so that each one's network is checked.

        Raises:
            ValueError: As a call does.
        """
        return self._evaluate(batch, alone=True)

    def evaluate_dealt(self, batch: Batch) -> Tensor | None:
        """As `evaluate_again`, for rows that ranks, or devices, share like those of a round; None where there are none, and
        where the model fails for a row. All ranks have to make the call.

        Raises:
            RanksFailed: If a rank ends, or comes to other states.
        """
        if self.bound.crew is None:
            return None

        def call(part: slice) -> tuple[Tensor, Tensor]:
            """Outputs of the rows of a part, and for each whether the model failed."""
            x = batch.x[part]
            try:
                return self._call(batch, part), torch.zeros(len(x), dtype=torch.uint8, device=x.device)
            except torch.OutOfMemoryError:
                raise
            except Exception:
                return torch.zeros_like(x), torch.ones(len(x), dtype=torch.uint8, device=x.device)

        parts = self._parts(batch, call, key="dealt")
        outputs, failed = (torch.cat(column) for column in zip(*parts, strict=True))
        return None if bool(failed.any()) else outputs

    def evaluate_apart(self, sequences: Sequence[Sequence[Batch]]) -> list[Tensor] | None:
        """As `evaluate_again`, for sequences of calls that ranks, or devices, share, each whole on one of them; the outputs of
        the last call of each. Where there are more members than sequences, each is made on as many as there are for it. None
        where there are no members, and where the model fails in a call. All ranks have to make the call.

        Raises:
            RanksFailed: If a rank ends, or comes to other states.
        """
        crew = self.bound.crew
        if crew is None:
            return None
        times = max(1, crew.members // len(sequences))
        every, lasts = [*sequences] * times, [sequence[-1] for sequence in sequences] * times
        widest = max(len(last.x) for last in lasts)

        def call(part: slice) -> tuple[Tensor, Tensor]:
            """Outputs `[sequences, rows, ...]` of the last calls, and for each whether the model failed."""
            outputs, failed = [], []
            for sequence, last in zip(every[part], lasts[part], strict=True):
                found = self._followed(sequence)
                outputs.append(_filled(torch.zeros_like(last.x) if found is None else found, widest - len(last.x)))
                failed.append(torch.full((1,), found is None, dtype=torch.uint8, device=last.x.device))
            return torch.stack(outputs), torch.cat(failed)

        filled = self.filled + sum(self._filling(len(batch.x)) for sequence in every for batch in sequence)
        first, seconds = torch.cat([last.x[:1] for last in lasts]), [*crew.seconds] if isinstance(crew, Sharded) else []
        parts = self.bound.parts(
            len(every), call, self.device, inputs=[first], key=("apart", widest, first.shape[1:], first.dtype)
        )
        self.filled = filled  # on every rank that of all of them
        if isinstance(crew, Sharded):
            crew.seconds = seconds  # of rows, of which a sequence has several
        outputs, failed = (torch.cat(column) for column in zip(*parts, strict=True))
        if bool(failed.any()):
            return None
        return [outputs[k, : len(sequence[-1].x)] for k, sequence in enumerate(sequences)]

    def _filling(self, count: int) -> int:
        """Rows that the calls for so many rows are filled with."""
        widths = self.bound.widths(self._widest) if self.pad else None
        filling = 0
        while count:
            width, own = self.bound.next_call(count, 1, widths)
            filling, count = filling + width - own, count - own
        return filling

    def _followed(self, sequence: Sequence[Batch]) -> Tensor | None:
        """The outputs of the last of some calls that one member makes; None where the model fails in one."""
        try:
            return [self._evaluate(batch, alone=True) for batch in sequence][-1]
        except Exception:
            return None

    def look(self, run: str) -> Look:
        """Looks whether the model was seen to be right in a run of a kind (seen.py).

        Args:
            run: What the run is, as far as the evaluator does not know it.
        """
        alike = {name: bool((value == value[:1]).all()) for name, value in self.conditioning.items()}
        forms = {name: _form(value) for name, value in {**self.conditioning, **self.shared}.items()}
        bound = self.bound.given, self.bound.max_rows, self.bound.shares, self.pad
        copies = [held.denoiser for held in self._elsewhere if held.denoiser is not self.denoiser]
        kind = f"{run} {alike} {forms} {bound} {self.device} {self.dtype}"
        return MODELS.look(self.denoiser, kind, copies, self._least)

    def _least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        crew = self.bound.crew
        if not isinstance(crew, Sharded):
            return number
        return min(int(data) for data in crew.ranks.gather_bytes(str(number).encode()))

    def begin(self, arguments: Mapping[str, object], widest: int) -> None:
        """Sees that all ranks begin a run with the same arguments; without effect on one process.

        Args:
            arguments: What decides on the run, by name.
            widest: Rows of the widest round.

        Raises:
            RanksFailed: If an argument differs.
        """
        if isinstance(self.bound.crew, Sharded):
            self.bound.crew.ranks.agree({name: described(value) for name, value in arguments.items()})
            self.bound.crew.warn_of_idle(widest)

    def _facts(self) -> dict[str, str]:
        """What ranks have to agree on."""
        return {
            **versions(),
            "dtype": str(self.dtype),
            **weights_of(self.denoiser),
            **weights_of(self.conditioning | self.shared),
        }

    def _evaluate(self, batch: Batch, *, alone: bool = False) -> Tensor:
        outputs = self._parts(batch, lambda part: self._call(batch, part), alone=alone)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _parts(self, batch: Batch, call: Callable[[slice], Part], *, key: str = "", alone: bool = False) -> list[Part]:
        """What a call returns for the parts of a batch."""
        begin = time.perf_counter()
        with torch.inference_mode(False), torch.no_grad():
            parts = self.bound.parts(
                len(batch.x),
                call,
                self.device,
                widths=self.bound.widths(self._widest) if self.pad else None,
                inputs=[batch.x],
                key=(key, batch.x.shape[1:], batch.x.dtype),
                mark=0 if self.bound.crew is None else _mark(batch),
                alone=alone,
                made=self._count,
            )
        self.seconds += time.perf_counter() - begin
        return parts

    def _count(self, rows: int, filling: int) -> None:
        """Counts a network call."""
        self.filled += filling

    def _call(self, batch: Batch, part: slice) -> Tensor:
        """Outputs of the rows of a part; rows beyond the batch's end are copies of its last one.

        Conditioning that is one row in memory is a copy of the caller's, and its version shows whether the model wrote into it.
        Then the rows are evaluated again with a copy for each, and so they are where the model fails.
        """
        held = self._held()
        count = len(batch.x[part])
        filling = part.stop - part.start - count
        x = _filled(batch.x[part], filling).to(device=held.device, dtype=self.dtype, copy=True)
        t = _filled(batch.t[part], filling).to(held.device, non_blocking=True, copy=True)
        if t.is_floating_point():
            t = t.to(x.dtype if x.dtype == torch.float64 else torch.float32)
        samples = _filled(batch.samples[part], filling)
        _require_rows_of(held.conditioning, samples)
        single = self._single(samples, held.conditioning) if held.conditioning and not self._copies else {}
        rows = {
            name: single[name].expand(len(x), *value.shape[1:])
            if name in single
            else value[samples.to(value.device, non_blocking=True)]
            for name, value in held.conditioning.items()
        }
        shape, dtype = x.shape, x.dtype  # of the rows, which the model may change, or resize
        versions = {name: _version(value) for name, value in held.shared.items()}
        failed, m = False, None
        try:
            if isinstance(held.denoiser, ByRow):
                nodes = _filled(batch.nodes[part], filling)
                m = held.denoiser.of_rows(x, t, nodes, samples, **rows, **held.shared)
            else:
                m = held.denoiser(x, t, **rows, **held.shared)
        except (RuntimeError, ValueError, AssertionError) as error:
            if not single or type(error) not in (RuntimeError, ValueError, AssertionError):
                if elsewhere(error):
                    said = next(iter(str(error).splitlines()), "")
                    raise ValueError(
                        f"the model was given rows on {held.device}, and some of its tensors are on another device ({said}): "
                        "give the evaluator the device of its weights, such as device='cuda'"
                    ) from error
                raise
            failed = True
        for name, value in held.shared.items():
            if _version(value) != versions[name]:
                raise ValueError(f"the model writes into {name!r}, which all rows share; have it write into a copy")
        if failed or any(value._version for value in single.values()):
            self._copies = True
            return self._call(batch, part)
        if not isinstance(m, Tensor):
            raise ValueError(
                f"the model returned a {type(m).__name__}; it must return one tensor (for a diffusers network, its `.sample`)"
            )
        if m.is_nested or m.layout is not torch.strided:
            raise ValueError("the model returned a sparse or nested tensor; it must return one entry for each of its input")
        if m.is_meta:
            raise ValueError("the model returned a tensor on the meta device, which holds no numbers; load the model's weights")
        if m.shape != shape:
            raise ValueError(
                f"the model returned shape {tuple(m.shape)} for rows of shape {tuple(shape)}; it must return one output "
                "of the shape of its input (a network that also predicts a variance needs those channels removed)"
            )
        if m.dtype != dtype:
            own = f"give the evaluator the network's own dtype, dtype={m.dtype}, or have the model return its input's"
            advice = own if m.is_floating_point() else "have the model return real numbers of its input's dtype"
            raise ValueError(f"the model returned dtype {m.dtype} for rows of dtype {dtype}; {advice}")
        found = m[:count].detach().to(batch.x.device, batch.x.dtype, copy=True)
        if not is_plain(found):  # known of the copy alone: outputs that a collective is still making are plain then
            raise ValueError(
                f"the model returned a {type(m).__name__}, which computes in its own way; it must return a plain torch tensor "
                "(of a DTensor, its full_tensor(); of a MaskedTensor, its get_data())"
            )
        return plain(found)

    def _held(self) -> Held:
        """What is held where this thread evaluates."""
        crew = self.bound.crew
        if isinstance(crew, Replicas) and crew.place > 0:
            return self._elsewhere[crew.place]
        return Held(self.denoiser, self.device, self.conditioning, self.shared)

    def _single(self, samples: Tensor, conditioning: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`[1, ...]` copies of the conditioning that is equal in all rows, which are of some samples.

        It is equal where all rows are of one sample. Padded calls have the same strides in every round of a run, so there it
        is that of a run of one sample only.
        """
        first = int(samples[0])
        if len(samples) == 1 or (not self.pad and bool((samples != first).any())):
            return {}
        alike = {name: value for name, value in conditioning.items() if not self.pad or len(value) == 1}
        return {name: value[first : first + 1].clone() for name, value in alike.items()}


def _require_rows_of(conditioning: Mapping[str, Tensor], samples: Tensor) -> None:
    """Refuses conditioning that has no row for one of some samples.

    Raises:
        ValueError: Then.
    """
    most = int(samples.max()) if conditioning else 0
    for name, value in conditioning.items():
        if most >= len(value):
            raise ValueError(
                f"the conditioning {name!r} has {len(value)} rows, and sample {most} was asked for; each sample needs one row"
            )


def _mark(batch: Batch) -> int:
    """A number that differs where nodes, samples or times do."""
    places = torch.stack([batch.nodes.double(), batch.samples.double(), batch.t.double()])
    return zlib.crc32(places.numpy().tobytes())


def _on(device: torch.device, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values with their tensors on a device."""
    return _pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(values))


def _filled(rows: Tensor, count: int) -> Tensor:
    """`[R + count, ...]`: rows, and so many copies of the last one."""
    return torch.cat([rows, rows[-1:].expand(count, *rows.shape[1:])]) if count else rows


def _form(value: Any) -> str:
    """The structure of what a model is called with."""
    parts, spec = _pytree.tree_flatten(value)
    return f"{spec} {[(tuple(p.shape[1:]), p.dtype) if isinstance(p, Tensor) else type(p).__qualname__ for p in parts]}"


def _version(value: Any) -> int:
    """The number of changes of a tensor in place; -1 for other values and for inference tensors, of which torch counts none."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else -1

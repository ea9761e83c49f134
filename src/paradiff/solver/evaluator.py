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
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from paradiff.errors import require_whole, shown
from paradiff.solver.accelerator import empty_cache
from paradiff.solver.agreement import described, versions, weights_of
from paradiff.solver.arguments import device_of, require_dtype, require_model, require_rows
from paradiff.solver.protocol import Batch
from paradiff.solver.ranks import Ranks
from paradiff.solver.sharded import Sharded, shares_of, taken

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
        crew: What deals the items out (sharded.py); None for one process.

    Attributes:
        max_rows: The bound now: smaller than the given one after a call ran out of memory.
        shares: As given.
        crew: As given.

    Raises:
        ValueError: If `max_rows` or `shares` is below 1.
    """

    def __init__(self, max_rows: int | None = None, *, shares: int = 1, crew: Sharded | None = None) -> None:
        require_rows(max_rows)
        require_whole("shares", shares, 1)
        self.max_rows, self.shares, self.crew = max_rows, shares, crew

    def parts(
        self,
        count: int,
        call: Callable[[slice], Part],
        device: torch.device,
        *,
        rows: int = 1,
        width: int | None = None,
        inputs: Sequence[Tensor] = (),
        key: Hashable = None,
        mark: int = 0,
        alone: bool = False,
        made: Callable[[int], None] | None = None,
    ) -> list[Part]:
        """`call(part)` for the consecutive parts of `range(count)`, in order; on ranks, all outputs in one part.

        Where a call runs out of memory, the bound is halved and kept, and the part is called again.

        Args:
            count: Number of items.
            call: The network call for the items of a slice. With `width`, its stop may lie beyond the items. On
                ranks it returns nested lists and dicts of tensors `[items, ...]`.
            device: Where the network lives.
            rows: Rows of one item; an item of more rows than the bound is called alone.
            width: Items in each call where the bound allows for them; None for all.
            inputs: `[items, ...]` tensors on which all ranks have to agree.
            key: What the form of the output depends on; None where nothing is known of it.
            mark: A number on which all ranks have to agree.
            alone: Whether this rank makes all calls by itself.
            made: Told the items of each call that was made, by any rank.

        Raises:
            torch.OutOfMemoryError: If one item alone does not fit.
            RanksFailed: If a rank fails, or ranks disagree.
        """
        if self.crew is not None and not alone:
            return self.crew.parts(
                self, count, call, device, rows=rows, width=width, inputs=inputs, key=key, mark=mark, made=made
            )
        if alone or self.shares == 1:
            return [part for part, _ in self.stretch(range(count), call, device, rows=rows, width=width, made=made)]
        width = None if width is None else -(-width // self.shares)
        return [
            taken(part, items)
            for stretch in shares_of(count, self.shares)
            for part, items in self.stretch(stretch, call, device, rows=rows, width=width, made=made)
        ]

    def stretch(
        self,
        items: range,
        call: Callable[[slice], Part],
        device: torch.device,
        *,
        rows: int = 1,
        width: int | None = None,
        made: Callable[[int], None] | None = None,
    ) -> list[tuple[Part, int]]:
        """The parts of consecutive items, each with the number of items that it is for; as `parts` on one process."""
        size = self.size(len(items), rows, width)
        done: list[tuple[Part, int]] = []
        first = items.start
        while first < items.stop:
            stop = min(first + size, items.stop) if width is None else first + size
            try:
                done.append((call(slice(first, stop)), min(stop, items.stop) - first))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = (size + 1) // 2
                self.max_rows = size * rows
            else:
                if made is not None:
                    made(stop - first)
                first = stop
                continue
            # Outside of the handler, since the error's traceback holds the tensors of the failed call.
            empty_cache(device)
        return done

    def size(self, count: int, rows: int, width: int | None) -> int:
        """Items in each call for `count` consecutive ones."""
        most = count if width is None else width
        return most if self.max_rows is None else min(most, max(1, self.max_rows // rows))


class Evaluator:
    """Evaluates rows with one network on one device, in chunks of at most `max_rows`.

    On an accelerator that runs out of memory the chunk is halved and the rows are evaluated again; the smaller chunk is
    kept. Nothing here waits for the device. Evaluators are compared by identity.

    Args:
        denoiser: The network behind its calling convention (see `Denoiser`).
        conditioning: Tensors `[B, ...]`, handed to the denoiser by name, one row for each row of the batch.
        max_rows: Largest number of rows in one network call; None for no bound. A round of more rows takes several calls
            and still counts as one round.
        device: Where the network lives; states are kept there too.
        dtype: The network's dtype; states are cast to it, outputs back. None leaves states as they are.
        mesh: Ranks that each have the network and share the rows of a round (sharded.py): a DeviceMesh, or the `Ranks` along
            one of its axes. All ranks have to make the same calls. None for one process.
        mesh_axis: The name of the mesh's axis along which rows are shared.
        shares: Stretches of equal length that the rows of a round are cut into, at least; as many as ranks by default. Samples
            are the same, bit for bit, on any number of ranks with the same shares, and on one process.

    Attributes:
        rounds: Rounds so far.
        evaluations: Their rows so far; those of checks are not counted.
        seconds: Time spent in network calls, those of checks included, as seen from the host: on an asynchronous device only
            their launch.

    Raises:
        ValueError: If an argument is of another kind, `max_rows` is below 1, or the device is not to be had.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        conditioning: Mapping[str, Tensor] | None = None,
        max_rows: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        mesh: DeviceMesh | Ranks | None = None,
        mesh_axis: str = "time",
        shares: int | None = None,
    ) -> None:
        require_model(denoiser)
        require_dtype(dtype)
        if conditioning is not None and not isinstance(conditioning, Mapping):
            raise ValueError(f"the conditioning is {shown(conditioning)}; give tensors by name, such as {{'y': labels}}")
        for name, value in (conditioning or {}).items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                raise ValueError(f"the conditioning {name!r} is {shown(value)}; give a tensor with a row for each sample")
        if shares is not None:
            require_whole("shares", shares, 1, ", or None for as many as ranks")
        require_rows(max_rows)
        self.denoiser = denoiser
        self.conditioning = dict(conditioning or {})
        self.device = device_of(device)
        self.dtype = dtype
        self.rounds = 0
        self.evaluations = 0
        self.seconds = 0.0
        crew = None
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

    def begin(self, arguments: Mapping[str, object], widest: int) -> None:
        """Sees that all ranks begin a run with the same arguments; without effect on one process.

        Args:
            arguments: What decides on the run, by name.
            widest: Rows of the widest round.

        Raises:
            RanksFailed: If an argument differs.
        """
        if self.bound.crew is not None:
            self.bound.crew.ranks.agree({name: described(value) for name, value in arguments.items()})
            self.bound.crew.warn_of_idle(widest)

    def _facts(self) -> dict[str, str]:
        """What ranks have to agree on."""
        return {**versions(), "dtype": str(self.dtype), **weights_of(self.denoiser), **weights_of(self.conditioning)}

    def _evaluate(self, batch: Batch, *, alone: bool = False) -> Tensor:
        begin = time.perf_counter()
        places = torch.stack([batch.nodes.double(), batch.samples.double(), batch.t.double()])
        with torch.inference_mode(False), torch.no_grad():
            outputs = self.bound.parts(
                len(batch.x),
                lambda part: self._call(batch, part),
                self.device,
                inputs=[batch.x],
                key=(batch.x.shape[1:], batch.x.dtype),
                mark=zlib.crc32(places.numpy().tobytes()),
                alone=alone,
            )
        self.seconds += time.perf_counter() - begin
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _call(self, batch: Batch, part: slice) -> Tensor:
        x = batch.x[part].to(device=self.device, dtype=self.dtype, copy=True)
        t = batch.t[part].to(self.device, non_blocking=True, copy=True)
        if t.is_floating_point():
            t = t.to(x.dtype if x.dtype == torch.float64 else torch.float32)
        rows = {
            name: value[batch.samples[part].to(value.device, non_blocking=True)] for name, value in self.conditioning.items()
        }
        m = self.denoiser(x, t, **rows)
        if not isinstance(m, Tensor):
            raise ValueError(
                f"the model returned a {type(m).__name__}; it must return one tensor (for a diffusers network, its `.sample`)"
            )
        if m.is_nested or m.layout is not torch.strided:
            raise ValueError("the model returned a sparse or nested tensor; it must return one entry for each of its input")
        if m.shape != x.shape:
            raise ValueError(
                f"the model returned shape {tuple(m.shape)} for rows of shape {tuple(x.shape)}; it must return one output "
                "of the shape of its input (a network that also predicts a variance needs those channels removed)"
            )
        if m.dtype != x.dtype:
            raise ValueError(
                f"the model returned dtype {m.dtype} for rows of dtype {x.dtype}; give the evaluator the network's own "
                f"dtype, dtype={m.dtype}, or have the model return its input's"
            )
        return m.detach().to(batch.x.dtype, copy=True)

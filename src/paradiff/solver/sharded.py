# SPDX-License-Identifier: Apache-2.0
"""The sharded evaluation: the rows of a round dealt out over ranks, and their outputs gathered on all of them.

Every rank runs the same solver on the same states. Of a round's R rows the rank at place g evaluates a stretch,

    rows g * S ... (g + 1) * S - 1,    S = ceil(R / G) for G ranks,

in calls of at most `max_rows`, as one process does that was given `shares=G`: so its outputs are the same, bit for bit. With
`balance="speed"` the stretches are as long as the ranks' measured speeds allow: each row goes to the rank that would have done
it first. A rank without rows waits.

A round moves one block a rank: 64 bytes of numbers, then the outputs of its rows. By the numbers all ranks see the same and
decide alike: a sum over the bits of the states that the outputs are of, which tells ranks apart whose trajectories differ; the
bound on rows, lower where one ran out of memory; whether one met an error; the first row whose output is not finite, which
another rank evaluates again; the seconds that a row took; and the first rank's clock, by which all of them keep a deadline.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from paradiff.solver.crew import Bound, dealt
from paradiff.solver.ranks import Opened, Ranks, aligned, packed, unpacked

HEAD = 8
"""Numbers before the outputs in a block."""

ROWS, AGAIN = 10, 11
"""Kinds of exchanges: a round's rows; a row that is evaluated again."""

TENSOR = "paradiff: a tensor"
"""Stands for a tensor in a layout."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of so many bytes."""

COARSE = torch.finfo(torch.bfloat16).eps ** (2 / 3)
"""Relative difference of two ranks' outputs for one row that rounding explains, on different devices and in any dtype."""

FINE, MEMORY, ERROR = 0, 1, 2
"""How a rank's calls went: well, out of memory at one item, an error."""

REMEMBERED = 0.5
"""Share of the last round in the measured seconds of a row."""


@dataclass(frozen=True)
class Layout:
    """How the outputs of items are put together: nested lists and dicts, with tensors `[items, ...]`.

    Attributes:
        spec: The structure.
        leaves: What is in it; for a tensor, TENSOR.
        forms: The shape of one item's entry of each tensor, and its dtype.
    """

    spec: Any
    leaves: tuple[Any, ...]
    forms: tuple[tuple[torch.Size, torch.dtype], ...]

    @staticmethod
    def of(part: Any) -> tuple[Layout, list[Tensor]]:
        """The layout of a part, and its tensors."""
        leaves, spec = _pytree.tree_flatten(part)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kept = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return Layout(spec, kept, tuple((one.shape[1:], one.dtype) for one in tensors)), tensors

    def alike(self, other: Layout) -> bool:
        """Whether another layout's tensors have the same forms."""
        return self.forms == other.forms

    def sizes(self, items: int) -> list[int]:
        """Bytes of each tensor of so many items."""
        return [items * shape.numel() * dtype.itemsize for shape, dtype in self.forms]

    def length(self, items: int) -> int:
        """Bytes of the tensors of so many items in a block."""
        return sum(map(aligned, self.sizes(items)))

    def empty(self) -> Any:
        """The part for no items."""
        return self.whole([torch.empty(0, *shape, dtype=dtype) for shape, dtype in self.forms])

    def whole(self, tensors: Sequence[Tensor]) -> Any:
        """The part with these tensors."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, str) and leaf == TENSOR else leaf for leaf in self.leaves]
        return _pytree.tree_unflatten(leaves, self.spec)


@dataclass(eq=False)
class Result:
    """What a rank's calls came to: outputs for its items, or an error."""

    status: int
    layout: Layout | None = None
    tensors: list[Tensor] = field(default_factory=list)
    error: Exception | None = None


class IdleRanks(RuntimeWarning):
    """That a run has more ranks than its rounds have rows."""


class Sharded:
    """Shares out network calls over ranks; what a `RowBound` (evaluator.py) hands its items to.

    Args:
        ranks: The ranks.
        facts: What ranks have to agree on at the start of their first round: texts by what they are the text of (ranks.py).
        shares: Stretches that the items are cut into; as many as ranks by default. Stretches follow each other from rank to
            rank, as evenly as they go. With a number of their own, samples do not depend on the number of ranks.

    Attributes:
        seconds: The seconds that an item took on each rank, as measured.
    """

    def __init__(
        self,
        ranks: Ranks,
        facts: Callable[[], Mapping[str, str]] = dict,
        *,
        shares: int | None = None,
    ) -> None:
        self.ranks, self.facts = ranks, facts
        self.shares = ranks.size if shares is None else shares
        self._begun = self._warned = False
        self.seconds = [0.0] * ranks.size
        self._layouts: dict[Hashable, Layout] = {}

    @property
    def members(self) -> int:
        """How many ranks there are."""
        return self.ranks.size

    @property
    def even(self) -> int:
        """Stretches of equal length that the items of a round are cut into; 1 where they are dealt out by speed."""
        return 1 if self.ranks.balance == "speed" else self.shares

    def stretches(self, count: int) -> list[list[range]]:
        """For each rank the stretches of `range(count)` that it evaluates."""
        if self.ranks.balance == "speed":
            lengths, ends = by_speed(count, self.seconds), [0]
            for length in lengths:
                ends.append(ends[-1] + length)
            return [[range(a, b)] if b > a else [] for a, b in itertools.pairwise(ends)]
        return dealt(count, self.shares, self.ranks.size)

    def warn_of_idle(self, widest: int) -> None:
        """Warns once, on one rank, where a run has fewer rows a round than there are ranks.

        Args:
            widest: Rows of the widest round.
        """
        if widest < self.ranks.size and not self._warned and self.ranks.place == 0:
            warnings.warn(too_many(self.ranks.size, widest), IdleRanks, stacklevel=4)
        self._warned |= widest < self.ranks.size

    def parts(
        self,
        bound: Bound,
        count: int,
        call: Callable[[slice], Any],
        device: torch.device,
        *,
        rows: int,
        widths: Sequence[int] | None,
        inputs: Sequence[Tensor],
        key: Hashable,
        mark: int,
        made: Callable[[int, int], None] | None = None,
    ) -> list[Any]:
        """The outputs for all items, as one part, on every rank. See `Crew`."""
        if not self._begun:
            self._begun = True
            self._begin(call, inputs, key)
        stretches = self.stretches(count)
        lengths = [sum(map(len, own)) for own in stretches]
        form = zlib.crc32(repr([(tuple(x.shape[1:]), x.dtype) for x in inputs]).encode())
        opened = self.ranks.open(ROWS, count, rows, form, mark)
        begin = time.perf_counter()
        result = self._evaluated(bound, stretches[self.ranks.place], call, device, rows, widths, made)
        if self.ranks.balance == "speed" and device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = (time.perf_counter() - begin) / max(1, lengths[self.ranks.place])
        head = [result.status, 0, bound.max_rows or 0, -1, int(1e9 * spent), int(1e9 * time.monotonic()), 0, 0]
        heads, outputs = self._exchanged(opened, result, head, lengths, device, inputs, key)
        self.ranks.clock = int(heads[0, 5]) / 1e9
        self._heed(heads, result, lengths)
        self._learn(bound, heads, lengths)
        self._heed_states(heads)
        if made is not None:
            for items in (items for place, own in enumerate(stretches) if place != self.ranks.place for items in own):
                left = len(items)
                while left:
                    width, own = bound.next_call(left, rows, widths)
                    made(width, width - own)
                    left -= own
        if (bad := next((row for row in heads[:, 3].tolist() if row >= 0), None)) is not None:
            self._heed_number(call, bad, next(place for place, row in enumerate(heads[:, 3].tolist()) if row >= 0))
        return outputs

    def _evaluated(
        self,
        bound: Bound,
        own: Sequence[range],
        call: Callable[[slice], Any],
        device: torch.device,
        rows: int,
        widths: Sequence[int] | None,
        made: Callable[[int, int], None] | None,
    ) -> Result:
        """The outputs for this rank's items, or what went wrong."""
        try:
            found = [
                one for stretch in own for one in bound.stretch(stretch, call, device, rows=rows, widths=widths, made=made)
            ]
            parts = [(*Layout.of(part), items) for part, items in found]
            tensors = [[tensor[:items] for tensor in several] for _, several, items in parts]
            joined = [column[0] if len(parts) == 1 else torch.cat(column) for column in zip(*tensors, strict=True)]
            return Result(FINE, next((one[0] for one in parts), None), joined)
        except torch.OutOfMemoryError as error:
            return Result(MEMORY, error=error.with_traceback(None))  # whose frames hold the failed call's tensors
        except Exception as error:
            return Result(ERROR, error=error)

    def _exchanged(
        self,
        opened: Opened,
        result: Result,
        head: list[int],
        lengths: Sequence[int],
        device: torch.device,
        inputs: Sequence[Tensor],
        key: Hashable,
    ) -> tuple[Tensor, list[Any]]:
        """The heads of all ranks `[G, HEAD]`, on the host, and the outputs of all items as one part."""
        layout = self._layouts.get(key)
        if layout is None:  # a form of output that not all ranks know
            mine = result.layout
            described = map(unpacked, self.ranks.gather_bytes(packed(None if mine is None else mine.empty())))
            layout = mine or next((Layout.of(one)[0] for one in described if one is not None), None)
            if layout is None:  # no rank has an output
                layout = Layout.of(())[0]
            elif key is not None:
                self._layouts[key] = layout
        own = lengths[self.ranks.place]
        fits = result.status == FINE and (own == 0 or (result.layout is not None and result.layout.alike(layout)))
        tensors = result.tensors if fits and own else [torch.zeros(own, *s, dtype=d, device=device) for s, d in layout.forms]
        if not fits and result.status == FINE:
            head[0], result.error = ERROR, ValueError("the network's outputs have another form than on the other ranks")
        numbers = _head(head, tensors, inputs, device, sum(lengths[: self.ranks.place]))
        parts = [numbers, *(tensor.contiguous() for tensor in tensors)]
        blocks = self.ranks.gather(opened, parts, [8 * HEAD + layout.length(length) for length in lengths])
        heads = torch.stack([block[: 8 * HEAD].view(torch.int64) for block in blocks]).cpu()
        columns: list[list[Tensor]] = [[] for _ in layout.forms]
        for length, block in zip(lengths, blocks, strict=True):
            at = 8 * HEAD
            for column, (shape, dtype), size in zip(columns, layout.forms, layout.sizes(length), strict=True):
                column.append(block[at : at + size].view(dtype).view(length, *shape))
                at += aligned(size)
        return heads, [layout.whole([torch.cat(column) for column in columns])]

    def _begin(self, call: Callable[[slice], Any], inputs: Sequence[Tensor], key: Hashable) -> None:
        """Sees that the ranks agree: on versions, weights and arguments, and on the output of the first item."""
        self.ranks.agree(self.facts())
        try:
            tensors = Layout.of(call(slice(0, 1)))[1]
            numbers = torch.cat([tensor[:1].flatten().double().cpu() for tensor in tensors])
        except Exception:
            numbers = torch.empty(0, dtype=torch.float64)  # the round itself meets it
        data = self.ranks.gather_bytes(numbers.numpy().tobytes())
        outputs = [torch.frombuffer(bytearray(one), dtype=torch.float64) if one else numbers[:0] for one in data]
        alike = [[_difference(one, other) <= COARSE for other in outputs] for one in outputs]
        usual = max(range(self.ranks.size), key=lambda place: sum(alike[place]))
        odd = [place for place in range(self.ranks.size) if not alike[usual][place]]
        if odd and all(len(outputs[place]) for place in (usual, *odd)):
            off = max(_difference(outputs[place], outputs[usual]) for place in odd)
            raise self.ranks.failed(
                f"{self.ranks.named(odd)} evaluated the run's first row otherwise than {self.ranks.named([usual])}, by "
                f"{off:.2g} of its size: give all ranks the same weights, seeds and arguments, and call model.eval()"
            )

    def _heed(self, heads: Tensor, result: Result, lengths: Sequence[int]) -> None:
        """Raises what a rank met: where all that had rows met it, as one process does; the rank's name otherwise."""
        statuses = heads[:, 0].tolist()
        if all(status == FINE for status in statuses):
            return
        failed = [place for place, status in enumerate(statuses) if status != FINE]
        errors = self.ranks.gather_bytes(packed(result.error))
        first = result.error if failed[0] == self.ranks.place else unpacked(errors[failed[0]])
        line = next(iter(str(first).splitlines()), "")
        if MEMORY in statuses and ERROR not in statuses:
            raise torch.OutOfMemoryError(f"{self.ranks.named(failed)} ran out of memory at one row: {line}")
        assert first is not None
        if all(statuses[place] != FINE for place, length in enumerate(lengths) if length):
            raise first
        raise self.ranks.failed(
            f"{self.ranks.named(failed)} failed at exchange {self.ranks.exchanges}, where others did not: "
            f"{type(first).__name__}: {line}"
        ) from result.error

    def _learn(self, bound: Bound, heads: Tensor, lengths: Sequence[int]) -> None:
        """Takes over what the heads say of bounds and speeds."""
        bounds = [most for most in heads[:, 2].tolist() if most]
        bound.max_rows = min(bounds, default=bound.max_rows)
        for place, spent in enumerate(heads[:, 4].tolist()):
            if lengths[place]:
                before, now = self.seconds[place], spent / 1e9
                self.seconds[place] = now if before == 0 else (1 - REMEMBERED) * before + REMEMBERED * now

    def _heed_states(self, heads: Tensor) -> None:
        """Raises if the ranks' states differ."""
        sums = heads[:, 1].tolist()
        if len(set(sums)) == 1:
            return
        usual = max(sums, key=sums.count)
        odd = [place for place, one in enumerate(sums) if one != usual]
        raise self.ranks.failed(
            f"{self.ranks.named(odd)} came to other states than {self.ranks.named([sums.index(usual)])} at exchange "
            f"{self.ranks.exchanges}: give all ranks the same noise (a generator with the same seed), edits and kind of device"
        )

    def _heed_number(self, call: Callable[[slice], Any], item: int, place: int) -> None:
        """Has another rank evaluate an item whose output is not finite; raises if it is finite there."""
        other = (place + 1) % self.ranks.size
        if other == place:
            return
        opened, finite = self.ranks.open(AGAIN, item), 0
        if other == self.ranks.place:
            with contextlib.suppress(Exception):
                finite = int(all(bool(t[:1].isfinite().all()) for t in Layout.of(call(slice(item, item + 1)))[1]))
        blocks = self.ranks.gather(opened, [torch.tensor([finite])], [8] * self.ranks.size)
        if int(blocks[other].view(torch.int64)):
            raise self.ranks.failed(
                f"{self.ranks.named([place])} returned NaN or infinity at exchange {self.ranks.exchanges - 1} for a row that "
                f"{self.ranks.named([other])} evaluates to finite numbers: look at its device and its weights"
            )


def too_many(size: int, widest: int) -> str:
    """The sentence on ranks that never get a row."""
    rows = f"{widest} row{'s' * (widest > 1)}"
    return f"{size} ranks share rounds of at most {rows}, so {widest} of them are useful: start fewer, or widen the window"


def taken(part: Any, items: int) -> Any:
    """The first items of a part."""
    return _pytree.tree_map_only(Tensor, lambda tensor: tensor[:items], part)


def by_speed(count: int, seconds: Sequence[float]) -> list[int]:
    """How many of `count` items each rank evaluates: one after the other, each item goes to the rank that is the first to have
    done it, in `seconds` an item; where a rank was not measured, all are taken to be equally fast."""
    cost = list(seconds) if all(second > 0 for second in seconds) else [1.0] * len(seconds)
    lengths = [0] * len(cost)
    for _ in range(count):
        rank = min(range(len(cost)), key=lambda place: ((lengths[place] + 1) * cost[place], place))
        lengths[rank] += 1
    return lengths


def checksum(tensors: Sequence[Tensor]) -> Tensor:
    """A sum over the bits of tensors `[items, ...]`, each item's weighted with its place; an int64 scalar on their device."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device if tensors else None)
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(BITS[tensor.dtype.itemsize]) if tensor.is_floating_point() else tensor
        items = bits.reshape(len(bits), -1).sum(1, dtype=torch.int64)
        total = total + (items * torch.arange(1, len(items) + 1, device=items.device)).sum()
    return total


def _head(head: list[int], tensors: Sequence[Tensor], inputs: Sequence[Tensor], device: torch.device, first: int) -> Tensor:
    """The head, on the device: with the sum of the inputs, and the number of the first item that is not finite."""
    found = torch.tensor(head).to(device, non_blocking=True)
    if inputs:
        found[1] = checksum(inputs)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            flat = tensor.flatten(1)
            bad = ~(flat.amax(1).isfinite() & flat.amin(1).isfinite())
            found[3] = torch.where(bad.any(), first + bad.int().argmax(), found[3])
    return found


def _difference(one: Tensor, other: Tensor) -> float:
    """The norm of a difference relative to that of the larger; NaN equals NaN."""
    if len(one) != len(other):
        return float("inf")
    same = (one == other) | (one.isnan() & other.isnan())
    size = torch.where(one.isfinite() & other.isfinite(), torch.maximum(one.abs(), other.abs()), 0.0).norm()
    found = float(torch.where(same, 0.0, one - other).norm() / size.clamp(min=1e-300))
    return found if found == found else float("inf")

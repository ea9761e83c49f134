# SPDX-License-Identifier: Apache-2.0
"""Rows of all rounds that are kept with their outputs, to be evaluated once more at the end of a run.

What goes wrong in some rounds only, or at some places of a call, shows in a row of such a round. So a row of each round is
kept, until there are more than `FEW` and `SHARE` of all rows; then one of each two neighbours is dropped at random, and from
there on a row of every second round is kept. Of a model that changes with its calls, `MANY` are kept before any is dropped, or
as many as two calls hold. The last round's is always among them. Places near the ends of a call are taken more often than those
within.

The rows are evaluated in two calls at most, unless they are many: those that came from a call of an odd number in one of an
even number, the others in one of an odd number, in the reverse of the order of their places. In the one, a state that is made
up is large and at the chain's last time, in the other small and at its first, since a model may branch on a number that is
taken over all rows. In the one, too, a state is evaluated at a time that the chain leaves out, in the other another state at
that time and two close ones: what is kept for a time leaves the line between its neighbours. Several devices share the rows of
a call, as they do a round's.

Of a model that was seen to be right (seen.py) two rows are evaluated, other ones in every run.
"""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paradiff.solver.judge import Judge, before, close_times, joined, taken
from paradiff.solver.protocol import Batch
from paradiff.solver.rounding import difference

FEW = 8
"""Rows that are kept of any run."""

SHARE = 0.02
"""Rows that are kept beyond these, as a share of all rows."""

ALIKE = 2
"""Rows that are kept of a run whose calls hold one time each, as the plain loop's do, and evaluated each by itself: that a
model uses one row's time for all does no harm there."""

MOST = 16
"""Rows that are kept of the longest run: what they hold in memory."""

MANY, CALLS = 24, 2
"""The same of a model that changes with its calls, or cannot be read, since what it remembers may act in a few rounds; and the
calls that they may take where these hold more, of up to twice as many rows."""

LOUD, QUIET = -8.0, 0.02
"""Factors on a row's state that make up a large and a small one."""


Seen = tuple[Batch, Tensor, int]
"""The rows of a call, their outputs, and the place of one of them."""


@dataclass(frozen=True, eq=False)
class Witness:
    """A row of a round. Objects are compared by identity.

    Attributes:
        rows: The memory of all rows, `[MOST + 2, ...]`.
        outputs: `[MOST + 2, ...]` that of their outputs.
        slot: Where it lies there.
        place: Its place in its call.
        count: Rows of that call.
    """

    rows: Batch
    outputs: Tensor
    slot: int
    place: int
    count: int

    @property
    def row(self) -> Batch:
        """The row."""
        at, rows = slice(self.slot, self.slot + 1), self.rows
        return Batch(rows.x[at], rows.t[at], rows.nodes[at], rows.samples[at])

    @property
    def output(self) -> Tensor:
        """`[...]` its output."""
        return self.outputs[self.slot]


class Witnesses:
    """The rows that are kept.

    Args:
        runs: Runs of the same model that passed before, by which other rows are kept and evaluated in each.
    """

    def __init__(self, runs: int = 0) -> None:
        self._runs = runs
        self._random = random.Random(runs)  # the same on all ranks; torch's generators are the model's affair
        self._memory: tuple[Batch, Tensor] | None = None  # of all rows and outputs, so that no small pieces lie between rounds
        self._free = [*range(MOST + 2)]
        self._kept: list[Witness] = []
        self._last: Witness | None = None  # of the last round, where it is not among them
        self._chain: Tensor | None = None
        self._rounds = self._rows = 0
        self._every, self._widest = 1, 1
        self._times = False  # whether a call held several times
        self._many = False  # whether a row of each round is kept

    @property
    def kept(self) -> list[Witness]:
        """The rows, that of the last round at the end."""
        return self._kept if self._last is None else [*self._kept, self._last]

    def taken(self, batch: Batch, size: int, k: int | None = None) -> tuple[Witness, int]:
        """A row of a round, before a model may write into it.

        Args:
            batch: The round's rows.
            size: Rows of a network call at most.
            k: The row; one by chance by default.

        Returns:
            The row, without its output, and which one it is.
        """
        rows = len(batch.x)
        self._rounds, self._rows, self._widest = self._rounds + 1, self._rows + rows, max(self._widest, size)
        self._chain = batch.chain if self._chain is None else self._chain
        self._times = self._times or bool((batch.t != batch.t[0]).any())
        k = self._place(rows) if k is None else k
        if self._memory is None:
            x, t, nodes, samples = (given.new_empty(MOST + 2, *given.shape[1:]) for given in _tensors(batch))
            self._memory = Batch(x, t, nodes, samples), torch.empty_like(x)
        slot, begin = self._free.pop(), k // size * size
        for memory, given in zip(_tensors(self._memory[0]), _tensors(batch), strict=True):
            memory[slot] = given[k]
        return Witness(*self._memory, slot, k - begin, min(size, rows - begin)), k

    def keep_many(self) -> None:
        """Keeps a row of each round from here on, until they are many."""
        self._many = True
        if self._memory is None:
            return
        rows, outputs = self._memory
        x, t, nodes, samples = (_longer(given, 2 * MANY - MOST) for given in _tensors(rows))
        self._memory = Batch(x, t, nodes, samples), _longer(outputs, 2 * MANY - MOST)
        self._free += range(MOST + 2, 2 * MANY + 2)
        moved = {id(one): replace(one, rows=self._memory[0], outputs=self._memory[1]) for one in self.kept}
        self._kept = [moved[id(one)] for one in self._kept]
        self._last = None if self._last is None else moved[id(self._last)]

    def told(self, taken: tuple[Witness, int], outputs: Tensor) -> None:
        """Keeps a row with its output, or none.

        Args:
            taken: The row.
            outputs: `[R, ...]` the outputs of its round.
        """
        before, (witness, k) = self.kept, taken
        witness.output.copy_(outputs[k])
        self._last = witness
        if self._rounds % self._every == 0:
            self._kept.append(witness)
            self._last = None
            if len(self._kept) > self._most():
                self._kept = [self._random.choice(self._kept[i : i + 2]) for i in range(0, len(self._kept), 2)]
                self._last = None if self._kept[-1] is witness else witness
                self._every *= 2
        held = self.kept
        self._free += [one.slot for one in before if one not in held]

    def compare(self, judge: Judge) -> None:
        """Evaluates the rows once more, and compares.

        Raises:
            ValueError: If an output is another one by more than rounding.
        """
        kept = sorted(self.kept, key=lambda w: -w.place)
        if not kept:
            return
        chain, found = self._chain if self._times else None, None
        if chain is not None:
            with contextlib.suppress(ValueError):  # the model may know the times of the chain alone
                found = self._evaluated(judge, kept, chain)
        if found is None:
            chain, found = None, self._evaluated(judge, kept, None)
        seen, close = found
        for witness, one in seen:
            self._compared(judge, witness, one)
        if chain is not None and close and judge.stands_out(kept[0].row.x, torch.stack([y[k] for _, y, k in close])):
            judge.settle_time(_sized(kept[0].row), chain)

    def compare_few(self, judge: Judge) -> None:
        """Evaluates one row once more, and another one or one that is made up, for a model that was seen; and compares.

        A row of a call of an odd number is evaluated in one of two, others by themselves, after the other one. That is, in
        turn, a row of the last round, of any round, and a large and a small one that are made up, as in `compare`.

        Raises:
            ValueError: If an output is another one by more than rounding.
        """
        kept = self.kept
        if not kept:
            return
        chain = self._chain if self._times else None
        one = self._random.choice(kept)
        late = kept[-1] if self._runs % 4 == 1 else self._random.choice(kept)
        large = self._runs % 4 == 0
        made = _made(one.row, LOUD if large else QUIET, None if chain is None else chain[-1:] if large else chain[:1])
        other = (late.row, late) if self._runs % 2 and late is not one else (made, None)
        pair = [other, (one.row, one)]
        if self._runs % 3 == 0:
            pair.reverse()
        calls = [pair] if one.count % 2 and self._widest > 1 else [[part] for part in (other, (one.row, one))]
        for call in calls:
            rows = joined([row for row, _ in call])
            outputs = judge.evaluated(rows)
            for at, (_, witness) in enumerate(call):
                if witness is not None:
                    self._compared(judge, witness, (rows, outputs, at))

    def _compared(self, judge: Judge, witness: Witness, seen: Seen) -> None:
        """Compares a row's two outputs.

        Raises:
            ValueError: If they differ by more than rounding.
        """
        rows, outputs, at = seen
        if difference(outputs[at], witness.output) > judge.limit(rows.x):
            judge.settle_later(witness.row, witness.output, witness.place, witness.count, seen)

    def _most(self) -> int:
        """Rows that may be kept."""
        if not self._times:
            return FEW if self._many else ALIKE
        if self._many:
            return min(max(MANY, CALLS * self._widest), 2 * MANY)
        return min(FEW + int(SHARE * self._rows), MOST, 2 * self._widest)

    def _place(self, rows: int) -> int:
        """A row's place in a round, one near an end more often."""
        end = self._random.choice((0, 0, -1, None))
        if end is None:
            return self._random.randrange(rows)
        near = min(self._random.choice((0, 0, 1, 1, 2, 3)), rows - 1)
        return near if end == 0 else rows - 1 - near

    def _evaluated(
        self, judge: Judge, kept: list[Witness], chain: Tensor | None
    ) -> tuple[list[tuple[Witness, Seen]], list[Seen]]:
        """Evaluates the rows in two calls, or in those of as many rows as the run's.

        Args:
            judge: What evaluates.
            kept: The rows.
            chain: `[N]` times of the chain, where states are made up.

        Returns:
            Each row with where it was evaluated; and where states at three close times were, if there are such times.
        """
        seen: list[tuple[Witness, Seen]] = []
        three = None if chain is None else close_times(_sized(kept[0].row), chain, len(chain) // 2)
        close: list[Seen] = []
        for odd in (True, False):
            group = [w for w in kept if w.count % 2 == odd]
            rows = [w.row for w in group]
            if chain is not None and group:
                rows.append(_made(group[0].row, LOUD if odd else QUIET, chain[-1:] if odd else chain[:1]))
            last = [] if three is None else [before(three) if odd else three]
            if chain is not None and group and (sum(len(part.x) for part in (*rows, *last)) % 2 == 1) == odd:
                rows.append(rows[-1])
            if not (rows := [*rows, *last]):
                continue
            call = joined(rows)
            places: list[Seen] = []
            size = self._widest if self._times else 1
            for begin in range(0, len(call.x), size):
                part = taken(call, [*range(begin, min(begin + size, len(call.x)))])
                outputs = judge.dealt(part)
                places += [(part, outputs, k) for k in range(len(part.x))]
            seen += zip(group, places, strict=False)
            close = places[-3:] if three is not None else []
        return seen, close


def _longer(values: Tensor, count: int) -> Tensor:
    """Memory with room for `count` more."""
    return torch.cat([values, values.new_empty(count, *values.shape[1:])])


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What there is of each row."""
    return batch.x, batch.t, batch.nodes, batch.samples


def _made(row: Batch, factor: float, t: Tensor | None = None) -> Batch:
    """A row with its state times a factor, at its own time or another `[1]`."""
    return Batch(factor * row.x, row.t if t is None else t, row.nodes, row.samples)


def _sized(row: Batch) -> Batch:
    """A row with its state of a root mean square of 2, by which what is kept of it shows."""
    return Batch(row.x * (2 / row.x.square().mean().sqrt().clamp(min=1e-4)), row.t, row.nodes, row.samples)

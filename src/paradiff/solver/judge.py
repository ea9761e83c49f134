# SPDX-License-Identifier: Apache-2.0
"""Settles whether two outputs for a row differ by more than rounding, and what a model does then.

Rounding depends on the number of rows in a call, and a network may amplify it. So a difference above the limit (rounding.py) is
a suspicion only, which more evaluations settle: the row once more by itself, and in its place in a call of as many rows, all
others made up. Of a model whose rows are independent the answer is then the same, since calls of equal shape round alike. So it
is of one whose answers depend on the number of rows (padding), which is told apart by what small changes of the state leave of
the difference: rounding differs by something else then. A difference below 1 % has to be a multiple of the answer. A memory of
times has to show at several places of the chain, at the one of three close times at which it was given another state before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from paradiff.errors import RanksFailed
from paradiff.solver.arguments import outputs_of
from paradiff.solver.protocol import Batch, EditedOutputs
from paradiff.solver.rounding import difference, limit_of

FACTORS = (1.0, -0.5, 0.5, -1.0)
"""Factors on a state, each of which has to show that a model heeds the number of rows: by chance, rounding may at one."""

NUDGE = 0.03
"""Relative change of a state: a few roundings of the coarsest dtype."""

MOVED = 1e-3
"""Relative difference of the answers to two close states from which they are said to differ."""

ALIKE = 0.3
"""Relative difference of what two close states show of a dependence on the number of rows."""

COUNTED = 0.01
"""Relative difference of two answers from which a dependence on the number of rows is looked for. Kernels of other numbers of
rows may round a float32 network's weights to a coarser dtype, which shows in all states alike."""

FACTOR = 0.02
"""Relative difference of a dependence on the number of rows from a multiple of the answer, up to which it is one. Weights that
are rounded to a coarser dtype change the entries of an answer each by something else."""

ENTRIES = 4
"""Entries of an answer, above the least, that show whether it is a multiple."""

PLACES = (3, 5)
"""Places of a chain at which a memory of times has to show: at all of the first so many, at least 3."""

APART = 1.5
"""Multiple of the difference of two outputs at close times by which one between them has to leave the line through both. Of
models that know no order of times, a third do so at one place."""

OTHERS = (-0.5, 1.0, -2.0)
"""Factors on a row's state that make up the others of its call."""

MADE = -2.0
"""Factor on a row's state that makes up another one."""

REPEATED = (1.0,) * 6 + (-0.7, 0.4, -2.0, 1.6, -0.2) + (1.0,) * 3
"""Calls that tell a memory from rows that influence each other: 1 for the same one again, else a factor on the states of the
last row, with less of it towards the first. What a model keeps of every n-th call, n up to 7, is at one of these that of the
same call, and at one that of another, since 11 is no multiple of n; what it adds to every n-th one is added to a same one."""

STOPPED = "the model raised StopIteration; catch it in the model"
"""The reason against a model that raises it."""
ADVICE = "call model.eval(), and compute a row's output from its own state, time and conditioning alone; check='off' goes on"

Answer = Tensor | EditedOutputs


class Judge:
    """Evaluates rows again and refuses a model whose answers differ by more than rounding.

    Args:
        again: A function of a batch that returns its outputs.
        dtype: The network's dtype; None for that of the states.
        dealt: The same function, where several devices share the rows; it returns None where a call fails. `again` by default.
        apart: A function of sequences of batches, which several devices share, each whole on one of them. It returns the
            outputs of the last batch of each, or None where a call fails. `again` of each batch by default.

    Attributes:
        rows: Rows that were evaluated.
        draws: Whether the model draws random numbers.
    """

    def __init__(
        self,
        again: Callable[[Batch], Answer],
        dtype: torch.dtype | None,
        dealt: Callable[[Batch], Answer | None] | None = None,
        apart: Callable[[Sequence[Sequence[Batch]]], list[Tensor] | None] | None = None,
    ) -> None:
        self._again, self._dtype, self._dealt, self._apart = again, dtype, dealt, apart
        self.rows = 0
        self.draws = False

    def limit(self, x: Tensor) -> float:
        """Relative difference of two answers that rounding explains."""
        return limit_of(self._dtype or x.dtype, x.device)

    def evaluated(self, batch: Batch) -> Tensor:
        """Outputs for some rows.

        Raises:
            ValueError: If the model fails for them.
            RuntimeError: If it raises StopIteration, which would end a generator that asks for them.
        """
        self.rows += len(batch.x)
        x = batch.x.clone()
        try:
            return outputs_only(copied(self._again(batch), x))
        except StopIteration as error:
            raise RuntimeError(STOPPED) from error
        except (torch.OutOfMemoryError, RanksFailed):
            raise
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"the model fails for {_name(batch, 0)} in a call of {len(batch.x)} rows: {type(error).__name__}: {said}. It "
                f"must take any number of rows: {ADVICE}"
            ) from error

    def dealt(self, batch: Batch) -> Tensor:
        """Outputs for some rows, which several devices share; where that fails, each evaluates them all.

        Raises:
            ValueError: If the model fails for them.
        """
        found = None if self._dealt is None else self._dealt(batch)
        if found is None:
            return self.evaluated(batch)
        self.rows += len(batch.x)
        return outputs_only(copied(found, batch.x))

    def apart(self, sequences: Sequence[Sequence[Batch]]) -> Iterator[Tensor]:
        """Outputs of the last batch of each of some sequences, which several devices share. Where there is one, or that fails,
        each sequence is evaluated when its outputs are asked for.

        Raises:
            ValueError: If the model fails for them.
        """
        found = None if self._apart is None else self._apart(sequences)
        if found is None:
            yield from ([self.evaluated(batch) for batch in sequence][-1] for sequence in sequences)
            return
        self.rows += sum(len(batch.x) for sequence in sequences for batch in sequence)
        yield from found

    def alone(self, batch: Batch, outputs: Tensor, k: int) -> None:
        """Evaluates a row by itself and compares it with `outputs`.

        Raises:
            ValueError: If they differ by more than rounding.
        """
        self.compared(batch, outputs, k, self.evaluated(taken(batch, [k]))[0])

    def compared(self, batch: Batch, outputs: Tensor, k: int, other: Tensor) -> None:
        """Compares a row's output among `outputs` with another answer, `[...]`, by itself.

        Raises:
            ValueError: If they differ by more than rounding.
        """
        if (off := difference(other, outputs[k])) > self.limit(batch.x):
            self.settle(batch, outputs, other, k, off)

    def all(self, batch: Batch, outputs: Tensor) -> None:
        """Evaluates all rows once more, where random numbers were drawn, which may spare a few rows by chance.

        Raises:
            ValueError: If one differs by more than rounding.
        """
        found = self.evaluated(batch)
        off = [difference(one, other) for one, other in zip(found, outputs, strict=True)]
        if max(off) > self.limit(batch.x):
            raise ValueError(self._twice(batch, off.index(max(off)), max(off)))

    def settle(self, batch: Batch, outputs: Tensor, alone: Tensor, k: int, off: float) -> None:
        """Finds out whether a row's answer among others and that by itself differ by more than rounding.

        Args:
            batch: The rows of a call, or of a round of several calls.
            outputs: `[R, ...]` their outputs.
            alone: `[...]` the output of row k by itself.
            k: The row.
            off: The relative difference.

        Raises:
            ValueError: If so.
        """
        limit = self.limit(batch.x)
        once_more = difference(self.evaluated(taken(batch, [k]))[0], alone)
        if once_more > limit or len(batch.x) == 1:
            raise ValueError(self._twice(batch, k, max(once_more, off)))
        for factor in OTHERS:
            others = batch.x[[k] * len(batch.x)] * factor
            others[k] = batch.x[k]
            found = self.evaluated(taken(batch, [k] * len(batch.x), others))
            if torch.equal(found, outputs) and not torch.equal(outputs, outputs[k].expand_as(outputs)):
                raise ValueError(self._twice(batch, k, off))  # the answer of an earlier call
            if difference(found[k], outputs[k]) > limit:
                raise ValueError(self._beside_others(batch, k, outputs, taken(batch, [k]), off))
        if (again := difference(self.evaluated(taken(batch, [k]))[0], alone)) > limit:
            raise ValueError(self._twice(batch, k, again))  # by itself, after a call of several rows
        self._settle_count(taken(batch, [k]), k, len(batch.x), off)

    def settle_later(self, row: Batch, output: Tensor, place: int, count: int, call: tuple[Batch, Tensor, int]) -> None:
        """Finds out whether a row's answer at the end of a run and that in its round differ by more than rounding.

        Args:
            row: The row.
            output: `[...]` its output in its round.
            place: Its place in its call.
            count: Rows of that call.
            call: The rows of the later call, their outputs, and the place of the row there.

        Raises:
            ValueError: If so.
        """
        limit, (rows, found, at) = self.limit(row.x), call
        alone = self.evaluated(row)[0]
        if (off := difference(alone, output)) > limit:
            again: list[tuple[Batch, Tensor]] = []
            for factor, t in zip(OTHERS, _times(rows, row), strict=True):
                x = row.x[[0] * count] * factor
                x[place] = row.x[0]
                others = taken(row, [0] * count, x)
                others.t[torch.arange(count, device="cpu") != place] = t
                again.append((others, self.evaluated(others)))
            first = again[0][1][place]
            if max(difference(one[place], first) for _, one in again[1:]) > limit:
                raise ValueError(self._beside_others(again[0][0], place, again[0][1], row, off))
            if difference(first, output) > limit:
                raise ValueError(self._twice(row, 0, off, ", or its rows influenced each other in a round before"))
            self._settle_count(row, place, count, off)
        elif len(found) > 1 and (off := difference(alone, found[at])) > limit:
            self.settle(rows, found, alone, at, off)

    def settle_time(self, row: Batch, chain: Tensor) -> None:
        """Finds out whether a model remembers what it was given at a time: of three close times the middle one was met before,
        with another state, and its output stands out, at several places of the chain.

        Args:
            row: A row.
            chain: `[N]` times of the chain.

        Raises:
            ValueError: If so.
        """
        least, most = PLACES
        nodes = {len(chain) * k // 8 for k in (1, 2, 3, 5, 6, 7)} - {len(chain) // 2}
        places = [three for node in sorted(nodes) if (three := close_times(row, chain, node)) is not None][:most]
        if len(places) < least:
            return
        offs = []
        for three in places:
            self.evaluated(before(three))
            offs.append(self.stands_out(three.x, self.evaluated(three)))
            if offs[-1] == 0:
                return
        raise ValueError(self._twice(row, 0, min(offs)))

    def stands_out(self, x: Tensor, outputs: Tensor) -> float:
        """Relative difference by which the second of three outputs `[3, ...]` at close times leaves the line between the
        others; 0 where rounding or the times explain it."""
        one, two, other = outputs.double()
        between = (2 * one + other) / 3
        off = difference(between, two)
        explained = off <= self.limit(x) or float((between - two).norm()) <= APART * float((one - other).norm())
        return 0.0 if explained else off

    def _beside_others(self, batch: Batch, k: int, outputs: Tensor, row: Batch, off: float) -> str:
        """The reason against a model whose answer to a row changes with the others of its call. Rows influence each other, or
        it remembers earlier calls, be it of some calls only: then the same call, repeated after others of its shape, is
        answered otherwise, or all calls of its shape are answered alike.

        Args:
            batch: The rows of a call.
            k: The place of the row among them.
            outputs: `[R, ...]` their outputs.
            row: The row.
            off: The relative difference of its answers.
        """
        alike = True
        for factor in REPEATED:
            if factor == 1:
                anew = difference(self.evaluated(batch)[k], outputs[k])
                if anew > self.limit(batch.x):
                    return self._twice(row, 0, anew)
            else:
                share = torch.linspace(1, factor, len(batch.x), dtype=batch.x.dtype, device="cpu")
                factors = share.view(-1, *[1] * (batch.x.ndim - 1)).to(batch.x.device, non_blocking=True)
                other = taken(batch, [*range(len(batch.x))], factors * batch.x.roll(1, -1))
                alike = torch.equal(self.evaluated(other), outputs) and alike
        return self._twice(row, 0, off) if alike else self._influenced(row, 0, len(batch.x), off)

    def _settle_count(self, row: Batch, place: int, count: int, off: float) -> None:
        """Finds out whether what sets a row's two answers apart is the number of rows, rounding aside.

        Raises:
            ValueError: If so.
        """
        limit = self.limit(row.x)
        large = off > max(limit, COUNTED)
        if self._heeds_count(row, place, count, max(limit, COUNTED)) if large else self._is_multiple(row, place, count):
            raise ValueError(
                f"the model answered {_name(row, 0)} otherwise in a call of {count} rows than by itself: the answers differ by "
                f"{off:.2g} of their size, of which rounding explains {limit:.1g}. Its output depends on the number of rows "
                f"(padding), or it remembers earlier calls (a cache): {ADVICE}"
            )

    def _pair(self, row: Batch, place: int, count: int, x: Tensor) -> Tensor:
        """`[2, ...]` the answers to a state `[1, ...]` at a row's time, by itself and at a place among others."""
        rows = [taken(row, [0] * n, x.expand(n, *x.shape[1:]).clone()) for n in (1, count)]
        return torch.stack([self.evaluated(rows[0])[0], self.evaluated(rows[1])[place]])

    def _is_multiple(self, row: Batch, place: int, count: int) -> bool:
        """Whether the answers to several states made of a row's are among others the same multiple of those by itself, by more
        than rounding explains."""
        found = []
        for number, factor in enumerate(FACTORS):
            x = (row.x * factor).flatten(1).roll(number, 1).view_as(row.x)
            alone, among = self._pair(row, place, count, x).double()
            gap, size = among - alone, alone.square().sum().clamp(min=1e-300)
            found.append(float((gap * alone).sum() / size))
            entries = int((alone.abs() > 0.1 * alone.abs().amax()).sum())
            rest = float((gap - found[-1] * alone).norm())
            if entries < ENTRIES or difference(alone, among) <= self.limit(row.x) or rest > FACTOR * float(gap.norm()):
                return False
        return max(found) - min(found) <= FACTOR * max(map(abs, found))

    def _heeds_count(self, row: Batch, place: int, count: int, least: float) -> bool:
        """Whether the answers to a row's state, times each of several factors, differ between one row and as many as the
        round's by more than rounding explains, and by much the same, or the same multiple of the answer, when a small change of
        the state moves them. Rounding that a network amplifies differs by something else then. Answers that nothing moves
        (saturated ones) have to differ by the same for all factors."""
        still, signs = [], 1 - 2 * (torch.arange(row.x[0].numel(), device="cpu") % 2).view(1, *row.x.shape[1:]).to(row.x)
        for factor in FACTORS:
            x = row.x * factor
            first, *close = (self._pair(row, place, count, x * (1 + way * signs)) for way in (0.0, NUDGE, -NUDGE))
            if min(difference(*answers) for answers in (first, *close)) <= least:
                return False
            if min(max(map(difference, answers, first)) for answers in close) <= MOVED:
                still.append(first)
            elif not _differ_alike([first, *close]):
                return False
        return not still or (len(still) == len(FACTORS) and _differ_alike(still))

    def _influenced(self, batch: Batch, k: int, count: int, off: float) -> str:
        return (
            f"the model answered {_name(batch, k)} otherwise among {count} rows than by itself: the answers differ by "
            f"{off:.2g} of their size, of which rounding explains {self.limit(batch.x):.1g}. Its rows influence each other "
            f"(batch statistics), or it uses one row's time or conditioning for all, or it keeps what it was first given "
            f"(a cache): {ADVICE}"
        )

    def _twice(self, batch: Batch, k: int, off: float, beside: str = "") -> str:
        reason = "draws random numbers (dropout)" if self.draws else "remembers earlier calls (self-conditioning, a cache)"
        return (
            f"the model answered {_name(batch, k)} in two ways: the answers differ by {off:.2g} of their size, of which "
            f"rounding explains {self.limit(batch.x):.1g}. It {reason}{beside}: {ADVICE}"
        )


def _differ_alike(pairs: Sequence[Tensor]) -> bool:
    """Whether two answers `[2, ...]` differ by much the same in all pairs, or by much the same multiple of the first."""
    gaps = [(among - alone).double() for alone, among in pairs]
    size = float(gaps[0].norm())
    if max(float((gap - gaps[0]).norm()) for gap in gaps) < ALIKE * size:
        return True
    factors = []
    for gap, (alone, _) in zip(gaps, pairs, strict=True):
        answer = alone.double()
        if int((answer.abs() > 0.1 * answer.abs().amax()).sum()) < ENTRIES:
            return False
        factors.append(float((gap * answer).sum() / answer.square().sum()))
        if float((gap - factors[-1] * answer).norm()) >= ALIKE * float(gap.norm()):
            return False
    return max(abs(factor - factors[0]) for factor in factors) < ALIKE * abs(factors[0])


def taken(batch: Batch, rows: list[int], x: Tensor | None = None) -> Batch:
    """Some rows of a batch, with other states if there are any."""
    at = torch.tensor(rows, device="cpu")
    return Batch(
        batch.x[at.to(batch.x.device, non_blocking=True)] if x is None else x, batch.t[at], batch.nodes[at], batch.samples[at]
    )


def joined(parts: list[Batch]) -> Batch:
    """The rows of several batches."""
    x, t, nodes, samples = (torch.cat(values) for values in zip(*((p.x, p.t, p.nodes, p.samples) for p in parts), strict=True))
    return Batch(x, t, nodes, samples)


def copied(answer: Answer, rows: Tensor) -> Answer:
    """A copy of the answer to some rows, which fits them."""
    outputs, states = outputs_of(answer, rows)
    return outputs.clone() if states is None else EditedOutputs(outputs.clone(), states.clone())


def outputs_only(answer: Answer) -> Tensor:
    """The outputs of an answer."""
    return answer.outputs if isinstance(answer, EditedOutputs) else answer


def close_times(row: Batch, chain: Tensor, node: int) -> Batch | None:
    """A row's state at three times between a node's and that of the one before, close to the latter; None where whole numbers
    have no room for them."""
    if node < 1:
        return None
    one, other = chain[node - 1], chain[node]
    places = torch.tensor([1, 2, 4], device="cpu")
    if one.is_floating_point():
        t = one + (other - one) * 1e-3 * places
    elif abs(gap := int(other - one)) > 4:
        t = one + (1 if gap > 0 else -1) * places
    else:
        return None
    at = torch.tensor([node] * 3, device="cpu")
    return Batch(row.x[[0] * 3], t, at, row.samples[[0] * 3])


def before(three: Batch) -> Batch:
    """Another state at the middle one of three times, for a memory of times to keep."""
    return taken(three, [1], -three.x[1:2].abs() / 2)


def _times(rows: Batch, row: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Times for the others of a call: the row's own, the earliest and the latest of some rows."""
    return row.t[0], rows.t.min(), rows.t.max()


def _name(batch: Batch, k: int) -> str:
    return f"node {int(batch.nodes[k])} of sample {int(batch.samples[k])}"

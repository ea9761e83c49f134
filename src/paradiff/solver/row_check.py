# SPDX-License-Identifier: Apache-2.0
"""What a model must be, seen in the run itself: the output of a row depends on that row's state, time and conditioning alone.

A parallel solver evaluates a state in a batch with others, and again in a later round, so that all of this breaks it: rows that
influence each other (batch statistics), one row's time used for all, random numbers (dropout), a memory of earlier calls
(self-conditioning by a closure). So some rows of a round are evaluated again, each by itself, one after the other: one inside
of a network call, and the one whose time differs most from that of the call's first, of another sample where there is one.
Before them a state made up of the first one's own, -2x, is evaluated at its time, so that what the model remembers of a shape
or of a time shows.

A narrow window shows times that are alike, and a first guess states that are: a model may then take one row's time for all, or
the rows' mean, and be right. So where the round's calls do not hold the whole chain's times, or hold equal states, the first
row is also evaluated between two that are made up, of times of the middle and of the end of the chain.

At the end of the run two more rows make one call: a row of that early round, which must have the output that it had; and the
state that was made up, at a time close to its own that the chain leaves out. A model that keeps what it first met at a time is
wrong in all later rounds and answers alike whenever it is asked. At a time that it never met it has nothing to keep to, so its
output for that state is another one than at the close time, by more than the time explains.

Rounding depends on the number of rows in a call, and a network may amplify it. So a difference above `limit` is a suspicion
only, which more evaluations settle: the row once more by itself, and in its place in a round of as many rows, all others
made up. Of a model whose rows are independent the answer is then the same, since calls of equal shape round alike. So it is of
one whose answers depend on the number of rows (padding), which is told apart by what small changes of the state leave of the
difference: rounding differs by something else then. A memory of times has to show at several places of the chain, at the one
of three close times at which it was given another state before. As long as a model draws random numbers, all rows of each round
are evaluated again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from paradiff.errors import require_one_of
from paradiff.solver.accelerator import random_states
from paradiff.solver.arguments import outputs_of
from paradiff.solver.protocol import Batch, EditedOutputs

Check = Literal["first", "every", "off"]
"""Which rounds have rows evaluated again: `first`, three rows of the first one, and of the first whose network calls hold
several rows, several times or several samples, where that is a later one; four more where those of several times hold a part of
the chain only, or equal states; then one row at each further quarter of the chain that rounds of several times come to, since a
network may heed other rows in a part of the chain only; and two at the end. `every`, all rows of all rounds, slow, for tests.
`off`, none."""

CHECKS = ("first", "every", "off")
PARTS = 4
"""Parts of the chain in each of which a row is checked."""

FACTORS = (1.0, -0.5, 0.5, -1.0)
"""Factors on a state, each of which has to show that a model heeds the number of rows: by chance, rounding may at one."""

MADE = -2.0
"""Factor on a row's state that makes up another one."""

NUDGE = 0.03
"""Relative change of a state: a few roundings of the coarsest dtype."""

MOVED = 1e-3
"""Relative difference of the answers to two close states from which they are said to differ."""

ALIKE = 0.3
"""Relative difference of what two close states show of a dependence on the number of rows."""

COUNTED = 0.01
"""Relative difference of two answers from which a dependence on the number of rows is looked for. Kernels of other numbers of
rows may round a float32 network's weights to a coarser dtype, which shows in all states alike."""

PLACES = 3
"""Times at which a memory of times has to show."""

OTHERS = (-0.5, 1.0, -2.0)
"""Factors on a row's state that make up the others of its call."""

Answer = Tensor | EditedOutputs


@dataclass(frozen=True, eq=False)
class Early:
    """What the end of a run evaluates again. Objects are compared by identity.

    Attributes:
        row: A row.
        output: `[...]` its output in its round.
        place: Its place in its call, and the number of rows from the call's first on.
        made: A state that is made up, at a time that the chain leaves out; None where there is no such time.
        made_output: `[...]` the output for that state at a close time of the chain, which was met before.
        made_bound: Norm of the difference that the other time explains.
    """

    row: Batch
    output: Tensor
    place: tuple[int, int]
    made: Batch | None
    made_output: Tensor
    made_bound: float


ADVICE = "call model.eval(), and compute a row's output from its own state, time and conditioning alone; check='off' goes on"


class RowCheck:
    """Evaluates batches and checks some of their rows.

    Args:
        evaluate: A function of a batch that returns its outputs.
        check: See `Check`.
        again: The same function, for evaluations of the check; `evaluate` by default.

    Attributes:
        rows: Rows that were evaluated for the check.

    Raises:
        ValueError: If `check` is none of these.
    """

    def __init__(
        self, evaluate: Callable[[Batch], Answer], check: Check = "first", *, again: Callable[[Batch], Answer] | None = None
    ) -> None:
        require_one_of("check", check, CHECKS)
        self._evaluate, self._check = evaluate, check
        self._again = evaluate if again is None else again
        self._seen: set[str] = set()  # `_variety` of the rounds that were checked
        self._part = 0  # the part of the chain that they came to
        self._among_others = False  # whether a row was evaluated among others that are made up
        self._draws = False  # whether random numbers were drawn in the last of them
        self._early: Early | None = None
        self.rows = 0

    def __call__(self, batch: Batch) -> Answer:
        """The answer to a batch; a copy, since a model may return the same memory at every call.

        Raises:
            ValueError: If a row's output depends on more than that row.
        """
        if self._check == "off":
            return _copied(self._evaluate(batch), batch.x)
        variety, part = self._variety(batch), self._part_of(batch)
        known = variety <= self._seen
        wanted = self._check == "every" or not known or ("times" in variety and part > self._part)
        if not wanted and not self._draws:
            return _copied(self._evaluate(batch), batch.x)
        self._seen, self._part = variety | self._seen, max(part, self._part)
        x, before = batch.x.clone(), [torch.get_rng_state(), *random_states()]
        answer = _copied(self._evaluate(batch), batch.x)
        self._draws = not all(map(torch.equal, before, [torch.get_rng_state(), *random_states()]))
        given, outputs = Batch(x, batch.t, batch.nodes, batch.samples, batch.chain), _outputs(answer)
        if self._draws:
            self._compare_all(given, outputs)
        if wanted:
            self._compare(given, outputs, known)
        return answer

    def finish(self) -> None:
        """Evaluates a row of an early round once more, at the end of a run, beside a state that is made up.

        Raises:
            ValueError: If a row's output depends on more than that row.
        """
        if self._early is None:
            return
        early, made, found = self._early, self._early.made, None
        if made is not None:
            with contextlib.suppress(ValueError):  # the model may know the times of the chain alone
                found = self._evaluated(_joined(early.row, made))
        if found is None:
            made, found = None, self._evaluated(early.row)
        limit = self._limit(early.row.x)
        if (off := difference(found[0], early.output)) > limit:
            self._settle_early(early, found, off, limit)
        if made is not None and float((found[1] - early.made_output).double().norm()) > early.made_bound:
            self._settle_time(made, limit)

    def _calls(self, batch: Batch) -> Tensor:
        """`[R]` the first row of the network call that each row of a round is evaluated in."""
        rows = torch.arange(len(batch.x), device="cpu")
        size = getattr(self._evaluate, "max_rows", None)
        return torch.zeros_like(rows) if size is None else rows // size * size

    def _part_of(self, batch: Batch) -> int:
        """The part of the chain that a round comes to."""
        return 0 if batch.chain is None else max(batch.nodes.tolist()) * PARTS // max(len(batch.chain) - 1, 1)

    def _variety(self, batch: Batch) -> set[str]:
        """What the rows of one network call are: several, of several times, of several samples."""
        count, size = len(batch.x), getattr(self._evaluate, "max_rows", None)
        size = count if size is None else size
        found = {"one"} if size == 1 or count == 1 else {"one", "rows"}
        for name, values in (("times", batch.t), ("samples", batch.samples)):
            several = values.tolist()  # on the CPU
            if any(several[k] != several[k // size * size] for k in range(count)):
                found.add(name)
        return found

    def _compare_all(self, batch: Batch, outputs: Tensor) -> None:
        """Evaluates all rows again, since random numbers were drawn, which may spare a few rows by chance."""
        limit, found = self._limit(batch.x), self._evaluated(batch)
        off = [difference(one, other) for one, other in zip(found, outputs, strict=True)]
        if max(off) > limit:
            raise ValueError(self._twice(batch, off.index(max(off)), max(off), limit))

    def _compare(self, batch: Batch, outputs: Tensor, known: bool) -> None:
        """Evaluates rows by themselves and compares them with `outputs`.

        Args:
            batch: The round's rows.
            outputs: `[R, ...]` theirs.
            known: Whether such a round was checked before.
        """
        limit, rows = self._limit(batch.x), self._rows(batch)
        inner, last = rows[0], rows[-1]
        if known and self._check == "first":
            self._compare_row(batch, outputs, (inner + last + 1) // 2, limit)
            return
        made = _taken(batch, [inner], MADE * batch.x[inner : inner + 1])
        made_output = self._evaluated(made)[0]
        answers = [self._compare_row(batch, outputs, k, limit) for k in rows]
        if known:
            return
        self._early = self._early_of(batch, outputs, inner, last, made_output)
        if not self._among_others and (others := self._others(batch, rows)) is not None:
            self._among_others = True
            found = self._evaluated(others)
            if (off := difference(found[1], answers[0])) > limit:
                self._settle(others, found, answers[0], 1, off, limit)
            self._compare_row(others, found, 2, limit)

    def _compare_row(self, batch: Batch, outputs: Tensor, k: int, limit: float) -> Tensor:
        """Evaluates a row by itself and compares it with `outputs`; its answer."""
        alone = self._evaluated(_taken(batch, [k]))[0]
        if (off := difference(alone, outputs[k])) > limit:
            self._settle(batch, outputs, alone, k, off, limit)
        return alone

    def _others(self, batch: Batch, rows: list[int]) -> Batch | None:
        """The first row between two that are made up, of the middle and of the end of the chain; None where the rows' own call
        holds all that such others can show, or none of its rows can be seen by another."""
        chain, first = batch.chain, self._calls(batch)
        mine = first == first[rows[0]]
        if chain is None or not (batch.t[mine] != batch.t[rows[0]]).any():
            return None
        times, x = batch.t[mine], batch.x[mine.to(batch.x.device)]
        whole = bool(times.min() <= chain.min()) and bool(times.max() >= chain.max())
        if whole and not torch.equal(x, x[:1].expand_as(x)):
            return None
        nodes = torch.tensor([len(chain) // 2, int(batch.nodes[rows[0]]), len(chain) - 1], device="cpu")
        t = torch.stack([chain[nodes[0]], batch.t[rows[0]], chain[nodes[2]]])
        factor = torch.tensor([MADE, 1, MADE], dtype=x.dtype, device="cpu").to(x.device, non_blocking=True)
        x = batch.x[rows[0] :][:1] * factor.view(3, *[1] * (x.ndim - 1))
        return Batch(x, t, nodes, batch.samples[[rows[-1], rows[0], rows[-1]]])

    def _rows(self, batch: Batch) -> list[int]:
        """The rows that are evaluated by themselves, in this order: one inside of a call, and the one whose time differs most
        from the call's first, of another sample where there is one."""
        if self._check == "every":
            return [*range(len(batch.x))]
        first = self._calls(batch)
        apart = (batch.t - batch.t[first]).abs().double()
        score = apart / apart.amax().clamp(min=1e-300) + (batch.samples != batch.samples[first])
        last = int(score.argmax()) if score.any() else int((first == 0).sum()) - 1
        begin = int(first[last])
        inner = begin + (last - begin) * 2 // 3
        inner -= inner > begin + 1 and (last - inner) % 2 == 0
        return [inner, last] if inner != last else [last]

    def _early_of(self, batch: Batch, outputs: Tensor, inner: int, last: int, made_output: Tensor) -> Early:
        """What is evaluated at the end of the run: a round's last row again, and beside it the state that was made up of the
        inner one, at a time close to its own that the chain leaves out."""
        begin = int(self._calls(batch)[last])
        made, bound = None, 0.0
        for k in (inner - 1, inner + 1):
            if not 0 <= k < len(batch.x) or batch.samples[k] != batch.samples[inner] or batch.t[k] == batch.t[inner]:
                continue
            t = _between(batch.t[inner], batch.t[k])[:1]
            if made is None and len(t) and batch.chain is not None and not (batch.chain == t).any():
                near, far = float(batch.t[inner]), float(batch.t[k])
                share = (float(t) - near) / (far - near)
                change = float((outputs[k] - outputs[inner]).double().norm())
                bound = 10 * share * change + self._limit(batch.x) * float(made_output.double().norm())
                made = _taken(batch, [inner], MADE * batch.x[inner : inner + 1])
                made = Batch(made.x, t, made.nodes, made.samples, batch.chain)
        place = (last - begin, len(batch.x) - begin)
        return Early(_taken(batch, [last]), outputs[last].clone(), place, made, made_output, bound)

    def _settle(self, batch: Batch, outputs: Tensor, alone: Tensor, k: int, off: float, limit: float) -> None:
        """Finds out whether a row's two answers differ by more than rounding.

        Raises:
            ValueError: If so.
        """
        once_more = difference(self._evaluated(_taken(batch, [k]))[0], alone)
        if once_more > limit or len(batch.x) == 1:
            raise ValueError(self._twice(batch, k, max(once_more, off), limit))
        for factor in OTHERS:
            others = batch.x[[k] * len(batch.x)] * factor
            others[k] = batch.x[k]
            found = self._evaluated(_taken(batch, [k] * len(batch.x), others))
            if torch.equal(found, outputs) and not torch.equal(outputs, outputs[k].expand_as(outputs)):
                raise ValueError(self._twice(batch, k, off, limit))  # the answer of an earlier call
            if difference(found[k], outputs[k]) > limit:
                raise ValueError(self._influenced(batch, k, len(batch.x), off, limit))
        if (again := difference(self._evaluated(_taken(batch, [k]))[0], alone)) > limit:
            raise ValueError(self._twice(batch, k, again, limit))  # by itself, after a call of several rows
        if off > max(limit, COUNTED) and self._heeds_count(batch, k, max(limit, COUNTED)):
            raise ValueError(
                f"the model answered {_name(batch, k)} otherwise in a call of {len(batch.x)} rows than by itself: the answers "
                f"differ by {off:.2g} of their size, of which rounding explains {limit:.1g}. Its output depends on the "
                f"number of rows (padding), or it remembers earlier calls (a cache): {ADVICE}"
            )

    def _heeds_count(self, batch: Batch, k: int, least: float) -> bool:
        """Whether the answers to a row's state, times each of several factors, differ between one row and as many as the
        round's by more than rounding explains, and by much the same when a small change of the state moves them. Rounding that
        a network amplifies differs by something else then. Answers that nothing moves have to be the same for all factors."""
        count = len(batch.x)

        def pair(x: Tensor) -> Tensor:
            """The answers to a state by itself and among others."""
            rows = [_taken(batch, [k] * n, x.expand(n, *x.shape[1:]).clone()) for n in (1, count)]
            return torch.stack([self._evaluated(rows[0])[0], self._evaluated(rows[1])[k]])

        still, signs = [], 1 - 2 * (torch.arange(batch.x[k].numel(), device="cpu") % 2).view(1, *batch.x.shape[1:]).to(batch.x)
        for factor in FACTORS:
            x = batch.x[k : k + 1] * factor
            first, *close = (pair(x * (1 + way * signs)) for way in (0.0, NUDGE, -NUDGE))
            gaps = [(among - alone).double() for alone, among in (first, *close)]
            if min(difference(*answers) for answers in (first, *close)) <= least:
                return False
            if min(max(map(difference, answers, first)) for answers in close) <= MOVED:
                still.append(first)
            elif max(float((gap - gaps[0]).norm()) for gap in gaps[1:]) >= ALIKE * float(gaps[0].norm()):
                return False
        return not still or (len(still) == len(FACTORS) and all(torch.equal(still[0], other) for other in still))

    def _settle_early(self, early: Early, found: Tensor, off: float, limit: float) -> None:
        """Finds out whether a row's answer at the end of a run and that in its round differ by more than rounding.

        Raises:
            ValueError: If so.
        """
        row, (place, count) = early.row, early.place
        alone = self._evaluated(row)[0]
        if difference(alone, early.output) > limit:
            again = []
            for factor in OTHERS:
                x = row.x[[0] * count] * factor
                x[place] = row.x[0]
                again.append(self._evaluated(_taken(row, [0] * count, x))[place])
            if max(difference(one, again[0]) for one in again[1:]) > limit:
                raise ValueError(self._influenced(row, 0, count, off, limit))
            if difference(again[0], early.output) > limit:
                raise ValueError(self._twice(row, 0, off, limit))
        if early.made is not None and len(found) > 1 and (off := difference(alone, found[0])) > limit:
            self._settle(_joined(row, early.made), found, alone, 0, off, limit)

    def _settle_time(self, made: Batch, limit: float) -> None:
        """Finds out whether a model remembers what it was given at a time: of three close times the middle one was met before,
        with another state, and its output stands out, at several places of the chain.

        Raises:
            ValueError: If so.
        """
        chain, offs = made.chain, []
        assert chain is not None
        for node in [len(chain) * k // 8 for k in range(1, 8)]:
            t = _between(chain[node - 1], chain[node])
            if not len(t) or abs(node - int(made.nodes)) < 2:
                continue
            three = Batch(made.x[[0] * 3], t, made.nodes[[0] * 3], made.samples[[0] * 3])
            self._evaluated(_taken(three, [1], -made.x / 2))
            one, two, other = self._evaluated(three).double()
            between = (2 * one + other) / 3
            offs.append(difference(between, two))
            if offs[-1] <= limit or float((between - two).norm()) <= 4 * float((one - other).norm()):
                return
            if len(offs) == PLACES:
                raise ValueError(self._twice(made, 0, min(offs), limit))

    def _influenced(self, batch: Batch, k: int, count: int, off: float, limit: float) -> str:
        return (
            f"the model answered {_name(batch, k)} otherwise among {count} rows than by itself: the answers differ by "
            f"{off:.2g} of their size, of which rounding explains {limit:.1g}. Its rows influence each other (batch "
            f"statistics), or it uses one row's time or conditioning for all: {ADVICE}"
        )

    def _twice(self, batch: Batch, k: int, off: float, limit: float) -> str:
        reason = "draws random numbers (dropout)" if self._draws else "remembers earlier calls (self-conditioning, a cache)"
        return (
            f"the model answered {_name(batch, k)} in two ways: the answers differ by {off:.2g} of their size, of which "
            f"rounding explains {limit:.1g}. It {reason}: {ADVICE}"
        )

    def _evaluated(self, batch: Batch) -> Tensor:
        """Outputs for rows of the check.

        Raises:
            ValueError: If the model fails for them.
        """
        self.rows += len(batch.x)
        x = batch.x.clone()
        try:
            return _outputs(_copied(self._again(batch), x))
        except (torch.OutOfMemoryError, StopIteration):
            raise
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"the model fails for {_name(batch, 0)} in a call of {len(batch.x)} rows: {type(error).__name__}: {said}. It "
                f"must take any number of rows: {ADVICE}"
            ) from error

    def _limit(self, x: Tensor) -> float:
        """Relative difference of two answers that rounding explains: eps^(2/3) of the network's dtype, 2e-5 in float32, 1e-2 in
        float16 and 4e-2 in bfloat16, where kernels of different batch sizes leave a few eps. On CUDA, eps is at least that of
        TF32, 2^-10."""
        dtype = getattr(self._evaluate, "dtype", None) or x.dtype
        eps = torch.finfo(dtype).eps
        if x.device.type == "cuda" and dtype != torch.float64:
            eps = max(eps, 2.0**-10)
        return _limit_of(eps)


def _limit_of(eps: float) -> float:
    """Relative difference of two answers that rounding by `eps` explains."""
    return eps ** (2 / 3)


def difference(one: Tensor, other: Tensor) -> float:
    """Relative difference of two outputs `[...]` in the root mean square; infinite where one alone is not finite."""
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    gap = torch.where(same, 0.0, one - other)
    size = torch.where(one.isfinite() & other.isfinite(), torch.maximum(one.abs(), other.abs()), 0.0)
    found = float(gap.norm() / size.norm().clamp(min=1e-300))
    return found if found == found else float("inf")


def _taken(batch: Batch, rows: list[int], x: Tensor | None = None) -> Batch:
    """Some rows of a batch, with other states if there are any."""
    at = torch.tensor(rows, device="cpu")
    return Batch(batch.x[at.to(batch.x.device)] if x is None else x, batch.t[at], batch.nodes[at], batch.samples[at])


def _joined(one: Batch, other: Batch) -> Batch:
    """The rows of two batches."""
    return Batch(
        torch.cat([one.x, other.x]),
        torch.cat([one.t, other.t]),
        torch.cat([one.nodes, other.nodes]),
        torch.cat([one.samples, other.samples]),
    )


def _copied(answer: Answer, rows: Tensor) -> Answer:
    """A copy of the answer to some rows, which fits them."""
    outputs, states = outputs_of(answer, rows)
    return outputs.clone() if states is None else EditedOutputs(outputs.clone(), states.clone())


def _outputs(answer: Answer) -> Tensor:
    return answer.outputs if isinstance(answer, EditedOutputs) else answer


def _name(batch: Batch, k: int) -> str:
    return f"node {int(batch.nodes[k])} of sample {int(batch.samples[k])}"


def _between(one: Tensor, other: Tensor) -> Tensor:
    """`[3]` times from one towards another and close to it, at distances of 1, 2 and 4 of a small unit; none where whole
    numbers have no room for all."""
    places = torch.tensor([1, 2, 4], device="cpu")
    if one.is_floating_point():
        return one + (other - one) * 1e-3 * places
    gap = int(other - one)
    return one + (1 if gap > 0 else -1) * places if abs(gap) > 4 else one.new_empty(0)

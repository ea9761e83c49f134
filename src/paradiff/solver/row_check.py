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

Evaluations of the check are calls that a model with a memory may see. So where the rounds are the plain chain's own steps, and
the model is another one after its first call, or cannot be read (identity.py), all rows are evaluated again at the end of the
run. Of such a model more rows are kept.

A row of each round is kept, until there are many, and evaluated once more at the end of the run (witnesses.py). As long as a
model draws random numbers, all rows of each round are evaluated again. Whether two outputs differ by more than rounding is
settled in judge.py. Of a model that was seen to be right in a whole run of the same kind (seen.py), two rows are evaluated
again, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from paradiff.errors import require_one_of
from paradiff.solver.accelerator import random_states
from paradiff.solver.judge import MADE, Answer, Judge, copied, outputs_only, taken
from paradiff.solver.protocol import Batch
from paradiff.solver.seen import Look
from paradiff.solver.witnesses import Witnesses

Check = Literal["first", "every", "off"]
"""Which rounds have rows evaluated again: `first`, three rows of the first one, and of the first whose network calls hold
several rows, several times or several samples, where that is a later one; four more where those of several times hold a part of
the chain only, or equal states; then one row at each further quarter of the chain that rounds of several times come to, since a
network may heed other rows in a part of the chain only; and rows of all rounds at the end. A model that was seen to be right is
checked by two rows at the end. `every`, all rows of all rounds, and rows of all rounds at the end, slow, for tests. `off`,
none."""

CHECKS = ("first", "every", "off")
PARTS = 4
"""Parts of the chain in each of which a row is checked."""


class RowCheck:
    """Evaluates batches and checks some of their rows.

    Args:
        evaluate: A function of a batch that returns its outputs.
        check: See `Check`.
        again: The same function, for evaluations of the check; `evaluate` by default.
        dealt: The same function, for those that several devices share (judge.py).
        apart: The same, for sequences of batches (judge.py).
        look: What is known of the model, for `first`; None if nothing is.
        owned: Whether the answers are copies already.
        plain: Whether the rounds are the steps of the plain chain, one after the other.

    Raises:
        ValueError: If `check` is none of these.
    """

    def __init__(
        self,
        evaluate: Callable[[Batch], Answer],
        check: Check = "first",
        *,
        again: Callable[[Batch], Answer] | None = None,
        dealt: Callable[[Batch], Answer | None] | None = None,
        apart: Callable[[Sequence[Sequence[Batch]]], list[Tensor] | None] | None = None,
        look: Look | None = None,
        owned: bool = False,
        plain: bool = False,
    ) -> None:
        require_one_of("check", check, CHECKS)
        self._evaluate, self._check, self._owned = evaluate, check, owned
        self._judge = Judge(evaluate if again is None else again, getattr(evaluate, "dtype", None), dealt, apart)
        self._look = look
        self._few = look is not None and look.runs > 0  # whether few rows are evaluated again, since the model was seen
        self._witnesses = Witnesses(0 if look is None else look.runs)
        self._seen: set[str] = set()  # `_variety` of the rounds that were checked
        self._part = 0  # the part of the chain that they came to
        self._plain = plain
        self._constant: bool | None = None  # whether the model consists of the same after its first call; None before
        self._later: list[tuple[Batch, Tensor, bool]] = []  # rounds with their outputs that are checked at the end
        self._among_others = False  # whether a row was evaluated among others that are made up

    @property
    def rows(self) -> int:
        """Rows that were evaluated for the check."""
        return self._judge.rows

    def __call__(self, batch: Batch) -> Answer:
        """The answer to a batch; a copy, since a model may return the same memory at every call.

        Raises:
            ValueError: If a row's output depends on more than that row.
        """
        if self._check == "off":
            return self._answer(batch)
        variety, part = self._variety(batch), self._part_of(batch)
        known, first = variety <= self._seen or self._few, not self._seen
        wanted = not self._few and (self._check == "every" or not known or ("times" in variety and part > self._part))
        rows = None if known else self._rows(batch)
        witness = self._witnesses.taken(batch, self._size(batch), None if rows is None else rows[-1])
        if not wanted and not self._judge.draws and not (self._few and first):
            answer = self._answer(batch)
            self._witnesses.told(witness, outputs_only(answer))
            return answer
        self._seen, self._part = variety | self._seen, max(part, self._part)
        x, before = batch.x.clone(), random_states()
        answer = self._answer(batch)
        self._judge.draws = not all(map(torch.equal, before, random_states()))
        given, outputs = Batch(x, batch.t, batch.nodes, batch.samples, batch.chain), outputs_only(answer)
        self._witnesses.told(witness, outputs)
        if self._judge.draws:
            self._judge.all(given, outputs)
        if wanted and not self._is_constant() and self._plain:
            self._later.append((given, outputs, known))
        elif wanted:
            self._compare(given, outputs, known)
        return answer

    def _is_constant(self) -> bool:
        """Whether the model consists of the same after its first call, and can be read."""
        if self._constant is None:
            self._constant = self._look is not None and self._look.still()
            if not self._constant:
                self._witnesses.keep_many()
        return self._constant

    def _answer(self, batch: Batch) -> Answer:
        answer = self._evaluate(batch)
        return answer if self._owned else copied(answer, batch.x)

    def finish(self) -> None:
        """Evaluates rows of the run's rounds once more, at its end: two, if the model was seen and is unchanged.

        Raises:
            ValueError: If a row's output depends on more than that row.
        """
        for batch, outputs, known in self._later:
            self._compare(batch, outputs, known)
        same = self._look is not None and self._look.unchanged() and not self._judge.draws
        if self._few and same:
            self._witnesses.compare_few(self._judge)
        else:
            self._witnesses.compare(self._judge)
        if self._look is not None and same:
            self._look.passed()

    def _size(self, batch: Batch) -> int:
        """Rows of a network call of a round at most."""
        size = getattr(self._evaluate, "max_rows", None)
        return len(batch.x) if size is None else min(size, len(batch.x))

    def _calls(self, batch: Batch) -> Tensor:
        """`[R]` the first row of the network call that each row of a round is evaluated in."""
        size = self._size(batch)
        return torch.arange(len(batch.x), device="cpu") // size * size

    def _part_of(self, batch: Batch) -> int:
        """The part of the chain that a round comes to."""
        return 0 if batch.chain is None else max(batch.nodes.tolist()) * PARTS // max(len(batch.chain) - 1, 1)

    def _variety(self, batch: Batch) -> set[str]:
        """What the rows of one network call are: several, of several times, of several samples."""
        count, size = len(batch.x), self._size(batch)
        found = {"one"} if size == 1 or count == 1 else {"one", "rows"}
        for name, values in (("times", batch.t), ("samples", batch.samples)):
            several = values.tolist()  # on the CPU
            if any(several[k] != several[k // size * size] for k in range(count)):
                found.add(name)
        return found

    def _compare(self, batch: Batch, outputs: Tensor, known: bool) -> None:
        """Evaluates rows by themselves and compares them with `outputs`.

        Args:
            batch: The round's rows.
            outputs: `[R, ...]` theirs.
            known: Whether such a round was checked before.
        """
        rows = self._rows(batch)
        inner, last = rows[0], rows[-1]
        if known and self._check == "first":
            self._judge.alone(batch, outputs, (inner + last + 1) // 2)
            return
        made = taken(batch, [inner], MADE * batch.x[inner : inner + 1])
        calls = [[made] * (k == inner) + [taken(batch, [k])] for k in rows]
        others = None if known or self._among_others else self._others(batch, rows)
        if others is not None:
            self._among_others = True
            calls += [[others], [taken(others, [2])]]
        answers = self._judge.apart(calls)
        alone = []
        for k, answer in zip(rows, answers, strict=False):
            alone.append(answer[0])
            self._judge.compared(batch, outputs, k, answer[0])
        if others is not None:
            found, answer = answers
            self._judge.compared(others, found, 1, alone[0])
            self._judge.compared(others, found, 2, answer[0])

    def _others(self, batch: Batch, rows: list[int]) -> Batch | None:
        """The first row between two that are made up, of the middle and of the end of the chain; None where the rows' own call
        holds all that such others can show, or none of its rows can be seen by another."""
        chain, first = batch.chain, self._calls(batch)
        mine = first == first[rows[0]]
        if chain is None or not (batch.t[mine] != batch.t[rows[0]]).any():
            return None
        times, x = batch.t[mine], batch.x[mine.nonzero()[:, 0].to(batch.x.device, non_blocking=True)]
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

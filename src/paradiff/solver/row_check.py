# SPDX-License-Identifier: Apache-2.0
"""What a model must be, seen in the run itself: the output of a row depends on that row's state, time and conditioning alone.

A parallel solver evaluates a state in a batch with others, and again in a later round, so that all of this breaks it: rows that
influence each other (batch statistics), one row's time used for all, random numbers (dropout), a memory of earlier calls
(self-conditioning by a closure). So some rows of a round are evaluated again, each by itself, one after the other: the first
row, and the one whose time differs most from that one's, of another sample where there is one. Before them a state made up of
the last row's own, -x/2, is evaluated at its time, so that what the model remembers of a shape or of a time shows.

A narrow window shows times that are alike, and a first guess states that are: a model may then take one row's time for all, or
the rows' mean, and be right. So where the round's calls do not hold the whole chain's times, or hold equal states, the first
row is also evaluated among others that are made up, of times of the middle and of the end of the chain.

Rounding depends on the number of rows in a call, and a network may amplify it. So a difference above `limit` is a suspicion
only, which two more evaluations settle: the row once more by itself, and in its place in a round of as many rows, all others
made up. Of a model whose rows are independent the answer is then the same, since calls of equal shape round alike. So it is of
one whose answers depend on the number of rows (padding), which is told apart by size: at several states the answers differ by
more than any dtype's rounding explains, and small changes of the state move them by less. As long as a model draws random
numbers, all rows of each round are evaluated again.
"""

from __future__ import annotations

from collections.abc import Callable
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
network may heed other rows in a part of the chain only. `every`, all rows of all
rounds, slow, for tests. `off`, none."""

CHECKS = ("first", "every", "off")
PARTS = 4
"""Parts of the chain in each of which a row is checked."""

COARSEST = torch.finfo(torch.bfloat16).eps
"""The coarsest rounding in a network."""

FACTORS = (1.0, -0.5, 0.5, -1.0)
"""Factors on a state, each of which has to show that a model heeds the number of rows: by chance, rounding may at one."""

NUDGES = ((COARSEST / 2, 4.0), (0.125, 1.5))
"""Relative changes of a state, and the times by which rounding in the network may move the answer beyond what they do: the
first is a rounding of the state, the second shows whether the network amplifies what is small to the size of its answer."""

Answer = Tensor | EditedOutputs
ADVICE = "call model.eval(), and compute a row's output from its own state, time and conditioning alone; check='off' goes on"


class RowCheck:
    """Evaluates batches and checks some of their rows.

    Args:
        evaluate: A function of a batch that returns its outputs.
        check: See `Check`.
        again: The same function, for evaluations of the check; `evaluate` by default.

    Attributes:
        rows: Rows that were evaluated again.

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

    def _calls(self, batch: Batch) -> Tensor:
        """`[R]` the first row of the network call that each row of a round is evaluated in."""
        rows = torch.arange(len(batch.x), device="cpu")
        size = getattr(self._evaluate, "max_rows", None)
        return torch.zeros_like(rows) if size is None else rows // size * size

    def _part_of(self, batch: Batch) -> int:
        """The part of the chain that a round comes to."""
        return 0 if batch.chain is None else int(batch.nodes.max()) * PARTS // max(len(batch.chain) - 1, 1)

    def _variety(self, batch: Batch) -> set[str]:
        """What the rows of one network call are: several, of several times, of several samples."""
        size = getattr(self._evaluate, "max_rows", None)
        if size is None or size >= len(batch.x):  # one call
            rows, first = torch.tensor(len(batch.x) > 1, device="cpu"), slice(0, 1)
        else:
            first = self._calls(batch)
            rows = first != torch.arange(len(first), device="cpu")
        found = {"rows": rows, "times": batch.t != batch.t[first], "samples": batch.samples != batch.samples[first]}
        return {"one", *(name for name, apart in found.items() if apart.any())}

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
        limit = self._limit(batch.x)
        rows = self._rows(batch)
        if known and self._check == "first":
            rows = [(rows[0] + rows[-1] + 1) // 2]
        else:
            self._evaluated(_taken(batch, [rows[-1]], -batch.x[rows[-1] :][:1] / 2))
        answers = [self._compare_row(batch, outputs, k, limit) for k in rows]
        if not known and not self._among_others and (others := self._others(batch, rows)) is not None:
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
        made, nodes = x[:1] / 2, torch.tensor([len(chain) // 2, int(batch.nodes[rows[0]]), len(chain) - 1], device="cpu")
        t = torch.stack([chain[nodes[0]], batch.t[rows[0]], chain[nodes[2]]])
        x = torch.cat([-made, batch.x[rows[0] :][:1], made])
        return Batch(x, t, nodes, batch.samples[[rows[-1], rows[0], rows[-1]]])

    def _rows(self, batch: Batch) -> list[int]:
        """The rows that are evaluated by themselves, in this order."""
        if self._check == "every":
            return [*range(len(batch.x))]
        first = self._calls(batch)
        apart = (batch.t - batch.t[first]).abs().double()
        score = apart / apart.amax().clamp(min=1e-300) + (batch.samples != batch.samples[first])
        other = int(score.argmax()) if score.any() else int((first == 0).sum()) - 1
        return [int(first[other]), other] if other != int(first[other]) else [other]

    def _settle(self, batch: Batch, outputs: Tensor, alone: Tensor, k: int, off: float, limit: float) -> None:
        """Finds out whether a row's two answers differ by more than rounding.

        Raises:
            ValueError: If so.
        """
        once_more = difference(self._evaluated(_taken(batch, [k]))[0], alone)
        if once_more > limit or len(batch.x) == 1:
            raise ValueError(self._twice(batch, k, max(once_more, off), limit))
        others = -batch.x[[k] * len(batch.x)] / 2
        others[k] = batch.x[k]
        found = self._evaluated(_taken(batch, [k] * len(batch.x), others))
        if torch.equal(found, outputs) and not torch.equal(outputs, outputs[k].expand_as(outputs)):
            raise ValueError(self._twice(batch, k, off, limit))  # the answer of an earlier call
        if difference(found[k], outputs[k]) > limit:
            raise ValueError(
                f"the model answered {_name(batch, k)} otherwise among {len(batch.x)} rows than by itself: the answers differ "
                f"by {off:.2g} of their size, of which rounding explains {limit:.1g}. Its rows influence each other (batch "
                f"statistics), or it uses one row's time or conditioning for all: {ADVICE}"
            )
        if (again := difference(self._evaluated(_taken(batch, [k]))[0], alone)) > limit:
            raise ValueError(self._twice(batch, k, again, limit))  # by itself, after a call of several rows
        if off > _limit_of(COARSEST) and all(self._heeds_count(batch, k, factor) for factor in FACTORS):
            raise ValueError(
                f"the model answered {_name(batch, k)} otherwise in a call of {len(batch.x)} rows than by itself: the answers "
                f"differ by {off:.2g} of their size, of which rounding explains {limit:.1g}. Its output depends on the "
                f"number of rows (padding), or it remembers earlier calls (a cache): {ADVICE}"
            )

    def _heeds_count(self, batch: Batch, k: int, factor: float) -> bool:
        """Whether the answer to a row's state, times a factor, differs between one row and as many as the round's by more than
        rounding explains, and more than a change of the state by as much as rounding moves it."""
        x = batch.x[k : k + 1] * factor
        count = len(batch.x)
        alone, among = (
            self._evaluated(_taken(batch, [k] * n, x.expand(n, *x.shape[1:]).clone()))[-1 if n == 1 else k] for n in (1, count)
        )
        off = difference(alone, among)
        if off <= _limit_of(COARSEST):
            return False
        signs = 1 - 2 * (torch.arange(x.numel(), device=x.device) % 2).to(x.dtype).view_as(x)
        for size, times in NUDGES:
            nudged = [self._evaluated(_taken(batch, [k], x * (1 + way * size * signs)))[0] for way in (1, -1)]
            if off <= times * max(difference(one, alone) for one in nudged):
                return False
        return True

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


def _copied(answer: Answer, rows: Tensor) -> Answer:
    """A copy of the answer to some rows, which fits them."""
    outputs, states = outputs_of(answer, rows)
    return outputs.clone() if states is None else EditedOutputs(outputs.clone(), states.clone())


def _outputs(answer: Answer) -> Tensor:
    return answer.outputs if isinstance(answer, EditedOutputs) else answer


def _name(batch: Batch, k: int) -> str:
    return f"node {int(batch.nodes[k])} of sample {int(batch.samples[k])}"

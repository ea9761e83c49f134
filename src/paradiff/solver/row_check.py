# SPDX-License-Identifier: Apache-2.0
"""What a model must be, seen in the run itself: the output of a row depends on that row's state, time and conditioning alone.

A parallel solver evaluates a state in a batch with others, and again in a later round, so that all of this breaks it: rows that
influence each other (batch statistics), one row's time used for all, random numbers (dropout), a memory of earlier calls
(self-conditioning by a closure). So some rows of a round are evaluated again, each by itself, one after the other: the first
row, and the one whose time differs most from that one's, of another sample where there is one. Between them the model has seen
another state in a call of the same shape, so that what it remembers shows; where the round has one row, or its two answers
hardly differ, a state made up of the row's own, -x/2, is evaluated before.

Rounding depends on the number of rows in a call, and a network may amplify it. So a difference above `limit` is a suspicion
only, which two more evaluations settle: the row once more by itself, and in its place in a round of as many rows, all others
made up. Of a model whose rows are independent the answer is then the same, since calls of equal shape round alike. As long as a
model draws random numbers, all rows of each round are evaluated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from paradiff.errors import require_one_of
from paradiff.solver.arguments import outputs_of
from paradiff.solver.protocol import Batch, EditedOutputs

Check = Literal["first", "every", "off"]
"""Which rounds have rows evaluated again: `first`, two rows of the first one, and two of the first whose network calls hold
several rows, several times or several samples, where that is a later one; then one row at each further quarter of the chain
that rounds of several times come to, since a network may heed other rows in a part of the chain only. `every`, all rows of all
rounds, slow, for tests. `off`, none."""

CHECKS = ("first", "every", "off")
PARTS = 4
"""Parts of the chain in each of which a row is checked."""

ALIKE = 0.1
"""Relative difference of two answers below which one in place of the other might not show."""

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
        x, before = batch.x.clone(), _random_states(batch.x.device)
        answer = _copied(self._evaluate(batch), batch.x)
        self._draws = not all(map(torch.equal, before, _random_states(batch.x.device)))
        given, outputs = Batch(x, batch.t, batch.nodes, batch.samples), _outputs(answer)
        if self._draws:
            self._compare_all(given, outputs)
        if wanted:
            self._compare(given, outputs, known)
        return answer

    def _calls(self, batch: Batch) -> Tensor:
        """`[R]` the first row of the network call that each row of a round is evaluated in."""
        rows = torch.arange(len(batch.x))
        size = getattr(self._evaluate, "max_rows", None)
        return torch.zeros_like(rows) if size is None else rows // size * size

    def _part_of(self, batch: Batch) -> int:
        """The part of the chain that a round comes to."""
        return 0 if not batch.steps else int(batch.nodes.max()) * PARTS // max(batch.steps - 1, 1)

    def _variety(self, batch: Batch) -> set[str]:
        """What the rows of one network call are: several, of several times, of several samples."""
        first = self._calls(batch)
        found = {
            "rows": first != torch.arange(len(first)),
            "times": batch.t != batch.t[first],
            "samples": batch.samples != batch.samples[first],
        }
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
        elif len(rows) == 1 or difference(outputs[rows[0]], outputs[rows[-1]]) < ALIKE:
            self._evaluated(_taken(batch, [rows[-1]], -batch.x[rows[-1] :][:1] / 2))
        for k in rows:
            alone = self._evaluated(_taken(batch, [k]))[0]
            if (off := difference(alone, outputs[k])) > limit:
                self._settle(batch, outputs, alone, k, off, limit)

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
    at = torch.tensor(rows)
    return Batch(batch.x[at.to(batch.x.device)] if x is None else x, batch.t[at], batch.nodes[at], batch.samples[at])


def _copied(answer: Answer, rows: Tensor) -> Answer:
    """A copy of the answer to some rows, which fits them."""
    outputs, states = outputs_of(answer, rows)
    return outputs.clone() if states is None else EditedOutputs(outputs.clone(), states.clone())


def _outputs(answer: Answer) -> Tensor:
    return answer.outputs if isinstance(answer, EditedOutputs) else answer


def _name(batch: Batch, k: int) -> str:
    return f"node {int(batch.nodes[k])} of sample {int(batch.samples[k])}"


def _random_states(device: torch.device) -> list[Tensor]:
    """The states of torch's own generators, on the CPU and on a device."""
    found = [torch.get_rng_state()]
    return [*found, torch.cuda.get_rng_state(device)] if device.type == "cuda" else found

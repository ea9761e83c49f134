# SPDX-License-Identifier: Apache-2.0
"""A row of a request's first round with its output, which is evaluated once more when the request's sample is found.

A model that heeds the rows of other requests, the number of rows or what it was called with before answers it otherwise then.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from paradiff.solver.judge import Judge, taken
from paradiff.solver.protocol import Batch
from paradiff.solver.rounding import difference


@dataclass(frozen=True, eq=False)
class Witness:
    """Such a row. Witnesses are compared by identity.

    Attributes:
        row: The row, a batch of one.
        output: `[...]` its output.
        place: Its place in its call.
        count: Rows of that call.
    """

    row: Batch
    output: Tensor
    place: int
    count: int

    @classmethod
    def of(cls, batch: Batch, place: int, outputs: Tensor) -> Witness:
        """A row of a call, copied.

        Args:
            batch: The call's rows.
            place: Which.
            outputs: `[R, ...]` their outputs.
        """
        return cls(taken(batch, [place]), outputs[place].clone(), place, len(batch.x))

    def compare(self, judge: Judge, call: tuple[Batch, Tensor, int]) -> None:
        """Compares its output with that of a later call.

        Args:
            judge: What evaluates rows again where they differ.
            call: The rows of the later call, their outputs, and the row's place there.

        Raises:
            ValueError: If they differ by more than rounding.
        """
        _, outputs, place = call
        if difference(outputs[place], self.output) > judge.limit(self.row.x):
            judge.settle_later(self.row, self.output, self.place, self.count, call)

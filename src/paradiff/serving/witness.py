# SPDX-License-Identifier: Apache-2.0
"""Rows of the first rounds of requests with their outputs, one of each, which are evaluated once more when samples are found.

A model that heeds the rows of other requests, the number of rows or what it was called with before answers them otherwise then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from paradiff.chain.step import uploaded
from paradiff.solver.judge import Judge, taken
from paradiff.solver.protocol import Batch
from paradiff.solver.rounding import differences


@dataclass(frozen=True, eq=False)
class Witness:
    """Such rows of one call. Witnesses are compared by identity.

    Attributes:
        rows: The rows, K of them.
        outputs: `[K, ...]` their outputs.
        places: Their places in their call.
        count: Rows of that call.
    """

    rows: Batch
    outputs: Tensor
    places: Sequence[int]
    count: int

    @classmethod
    def of(cls, batch: Batch, places: list[int], outputs: Tensor) -> Witness:
        """Rows of a call, copied.

        Args:
            batch: The call's rows.
            places: Which.
            outputs: `[R, ...]` their outputs.
        """
        return cls(taken(batch, places), outputs[uploaded(places, outputs.device)], places, len(batch.x))

    def compare(self, judge: Judge, which: Sequence[int], call: tuple[Batch, Tensor, Sequence[int]]) -> None:
        """Compares outputs with those of a later call. Waits for the device once.

        Args:
            judge: What evaluates rows again where they differ.
            which: The rows, of K.
            call: The rows of the later call, their outputs, and the places of these rows there.

        Raises:
            ValueError: If they differ by more than rounding.
        """
        batch, outputs, places = call
        pair = (of[uploaded(at, of.device)] for of, at in ((outputs, places), (self.outputs, which)))
        for k, place, off in zip(which, places, differences(*pair), strict=True):
            if off > judge.limit(self.rows.x):
                row = taken(self.rows, [k])
                judge.settle_later(row, self.outputs[k], self.places[k], self.count, (batch, outputs, place))

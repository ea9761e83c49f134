# SPDX-License-Identifier: Apache-2.0
"""SRDS: Parareal over blocks of the chain (solver.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from paradiff.chain.table import Table
from paradiff.errors import is_whole
from paradiff.methods.chain_method import ChainMethod
from paradiff.methods.parareal.options import PararealOptions
from paradiff.methods.parareal.run import PararealRun
from paradiff.solver.protocol import Problem


@dataclass(frozen=True, repr=False, eq=False)
class PararealMethod(ChainMethod, PararealOptions):
    """A self-refining sampler; its attributes are those of `PararealOptions`.

    Raises:
        ValueError: If a value is out of its range, or two of them contradict each other.
    """

    def prepare(self, problem: Problem) -> PararealRun:
        """The run on a problem.

        Raises:
            ValueError: If the method does not fit the problem's table or the shape of its samples.
        """
        return PararealRun(self, problem)

    def width(self, table: Table) -> int:
        """Blocks in flight, or the bound on rows."""
        return min(len(self.edges(table)) - 1, *(bound for bound in (self.window, self.rows) if bound is not None), table.steps)

    def progress(self, table: Table) -> tuple[int, str]:
        """The number of blocks."""
        return len(self.edges(table)) - 1, "blocks"

    def in_loop(self, table: Table, least: float) -> PararealMethod:
        """With a tolerance that the network's dtype resolves, and no more blocks than the loop's chain has steps."""
        tolerance = max(self.tolerance, least) if self.rule == "error" else self.tolerance
        blocks = min(self.blocks, table.steps) if is_whole(self.blocks) else self.blocks
        fitted = dataclasses.replace(self, tolerance=tolerance, blocks=blocks, window=None)
        return (
            fitted
            if self.window is None
            else dataclasses.replace(fitted, window=min(self.window, len(fitted.edges(table)) - 1))
        )

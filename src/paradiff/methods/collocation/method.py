# SPDX-License-Identifier: Apache-2.0
"""Collocation: evaluations at a few mesh points, interpolated in between (solver.py)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from paradiff.chain.table import Table
from paradiff.methods.chain_method import ChainMethod
from paradiff.methods.collocation.options import CollocationOptions
from paradiff.methods.collocation.run import CollocationRun
from paradiff.solver.protocol import Problem


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class CollocationMethod(ChainMethod, CollocationOptions):
    """A collocation method; its attributes are those of `CollocationOptions`. It returns a sample and an estimate of its error,
    which is no bound.

    Raises:
        ValueError: If a value is of the wrong kind or out of its range, or two of them contradict each other.
    """

    @property
    def solves_chain(self) -> bool:
        """Whether the sample sought is the chain's own, not that of the equation that the chain discretizes."""
        return self.target == "chain"

    def cannot_begin(self) -> str | None:
        """Why it cannot begin from a trajectory: that of a chain is none of the equation that it discretizes."""
        return None if self.target == "chain" else f"a trajectory is that of the chain, and its target is the {self.target}"

    def prepare(self, problem: Problem) -> CollocationRun:
        """The run on a problem.

        Raises:
            ValueError: If the method does not fit the problem's table, or the file of `warm_start` is no mesh store.
        """
        return CollocationRun(self, problem)

    def width(self, table: Table) -> int:
        """Nodes of the first mesh, or the bound on rows."""
        count = len(self.edges(table)) - 1
        return count if self.window is None else min(count, self.window)

    def progress(self, table: Table) -> tuple[int, str]:
        """The sample itself is the one part that becomes final."""
        return 1, "samples"

    def in_loop(self, table: Table, least: float) -> CollocationMethod:
        """As it is, with a tolerance that the network's dtype resolves."""
        return dataclasses.replace(self, tolerance=least) if self.tolerance < least else self

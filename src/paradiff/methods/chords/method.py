# SPDX-License-Identifier: Apache-2.0
"""CHORDS: a method of the one loop (solver.py), and its preset."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from paradiff.chain.table import Table
from paradiff.methods.chain_method import ChainMethod
from paradiff.methods.chords.options import ChordsOptions, Rule
from paradiff.methods.chords.run import ChordsRun
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.solver.protocol import Problem


@dataclass(frozen=True, repr=False, eq=False)
class ChordsMethod(ChainMethod, ChordsOptions):
    """CHORDS; its attributes are those of `ChordsOptions`.

    Raises:
        ValueError: If a value is out of its range, or two of them contradict each other.
    """

    def edges(self, table: Table) -> list[int]:
        """All nodes.

        Raises:
            ValueError: If the method does not fit the table.
        """
        self.starts_on(table)
        return list(range(table.steps + 1))

    def prepare(self, problem: Problem) -> ChordsRun:
        """The run on a problem.

        Raises:
            ValueError: If the method does not fit the problem's table.
        """
        return ChordsRun(self, problem)

    def width(self, table: Table) -> int:
        """The number of cores."""
        return min(self.cores, table.steps)

    def progress(self, table: Table) -> tuple[int, str]:
        """The sample."""
        return 1, "samples"

    def in_loop(self, table: Table, least: float) -> ChordsMethod:
        """With a tolerance that the network's dtype resolves, and no core that starts beyond the loop's chain."""
        tolerance = max(self.tolerance, least) if self.rule == "error" else self.tolerance
        starts = None if self.starts is None else [node for node in self.starts if node < table.steps]
        cores = min(self.cores, table.steps) if starts is None else len(starts)
        answers = None if self.answers is None else min(self.answers, cores)
        return dataclasses.replace(self, tolerance=tolerance, starts=starts, cores=cores, answers=answers)


def chords(
    cores: int = 8,
    tolerance: float = DEFAULT_TOLERANCE,
    *,
    starts: Sequence[int] | None = None,
    rule: Rule = "error",
    answers: int | None = None,
) -> ChordsMethod:
    """CHORDS: solvers that start along the chain, each corrected by the slower one behind it; for deterministic chains.

    Source: "CHORDS: Diffusion Sampling Accelerator with Multi-core Hierarchical ODE Solvers", ICCV 2025, arXiv 2507.15260.

    Every core ends with an answer, the fastest first; the last answer is the sequential sample. Each is a round's best known
    sample, so an observer sees it as soon as it is made (`Round.states()`, and `answer` of the round's records).

    Differs from the authors' code in: an estimate of the error decides when to stop (`error`); `change` compares the root mean
    square change between two answers, there their difference's norm over the number of entries. Starts for other numbers of
    steps are the released ones for 50, in proportion; for numbers of cores other than 4 and 8 they are even, which is ours.

    Args:
        cores: Number of solvers, C, and rows of a round.
        tolerance: With rule `error`, the root mean square error that the sample may have by estimate, in the data's units. With
            `change`, the root mean square change between two answers.
        starts: The nodes at which the cores start, rising, 0 first; None for the released ones in proportion.
        rule: `error` or `change`.
        answers: The answer at which to stop whatever the rule says: 0 for the long step from the last core's start, 1 for the
            last core's end (the released default), up to C, which is the sequential sample. Of several that a round
            makes the last is taken.

    Raises:
        ValueError: If a number is out of its range, or starts and cores, or cores and answers, contradict each other.
    """
    return ChordsMethod("chords", cores, starts, tolerance, rule, answers)

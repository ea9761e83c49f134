# SPDX-License-Identifier: Apache-2.0
"""The window methods: sweeps over a sliding window of nodes (solver.py).

The named methods of the literature are functions in methods/presets.py and methods/piadm.py that return one of these.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

from paradiff.chain.slope import zero
from paradiff.chain.table import Table
from paradiff.errors import is_whole
from paradiff.methods.window.options import WindowOptions
from paradiff.methods.window.run import WindowRun
from paradiff.solver.protocol import Problem, Run


@dataclass(frozen=True, repr=False, eq=False)
class WindowMethod(WindowOptions):
    """A method of the window solver; its attributes are those of `WindowOptions`.

    Raises:
        ValueError: If a value is out of its range, or two of them contradict each other.
    """

    @property
    def dense_output(self) -> bool:
        """Whether all states become known: they do."""
        return True

    @property
    def solves_chain(self) -> bool:
        """Whether the sample sought is the chain's own: it is."""
        return True

    @property
    def follows_edits(self) -> bool:
        """Whether states may be changed between steps: where sub-intervals are single steps, all of whose states are kept."""
        return self.stride == 1 if isinstance(self.stride, int) else set(self.stride) == {1}

    def cannot_begin(self) -> str | None:
        """Why it cannot begin from a trajectory: a window of one node has no initial guess."""
        return "it evaluates one node after the other, whatever is known of them" if self.window == 1 else None

    def prepare(self, problem: Problem) -> Run:
        """The run on a problem.

        Raises:
            ValueError: If the method does not fit the problem's table.
        """
        return WindowRun(self, problem)

    def reference(self) -> WindowMethod:
        """The plain chain, with the corrector's steps if there are any."""
        plain = WindowMethod("sequential", slope=zero, window=1, predictor="copy", tolerance=0.0)
        if self.corrector is None:
            return plain
        corrector = dataclasses.replace(self.corrector, sweeps=self.corrector.steps)
        return dataclasses.replace(plain, blocks=self.blocks, corrector=corrector)

    def width(self, table: Table) -> int:
        """Nodes of a full window; of the longest block, where blocks are solved in turn."""
        edges = self.edges(table)
        if self.blocks is not None and self.blocks.stagger is None:
            edges = self.blocks.edges(table)
            intervals = max(b - a for a, b in itertools.pairwise(edges))
        else:
            intervals = len(edges) - 1
        return intervals if self.window is None else min(intervals, self.window)

    def progress(self, table: Table) -> tuple[int, str]:
        """The number of sub-intervals, in nodes."""
        return len(self.edges(table)) - 1, "nodes"

    def in_loop(self, table: Table, least: float) -> WindowMethod:
        """With a first step alone, where a window slides freely, as a loop's first pass takes just that.

        Warm-up, stride, blocks, window, and what an Anderson mixing reaches, are shortened to the loop's chain: a pipeline that
        starts from an image walks only a part of the steps that its call names.

        Raises:
            ValueError: If there is a corrector, which changes the sample.
        """
        if self.corrector is not None:
            raise ValueError(
                f"{self.name} was given a corrector, which changes the sample; a pipeline's call has to give its own: leave "
                "the corrector out"
            )
        steps, warmup, stride, blocks, tolerance = table.steps, self.warmup, self.stride, self.blocks, self.tolerance
        if blocks is None and self.window != 1:
            warmup = max(warmup, 1)
        warmup = min(warmup, steps)
        if is_whole(stride):
            stride = min(stride, max(steps - warmup, 1))
        if blocks is not None and is_whole(blocks.count):
            blocks = dataclasses.replace(blocks, count=min(blocks.count, steps))
        if self.rule == "error" and 0 < tolerance < least:
            tolerance = least
        window = steps if self.window is None else min(self.window, steps)
        anderson = None if self.anderson is None else self.anderson.within(window)
        fitted = dataclasses.replace(
            self, warmup=warmup, stride=stride, blocks=blocks, window=None, tolerance=tolerance, anderson=anderson
        )
        return (
            fitted
            if self.window is None
            else dataclasses.replace(fitted, window=min(self.window, len(fitted.edges(table)) - 1))
        )

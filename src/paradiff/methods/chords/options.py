# SPDX-License-Identifier: Apache-2.0
"""The frozen hyper-parameters of CHORDS, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

from paradiff.chain.table import Table
from paradiff.errors import are_whole, require_kind, require_one_of, require_real, require_whole, shown
from paradiff.methods.chords.control import ChordsControl
from paradiff.methods.face import Face, settle
from paradiff.methods.tolerance import DEFAULT_TOLERANCE

Rule = Literal["error", "change"]

PUBLISHED = {4: (0, 8, 16, 32), 8: (0, 2, 4, 8, 16, 24, 32, 40)}
"""The released starts for 50 steps, by the number of cores."""

PUBLISHED_STEPS = 50


@dataclass(frozen=True, repr=False, eq=False)
class ChordsOptions(Face):
    """Hyper-parameters of CHORDS; see `methods.chords`.

    Attributes:
        name: The method's name.
        cores: Number of solvers.
        starts: The nodes at which they start, 0 first; None for the published ones, or even ones.
        tolerance: What the rule compares with.
        rule: `error` or `change`.
        answers: The answer after which to stop whatever the rule says, counted from 0; None to stop by the rule.
        control: The tuned numbers of the estimate.

    Raises:
        ValueError: If a value is out of its range, or two of them contradict each other.
    """

    name: str = "chords"
    cores: int = 8
    starts: Sequence[int] | None = None
    tolerance: float = DEFAULT_TOLERANCE
    rule: Rule = "error"
    answers: int | None = None
    control: ChordsControl = field(default=ChordsControl(), kw_only=True)

    def __post_init__(self) -> None:
        require_whole("cores", self.cores, 1)
        if self.starts is not None:
            if not are_whole(self.starts):
                raise ValueError(f"starts is {shown(self.starts)}; give rising whole numbers, 0 first, or None")
            if len(self.starts) == 0 or self.starts[0] != 0 or any(b <= a for a, b in pairwise(self.starts)):
                raise ValueError(f"starts is {shown(list(self.starts))}; the nodes must rise from 0: give 0 first, or None")
            if self.cores not in (len(self.starts), ChordsOptions.cores):
                raise ValueError(
                    f"cores is {self.cores} with {len(self.starts)} starts; each core has one start: leave cores out"
                )
            object.__setattr__(self, "cores", len(self.starts))
        require_real("the tolerance", self.tolerance, positive=True, otherwise=" (for the exact sample use sequential)")
        require_one_of("rule", self.rule, get_args(Rule))
        if self.answers is not None:
            require_whole("answers", self.answers, 0, ", or None")
            if self.answers > self.cores:
                raise ValueError(
                    f"answers is {self.answers}; {self.cores} cores give the answers 0 to {self.cores}: give one of these, or "
                    "None"
                )
        require_kind("control", self.control, ChordsControl)
        settle(self, "cores", "starts", "answers", numbers=["tolerance"])

    def starts_on(self, table: Table) -> list[int]:
        """The nodes at which the cores start.

        Raises:
            ValueError: If the method does not fit the table.
        """
        steps = table.steps
        if table.stochastic:
            raise ValueError(
                f"chords is for deterministic chains, whose long steps it compares; table {table.name!r} is stochastic: use a "
                "deterministic sampler, or parasolver"
            )
        if table.band > 1:
            raise ValueError(
                f"chords is for one-step samplers; a step of table {table.name!r} reads {table.band} states: use a one-step "
                "sampler, such as ddim or euler, or parasolver"
            )
        if self.cores > steps:
            raise ValueError(f"chords was given {self.cores} cores; the chain has {steps} steps: give at most {steps}")
        if self.starts is not None:
            if self.starts[-1] >= steps:
                raise ValueError(
                    f"a core starts at node {self.starts[-1]}; the chain has {steps} steps: give starts below {steps}"
                )
            return list(self.starts)
        known = PUBLISHED.get(self.cores, tuple(PUBLISHED_STEPS * c / self.cores for c in range(self.cores)))
        starts = [round(node * steps / PUBLISHED_STEPS) for node in known]
        for c in range(1, len(starts)):
            starts[c] = max(starts[c], starts[c - 1] + 1)
        return [min(node, steps - len(starts) + c) for c, node in enumerate(starts)]

# SPDX-License-Identifier: Apache-2.0
"""What a caller of `auto` asks for: an objective within a tolerance, and what a method must be able to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from paradiff.errors import require_kind, require_one_of, require_real, require_whole
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.planning.cost import Devices
from paradiff.planning.plan import Plan
from paradiff.solver.protocol import Method, Remembers

Objective = Literal["latency", "evaluations", "memory", "anytime"]
"""Least seconds; fewest evaluations of the network, which is energy; fewest states held at once; a first preview of the sample
after one round, and better ones after every further round."""


@dataclass(frozen=True, repr=False, eq=False)
class Wish:
    """What is asked for.

    Attributes:
        tolerance: Root mean square error that a sample may have by estimate.
        window: Most rows of a sample in a round; None for no bound.
        plan: A plan that decides; None for what is known.
        objective: What is made least; None for latency, or for what the deadline asks.
        deadline: Seconds within which the best sample is wanted; None for no bound.
        clocked: Whether the clock may decide: not on ranks, which have to choose alike.
        devices: Devices that share the rows of a round.
        dense: Whether the states of all nodes have to become known, as a callback reads them.
        edits: Whether states may be changed between steps.
        begins: Whether runs begin from an earlier one's trajectory.
        keeps: Whether they keep their own.

    Raises:
        ValueError: If a value is of another kind or out of its range, or two of them contradict each other.
    """

    tolerance: float = DEFAULT_TOLERANCE
    window: int | None = None
    plan: Plan | None = None
    objective: Objective | None = None
    deadline: float | None = None
    clocked: bool = dataclasses.field(default=True, kw_only=True)
    devices: Devices = dataclasses.field(default=Devices(), kw_only=True)
    dense: bool = dataclasses.field(default=False, kw_only=True)
    edits: bool = dataclasses.field(default=False, kw_only=True)
    begins: bool = dataclasses.field(default=False, kw_only=True)
    keeps: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        require_real("the tolerance", self.tolerance, positive=True)
        if self.window is not None:
            require_whole("the window", self.window, 1, ", or None for no bound on rows")
        if self.plan is not None:
            require_kind("the plan", self.plan, Plan, ", as paradiff.plan returns it, or None")
        if self.objective is not None:
            require_one_of("the objective", self.objective, get_args(Objective))
        if self.deadline is not None:
            require_real("the deadline, in seconds,", self.deadline, positive=True)
        if self.plan is not None and (self.objective is not None or self.deadline is not None):
            asked = "an objective" if self.objective is not None else "a deadline"
            raise ValueError(f"a plan and {asked} were given, and either would decide; leave one of them out")
        if self.deadline is not None and self.objective not in (None, "anytime"):
            raise ValueError(
                f"the objective is {self.objective!r} and the deadline {self.deadline:g} s, which ask for different samples: a "
                "deadline is for the best one in time; leave one of them out"
            )

    def allows(self, method: Method) -> bool:
        """Whether a method can do what is asked of it."""
        if self.remembers and not isinstance(method, Remembers):
            return False
        if self.begins and isinstance(method, Remembers) and method.cannot_begin() is not None:
            return False
        return (method.dense_output or not self.dense) and (method.follows_edits or not self.edits)

    @property
    def remembers(self) -> bool:
        """Whether a trajectory is begun from, or kept."""
        return self.begins or self.keeps

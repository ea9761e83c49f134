# SPDX-License-Identifier: Apache-2.0
"""Parareal: the frozen hyper-parameters of one self-refining sampler (solver.py runs it).

The chain is cut into B blocks at the fine nodes e[0] = 0 < e[1] < ... < e[B] = N. F walks a block's fine steps, G is a coarse
propagator over the block (coarse.py), and from one coarse sweep x[i+1] = G(x[i]) the block edges are refined by

    x[i+1] <- F(x[i] before) + ( G(x[i] new) - G(x[i] before) ),                                                  (1)

Newton's iteration on the edges with the derivative of F replaced by that of G. After p iterations the first p edges are
exact, and the sum in (1) is taken in that order so that they are in floating point too.

Rounds for B equal blocks of S steps, G of one step, K iterations:

    batched    B + K (S + B)        coarse sweep, then fine runs side by side and a coarse sweep, K times
    pipelined  B + K (S - 1)        every run starts as soon as its start is known and shares G's evaluation      (2)

With N = S B these are smallest near B = sqrt(N) and B = sqrt(K N); (2) never exceeds N, since K never exceeds B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch

from paradiff.chain.slope import Slope
from paradiff.chain.table import Table
from paradiff.errors import are_whole, is_whole, require_kind, require_one_of, require_real, require_whole, shown
from paradiff.methods.face import Face, settle
from paradiff.methods.parareal.coarse import Coarse, between, of_table, one_step, two_step
from paradiff.methods.parareal.control import PararealControl
from paradiff.methods.tolerance import DEFAULT_TOLERANCE

Ordering = Literal["pipelined", "batched"]
StopRule = Literal["error", "change", "sample", "image"]
Choice = Literal["one step", "two step"] | int | Sequence[int] | Table | Slope


@dataclass(frozen=True, repr=False, eq=False)
class PararealOptions(Face):
    """Hyper-parameters of SRDS; see `methods.srds`.

    Attributes:
        name: The method's name.
        blocks: Number of blocks, or their edges as fine nodes, 0 and N included; None for the planner's number.
        coarse: The coarse propagator: `one step`, `two step`, the number of coarse steps a block, the fine nodes that they
            visit, a coarse table, or a slope (chain/slope.py), which needs no network.
        ordering: Of the rows: `pipelined` or `batched`.
        tolerance: What the rule compares with.
        rule: When to stop: `error`, `change`, `sample` or `image`.
        iterations: A number of iterations K to be made whatever the rule says; None to stop by the rule.
        window: Number of blocks in flight; None for all.
        rows: Most rows that one sample puts in one round; None for no bound.
        control: The tuned numbers of the stopping rule and the planner.

    Raises:
        ValueError: If a value is out of its range, or two of them contradict each other.
    """

    name: str = "srds"
    blocks: int | Sequence[int] | None = None
    coarse: Choice = "one step"
    ordering: Ordering = "pipelined"
    tolerance: float = DEFAULT_TOLERANCE
    rule: StopRule = "error"
    iterations: int | None = None
    window: int | None = None
    rows: int | None = None
    control: PararealControl = field(default=PararealControl(), kw_only=True)

    def __post_init__(self) -> None:
        self._refuse_other_kinds()
        if self.ordering == "batched":
            for name in ("window", "rows"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} was given with the batched ordering, which has none; use ordering='pipelined'")
            if self.network_free:
                raise ValueError("the coarse propagator is a slope, which has no sweep to batch; use ordering='pipelined'")
        if self.window is not None and self.network_free:
            raise ValueError(
                "window was given with a coarse propagator that is a slope; parasolver with a stride, a slope and a window is "
                "that method"
            )
        if self.window is not None and (self.iterations is not None or self.rule in ("sample", "image")):
            given = "iterations" if self.iterations is not None else f"rule {self.rule!r}"
            raise ValueError(
                f"window was given with {given}, which looks at the end of the chain; a window slides by rule 'error' or "
                "'change'"
            )

    def _refuse_other_kinds(self) -> None:
        """Refuses values of the wrong kind, and those that are out of their range whatever the others are.

        Raises:
            ValueError: If there is one.
        """
        if self.blocks is not None and not are_whole(self.blocks) and not (is_whole(self.blocks) and self.blocks >= 1):
            raise ValueError(
                f"blocks is {shown(self.blocks)}; give a whole number of at least 1 block, the edges of the blocks, or None"
            )
        for name, kind in (("ordering", Ordering), ("rule", StopRule)):
            require_one_of(name, getattr(self, name), get_args(kind))
        if is_whole(self.coarse):
            if self.coarse < 1:
                raise ValueError(f"coarse is {shown(self.coarse)} steps a block; it must be at least 1")
        elif not (
            self.network_free
            or isinstance(self.coarse, Table)
            or are_whole(self.coarse)
            or (isinstance(self.coarse, str) and self.coarse in ("one step", "two step"))
        ):
            raise ValueError(
                f"coarse is {shown(self.coarse)}; it must be 'one step', 'two step', a number of steps, fine nodes, a table or "
                "a slope"
            )
        otherwise = " (for the exact sample force as many iterations as there are blocks)"
        require_real("the tolerance", self.tolerance, positive=True, otherwise=otherwise)
        for name, least in (("iterations", 0), ("window", 1), ("rows", 1)):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name), least, ", or None")
        require_kind("control", self.control, PararealControl)
        settle(self, "blocks", "coarse", "iterations", "window", "rows", numbers=["tolerance"])

    @property
    def network_free(self) -> bool:
        """Whether the coarse propagator is a slope."""
        return isinstance(self.coarse, torch.Tensor) or (callable(self.coarse) and not isinstance(self.coarse, type))

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuses a rule in grey levels for samples that are no pictures of 1 or 3 channels.

        Raises:
            ValueError: If the rule is 'image' and samples are not images.
        """
        if self.rule == "image" and (len(shape) != 3 or shape[0] not in (1, 3)):
            raise ValueError(
                f"rule 'image' counts grey levels of pictures, [1 or 3, height, width], but a sample has shape {tuple(shape)}; "
                "use rule 'sample', which measures the change in the state's own units"
            )

    def edges(self, table: Table) -> list[int]:
        """The fine nodes between blocks, 0 and N included. A number of blocks is balanced: lengths differ by one step at most
        and the longer blocks come first, so that no block waits for itself; edges of two-stage samplers fall between steps.

        Raises:
            ValueError: If there are more blocks than steps, or the edges are no rising nodes of the table.
        """
        steps = table.steps
        if self.blocks is None and isinstance(self.coarse, Table):
            return of_table(table, self.coarse).nodes
        if self.blocks is None or is_whole(self.blocks):
            stops = table.restarts
            if len(stops) < steps / table.band:  # a multistep sampler: its history travels with the edge
                stops = list(range(steps + 1))
            count = self.planned(len(stops) - 1) if self.blocks is None else self.blocks
            if count > steps:
                raise ValueError(f"{count} blocks were asked for; the chain has {steps} steps: give at most {steps}")
            if count > len(stops) - 1:
                stops = list(range(steps + 1))
            short, longer = divmod(len(stops) - 1, count)
            return [stops[n] for n in accumulate([0] + [short + 1] * longer + [short] * (count - longer))]
        edges = list(self.blocks)
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != steps or any(b <= a for a, b in pairwise(edges)):
            raise ValueError(f"the block edges are {edges}; they must rise from 0 to {steps}, the chain's number of steps")
        short = min(b - a for a, b in pairwise(edges))
        if short < table.band - 1:
            raise ValueError(
                f"the block edges are {edges}, with a block of {short} steps; table {table.name!r} reads {table.band} states "
                f"and needs blocks of at least {table.band - 1} steps: give longer ones, or use parasolver, which needs none"
            )
        return edges

    def planned(self, steps: int) -> int:
        """The planner's number of blocks for N steps: the nearest whole number to sqrt(K N) pipelined, to sqrt(N) batched,
        with K the forced iterations or those that the control expects; 1 ... N."""
        expected = self.control.expected_iterations if self.iterations is None else min(max(self.iterations, 1), steps)
        return max(1, min(steps, round(math.sqrt(steps * (expected if self.ordering == "pipelined" else 1)))))

    def propagator(self, table: Table, edges: Sequence[int]) -> Coarse:
        """The coarse propagator on the table, over blocks between `edges`.

        Raises:
            ValueError: If a block edge is no node of the coarse propagator, or one of its nodes is none of the table.
        """
        if isinstance(self.coarse, str):
            return (one_step if self.coarse == "one step" else two_step)(table, edges)
        if is_whole(self.coarse):
            nodes = [0]
            for left, right in pairwise(edges):
                count = min(self.coarse, right - left)
                nodes += [left + (right - left) * k // count for k in range(1, count + 1)]
            return one_step(table, nodes)
        if isinstance(self.coarse, torch.Tensor) or callable(self.coarse):
            return between(table, edges, self.coarse)
        nodes = of_table(table, self.coarse).nodes if isinstance(self.coarse, Table) else list(self.coarse)
        if any(not 0 <= n <= table.steps for n in nodes) or any(b <= a for a, b in pairwise(nodes)):
            raise ValueError(f"the coarse nodes are {nodes}; they must be rising nodes of the table, from 0 to {table.steps}")
        missing = next((e for e in edges if e not in nodes), None)
        if missing is not None:
            raise ValueError(
                f"the block edge {missing} is no node of the coarse propagator, whose fine nodes are {nodes}; every block edge "
                "must be one of them"
            )
        return of_table(table, self.coarse) if isinstance(self.coarse, Table) else one_step(table, nodes)

"""A method: the frozen hyper-parameters of one parallel-in-time solver.

The named methods of the literature are functions in methods.py that return one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from paradiff.slope import Slope, identity
from paradiff.table import Table

Start = Literal["copy", "linear", "clean"]
Rule = Literal["error", "change"]


@dataclass(frozen=True)
class Method:
    """Hyper-parameters of the window loop (solve.py).

    Attributes:
        name: The method's name.
        slope: G, how changes are carried along the window (slope.py).
        window: Number of sub-intervals solved at once; None for all.
        stride: Fine steps in a sub-interval, or the lengths of all sub-intervals after the warm-up.
        warmup: Steps really taken, one after the other, before the window opens.
        start: What new nodes of the window are filled with: `copy` of the last state, the `linear` part of the steps (outputs
            zero, same noises), or the steps with the newest `clean`-data estimate frozen and the same noises.
        tolerance: What the rule compares with.
        rule: `error`: the tolerance is the root mean square error that the sample may have by estimate (certificate.py),
            spent along the chain as it accrues. `change`: a node passes when its root mean square change is at most
            `tolerance` times the standard deviation of the noise that a DDPM step would add there (the published rules).

    Raises:
        ValueError: If a value is out of its range.
    """

    name: str
    slope: Slope = identity
    window: int | None = None
    stride: int | Sequence[int] = 1
    warmup: int = 0
    start: Start = "clean"
    tolerance: float = 2.4e-2
    rule: Rule = "error"

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"the window is {self.window}; it must be at least 1, or None for the whole chain")
        strides = [self.stride] if isinstance(self.stride, int) else self.stride
        if not strides or min(strides) < 1:
            raise ValueError(f"the stride is {self.stride}; a sub-interval must have at least 1 step")
        if self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}; it must be 0 or more steps")
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"the tolerance is {self.tolerance}; it must be 0 or more, and finite")
        for field, kind in (("start", Start), ("rule", Rule)):
            if getattr(self, field) not in get_args(kind):
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(get_args(kind))}")

    def edges(self, table: Table) -> list[int]:
        """The fine nodes at which sub-intervals begin and end, 0 and N included: single steps during the warm-up, then
        sub-intervals of `stride` steps, the last one shorter where they do not divide.

        Raises:
            ValueError: If window, warm-up or stride do not fit the table.
        """
        steps = table.steps
        if self.warmup > steps:
            raise ValueError(f"warmup is {self.warmup} steps; the chain has {steps}: give at most {steps}")
        if isinstance(self.stride, int):
            if self.stride > steps:
                raise ValueError(f"the stride is {self.stride} steps; the chain has {steps}: give at most {steps}")
            edges = [*range(self.warmup), *range(self.warmup, steps, self.stride), steps]
        else:
            lengths = torch.tensor(list(self.stride))
            if int(lengths.sum()) != steps - self.warmup:
                raise ValueError(
                    f"the strides add up to {int(lengths.sum())} steps; after {self.warmup} warm-up steps the chain has "
                    f"{steps - self.warmup} left, and they must cover it exactly"
                )
            edges = [*range(self.warmup), *(self.warmup + torch.cat([torch.zeros(1), lengths.cumsum(0)])).int().tolist()]
        if self.window is not None and self.window > len(edges) - 1:
            raise ValueError(
                f"the window is {self.window}; the chain has {len(edges) - 1} sub-intervals: give at most that, or None for all"
            )
        return edges

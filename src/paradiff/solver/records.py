# SPDX-License-Identifier: Apache-2.0
"""What a solver records of a round: one class for each kind of iteration, each with its JSON form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Scale = Literal["logarithmic", "counted", "marked"]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a picture of a run shows of one round: a column of cells over the parts of the chain.

    Attributes:
        axis: What the parts are called, and where they begin.
        scale: How a cell's number is shown: a positive one by `logarithmic` colours; a small whole one by colours that are
            `counted`, where a part may have several in a round; or not at all, the cell being `marked`.
        meaning: What a cell's number is.
        cells: Part and number of every cell.
        curves: Numbers to be drawn below by round, by name; none that is 0 or infinite is drawn.
    """

    axis: str
    scale: Scale
    meaning: str = ""
    cells: list[tuple[int, float]]
    curves: dict[str, float] = field(default_factory=dict)


class Record(Protocol):
    """What one sample did in one round.

    Attributes:
        round: The round, counted from 1.
        sample: The sample.
        passed: How many parts of the sample's chain became final; the unit is that of the method's `progress`.
    """

    @property
    def round(self) -> int: ...

    @property
    def sample(self) -> int: ...

    @property
    def passed(self) -> int: ...

    def to_json(self) -> dict[str, Any]:
        """The record without the sample's number, as JSON has it; infinities are left as they are."""
        ...

    def trace(self) -> Trace:
        """The record as a picture of the run shows it."""
        ...


@dataclass(frozen=True, repr=False)
class WindowRecord:
    """One sweep of one sample's window.

    Attributes:
        round: The round at which the sweep ended, counted from 1.
        sample: The sample.
        first: The first node of the window, whose state is final.
        change: Root mean square change of the nodes after it, one number a node.
        passed: How many of these nodes became final; 0 for the last sweep of a corrector, which moved the node `first`.
    """

    round: int
    sample: int
    first: int
    change: list[float]
    passed: int

    def __repr__(self) -> str:
        nodes = f"nodes {self.first + 1} to {self.first + len(self.change)}"
        return f"WindowRecord(round {self.round}, sample {self.sample}: {nodes}, {_most(self.change)}, {self.passed} passed)"

    def to_json(self) -> dict[str, Any]:
        """As `Record.to_json`; changes to three digits."""
        return {"round": self.round, "passed": self.passed, "first": self.first, "change": [_rounded(c) for c in self.change]}

    def trace(self) -> Trace:
        """The change of every node of the window."""
        return Trace(
            axis="node (0 noise, last the sample)",
            scale="logarithmic",
            meaning="RMS change of the node in the round",
            cells=list(enumerate(self.change, self.first + 1)),
        )


@dataclass(frozen=True, repr=False)
class PararealRecord:
    """One round of one sample's Parareal iteration.

    Attributes:
        round: The round, counted from 1.
        sample: The sample.
        rows: Block and iteration of every row that the sample had evaluated.
        values: Edge, iteration and root mean square change of every block edge that got a new value; the change is infinite
            for an edge's first value.
        passed: How many block edges became final.
    """

    round: int
    sample: int
    rows: list[tuple[int, int]]
    values: list[tuple[int, int, float]]
    passed: int

    def __repr__(self) -> str:
        change = _most([change for _, _, change in self.values])
        rows = f"{len(self.rows)} rows, {len(self.values)} new values"
        return f"PararealRecord(round {self.round}, sample {self.sample}: {rows}, {change}, {self.passed} edges passed)"

    def to_json(self) -> dict[str, Any]:
        """As `Record.to_json`; changes to three digits."""
        values = [[edge, iteration, _rounded(change)] for edge, iteration, change in self.values]
        return {"round": self.round, "passed": self.passed, "rows": [list(row) for row in self.rows], "values": values}

    def trace(self) -> Trace:
        """The iteration of every row."""
        return Trace(axis="block (0 at the noise)", scale="counted", meaning="iteration", cells=list(self.rows))


@dataclass(frozen=True, repr=False)
class CollocationRecord:
    """One round of one sample's collocation system.

    Attributes:
        round: The round, counted from 1.
        sample: The sample.
        nodes: The fine nodes at which the sample had the network evaluated.
        of: How many nodes its mesh has now.
        change: Root mean square change of the sample.
        interpolation_error: Estimated error from interpolation; infinite before it was estimated.
        iteration_error: Estimated error from sweeps not made.
        passed: 1 if this made the sample final.
    """

    round: int
    sample: int
    nodes: list[int]
    of: int
    change: float
    interpolation_error: float
    iteration_error: float
    passed: int = 0

    def __repr__(self) -> str:
        errors = f"estimated errors {self.interpolation_error:.2g} (interpolation) and {self.iteration_error:.2g} (iteration)"
        return f"CollocationRecord(round {self.round}, sample {self.sample}: {len(self.nodes)} of {self.of} nodes, {errors})"

    def to_json(self) -> dict[str, Any]:
        """As `Record.to_json`; the change to three digits."""
        errors = {"interpolation_error": self.interpolation_error, "iteration_error": self.iteration_error}
        visited = {"visited": self.nodes, "of": self.of, "change": _rounded(self.change)}
        return {"round": self.round, "passed": self.passed, **visited, **errors}

    def trace(self) -> Trace:
        """The nodes at which the network was evaluated, and how the sample and its estimated errors moved."""
        curves = {
            "change of the sample": self.change,
            "estimated interpolation error": self.interpolation_error,
            "estimated iteration error": self.iteration_error,
        }
        return Trace(axis="fine node (0 noise)", scale="marked", cells=[(node, 1) for node in self.nodes], curves=curves)


@dataclass(frozen=True, repr=False)
class ChordsRecord:
    """One round of one sample's cores.

    Attributes:
        round: The round, counted from 1.
        sample: The sample.
        nodes: The nodes at which its cores were evaluated, the slowest core first.
        answer: The newest answer that the round made, counted from 0; None where it made none.
        change: Root mean square change of the newest answer from the one before; infinite before there are two, 0 for the
            sequential sample.
        passed: 1 if this made the sample final.
    """

    round: int
    sample: int
    nodes: list[int]
    answer: int | None
    change: float
    passed: int = 0

    def __repr__(self) -> str:
        made = "no answer" if self.answer is None else f"answer {self.answer}, change {self.change:.2g}"
        return f"ChordsRecord(round {self.round}, sample {self.sample}: {len(self.nodes)} cores, {made})"

    def to_json(self) -> dict[str, Any]:
        """As `Record.to_json`; the change to three digits."""
        made = {"visited": self.nodes, "answer": self.answer, "change": _rounded(self.change)}
        return {"round": self.round, "passed": self.passed, **made}

    def trace(self) -> Trace:
        """The nodes at which the cores were, and how the answers moved."""
        cells = [(node, 1.0) for node in self.nodes]
        return Trace(axis="node (0 noise)", scale="marked", cells=cells, curves={"change of the answer": self.change})


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _most(changes: list[float]) -> str:
    """How much the node changed that changed most."""
    return f"change up to {max(changes):.2g}" if changes else "no change"

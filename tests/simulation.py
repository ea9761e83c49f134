# SPDX-License-Identifier: Apache-2.0
"""An event simulation of Parareal's dependency graph, without states: which rows a run must evaluate, round by round.

Write F(i, p) and G(i, p) for the fine and the coarse solve of block i from x[i, p]. With K iterations to be made:

    x[0, 0] is known and exact;
    x[n, 0] is known when G(n-1, 0) is;
    x[n, p] for 0 < p < n when F(n-1, p-1), G(n-1, p) and G(n-1, p-1) are;
    x[n, n] is F(n-1, n-1), and exact: later iterations do not change it and add no solve.

A solve takes one step a round from the round after its start is known; its first fine and its first coarse step are one row.
Fine steps at iteration K are not wanted, nothing runs in a block whose end is exact, and the run ends with x[B, K].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Row = tuple[int, int]  # block and iteration


@dataclass
class Graph:
    """What is known so far: edges by (edge, iteration), and steps taken by (block, iteration)."""

    lengths: Sequence[int]
    coarse: Sequence[int]
    iterations: int
    known: set[tuple[int, int]] = field(default_factory=lambda: {(0, 0)})
    fine_taken: dict[Row, int] = field(default_factory=dict)
    coarse_taken: dict[Row, int] = field(default_factory=dict)

    def fine_ended(self, block: int, p: int) -> bool:
        return self.fine_taken.get((block, p), 0) == self.lengths[block]

    def coarse_ended(self, block: int, p: int) -> bool:
        return self.coarse_taken.get((block, p), 0) == self.coarse[block]

    def follows(self, n: int, p: int) -> bool:
        """Whether x[n, p] can be made."""
        if p == n:
            return self.fine_ended(n - 1, n - 1)
        if p == 0:
            return self.coarse_ended(n - 1, 0)
        return self.fine_ended(n - 1, p - 1) and self.coarse_ended(n - 1, p) and self.coarse_ended(n - 1, p - 1)

    def learn(self) -> None:
        """Adds every edge value that follows from the steps taken."""
        for n in range(1, len(self.lengths) + 1):
            self.known |= {(n, p) for p in range(min(n, self.iterations) + 1) if self.follows(n, p)}

    def ready(self) -> list[tuple[tuple[int, int, int, bool], list[str]]]:
        """The rows that can be taken, each as (key, kinds of step), key being the round it is due at without a bound, the
        iteration, the block, and whether it only is a fine step."""
        found, longest = [], max(self.lengths)
        for block, p in self.known:
            if block == len(self.lengths) or (block + 1, block + 1) in self.known:
                continue
            due = p * (longest - 1) + block
            steps = {"coarse": self.coarse_taken.get((block, p), 0)} if not self.coarse_ended(block, p) else {}
            if p < self.iterations and not self.fine_ended(block, p):
                steps["fine"] = self.fine_taken.get((block, p), 0)
            if set(steps.values()) == {0} and len(steps) == 2:
                found.append(((due, p, block, False), ["coarse", "fine"]))
            else:
                found += [((due + taken, p, block, kind == "fine"), [kind]) for kind, taken in steps.items()]
        return found

    def take(self, row: Row, kinds: Sequence[str]) -> None:
        for kind in kinds:
            taken = self.coarse_taken if kind == "coarse" else self.fine_taken
            taken[row] = taken.get(row, 0) + 1


def simulate(
    lengths: Sequence[int], iterations: int, coarse: int = 1, bound: int | None = None, ordering: str = "pipelined"
) -> list[list[Row]]:
    """The rows of every round, as sorted (block, iteration).

    Args:
        lengths: Fine steps of every block.
        iterations: K.
        coarse: Coarse steps of every block; a shorter block takes as many as it has fine ones.
        bound: Most rows a round; None for no bound. Rows that an unbounded run would take earliest go first.
        ordering: `pipelined` or `batched`.
    """
    counts = [min(coarse, length) for length in lengths]
    if ordering == "batched":
        return _batched(lengths, counts, iterations)
    graph, rounds = Graph(lengths, counts, iterations), []
    while (len(lengths), iterations) not in graph.known:
        chosen = sorted(graph.ready())[:bound]
        assert chosen, "nothing is ready and the last edge is unknown"
        for (_, p, block, _), kinds in chosen:
            graph.take((block, p), kinds)
        graph.learn()
        rounds.append(sorted((block, p) for (_, p, block, _), _ in chosen))
    return rounds


def _batched(lengths: Sequence[int], counts: Sequence[int], iterations: int) -> list[list[Row]]:
    """A coarse sweep, one row a round; then, K times, all fine solves side by side and a coarse sweep."""
    rounds = []
    for p in range(iterations + 1):
        if p > 0:
            rounds += [[(i, p - 1) for i, length in enumerate(lengths) if length > step] for step in range(max(lengths))]
        rounds += [[(i, p)] for i, count in enumerate(counts) for _ in range(count)]
    return rounds

# SPDX-License-Identifier: Apache-2.0
"""The state of one request between rounds."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.serving.chains import Chain
from paradiff.serving.request import SampleRequest
from paradiff.serving.witness import Witness
from paradiff.solver.protocol import Place, Resizes, Run, Solver
from paradiff.solver.solution import ErrorEstimate, Status


class Walk(Protocol):
    """Who takes single steps of requests."""

    def node_of(self, state: RequestState, /) -> int:
        """The node to which those of a request have come."""
        ...

    def place_of(self, state: RequestState, /) -> Place:
        """The same with what the next step reads."""
        ...


@dataclass(eq=False, kw_only=True)
class RequestState:
    """A request that is being solved: by a solver of its method, or, where its windows would be of one node, by single steps
    (walkers.py). States are compared by identity.

    Attributes:
        request: The request.
        chain: Its chain.
        noise: x[0] and its noises.
        slot: The row of its conditioning.
        family: The method's name.
        most: Most rows of a round.
        make: Makes the method's run and its solver; None where single steps are all that was asked for.
        walks: Whether single steps may be taken in the solver's place.
        place: Where the single steps began, or were left; None while the solver is at work.
        walk: Who takes them, and knows where they have come to; None between.
        arrived: Whether they have come to the chain's end.
        run: The run, once it was needed; `solver` its solver.
        rows: Rows of a round, at most, as the load has it now.
        rounds: Rounds in which the request took part.
        evaluations: Its rows in these.
        widest: The most rows of one of them.
        witness: Rows of its first round, one of which is evaluated once more when its sample is found; None before.
        witnessed: Which of them.
        confirmed: Whether its sample is found, and that was done, or is not wanted.
        error: Why it ended without a sample; None where it did not.
        kind: What decides on its rows beside the load: the chain, the method, the tolerance and most rows.
    """

    request: SampleRequest
    chain: Chain
    noise: Noise
    slot: int
    family: str
    most: int
    make: Callable[[], tuple[Run, Solver[Any]]] | None
    walks: bool
    place: Place | None = None
    walk: Walk | None = None
    arrived: bool = False
    run: Run | None = None
    solver: Solver[Any] | None = None
    rows: int = 1
    rounds: int = 0
    evaluations: int = 0
    widest: int = 0
    witness: Witness | None = None
    witnessed: int = 0
    confirmed: bool = False
    error: str | None = None
    kind: Hashable = None

    @property
    def node(self) -> int | None:
        """The node up to which single steps have come; None while the solver is at work."""
        if self.walk is not None:
            return self.walk.node_of(self)
        return None if self.place is None else self.place.node

    @property
    def done(self) -> bool:
        """Whether the request is at its end: its sample is found and confirmed, or cannot be."""
        return self.error is not None or self.confirmed

    @property
    def found(self) -> bool:
        """Whether its sample is found, or cannot be."""
        if self.arrived or self.error is not None:
            return True
        if self.walk is not None:
            return False
        if self.place is not None:
            return self.place.node == self.chain.table.steps
        assert self.solver is not None
        return self.solver.done

    def stand(self) -> Place | None:
        """Where the single steps have come to, which are not gone on with by whoever took them; None while the solver is at
        work."""
        if self.walk is not None:
            self.place, self.walk = self.walk.place_of(self), None
        return self.place

    def resize(self, rows: int) -> None:
        """Bounds the rows of the rounds to come; what is solved stays.

        With one row, single steps go on from the node up to which states are final; with more, a window goes on from the node
        to which they have come. A method whose rows cannot be bounded keeps its own.

        Args:
            rows: The bound, one at least.
        """
        rows = max(1, min(rows, self.most))
        if rows == self.rows or self.found:
            return
        self.rows = rows
        if rows > 1 and self.place is not None and self.make is not None:
            place = self.stand()
            assert place is not None
            self._widen(place)
        elif rows == 1 and self.walks and self.place is None:
            assert self.solver is not None
            self.place = self.solver.place()  # pyright: ignore[reportAttributeAccessIssue]  (walks says so)
        elif isinstance(self.solver, Resizes):
            self.solver.resize(rows)

    def begin(self) -> None:
        """Makes the method's solver."""
        assert self.make is not None
        self.run, self.solver = self.make()

    def _widen(self, place: Place) -> None:
        """Leaves the walk for the method's solver."""
        if self.solver is None:
            self.begin()
        solver: Any = self.solver
        self.place = None
        solver.resize(1)
        solver.resume(place)
        solver.resize(self.rows)

    @property
    def sample(self) -> Tensor:
        """`[...]` the sample of a request, once it is found."""
        place = self.stand()
        if place is not None:
            return place.states[0]
        assert self.solver is not None
        return self.solver.final

    def ended(self) -> tuple[Status, str, ErrorEstimate]:
        """How a request ended whose sample is found, the sentence that says so, and how far to trust the sample."""
        solver: Any = self.solver
        if solver is None or (self.walks and self.widest <= 1):
            return Status.EXACT, Status.EXACT.message(), ErrorEstimate(0.0, 0.0, self.rounds, self.evaluations)
        place = self.stand()
        if place is not None:  # the errors of the windows before are carried to the end
            solver.resume(place)
            self.place = None
        assert self.run is not None
        estimate = replace(solver.error_estimate, rounds=self.rounds, evaluations=self.evaluations)
        return *self.run.status([estimate]), estimate

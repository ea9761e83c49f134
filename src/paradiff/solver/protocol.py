# SPDX-License-Identifier: Apache-2.0
"""What meets in the loop: problems, methods, their runs and solvers, evaluators and observers.

A `Method` holds hyper-parameters. It prepares a `Problem`, the chain with its noises, into a `Run`, which holds what all
samples share and makes a `Solver` for each. A solver evaluates nothing itself. In every round each is asked for a `Query`, the
rows that it wants evaluated; an evaluator turns the rows of all samples, one `Batch`, into outputs; the solver is told its part
of them, and advances:

    query = solver.ask();    norms = solver.tell(query, outputs);    record = solver.advance(norms on the host, round)

`tell` returns nothing in the midst of a sweep that takes several rounds, and `advance` is then left out. The loop (loop.py)
knows no method by name: a new method is a class with these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from paradiff.chain.noise import Noise
from paradiff.chain.table import Table
from paradiff.errors import require_real, shown
from paradiff.solver.records import Record
from paradiff.solver.solution import ErrorEstimate, Status
from paradiff.solver.trajectory import Part, Trajectory

if TYPE_CHECKING:
    from paradiff.solver.ranks import Ranks

OnFinal = Callable[[int, Tensor], None]
"""Called with the fine node of the first of some states that became final, and these states, `[n, ...]`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What is solved, and in which arithmetic. Problems are compared by identity.

    Attributes:
        table: The sampler.
        noise: x[0] and the noises of every sample.
        start: `[B, ...]` states at node 0 to use instead of the noise's; None for the noise's.
        device: Where states live.
        dtype: Dtype of states, float32 or float64.
        shared_window: Each sample is a batch `[b, ...]` of members that share its window: a node changes as much as the member
            that changes most, and errors are estimated for the worst member.
        resolution: Relative precision of the network's outputs; that of the states by default.
        smooth: Whether outputs vary little from node to node for like states.
        symmetry: `symmetry(values)` of states or outputs `[W, ...]`: their changes `[W, g, ...]` by the g generators of a group
            under which the network answers alike; None for none.
        renewed: True, `[*shape]`, for elements of a state that each step makes from the network's output alone, whatever they
            were before, such as an estimate that is handed from step to step; None for none.
        on_final: Called with every stretch of nodes that became final, in order; for one sample, and methods that keep the
            states of all nodes.
        trajectory: That of an earlier run on the table, from which the samples begin; None for none.
        keep: Whether the run's own trajectory is kept.

    Raises:
        ValueError: If `dtype` is neither float32 nor float64, another value is of another kind, or `on_final` is given with
            several samples.
    """

    table: Table
    noise: Noise
    start: Tensor | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    shared_window: bool = False
    resolution: float | None = None
    smooth: bool = True
    symmetry: Callable[[Tensor], Tensor] | None = None
    renewed: Tensor | None = None
    on_final: OnFinal | None = None
    trajectory: Trajectory | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"states were asked for in {shown(self.dtype)}; they are kept in float32 or float64 (the network's own dtype "
                "is given to the evaluator)"
            )
        if self.resolution is not None:
            require_real("the resolution", self.resolution, positive=True, otherwise=", or None for that of the states")
        for name, value in (("shared_window", self.shared_window), ("smooth", self.smooth)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; give True or False")
        if self.on_final is not None and self.noise.samples != 1:
            raise ValueError(
                f"on_final was given with {self.noise.samples} samples, which end at rounds of their own; solve one at a time"
            )

    @property
    def elements(self) -> int:
        """Elements of a sample; of a member, where it is a batch of them."""
        return math.prod(self.noise.shape[int(self.shared_window) :])

    def start_of(self, sample: int) -> Tensor | None:
        """The given state of one sample at node 0; None for the noise's."""
        return None if self.start is None else self.start[sample]

    def part_of(self, sample: int) -> Part | None:
        """The trajectory that one sample begins from; None for none."""
        return None if self.trajectory is None else self.trajectory.parts[sample]


@dataclass(frozen=True, eq=False)
class Query:
    """The rows of one sample that a solver wants evaluated; a solver's own kind may carry more, for its `tell`. Queries are
    compared by identity.

    Attributes:
        nodes: `[R]` fine nodes, on the CPU.
        rows: `[R, ...]` states there, scaled as the network expects them.
    """

    nodes: Tensor
    rows: Tensor


AnyQuery = TypeVar("AnyQuery", bound=Query)


class Solver(Protocol[AnyQuery]):
    """One sample's iteration.

    Attributes:
        sample: The sample.
        done: Whether the sample is found.
        final: `[...]` the sample once it is found.
        newest: `[...]` the best that is known of the sample, or of the state furthest along the chain. A solver may have
            `reaches_end`, whether that is the sample; it is taken not to be before the solver is done.
        error_estimate: How far to trust the sample.
    """

    @property
    def sample(self) -> int: ...

    @property
    def done(self) -> bool: ...

    @property
    def final(self) -> Tensor: ...

    @property
    def newest(self) -> Tensor: ...

    @property
    def error_estimate(self) -> ErrorEstimate: ...

    def ask(self) -> AnyQuery:
        """The rows wanted in this round, one at least."""
        ...

    def tell(self, query: AnyQuery, outputs: Tensor, states: Tensor | None = None) -> Tensor | None:
        """Takes the outputs of a query.

        Args:
            query: What `ask` returned.
            outputs: `[R, ...]` the network's outputs.
            states: `[R, ...]` the states as the caller changed them before the network saw them, not scaled; None where it left
                them alone.

        Returns:
            Numbers that `advance` needs on the host, `[W]` on the device; None in the midst of a sweep.
        """
        ...

    def advance(self, norms: list[float], round: int) -> Record:
        """Judges the round by the numbers that `tell` returned, and moves on."""
        ...


@dataclass(frozen=True, eq=False)
class Marched:
    """What a march of all samples in step returns.

    Attributes:
        sample: `[B, ...]` samples.
        estimates: One a sample.
        history: The records of all rounds.
    """

    sample: Tensor
    estimates: list[ErrorEstimate]
    history: Sequence[Record]


March = Generator["Batch", tuple[Tensor, Tensor | None], Marched]
"""Yields the rows of a round, and is sent their outputs, and the states where the caller changed them."""


@runtime_checkable
class Marches(Protocol):
    """A run that may take all samples through their rounds in step, without a solver for each."""

    def march(self) -> March | None:
        """The march; None where the method or the problem needs solvers."""
        ...


@runtime_checkable
class Explains(Protocol):
    """A run that has something to say beside how it ended."""

    def explained(self, message: str) -> str:
        """A message of the run with what is said beside."""
        ...


class Run(Protocol):
    """One method on one problem: what all samples share.

    Attributes:
        t: `[N+1]` times of the chain that is solved, as the network is given them.
    """

    @property
    def t(self) -> Tensor: ...

    def solver(self, sample: int) -> Solver[Any]:
        """The solver of one sample."""
        ...

    def status(self, estimates: Sequence[ErrorEstimate]) -> tuple[Status, str]:
        """How the run ended, and the sentence that says so with its numbers."""
        ...

    def close(self) -> None:
        """Called once when all samples are found."""
        ...


@runtime_checkable
class Method(Protocol):
    """The hyper-parameters of one way to solve a chain.

    Attributes:
        name: The method's name.
        tolerance: What the method's rule compares with.
        dense_output: Whether the states of all nodes become known, in order, so that `Problem.on_final` can be called.
        solves_chain: Whether the sample sought is that of the table's own chain.
        follows_edits: Whether it can follow a caller who changes states before the network sees them.
    """

    @property
    def name(self) -> str: ...

    @property
    def tolerance(self) -> float: ...

    @property
    def dense_output(self) -> bool: ...

    @property
    def solves_chain(self) -> bool: ...

    @property
    def follows_edits(self) -> bool: ...

    def edges(self, table: Table) -> list[int]:
        """The fine nodes between the parts that the method iterates on, 0 and N included.

        Raises:
            ValueError: If the method does not fit the table.
        """
        ...

    def prepare(self, problem: Problem) -> Run:
        """The run on a problem.

        Raises:
            ValueError: If the method does not fit the problem.
        """
        ...

    def reference(self) -> Method:
        """The sequential method whose sample this one solves for."""
        ...

    def width(self, table: Table) -> int:
        """Rows of one sample in a round in which all that is solved at once takes part."""
        ...

    def progress(self, table: Table) -> tuple[int, str]:
        """How many parts of one sample become final, the sum of its records' `passed`, and what they are called."""
        ...

    def in_loop(self, table: Table, least: float) -> Method:
        """The method as a pipeline's own loop can be driven by it, whose first pass is at x[0] alone.

        Args:
            table: The loop's chain.
            least: The smallest tolerance that the network's dtype resolves, for rules that estimate the sample's error; 0 for
                no such bound.

        Raises:
            ValueError: If it asks for what a pipeline's loop cannot do.
        """
        ...


@runtime_checkable
class Chooses(Protocol):
    """A method that chooses another one for a model."""

    def for_model(self, evaluate: Evaluate, table: Table, noise: Noise) -> Method:
        """The method for a model, a chain and so many samples of a shape."""
        ...

    def chosen(self, table: Table, samples: int = 1) -> Method:
        """What is chosen for a chain and so many samples."""
        ...

    def reason(self, table: Table) -> str:
        """What is chosen for a chain of one sample, and why."""
        ...

    def on_ranks(self, ranks: Ranks) -> Method:
        """The method for ranks, which have to choose alike; all of them make the call."""
        ...

    def for_states(self) -> Method:
        """The method for a caller who reads the states of all nodes."""
        ...

    def remembering(self, *, begins: bool, keeps: bool) -> Method:
        """The method for runs that begin from a trajectory, or keep their own."""
        ...

    def for_edits(self) -> Method:
        """The method for a caller who changes states between steps."""
        ...

    def observing(self, observer: Observer | None) -> Observer | None:
        """What observes a run: the caller's observer, and what the method itself watches; None for nothing."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """A method whose runs keep their trajectories, and may begin from one."""

    def cannot_begin(self) -> str | None:
        """Why it cannot begin from a trajectory, a clause; None where it can."""
        ...


@runtime_checkable
class Kept(Protocol):
    """A solver that kept its trajectory."""

    def part(self) -> Part:
        """The trajectory of its sample."""
        ...


@runtime_checkable
class Resizes(Protocol):
    """A solver whose rows in a round can be bounded anew between two sweeps; what it has found stays."""

    @property
    def resizable(self) -> bool:
        """Whether it can: not where the parts of its chain are given."""
        ...

    def resize(self, rows: int) -> None:
        """Bounds the rows of the rounds to come, at least one each; without effect where it is not resizable."""
        ...


@dataclass(frozen=True, eq=False)
class Place:
    """Where a walk of the plain chain has come to, and what its next step reads. Places are compared by identity.

    Attributes:
        node: The node i whose state is known.
        states: x[i], x[i-1], ..., each `[...]`: at least as many as a step reads, as far as the chain has them.
        outputs: m[i-1], m[i-2], ..., each `[...]`, one fewer.
    """

    node: int
    states: Sequence[Tensor]
    outputs: Sequence[Tensor]


@runtime_checkable
class Walks(Resizes, Protocol):
    """A resizable solver of the plain chain, whose first states are final: others may take single steps in its place."""

    def place(self) -> Place:
        """Up to where its states are final."""
        ...

    def resume(self, place: Place) -> None:
        """Goes on from a place that single steps came to from its own."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """Rows to be evaluated in one round. Batches are compared by identity.

    Attributes:
        x: `[R, ...]` states, already scaled as the network expects them.
        t: `[R]` times, on the CPU; int64 where all times of the table are whole numbers, else float64.
        nodes: `[R]` nodes, on the CPU.
        samples: `[R]` samples, on the CPU.
        chain: `[N]` times of all nodes of the chain that are evaluated, on the CPU; None where they are not known.
        widest: Rows of the widest round of the run, from which padded calls have their widths; None where it is not known.
    """

    x: Tensor
    t: Tensor
    nodes: Tensor
    samples: Tensor
    chain: Tensor | None = None
    widest: int | None = None

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.x.shape[1:]))
        return f"Batch({len(self.x)} rows of {shape}, {self.x.dtype}, nodes {int(self.nodes.min())} to {int(self.nodes.max())})"


@dataclass(frozen=True, eq=False)
class EditedOutputs:
    """What a solver is sent in place of plain outputs where its caller changed states before the network saw them. Objects are
    compared by identity.

    Attributes:
        outputs: `[R, ...]` the network's outputs at the changed states.
        states: `[R, ...]` the changed states, not scaled.
    """

    outputs: Tensor
    states: Tensor


class Evaluate(Protocol):
    """Rows in, outputs out: what `drive` calls once a round.

    Attributes:
        device: Where the rows are wanted.
        dtype: The network's dtype; None for that of the states.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype | None: ...

    def __call__(self, batch: Batch) -> Tensor:
        """Outputs `[R, ...]` of a batch, in the dtype of its states, on their device."""
        ...


@dataclass(frozen=True)
class Round:
    """What an observer is shown.

    Attributes:
        number: The round, counted from 1.
        records: What each sample did whose sweep ended in this round.
        solvers: The solvers of all samples.
    """

    number: int
    records: Sequence[Record] = field(repr=False)
    solvers: Sequence[Solver[Any]] = field(repr=False)

    def states(self) -> Tensor:
        """`[B, ...]` the best that is known of every sample now (`Solver.newest`); a copy on the device."""
        return torch.stack([solver.newest for solver in self.solvers])


class Observer(Protocol):
    """Called after every round; it may ask the run to stop."""

    def __call__(self, round: Round, /) -> bool | None:
        """True to end the run here: its samples are then the best that is known, with an infinite estimate of their error,
        unless the observer estimates them (`Estimates`)."""
        ...


@runtime_checkable
class Estimates(Protocol):
    """An observer that estimates the errors of samples as they are known after the round that it saw last.

    Attributes:
        errors: The estimates, one a sample; infinite where nothing is known.
        wish: Whose wish it is that a run ends, as a sentence begins with it.
    """

    @property
    def errors(self) -> Sequence[float]: ...

    @property
    def wish(self) -> str: ...

# SPDX-License-Identifier: Apache-2.0
"""The frozen hyper-parameters of the window solver, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, get_args

from paradiff.chain.slope import Slope, identity, refuse_no_slope
from paradiff.chain.table import Table
from paradiff.errors import are_whole, is_whole, require_kind, require_one_of, require_real, require_whole, shown
from paradiff.methods.face import Face, settle
from paradiff.methods.secant import DAMPING, MOST_PAIRS
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.methods.window.blocks import Blocks
from paradiff.methods.window.control import WindowControl
from paradiff.methods.window.corrector import Corrector
from paradiff.methods.window.mixing import Anderson

MOST_NEIGHBOURS = 64  # whose pairs a node may take: those further off say nothing of it

Predictor = Literal["copy", "held", "linear", "clean"]
Rule = Literal["error", "change", "residual", "sweeps"]
Chains = Literal["any", "stochastic", "deterministic"]


@dataclass(frozen=True, repr=False, eq=False)
class WindowOptions(Face):
    """Hyper-parameters of the window solver (solver.py).

    Attributes:
        name: The method's name.
        slope: G, how changes are carried along the window (chain/slope.py).
        window: Number of sub-intervals solved at once; None for all.
        stride: Fine steps in a sub-interval, or the lengths of all sub-intervals after the warm-up.
        warmup: Steps taken one after the other before the window opens.
        predictor: The initial guess for new nodes of the window: `copy` of the last state, the same `held` as ParaTAA does (the
            window's end, where nothing is evaluated yet, is 0, and once inside a copy, too), the `linear` part of the steps
            (outputs zero, same noises), or the steps with the newest `clean`-data estimate frozen and the same noises.
        tolerance: What the rule compares with.
        rule: `error`: the tolerance is the root mean square error that the sample may have by estimate (budget.py),
            used along the chain as it accrues. `change`: a node passes when its root mean square change is at most
            `tolerance` times the standard deviation of the noise that a DDPM step would add there (the published rules).
            `residual`: a node passes when the root mean square residual of its own step is at most `tolerance`, or at most
            `noise_tolerance` times that standard deviation (ParaTAA's). `sweeps`: a node passes when it has been swept
            `sweeps` times.
        sweeps: K of the rule `sweeps`.
        blocks: Blocks that the window respects (blocks.py); None for a window that slides freely.
        corrector: What follows every block at whose end noise is left (corrector.py), or None. The sample is then that of
            the sequential chain with the corrector's own steps taken one after the other: window 1, sweeps of all its steps.
        chains: Which chains the method is for.
        secants: Pairs of earlier sweeps that correct the slope at each node (methods/secant.py); 0 for the slope alone, 1000
            at most.
        neighbours: From how many nodes before it a node takes the pairs, too; 64 at most.
        neighbour_damping: Lambda of those (methods/secant.py), 0 or more; that of a node's own pairs is 0.01.
        anderson: Triangular Anderson acceleration (anderson.py), or None.
        noise_tolerance: The second tolerance of the rule `residual`.
        control: The tuned numbers of the error budget.

    Raises:
        ValueError: If a value is out of its range.
    """

    name: str
    slope: Slope = identity
    window: int | None = None
    stride: int | Sequence[int] = 1
    warmup: int = 0
    predictor: Predictor = "clean"
    tolerance: float = DEFAULT_TOLERANCE
    rule: Rule = "error"
    sweeps: int | None = None
    blocks: Blocks | None = None
    corrector: Corrector | None = None
    chains: Chains = "any"
    secants: int = 0
    neighbours: int = 0
    neighbour_damping: float = DAMPING
    anderson: Anderson | None = None
    noise_tolerance: float = 0.0
    control: WindowControl = field(default=WindowControl(), kw_only=True)

    def __post_init__(self) -> None:
        self._refuse_other_kinds()
        if (self.sweeps is not None) != (self.rule == "sweeps"):
            raise ValueError(f"sweeps is {self.sweeps} with rule {self.rule!r}; the rule 'sweeps' needs it, no other takes it")
        if self.noise_tolerance and self.rule != "residual":
            raise ValueError(
                f"noise_tolerance is {self.noise_tolerance:g} with rule {self.rule!r}; only the rule 'residual' has two "
                "tolerances: leave it out"
            )
        self._refuse_two_accelerations()
        if self.blocks is not None and (self.stride != 1 or self.warmup):
            raise ValueError(
                f"blocks were given with a stride of {self.stride} and {self.warmup} warm-up steps; blocks are solved node by "
                "node from the start: leave stride at 1 and warmup at 0"
            )
        if self.predictor == "held" and (self.blocks is not None or self.stride != 1):
            raise ValueError(
                "the predictor is 'held', whose window ends where nothing is evaluated yet; it takes neither blocks nor a "
                "stride: use 'copy'"
            )
        if self.secants and self.stride != 1:
            raise ValueError(
                f"secants is {self.secants} with a stride of {self.stride}; it must be 0 where sub-intervals have several "
                "steps, of which only the ends are swept again"
            )
        if self.corrector is not None and (self.blocks is None or self.blocks.stagger is not None):
            raise ValueError(
                "a corrector was given to a method whose blocks do not end one after the other; it needs blocks in turn, "
                "without a stagger"
            )

    def _refuse_two_accelerations(self) -> None:
        """Refuses an acceleration on a method that has another, or cannot have it.

        Raises:
            ValueError: If there is one.
        """
        if self.anderson is None:
            return
        if self.secants:
            raise ValueError(
                f"secants is {self.secants} and an Anderson mixing was given; each is an acceleration of its own: give one"
            )
        if self.stride != 1:
            raise ValueError(
                f"an Anderson mixing was given with a stride of {self.stride}; it mixes the states of single steps: "
                "leave stride at 1"
            )
        if self.sweeps is not None:
            raise ValueError(
                f"an Anderson mixing was given with sweeps = {self.sweeps}; a fixed number of sweeps has no residuals that the "
                "mixing could be held to: use rule 'residual', 'change' or 'error'"
            )
        if self.window is not None:
            self.anderson.refuse_longer_than(self.window)

    def _refuse_other_kinds(self) -> None:
        """Refuses values of the wrong kind, and those that are out of their range whatever the others are.

        Raises:
            ValueError: If there is one.
        """
        refuse_no_slope(self.slope)
        if self.window is not None:
            require_whole("the window", self.window, 1, ", or None for the whole chain")
        strides = [self.stride] if is_whole(self.stride) else self.stride
        if not are_whole(strides):
            raise ValueError(
                f"the stride is {shown(strides)}; it must be a whole number of steps, or a list of the lengths of all "
                "sub-intervals"
            )
        if min(strides, default=0) < 1:
            raise ValueError(
                f"the stride is {shown(self.stride)}; a sub-interval must have at least 1 step: give a whole number of steps, "
                "or the lengths of all sub-intervals"
            )
        require_whole("warmup", self.warmup, 0)
        for name, kind in (("predictor", Predictor), ("rule", Rule), ("chains", Chains)):
            require_one_of(name, getattr(self, name), get_args(kind))
        require_real("the tolerance", self.tolerance)
        require_real("noise_tolerance", self.noise_tolerance)
        if self.sweeps is not None:
            require_whole("sweeps", self.sweeps, 1)
        require_whole("secants", self.secants, 0, most=MOST_PAIRS)
        require_whole("neighbours", self.neighbours, 0, most=MOST_NEIGHBOURS)
        require_real("neighbour_damping", self.neighbour_damping)
        for name, kind in (("blocks", Blocks), ("corrector", Corrector), ("anderson", Anderson)):
            if getattr(self, name) is not None:
                require_kind(name, getattr(self, name), kind, ", or None")
        require_kind("control", self.control, WindowControl)
        settle(
            self,
            "window",
            "stride",
            "warmup",
            "sweeps",
            "secants",
            "neighbours",
            numbers=["tolerance", "noise_tolerance", "neighbour_damping"],
        )

    @property
    def learns(self) -> bool:
        """Whether earlier sweeps correct the present one, by secant pairs or by a mixing."""
        return self.secants > 0 or (self.anderson is not None and self.anderson.history != 1)

    def edges(self, table: Table) -> list[int]:
        """The fine nodes at which sub-intervals begin and end, 0 and N included: single steps during the warm-up, then
        sub-intervals of `stride` steps, the last one shorter where they do not divide.

        Raises:
            ValueError: If window, warm-up, stride or blocks do not fit the table, or the method is not for such chains.
        """
        steps = table.steps
        if self.chains != "any" and (self.chains == "stochastic") != table.stochastic:
            raise ValueError(
                f"{self.name} is for {self.chains} chains; table {table.name!r} is "
                f"{'stochastic' if table.stochastic else 'deterministic'}: use the method's other form, or another sampler"
            )
        if self.blocks is not None:
            edges = self.blocks.edges(table)
            crossed = [e for e in edges if e not in table.restarts]
            if self.corrector is not None and crossed:
                raise ValueError(
                    f"a corrector was given, but table {table.name!r} reads past the block edge at node {crossed[0]}, to "
                    "states from before the correction; give block edges at which it starts afresh (Table.restarts), or a "
                    "one-step sampler"
                )
        if self.warmup > steps:
            raise ValueError(f"warmup is {self.warmup} steps; the chain has {steps}: give at most {steps}")
        if is_whole(self.stride):
            if self.stride > steps:
                raise ValueError(f"the stride is {self.stride} steps; the chain has {steps}: give at most {steps}")
            edges = [*range(self.warmup), *range(self.warmup, steps, self.stride), steps]
        else:
            total = sum(self.stride)
            if total != steps - self.warmup:
                raise ValueError(
                    f"the strides add up to {shown(total)} steps; after {self.warmup} warm-up steps the chain has "
                    f"{steps - self.warmup} left, and they must cover it exactly"
                )
            edges = [*range(self.warmup), *accumulate(self.stride, initial=self.warmup)]
        if self.window is not None and self.window > len(edges) - 1:
            raise ValueError(
                f"the window is {self.window}; the chain has {len(edges) - 1} sub-intervals: give at most that, or None for all"
            )
        if self.anderson is not None:
            self.anderson.refuse_longer_than(len(edges) - 1)
        return edges

# SPDX-License-Identifier: Apache-2.0
"""`auto`: the method that is chosen for a model and a chain, and corrects itself while it runs.

What is known decides (picking.py): the stored latency curve of the model on this machine, stored traces of its runs, the
library's own models on like chains. Where no curve is known, a long chain begins with a few calls that measure it, within a
share of its own seconds; a shorter one is walked, and what its end has left of that share measures a point of the curve for the
next run. A deadline is kept by an observer, which ends the run before a round that would be too late.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from paradiff.chain.noise import Noise
from paradiff.chain.table import Table
from paradiff.methods.chain_method import ChainMethod
from paradiff.methods.face import Face
from paradiff.methods.tolerance import DEFAULT_TOLERANCE
from paradiff.planning.auto_run import SHARE, AutoRun
from paradiff.planning.cost import Devices
from paradiff.planning.curves import curve_file, keep, stored_curve
from paradiff.planning.identity import evaluator_key, table_key
from paradiff.planning.latency import quick_latency
from paradiff.planning.memo import MEMO, Entry, stamp_of
from paradiff.planning.picking import PLAIN, SHORTEST, Known, Picked, pick
from paradiff.planning.plan import Plan
from paradiff.planning.store import cache_folder
from paradiff.planning.traces import traces_of
from paradiff.planning.wish import Objective, Wish
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.previews import Timed
from paradiff.solver.protocol import Evaluate, Method, Observer, Problem
from paradiff.solver.ranks import Ranks
from paradiff.solver.sharded import Sharded

FEWEST = 8
"""Rows that measuring at the beginning needs: a warm call and one of each of 1, 2 and 4 rows."""

FEWEST_IN_TIME = 4
"""The same where a deadline asks for a choice by the clock: without the call of 4 rows."""


@dataclass(frozen=True, repr=False, eq=False)
class AutoMethod(ChainMethod, Wish, Face):
    """The method that chooses; `auto` makes one. Its further attributes are those of `Wish`.

    Attributes:
        name: Its name.
        known: What is known of the model; None before a model is seen.
        look_up: What is known by chain, for a caller who learns of the chain later; None where nothing is.
        begun: When the run began, in seconds of the clock; None for the time at which it is solved.
        clock: Tells the seconds by which a deadline is kept; None for `time.perf_counter`.
    """

    name: str = "auto"
    known: Known | None = dataclasses.field(default=None, kw_only=True)
    look_up: Callable[[Table], Known] | None = dataclasses.field(default=None, kw_only=True)
    begun: float | None = dataclasses.field(default=None, kw_only=True)
    clock: Callable[[], float] | None = dataclasses.field(default=None, kw_only=True)

    @property
    def dense_output(self) -> bool:
        """Whether the states of all nodes become known: where they are asked for, a method with them is chosen."""
        return True

    def edges(self, table: Table) -> list[int]:
        """Those of the choice."""
        return self.pick(table).method.edges(table)

    def width(self, table: Table) -> int:
        """That of the choice."""
        return self.pick(table).method.width(table)

    def progress(self, table: Table) -> tuple[int, str]:
        """That of the choice."""
        return self.pick(table).method.progress(table)

    def in_loop(self, table: Table, least: float) -> Method:
        """The choice as a pipeline's own loop can be driven by it."""
        return self.pick(table).method.in_loop(table, least)

    def prepare(self, problem: Problem) -> AutoRun:
        """The run of the choice.

        Raises:
            ValueError: If the choice does not fit the problem.
        """
        chooser = self if problem.on_final is None else self.for_states()
        picked = chooser.pick(problem.table, problem.noise.samples)
        if problem.trajectory is not None and picked.method.name == PLAIN.name:
            problem = dataclasses.replace(problem, trajectory=None)
        return AutoRun(self.known, picked, problem)

    def cannot_begin(self) -> str | None:
        """None: it chooses a method that can begin from a trajectory, or the plain chain."""
        return None

    def remembering(self, *, begins: bool, keeps: bool) -> AutoMethod:
        """The same for runs that begin from a trajectory, or keep their own."""
        return dataclasses.replace(self, begins=begins, keeps=keeps)

    def for_model(self, evaluate: Evaluate, table: Table, noise: Noise) -> AutoMethod:
        """The same with what is known of a model; a long chain's curve is measured, within a share of its seconds."""
        begun = time.perf_counter()
        if isinstance(evaluate, Evaluator) and isinstance(evaluate.bound.crew, Sharded):
            return self.on_ranks(evaluate.bound.crew.ranks)
        if self.known is not None and self.known.evaluator is evaluate:
            again = dataclasses.replace(self, begun=begun)
            object.__setattr__(again, "_kept", vars(self).get("_kept", (None, {})))
            object.__setattr__(again, "_warned", vars(self).get("_warned", False))
            return again
        short = table.steps <= SHORTEST and self.deadline is None
        if self.plan is not None or not isinstance(evaluate, Evaluator) or short or self.objective == "memory":
            return dataclasses.replace(self, begun=begun)
        entry = self._looked_up(evaluate, table, noise)
        known = Known(entry.curve, entry.traces, evaluate, entry.notes)
        found = dataclasses.replace(self, known=known, begun=begun)
        object.__setattr__(found, "_kept", (table, entry.picks))
        return found

    def _looked_up(self, evaluate: Evaluator, table: Table, noise: Noise) -> Entry:
        """What is known of a model, as it was looked up before, or anew."""
        given = tuple((name, value.shape[1:]) for name, value in evaluate.conditioning.items())
        shape = (noise.samples, *noise.shape)
        asked = (self.tolerance, self.window, self.objective, self.deadline, self.dense, self.edits, self.begins, self.keeps)
        facts = (table_key(table), shape, given, evaluate.dtype, evaluate.device, evaluate.bound.max_rows, cache_folder())
        entry = MEMO.find(evaluate.denoiser, (asked, facts))
        if entry is not None:
            return entry
        key = evaluator_key(evaluate)
        curve, notes = stored_curve(evaluate, noise, key=key)
        rows, least = (SHARE * table.steps, FEWEST) if self.deadline is None else (FEWEST_IN_TIME, FEWEST_IN_TIME)
        if curve is None and rows >= least:
            curve = quick_latency(evaluate, table, noise, rows)
            notes += keep(evaluate, noise, curve)
        traces = traces_of(evaluate, table, noise.shape, key=key)
        traces.files.append(curve_file(evaluate, noise, key=key))
        entry = Entry(stamp_of(*traces.files), curve, traces, (*notes, *traces.notes))
        if curve is not None:
            MEMO.keep(evaluate.denoiser, (asked, facts), entry)
        return entry

    def chosen(self, table: Table, samples: int = 1) -> Method:
        """What is chosen for a chain and so many samples."""
        return self.pick(table, samples).method

    def reason(self, table: Table) -> str:
        """What is chosen for a chain of one sample, and why."""
        return str(self.pick(table))

    def on_ranks(self, ranks: Ranks) -> AutoMethod:
        """The same for ranks that share rounds: they choose without a clock, so that all choose alike, and keep a deadline by
        the clock that they tell each other. With a deadline all ranks have to make the call."""
        begun = None if self.deadline is None else ranks.tell()
        devices = Devices(ranks.size, latency=0.0)
        return dataclasses.replace(self, clocked=False, devices=devices, begun=begun, clock=ranks.heard)

    def for_states(self) -> AutoMethod:
        """The same for a caller who reads the states of all nodes."""
        return dataclasses.replace(self, dense=True)

    def for_edits(self) -> AutoMethod:
        """The same for a caller who changes states between steps."""
        return dataclasses.replace(self, edits=True)

    def looking_up(self, look_up: Callable[[Table], Known]) -> AutoMethod:
        """The same with what is known by chain, and a clock that begins now."""
        return dataclasses.replace(self, look_up=look_up, begun=time.perf_counter())

    def observing(self, observer: Observer | None) -> Observer | None:
        """What observes the run: the caller's observer, and what keeps the deadline."""
        if self.deadline is None:
            return observer
        return Timed(self.deadline, observer, begun=self.begun, clock=self.clock)

    def pick(self, table: Table, samples: int = 1) -> Picked:
        """The choice for a chain; made once, and kept for the chain that was asked about last.

        Raises:
            ValueError: If the plan is of another chain.
        """
        of, kept = vars(self).get("_kept", (None, {}))
        if of is not table:
            kept = {}
            object.__setattr__(self, "_kept", (table, kept))
        if samples not in kept:
            asks = self.look_up is not None and (table.steps > SHORTEST or self.deadline is not None)
            known = self.look_up(table) if self.look_up is not None and asks else self.known
            kept[samples] = pick(self, known, table, samples)
        picked = kept[samples]
        if picked.warning is not None and not vars(self).get("_warned", False):  # each run has a method of its own
            object.__setattr__(self, "_warned", True)
            warnings.warn(picked.warning, UserWarning, stacklevel=3)
        return picked


def auto(
    window: int | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    *,
    objective: Objective | None = None,
    deadline: float | None = None,
    plan: Plan | None = None,
) -> AutoMethod:
    """Chooses method and window for the model, the chain and the machine, and says in the message what it chose and why.

    The choice is made by what was measured before, here and on the library's own models (`paradiff plan` measures a model); it
    is the plain chain where nothing is faster. The first runs of a model measure what they can within 4 % of their seconds. A
    choice may depend on the clock: two runs may then differ by as much as their tolerance. The message names the call that was
    chosen, such as `parasolver(window=8)`, which asks for the same by name.

    Our own.

    Args:
        window: Most rows of a sample in a round; None for no bound.
        tolerance: Root mean square error that the sample may have by estimate, in the data's units.
        objective: `latency`, the least seconds, by default; `evaluations`, the fewest of the network, which is energy;
            `memory`, the fewest states held at once; `anytime`, a preview of the sample from the first round on, and better
            ones after every further round, for an observer such as `paradiff.solver.Previews`.
        deadline: Seconds within which the best sample is wanted: the plain chain where it fits, else the most exact choice that
            does. Where none does, a warning says so, and the best that is known by then is given, with an estimate of its
            error. In a pipeline it ends the loop; encoders and decoding come on top. None for no bound.
        plan: A plan of `paradiff.plan`, which then decides.
    """
    return AutoMethod(tolerance, window, plan, objective, deadline)

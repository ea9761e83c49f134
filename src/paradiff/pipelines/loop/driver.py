# SPDX-License-Identifier: Apache-2.0
"""The solver of one pipeline call: started by the loop's first step, told of every later pass.

From the first step (first_step.py) the scheduler is probed (probe.py) and the solver is started. The network's output at node 0
is kept and used in every later round, since the state x[0] never changes.

An executor whose passes have one past in common, such as `vector`, is audited here (audit.py): each pass has, beside the rows
that the solver wants, a row of the pass before.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.data_scale import unusual
from paradiff.chain.roundoff import roundoff
from paradiff.chain.table import Table
from paradiff.errors import ChosenPlain, Edited, Unsupported, is_whole
from paradiff.methods.adaptive.method import AdaptiveMethod
from paradiff.methods.window.method import WindowMethod
from paradiff.pipelines.loop.audit import judge, relative_difference
from paradiff.pipelines.loop.callback import Callback
from paradiff.pipelines.loop.consumer import Pull
from paradiff.pipelines.loop.first_step import FirstStep, new_state, step_result
from paradiff.pipelines.loop.interrupt import Interrupt
from paradiff.pipelines.loop.magnified import Magnified, magnified
from paradiff.pipelines.loop.source import refuse_what_is_handed_on
from paradiff.pipelines.network.weights import Weights
from paradiff.samplers.scheduler.probe import Increments, probe
from paradiff.solver.loop import Rounds, solve
from paradiff.solver.protocol import Batch, Chooses, EditedOutputs, Method, Observer, Round
from paradiff.solver.solution import Solution
from paradiff.solver.trajectory import Trajectory

GIVEN_UP = 0.25
"""The part of the chain, at most, at whose end a run is given up for the plain call."""
PLAIN = "sequential"
"""The name of the method that makes the chain's own steps."""
HALF = (torch.float16, torch.bfloat16)
STOCHASTIC_ROUNDING, DETERMINISTIC_ROUNDING = 3.0, 10.0
"""Smallest tolerance, in units of the relative precision of outputs or states of these dtypes, on either kind of chain:
rounding moves them by the precision, and estimates count that with a caution (methods/window/control.py)."""
AFTER_THE_STEP = "the loop calls a network after its scheduler's step, for which a parallel run has no place"
"""The reason against a loop whose pass goes on after its step."""
NO_STEP = (
    "its loop took no step, or took its steps by a method that it held from before the call, or by its scheduler's class: call "
    "scheduler.step in the loop"
)
ENDED_EARLY = (
    "the loop ends before its last time, by a break or a return{}, and a parallel run solves all its times: set as many steps "
    "as it takes"
)
"""The reason against a loop that leaves out its last steps; in the midst the circumstance of the pass (lane.py)."""
SECOND_LOOP = "the call has a second loop, or runs its loop a second time: make a call of each"
"""The reason against a call whose scheduler steps after its loop."""


@dataclasses.dataclass(frozen=True, eq=False)
class Repeats:
    """Rows of a pass, which the next one evaluates again.

    Attributes:
        nodes: `[R]` their nodes.
        handed: `[R, B, ...]` the states that the loop was handed; for the first pass, those that its step was given.
        outputs: `[R, B, ...]` the network's outputs that its step was given.
        states: `[R, B, ...]` the states that its step was given.
    """

    nodes: Tensor
    handed: Tensor
    outputs: Tensor
    states: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Beside:
    """Numbers of a pass that come to the host together with those of `LoopSolver.tell`.

    Attributes:
        numbers: `[n]` the numbers, on the states' device.
        judge: Called with them; it may refuse the loop.
    """

    numbers: Tensor
    judge: Callable[[list[float]], None]


class LoopSolver:
    """Runs the solver between the passes of one pipeline call.

    Args:
        method: The method.
        dtype: Dtype of the solver's states; float32 or float64.
        callback: The user's callback, which is called with final states.
        observer: Called after each round; it may ask the run to stop.
        interrupt: The flag by which the call is ended from outside.
        weights: The networks' weights, which the loop leaves as they are; None where that is not checked.
        kind: The pipeline's class, from whose source its loop is read; None for no pipeline.
        begin: The trajectory that the call begins from; None for none.
        keep: Whether its own is kept.

    Attributes:
        started: Whether the loop's first step was taken. The attributes from `first` on exist from then on.
        done: Whether the solver has ended; `final` and `solution` exist from then on.
        passes: Passes of the loop's body so far, the first one included.
        rows: States evaluated so far, those of the audit included.
        shortened: Sentences about what of the method is longer than the loop's chain and was shortened to it.
        raised_tolerance: The tolerance used in place of the method's, if the network's dtype does not resolve that one.
        chosen: The method, or what it chose.
        fitted: The same as the loop is driven by it.
        times: Rows of the passes after the first one, and seconds from one to the next.
        first: The loop's first step.
        width: The largest number of nodes that are solved at once.
        table: The loop's chain.
        nodes: `[R]` the nodes of the next pass, on the CPU.
        states: `[R, B, ...]` the states at these nodes, not scaled, in the loop's dtype. The loop is handed copies of them.
        final: `[B, ...]` the sample, in the loop's dtype; of an interrupted call the newest final state.
        ended: The node of `final`: that of the chain's end, or of the state at which the call was interrupted.
        interrupted: Whether the call was interrupted before its solver ended.
        solution: The solver's solution, or None.
    """

    # All that follows is set by `begin`.
    first: FirstStep
    _state_dtype: torch.dtype
    _given: torch.dtype  # that of the states that the loop gave its step last
    width: int
    _repeat: int
    _first_output: Tensor
    _template: Any
    _noise: Increments
    _solver: Rounds
    _batch: Batch
    _places: Tensor
    _last: tuple[Tensor, Tensor, Tensor]
    _repeats: Repeats | None
    table: Table
    chosen: Method
    fitted: Method
    nodes: Tensor
    states: Tensor
    final: Tensor

    def __init__(
        self,
        method: Method,
        *,
        dtype: torch.dtype = torch.float32,
        callback: Callback | None = None,
        observer: Observer | None = None,
        interrupt: Interrupt | None = None,
        weights: Weights | None = None,
        kind: type | None = None,
        begin: Trajectory | None = None,
        keep: bool = False,
    ) -> None:
        self._weights, self._kind = weights, kind
        self._begin, self._keep = begin, keep
        if isinstance(method, Chooses):
            observer = method.observing(observer)
            method = method if callback is None else method.for_states()
        self.interrupt, self.interrupted, self.ended = interrupt, False, -1
        self.method, self._dtype, self._callback, self._observer = method, dtype, callback, observer
        self.started = self.done = False
        self._walked, self._tried = 0, False  # passes of one state, one after the other; whether one had several
        self.passes = self.rows = 0
        self.solution: Solution | None = None
        self.times: list[tuple[int, float]] = []
        self._told: float | None = None
        self._magnified = Magnified()  # known where states or outputs have 16 bits
        self.shortened: list[str] = []
        self.raised_tolerance: float | None = None

    def show(self, scheduler: Any) -> None:
        """Takes the scheduler that a callback is shown as the pipeline's (loop/callback.py)."""
        if self._callback is not None:
            self._callback.scheduler = scheduler

    @property
    def calls_back(self) -> bool:
        """Whether there is a user's callback."""
        return self._callback is not None

    def begin(self, first: FirstStep, *, repeat: int = 0, own: int = 1, pulls: Sequence[Pull] = ()) -> None:
        """Probes the chain and starts the solver, at the loop's first step.

        Args:
            first: The step.
            repeat: The largest number of rows of a pass that the next pass evaluates again, for the audit.
            own: Passes that are to be the pipeline's own, one after the other; a window opens after them.
            pulls: The frames that asked for the loop's first time.

        Raises:
            ChosenPlain: If the plain loop was chosen, and nobody looks at its rounds.
            Unsupported: If the chain has no table, or the loop hands something on in variables.
            ValueError: If the method does not fit the table.
        """
        if self._kind is not None:
            refuse_what_is_handed_on(self._kind, self.method, pulls)
        output, sample = first.output, first.sample
        self.first, self._template = first, first.real_step(0, output, sample)
        self.table = probe(first.scheduler, first.timesteps, first.options)
        self._state_dtype = self._given = new_state(self._template).dtype
        self._noise = Increments(
            first.scheduler,
            self.table,
            first.timesteps,
            sample,
            first.generator,
            first.options,
            output_dtype=output.dtype,
            state_dtype=self._state_dtype,
        )
        self._first_output = output.to(self._dtype)
        if self._callback is not None:
            self._callback.timesteps, self._callback.dtype = first.timesteps, self._state_dtype
            self._callback.modes = first.modes
        self.fitted = self._fitted([output.dtype, self._state_dtype])
        plain = dataclasses.replace(self.table, scale=torch.ones_like(self.table.scale))
        if isinstance(self.fitted, WindowMethod) and self.fitted.warmup and self.fitted.stride == 1:
            self.fitted = dataclasses.replace(self.fitted, warmup=min(max(self.fitted.warmup, own), self.table.steps))
        seen = self._callback is not None or self._observer is not None or self._keep
        if isinstance(self.method, Chooses) and self.chosen.name == PLAIN and not seen:
            raise ChosenPlain(self.method.reason(self.table))
        self.width = self.fitted.width(self.table)
        self._repeat = repeat if self.width > 1 else 0
        self._solver = solve(
            plain,
            self._noise,
            self.fitted,
            start=sample[None].to(self._dtype),
            device=sample.device,
            dtype=self._dtype,
            observer=self._observer if self.interrupt is None else self._observe,
            shared_window=True,
            resolution=max(torch.finfo(output.dtype).eps, torch.finfo(sample.dtype).eps),
            on_final=self._final if self._callback is not None or self.fitted.dense_output else None,
            trajectory=None if self.chosen.name == PLAIN else self._begin,
            keep_trajectory=self._keep,
        )
        if self._weights is not None:
            self._weights.mark()
        self.started = True
        self.passes = self.rows = 1
        self._last = torch.zeros(1, dtype=torch.int64), output[None], sample[None]
        repeats = self._repeat and sample.dtype == self._state_dtype  # The first pass has a state of another dtype else.
        self._repeats = Repeats(self._last[0], sample[None], output[None], sample[None]) if repeats else None
        self._take(next(self._solver))

    def tell(self, outputs: Tensor, states: Tensor, eps: float, beside: Beside | None = None) -> None:
        """Gives the solver the outputs of a pass. Waits for the device twice: for what tells whether the pass was an ordinary
        one, and for the solver's numbers.

        Args:
            outputs: `[R, B, ...]` the network's outputs.
            states: `[R, B, ...]` the states that the loop gave its step: those of `self.states`, or edited ones.
            eps: That of the coarsest dtype in which the pass was computed.
            beside: What an executor asks of the pass, before the solver is given anything.

        Raises:
            Unsupported: If outputs and states differ in shape.
            Unsupported: If the loop writes to its networks' weights.
            Edited: If it edits its states, and a method was chosen for it that cannot follow that.
            Carried: If a repeated row differs from the pass before.
            ValueError: If the loop edits its states and there is a callback.
        """
        if outputs.shape != self.states.shape or states.shape != self.states.shape:
            raise Unsupported(
                f"the loop's step was given outputs of shape {tuple(outputs.shape[1:])} for states of shape "
                f"{tuple(self.first.sample.shape)}"
            )
        if self._weights is not None:
            self._weights.check()
        self.passes += 1
        self.rows += len(outputs)
        self._given = states.dtype
        now = time.perf_counter()
        if self._told is not None:
            self.times.append((len(outputs), now - self._told))
        self._told = now
        own = len(self._places)
        handed = self.states
        same = (states == handed) | (states.isnan() & handed.isnan())
        differences = self._differences(outputs[own:], states[own:])
        flags = torch.stack([same[:own].all(), same[own:].all()]).to(differences.dtype)
        further = flags[:0] if beside is None else beside.numbers.to(differences.dtype)
        unedited, again, *told = torch.cat([flags, differences.flatten(), further]).tolist()
        if beside is not None:
            beside.judge(told[differences.numel() :])
        self._audit(told[: differences.numel()], bool(again), outputs.dtype, eps)
        nodes, handed, outputs, states, same = self.nodes[:own], handed[:own], outputs[:own], states[:own], same[:own]
        self._last = nodes, outputs, states
        self._choose(handed)
        self._give_up(own)
        edited = None
        if not unedited:
            if self._callback is not None:
                raise ValueError(
                    "the loop changes its latents after a step, so a parallel run has no final latents for a callback: leave "
                    "out callback_on_step_end"
                )
            if isinstance(self.method, Chooses) and not self.fitted.follows_edits:
                raise Edited("the loop changes its states between steps")
            places = self._places.to(states.device, non_blocking=True)
            edited = torch.where(same, self._batch.x[places], states.to(self._dtype))
        self._send(outputs.to(self._dtype), edited)

    def _give_up(self, states: int) -> None:
        """Ends a run early that a window was tried in for nothing, since its single steps cost more than the plain loop's.

        Args:
            states: Those of this pass, repeated ones left out.

        Raises:
            ChosenPlain: If the run is at its beginning, and nobody looks at its rounds.
        """
        self._tried |= states > 1
        self._walked = self._walked + 1 if states == 1 else 0
        unseen = self._callback is None and self._observer is None and isinstance(self.method, Chooses)
        early = int(self._last[0].max()) <= GIVEN_UP * self.table.steps
        if unseen and early and self._tried and self._walked == 2 and isinstance(self.fitted, AdaptiveMethod):
            raise ChosenPlain(f"sequential(), since a window was tried within {self.passes} passes and did not pay here")

    def _observe(self, round: Round) -> bool | None:
        """Shows the observer a round, and asks for the end of an interrupted run."""
        wish = None if self._observer is None else self._observer(round)
        return True if self.interrupt else wish

    def _final(self, first: int, states: Tensor) -> None:
        """Hands on the final states `[n, ...]` of the nodes from `first` on. After an interrupt the callback gets no others."""
        for node, state in enumerate(states, first):
            if self._callback is not None and self.interrupt and self.interrupt.state is not None:
                return
            if self.interrupt is not None:
                self.interrupt.on_final(node, state[None])
            if self._callback is not None:
                self._callback.on_final(node, state[None], self._noise.drawn_from(node - 1))

    def _differences(self, outputs: Tensor, states: Tensor) -> Tensor:
        """`[2, R]` how far the outputs and the states of repeated rows are from those of the pass before."""
        before = self._repeats
        if before is None:
            return torch.zeros(2, 0, dtype=torch.promote_types(outputs.dtype, torch.float32), device=outputs.device)
        return torch.stack([relative_difference(outputs, before.outputs), relative_difference(states, before.states)])

    def _audit(self, differences: list[float], same: bool, dtype: torch.dtype, eps: float) -> None:
        """Judges the rows that were repeated by their differences, those of all outputs and then those of all states.

        Args:
            differences: What `_differences` returned, on the host.
            same: Whether the repeated rows were given to the step as they were handed out.
            dtype: That of the outputs.
            eps: That of the coarsest dtype in which the pass was computed.
        """
        before = self._repeats
        if before is None or (self.passes == 2 and not same):
            return  # The loop edits its states, and what it was handed in its first pass is not known.
        count = len(before.nodes)
        for node, output, state in zip(before.nodes.tolist(), differences[:count], differences[count:], strict=True):
            judge(
                node,
                output,
                state,
                max(eps, torch.finfo(dtype).eps),
                "when the same state is evaluated again in the pass after",
            )

    def _choose(self, handed: Tensor) -> None:
        """Chooses the rows of this pass that the next one repeats: in turn the last, the first and the middle one."""
        if not self._repeat:
            return
        nodes, outputs, states = self._last
        count = len(nodes)
        place = (count - 1, 0, count // 2)[self.passes % 3]
        rows = slice(None) if self._repeat >= count else slice(place, place + 1)
        self._repeats = Repeats(nodes[rows], handed[rows].clone(), outputs[rows].clone(), states[rows].clone())

    def see(self, outputs: Iterable[Tensor]) -> None:
        """Takes what the networks returned in the first pass, by which their rounding is told. Waits for the device where
        states, or what the loop's step is given, have 16 bits."""
        if self._state_dtype in HALF or self.first.output.dtype in HALF:
            self._magnified = magnified(outputs, self.first.output)

    @property
    def widest(self) -> int:
        """The most states of a pass, those that are repeated included."""
        return self.width + min(self._repeat, self.width)

    def scale(self, nodes: Tensor) -> Tensor:
        """`[R]` factor from the states at `nodes` to the network's inputs."""
        return self.table.scale[nodes]

    def result(self, sample: Tensor) -> Any:
        """What the loop's step returns with `sample` as the new state, in the form of its scheduler.

        Other fields of it, such as an estimate of the clean data, exist at the last step, for chains that read one state back.
        """
        real: Any = None
        if self.done and self.table.band == 1:
            nodes, outputs, states = self._last
            place = int(nodes.argmax())
            if int(nodes[place]) == self.table.steps - 1:
                real = self.first.real_step(self.table.steps - 1, outputs[place], states[place])
        return step_result(self._template, sample, real)

    @property
    def rounded_to(self) -> torch.dtype:
        """The coarsest dtype of the states that the loop hands on: that of its steps' results, or what it casts them to."""
        return max((self.final.dtype, self._given), key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def rounding(self) -> float:
        """How far the plain call's sample may be from a chain's whose states and outputs are not rounded, RMS; 0 for those of
        32 bits and more. Each step rounds a state by at most half the spacing eps of its dtype, relative to its size; N of
        them, in quadrature, come to eps N^(1/2)/2, and a network answers to them. Tiny Stable Diffusion, DDIM, 20 steps: errors
        of 0.54 times eps N^(1/2) and the sample's size in bfloat16, 0.50 times in float16; twice as much is told, or what the
        chain's steps make of roundings (chain/roundoff.py), those of outputs that guidance magnifies (magnified.py) among
        them, where that is more. Where the step's outputs alone have 16 bits, it is what steps make of their rounding, since
        schedulers multiply in the outputs' dtype."""
        states = self.rounded_to in HALF
        if not states and self.first.output.dtype not in HALF:
            return 0.0
        eps = torch.finfo(self.rounded_to if states else self.first.output.dtype).eps
        square, more = float(self.final.double().square().mean()), self._magnified
        if not states:
            return roundoff(self.table, eps, unusual(square), more.size, more.apart, states=False)
        simple = eps * math.sqrt(square * self.ended)
        return max(simple, roundoff(self.table, eps, unusual(square), more.size, more.apart))

    def _fitted(self, dtypes: list[torch.dtype]) -> Method:
        """The method for this call, with a tolerance that outputs and states of these dtypes resolve."""
        eps = max([torch.finfo(dtype).eps for dtype in dtypes if dtype in HALF], default=0.0)
        least = (STOCHASTIC_ROUNDING if self.table.stochastic else DETERMINISTIC_ROUNDING) * eps
        method = self.method.chosen(self.table) if isinstance(self.method, Chooses) else self.method
        self.chosen, fitted = method, method.in_loop(self.table, least)
        self.raised_tolerance = None if fitted.tolerance == method.tolerance else fitted.tolerance
        end = f"for the loop's chain of {self.table.steps} step{'s' * (self.table.steps > 1)}"
        self.shortened = [
            f"the {name} {'were' if name == 'blocks' else 'was'} shortened from {given} to {used}, {end}"
            for name in ("window", "warmup", "stride", "blocks")
            for given, used in [(_length(method, name), _length(fitted, name))]
            if given is not None and used is not None and used < given
        ]
        return fitted

    def _take(self, batch: Batch) -> None:
        """Sets the next pass to the rows of a batch without those at node 0, whose output is known."""
        self._batch = batch
        self._places = batch.nodes.nonzero()[:, 0]
        if len(self._places) == 0:
            self._send(self._first_output[None][:0], None)
            return
        self.nodes = batch.nodes[self._places]
        self.states = batch.x[self._places.to(batch.x.device, non_blocking=True)].to(self._state_dtype)
        if self._repeats is not None:
            self.nodes = torch.cat([self.nodes, self._repeats.nodes])
            self.states = torch.cat([self.states, self._repeats.handed])

    def _send(self, outputs: Tensor, edited: Tensor | None) -> None:
        """Sends the solver the outputs of its batch, and the edited states if there are any; takes the next batch."""
        batch = self._batch
        if len(outputs) < len(batch.nodes):
            places = self._places.to(batch.x.device, non_blocking=True)
            outputs = self._first_output.expand_as(batch.x).clone().index_copy_(0, places, outputs)
            edited = None if edited is None else batch.x.index_copy(0, places, edited)
        try:
            batch = self._solver.send(outputs if edited is None else EditedOutputs(outputs, edited))
        except StopIteration as end:
            self.solution, self.done = end.value, True
            self.final, self.ended = end.value.sample[0].to(self._state_dtype), self.table.steps
            self.interrupted = bool(self.interrupt)
            if self.interrupt and self.interrupt.state is not None:
                self.final, self.ended = self.interrupt.state.to(self._state_dtype), self.interrupt.node
            else:
                self._noise.finish()
            self.final = self.final.clone()  # in the modes of the loop, not the solver's
            return
        self._take(batch)


def _length(method: Method, name: str) -> int | None:
    """A length among a method's hyper-parameters; None where it has none of this name, or a list of lengths."""
    value = getattr(method, name, None)
    value = getattr(value, "count", None) if value is not None and not is_whole(value) else value
    return value if is_whole(value) else None

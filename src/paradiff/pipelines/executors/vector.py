# SPDX-License-Identifier: Apache-2.0
"""The vector executor: one pipeline call whose loop body is run once for a whole window.

After the first pass the loop's state and time are `Windowed` tensors (windowed.py), and so is every tensor that the body
computes from them. Networks see the window as further rows of their batch (boundary.py). The loop's counter then counts
rounds, so this executor serves loops that do not use it as a step number (source.py).

Whatever the loop keeps from one pass to the next shows in one of three ways. Windowed tensors of two rounds do not mix. A row
of each pass is evaluated again in the next one (audit.py). Counts and lengths that grow with every pass are found among the
loop's variables (ledger.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.table import column
from paradiff.errors import Carried, MixedWindows, Unsupported
from paradiff.pipelines.executors.dry_walk import Start, refuse_memory
from paradiff.pipelines.loop.audit import KEEPS
from paradiff.pipelines.loop.driver import AFTER_THE_STEP, SECOND_LOOP, LoopSolver
from paradiff.pipelines.loop.first_step import FirstStep, refuse_other_generator, refuse_other_time
from paradiff.pipelines.loop.given import BACK, WRITTEN, Given
from paradiff.pipelines.loop.ledger import Ledger, grown, ledger
from paradiff.pipelines.loop.random_watch import RandomWatch
from paradiff.pipelines.loop.scheduler_proxy import (
    first_index,
    make_proxy,
    passed_over,
    place,
    real_scheduler,
    refuse_changes,
    seal,
    settings,
)
from paradiff.pipelines.loop.timesteps import Iterations
from paradiff.pipelines.loop.torch_modes import Modes
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.tensor.windowed import Windowed, common_run

HIDDEN = 3
"""Times that an interrupt, set again and again by another thread, is hidden from the loop."""


@dataclasses.dataclass(eq=False)
class Round:
    """The round that windowed tensors belong to. Tensors of two rounds do not mix, since their states are at other nodes.

    Attributes:
        own: The run's batching.
        open: Whether the pass of this round has begun: its times were yielded.
        refused: What was refused in an operation on the states of the round, even if the loop caught it; None for nothing.
    """

    own: Batching
    open: bool = False
    refused: Unsupported | None = None

    @property
    def batching(self) -> Batching:
        """The run's batching, which boundary.py reads here when a network is called.

        Raises:
            Unsupported: If the pass has not begun: the loop calls the network between a step and the next time.
        """
        if not self.open:
            raise Unsupported(AFTER_THE_STEP)
        return self.own


class Vector:
    """Handles the scheduler's requests of a loop that carries a window (see `LoopHandler`).

    Args:
        scheduler: The pipeline's scheduler.
        solver: The call's solver.
        batching: The run's batching.
        start: The call's beginning.
        generators: The generators among the call's arguments.

    Attributes:
        scheduler: The proxy that replaces the pipeline's scheduler during the call.
        made: The rounds, which live as long as a tensor of their states.
    """

    _times: Windowed  # those of the present pass; set when the first windowed one begins
    _settings: dict[str, Any]  # the scheduler's, at the loop's start

    def __init__(
        self,
        scheduler: Any,
        solver: LoopSolver,
        batching: Batching,
        start: Start | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._start = start
        self._solver, self._batching = solver, batching
        self.made: list[weakref.ref[Round]] = []
        self._round = self._opened()
        self._watch = RandomWatch(generators)
        self._ledgers = deque[Ledger](maxlen=3)
        self._iterations = Iterations()
        self._index: int | None = None
        self._given = Given(False)
        self.scheduler = make_proxy(scheduler, self)

    def rounds(self, timesteps: Tensor) -> Iterator[Tensor]:
        """The iteration over `timesteps`. For the loop it yields the first time, then a window of times a round."""
        if not self._solver.started:
            self._batching.begin_loop()
        for time in self._iterations.walk(timesteps, self._rounds):
            if not self._solver.started:
                if self._iterations.position == 0:
                    self._batching.log.mark(timesteps)
                self._watch.mark()
                self._settings = settings(self.scheduler)
            yield time
        if not self._solver.started:
            self._batching.looping = self._iterations.timesteps is not None

    def _rounds(self) -> Iterator[Tensor]:
        solver, interrupt = self._solver, self._solver.interrupt
        timesteps = solver.first.timesteps
        hidden = 0
        while not solver.done:
            passes = solver.passes
            self._round.open = True
            self._times = Windowed.wrap(timesteps[solver.nodes.to(timesteps.device, non_blocking=True)], self._round)
            yield self._times
            if solver.passes == passes:
                if interrupt is None or not interrupt or hidden == HIDDEN:
                    raise passed_over(self._present(), self.scheduler)
                # The flag was set in the midst of a round: the loop makes this pass once more, and ends with its step.
                interrupt.hold()
                hidden += 1

    def _opened(self) -> Round:
        """A new round."""
        opened = Round(self._batching)
        self.made.append(weakref.ref(opened))
        return opened

    def settle(self, owner: Any) -> None:
        """Puts the last time in place of the times of the last pass, where the loop left them in an attribute of its owner."""
        if not self._solver.started or "_times" not in vars(self):
            return
        for name, value in list(vars(owner).items()):
            if value is self._times:
                vars(owner)[name] = self._solver.first.timesteps[self._solver.ended - 1]

    def _present(self) -> Any:
        """The scheduler that the loop's host has at present."""
        return self.scheduler if self._start is None else self._start.host.present(self._start.host.owner, self.scheduler)

    @contextlib.contextmanager
    def mixing(self) -> Iterator[None]:
        """Tells two ways apart in which the states of two rounds mix.

        After a step, before the next time, the loop edits its states with values of the pass that has ended; lanes can follow
        that. Within a pass, it uses a value of an earlier pass.

        Raises:
            Carried: If it was within a pass.
        """
        try:
            yield
        except MixedWindows:
            if not self._round.open:
                raise
            raise Carried(f"{KEEPS}: a pass reads a tensor of the states of an earlier one") from None

    def _count(self) -> None:
        """Compares what the loop counts and collects with the passes before."""
        if self._batching.check != "off":
            self._ledgers.append(ledger())
        if len(self._ledgers) == 3 and (path := grown(*self._ledgers)) is not None:
            raise Carried(f"{KEEPS}: {path} grows by the same amount in each")

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        """The scheduler's `scale_model_input`, for each state at its node."""
        solver = self._solver
        if not solver.started:
            return real_scheduler(self.scheduler).scale_model_input(sample, timestep)
        if not isinstance(sample, Windowed):
            raise Unsupported("the loop scales a state that is not of its window")
        factor = solver.scale(solver.nodes)
        if bool((factor == 1).all()):
            return sample
        window = sample.window
        scaled = window * column(factor, window.to(torch.promote_types(window.dtype, torch.float32)))
        return Windowed.wrap(scaled.to(window.dtype), self._round)

    def _look_again(self, output: Windowed, sample: Windowed) -> None:
        """Compares what the first steps were given with what it holds now, where the scheduler keeps it. Waits for the device
        then.

        Raises:
            Unsupported: If it is not the same.
        """
        if self._solver.passes <= BACK:
            unchanged = self._given.unchanged()
            if unchanged is not None and not bool(unchanged):
                raise Unsupported(WRITTEN)
            self._given.note(lambda: output.window, lambda: sample.window)

    def _aside(self) -> contextlib.AbstractContextManager[None]:
        """Lets the scheduler itself answer, where somebody else than the loop has it."""
        switch = None if self._start is None else self._start.host.switch
        return contextlib.nullcontext() if switch is None else switch.aside()

    def step(self, output: Tensor, timestep: Any, sample: Tensor, kwargs: dict[str, Any]) -> Any:
        """Ends a round with its outputs; returns the next window of states, or the sample."""
        solver = self._solver
        if solver.interrupt is not None:
            solver.interrupt.release()
        if self._round.refused is not None:
            raise self._round.refused
        if solver.done:
            raise Unsupported(SECOND_LOOP)
        timesteps = solver.first.timesteps if solver.started else self._iterations.begin()
        pulls, self._iterations.pulls = self._iterations.pulls, []
        self._watch.check(self._batching.log.drawing)
        refuse_changes(self.scheduler, self._settings)
        if solver.started:
            self._count()
        if not solver.started:
            first = FirstStep(
                scheduler=real_scheduler(self.scheduler),
                timesteps=timesteps,
                output=output,
                sample=sample,
                timestep=timestep,
                kwargs=kwargs,
            )
            check = self._batching.check
            with Modes.exact().entered(), self._aside():
                repeat = {"off": 0, "first": 1}.get(check, sys.maxsize)
                solver.begin(first, repeat=repeat, pulls=pulls)
            self._batching.widest = solver.widest
            self._index = first_index(self.scheduler, first.timesteps[0])
            self._given = Given(first.keeps)
            self._given.note(lambda: output, lambda: sample)
            seal(self.scheduler, first.running)
            self._settings = settings(self.scheduler)
            self._batching.log.divide(timesteps)
            solver.see(self._batching.log.made_first)
            if self._start is not None and check != "off":
                refuse_memory(self._start, solver, self._batching)
            self._batching.log.close(keep=True)
            self._count()
        else:
            if not isinstance(output, Windowed) or not isinstance(sample, Windowed):
                raise Unsupported("the loop steps a state that is not of its window")
            common_run([self._times, output, sample])
            if timestep is not self._times:
                given = timestep.window if isinstance(timestep, Windowed) else timestep
                refuse_other_time(given, self._times.window)
            self._look_again(output, sample)
            solver.first.check_options(kwargs)
            refuse_other_generator(kwargs.get("generator"), solver.first.generator)
            with Modes.exact().entered(), self._aside():
                solver.tell(output.window, sample.window, self._batching.eps)
        self._round.open = False
        self._round = self._opened()
        self._watch.mark()
        if solver.done:
            self._batching.end_loop()
        if self._index is not None:  # the index of the states that are returned
            nodes: Any = solver.table.steps
            if not solver.done:
                nodes = Windowed.wrap(solver.nodes.to(sample.device, non_blocking=True), self._round)
            place(self.scheduler, self._index + nodes)
        if solver.done:
            return solver.result(solver.final)
        with torch.inference_mode(False), torch.no_grad():
            handed = solver.states.clone()
        return solver.result(Windowed.wrap(handed, self._round))

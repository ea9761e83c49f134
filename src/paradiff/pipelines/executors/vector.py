# SPDX-License-Identifier: Apache-2.0
"""The vector executor: one pipeline call whose loop body is run once for a whole window.

After the first pass the loop's state and time are `Windowed` tensors (windowed.py), and so is every tensor that the body
computes from them. Networks see the window as further rows of their batch (boundary.py). The loop's counter then counts
rounds, so this executor serves loops that do not use it as a step number (source.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.table import column
from paradiff.errors import Unsupported
from paradiff.pipelines.loop.driver import LoopSolver
from paradiff.pipelines.loop.first_step import FirstStep
from paradiff.pipelines.loop.scheduler_proxy import blur, make_proxy, real_scheduler
from paradiff.pipelines.loop.timesteps import Iterations
from paradiff.pipelines.loop.torch_modes import Modes
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.tensor.windowed import Windowed

HIDDEN = 3
"""Times that an interrupt, set again and again by another thread, is hidden from the loop."""


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """The round that windowed tensors belong to. Tensors of two rounds do not mix, since their states are at other nodes.

    Attributes:
        batching: The run's batching, which boundary.py reads here.
    """

    batching: Batching


class Vector:
    """Handles the scheduler's requests of a loop that carries a window (see `LoopHandler`).

    Args:
        scheduler: The pipeline's scheduler.
        solver: The call's solver.
        batching: The run's batching.

    Attributes:
        scheduler: The proxy that replaces the pipeline's scheduler during the call.
    """

    def __init__(self, scheduler: Any, solver: LoopSolver, batching: Batching) -> None:
        self._solver, self._batching = solver, batching
        self._round = Round(batching)
        self._iterations = Iterations()
        self.scheduler = make_proxy(scheduler, self)

    def rounds(self, timesteps: Tensor) -> Iterator[Tensor]:
        """The iteration over `timesteps`. For the loop it yields the first time, then a window of times a round."""
        if not self._solver.started:
            self._batching.begin_loop()
        return self._iterations.walk(timesteps, self._rounds)

    def _rounds(self) -> Iterator[Tensor]:
        solver, interrupt = self._solver, self._solver.interrupt
        timesteps = solver.first.timesteps
        hidden = 0
        while not solver.done:
            passes = solver.passes
            yield Windowed.wrap(timesteps[solver.nodes.to(timesteps.device)], self._round)
            if solver.passes == passes:
                if interrupt is None or not interrupt or hidden == HIDDEN:
                    raise Unsupported("the loop passed over a step")
                # The flag was set in the midst of a round: the loop makes this pass once more, and ends with its step.
                interrupt.hold()
                hidden += 1

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

    def step(self, output: Tensor, timestep: Any, sample: Tensor, kwargs: dict[str, Any]) -> Any:
        """Ends a round with its outputs; returns the next window of states, or the sample."""
        solver = self._solver
        if solver.interrupt is not None:
            solver.interrupt.release()
        if not solver.started:
            first = FirstStep(
                scheduler=real_scheduler(self.scheduler),
                timesteps=self._iterations.begin(),
                output=output,
                sample=sample,
                kwargs=kwargs,
            )
            with Modes.exact().entered():
                solver.begin(first)
            blur(self.scheduler)
        else:
            if not isinstance(output, Windowed) or not isinstance(sample, Windowed):
                raise Unsupported("the loop steps a state that is not of its window")
            solver.first.check_options(kwargs)
            with Modes.exact().entered():
                solver.tell(output.window, sample.window)
        self._iterations.steps += 1
        self._round = Round(self._batching)
        self._batching.looping = not solver.done
        return solver.result(solver.final if solver.done else Windowed.wrap(solver.states, self._round))

"""The vector executor: one pipeline call whose loop body is run once for a whole window.

After the first pass the loop's state is a `Windowed` tensor (windowed.py), and so is its time; all that the body makes of them
is one tensor for all states. Networks see the window merged into their batch (boundary.py). The loop's counter then counts
rounds, so this serves loops that use it for nothing else (source.py).
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
from paradiff.pipelines.loop.scheduler_proxy import Iterations, blur, hijack, real_scheduler
from paradiff.pipelines.loop.torch_modes import Modes
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.tensor.windowed import Windowed


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """What the windowed tensors of one round have in common: they may not meet those of another, whose states are at other
    nodes.

    Attributes:
        merge: How they meet networks (boundary.py finds it here).
    """

    merge: Batching


class Vector:
    """The loop of a pipeline call with a window (see hijack.py's `Loop`).

    Args:
        scheduler: The pipeline's scheduler.
        drive: The solver's side.
        merge: How windows meet networks.

    Attributes:
        scheduler: The scheduler that the pipeline is to have during the call.
    """

    def __init__(self, scheduler: Any, drive: LoopSolver, merge: Batching) -> None:
        self._drive, self._merge = drive, merge
        self._round = Round(merge)
        self._iterations = Iterations()
        self.scheduler = hijack(scheduler, self)

    def rounds(self, timesteps: Tensor) -> Iterator[Tensor]:
        """The times that the loop walks: the first one, then a window of them for every further round."""
        return self._iterations.walk(timesteps, self._rounds)

    def _rounds(self) -> Iterator[Tensor]:
        drive = self._drive
        while not drive.done:
            passes = drive.passes
            yield Windowed.wrap(drive.timesteps[drive.nodes.to(drive.timesteps.device)], self._round)
            if drive.passes == passes:
                raise Unsupported("the loop passed over a step")

    def scale(self, sample: Tensor, timestep: Any) -> Tensor:
        """The states as the network expects them."""
        drive = self._drive
        if not drive.started:
            return real_scheduler(self.scheduler).scale_model_input(sample, timestep)
        if not isinstance(sample, Windowed):
            raise Unsupported("the loop scales a state that is not of its window")
        factor = drive.scale(drive.nodes)
        if bool((factor == 1).all()):
            return sample
        window = sample.window
        scaled = window * column(factor, window.to(torch.promote_types(window.dtype, torch.float32)))
        return Windowed.wrap(scaled.to(window.dtype), self._round)

    def step(self, output: Tensor, timestep: Any, sample: Tensor, kwargs: dict[str, Any]) -> Any:
        """Takes a round's outputs; gives the next window, or the sample."""
        drive = self._drive
        if not drive.started:
            drive.prepare(real_scheduler(self.scheduler), self._iterations.begin())
            with Modes.exact().entered():
                drive.begin(output, sample, kwargs)
            blur(self.scheduler)
        else:
            if not isinstance(output, Windowed) or not isinstance(sample, Windowed):
                raise Unsupported("the loop steps a state that is not of its window")
            drive.check_options(kwargs)
            with Modes.exact().entered():
                drive.answer(output.window, sample.window)
        self._iterations.steps += 1
        self._round = Round(self._merge)
        return drive.result(drive.final if drive.done else Windowed.wrap(drive.states, self._round))

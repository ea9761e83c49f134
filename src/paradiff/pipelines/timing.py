# SPDX-License-Identifier: Apache-2.0
"""How long a pipeline's networks take on several states, with the conditioning of a call in place.

The pipeline's own call is made up to its first pass with a window. There each network is called on 1, 2, 4, ... states, as a
parallel run would call it, and timed; then the call is given up, and what it changed is put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paradiff.methods.presets import jacobi
from paradiff.pipelines.call import Call
from paradiff.pipelines.host.host import Host
from paradiff.pipelines.loop.callback import Callback
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.settings import Settings
from paradiff.pipelines.tries import Beginning, Watched
from paradiff.solver.protocol import Round

Part = tuple[Any, list[Tensor]]
"""The structure of a network's output, and its tensors."""

REPEATS = 3
"""Timed calls of each width, of which the fastest counts, after one that is not timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """What the calls of one network cost.

    Attributes:
        network: The name of the network's class.
        seconds: The seconds of a call by its number of states, 1 first.
        repeated: Bytes of the inputs of one state that are repeated for each further one.
    """

    network: str
    seconds: Mapping[int, float]
    repeated: int

    def __str__(self) -> str:
        one = self.seconds[1]
        calls = ", ".join(f"{seconds / one:.2g} on {states}" for states, seconds in self.seconds.items() if states > 1)
        text = f"{self.network}: a call on one state takes {1000 * one:.3g} ms, and {calls or 'no more fit'} times that"
        return text + (f"; each further state repeats {self.repeated / 2**20:.3g} MiB of its inputs" if self.repeated else "")


class Enough(Exception):
    """All was timed."""


class Timed(Batching):
    """A batching that times each network at its first call with a window.

    Attributes:
        timings: What was found, by network.
    """

    def __init__(self) -> None:
        super().__init__(check="off")
        self.timings: dict[Any, Timing] = {}

    def first_window(
        self, name: str, forward: Any, states: int, part: Callable[[slice], Part], repeated: Callable[[], int]
    ) -> None:
        """Times a network's calls."""
        if forward in self.timings:
            return
        seconds: dict[int, float] = {}
        for width in sorted({*(2**k for k in range(states.bit_length())), states}):
            try:
                seconds[width] = min([_clocked(part, width) for _ in range(REPEATS + 1)][1:])
            except torch.OutOfMemoryError:
                if width == 1:
                    raise
                break
        self.timings[forward] = Timing(network=name, seconds=seconds, repeated=repeated())


class TimedCall(Call):
    """A call that is given up after its first round."""

    def timed(self, executor: str) -> list[Timing]:
        """What the networks of the loop cost, in the order in which a pass calls them."""
        batching = Timed()

        def stop(round: Round) -> None:
            if batching.timings:
                raise Enough

        with contextlib.suppress(Enough):
            self._try(executor, Callback.without(self._arguments), self._new_solver(None, Watched(stop)), batching)
        return list(batching.timings.values())


def timings(host: Host, arguments: Mapping[str, Any], executor: str, widest: int) -> list[Timing]:
    """Times the networks of a loop.

    Args:
        host: What owns the chain.
        arguments: The arguments of its call.
        executor: The executor that the loop allows.
        widest: The most states of a call.

    Raises:
        Unsupported: If the executor cannot run the call.
    """
    given = host.bound((), arguments)
    beginning = Beginning(host, given)
    try:
        return TimedCall(host, Settings(method=jacobi(window=widest), check="off"), given).timed(executor)
    finally:
        beginning.restore()


def forecast(costs: Sequence[Timing], rows: Sequence[int]) -> float:
    """The seconds of network calls of rounds on so many states, interpolated; beyond the widest call in proportion to it."""
    return sum(_seconds(cost, states) for cost in costs for states in rows)


def _seconds(cost: Timing, states: int) -> float:
    widths, seconds = list(cost.seconds), list(cost.seconds.values())
    return float(np.interp(states, widths, seconds)) * max(1.0, states / widths[-1])


def _clocked(part: Callable[[slice], Part], width: int) -> float:
    """The seconds of a call on the first `width` states, up to a number of its output on the host."""
    begin = time.perf_counter()
    _, tensors = part(slice(0, width))
    tensors[0].flatten()[-1:].tolist()
    return time.perf_counter() - begin

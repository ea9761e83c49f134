# SPDX-License-Identifier: Apache-2.0
"""The settings of a parallel run of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from paradiff.errors import require_whole
from paradiff.pipelines.network.batching import Check
from paradiff.pipelines.network.devices import Devices
from paradiff.planning.auto import auto
from paradiff.solver.arguments import require_warm
from paradiff.solver.protocol import Method, Observer
from paradiff.solver.ranks import Ranks
from paradiff.solver.trajectory import Trajectory

Executor = Literal["auto", "vector", "lanes", "sequential"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a pipeline is run in parallel. See `parallelize` for the meaning of each field.

    Raises:
        ValueError: If a field has a value that is not listed there.
    """

    method: Method = field(default_factory=auto)
    executor: Executor = "auto"
    max_rows: int | None = None
    pad: bool = False
    check: Check = "first"
    dtype: torch.dtype = torch.float32
    observer: Observer | None = None
    ranks: Ranks | None = None
    shares: int | None = None
    devices: Devices | None = None
    start: Trajectory | None = None
    keep_trajectory: bool = False

    def compared(self) -> tuple[object, ...]:
        """What has to be the same on all ranks, beside the method."""
        return self.executor, self.max_rows, self.pad, self.check, self.dtype, self.shares, self.start, self.keep_trajectory

    def __post_init__(self) -> None:
        method = self.method
        for name, value, known in (
            ("executor", self.executor, get_args(Executor)),
            ("check", self.check, get_args(Check)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
        if not isinstance(method, Method):
            raise ValueError(
                f"method is a {type(method).__name__}; give one of paradiff's, such as paradiff.parasolver(window=16)"
            )
        if not method.solves_chain:
            raise ValueError(
                f"{method.name} was given another target than the chain, whose times lie between those of the pipeline's loop; "
                "leave the target at 'chain', or sample the network itself with paradiff.sample"
            )
        require_warm(method, self.start, self.keep_trajectory)
        if self.start is not None and self.executor == "sequential":
            raise ValueError("start was given with executor='sequential', which walks the chain step by step; leave one out")
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the solver's states were asked for in {self.dtype}; they are kept in float32 or float64")
        if not isinstance(self.pad, bool):
            raise ValueError(f"pad is {self.pad!r}; give True or False")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows is {self.max_rows}; a network call needs at least 1 row, or None for no bound")
        if self.ranks is not None and self.devices is not None:
            raise ValueError("mesh and devices are both given; give ranks, or the devices of one process")
        if self.shares is not None:
            require_whole("shares", self.shares, 1, ", or None for as many as ranks")
        if self.observer is not None and not callable(self.observer):
            raise ValueError(f"observer is a {type(self.observer).__name__}; give a function of a round")

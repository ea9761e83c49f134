# SPDX-License-Identifier: Apache-2.0
"""What one run of the command line was asked for: the options as they were typed, and what they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paradiff.app.options import parse_argument, parse_seeds, parse_size
from paradiff.errors import refuse_unknown, require_real

if TYPE_CHECKING:
    import torch

    from paradiff.solver.deadline import Deadline
    from paradiff.solver.protocol import Method
    from paradiff.solver.ranks import Ranks

DTYPES = ("float32", "bfloat16", "float16")
NOISES = ("recorded", "keyed")

OUT = "paradiff-out"
"""The folder of a run that was given none; of the next one, `paradiff-out-2`."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `paradiff sample`, each as it was typed; None where it was left out and has no default of its own.

    Raises:
        ValueError: If a text among them is malformed, or no known name.
    """

    model: str
    sampler: str | None
    steps: int | None
    eta: float | None
    grid: str | None
    form: str | None
    seeds: str
    noise: str
    method: str
    method_option: list[str]
    window: int | None
    tolerance: float | None
    out: str | None
    compare: bool
    trace: bool
    overwrite: bool
    device: str
    devices: str | None = None
    dtype: str
    threads: int | None
    max_rows: int | None
    timeout: float | None
    deadline: float | None
    prompt: str | None
    negative_prompt: str | None
    guidance: float | None
    size: str | None
    argument: list[str]
    trust_remote_code: bool

    def __post_init__(self) -> None:
        refuse_unknown("dtype", self.dtype, DTYPES)
        refuse_unknown("noise", self.noise, NOISES)
        parse_seeds(self.seeds)
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(
                f"max_rows is {self.max_rows}; a network call needs at least 1 row: leave --max-rows out for no bound"
            )
        if self.timeout is not None:
            require_real("the time-out, in seconds,", self.timeout, positive=True)
        if self.deadline is not None:
            require_real("the deadline, in seconds,", self.deadline, positive=True)
        if self.devices is not None and self.device != "auto":
            raise ValueError(f"--device is {self.device!r}, and --devices {self.devices!r}; give one of them")
        if self.size is not None:
            parse_size(self.size)
        for text in self.argument:
            parse_argument(text)

    def to_json(self) -> dict[str, Any]:
        """The options by name."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that was found to be well-formed, with the objects that it names.

    Attributes:
        request: What was typed.
        seeds: The seeds, one a sample.
        method: The method.
        called: What the method's preset was called with, defaults included.
        device: Where the network goes.
        devices: Those of this process that share each round, the same one first; None for it alone.
        dtype: The network's dtype.
        deadline: What ends calls that take too long; None for no such bound.
        ranks: The ranks that share the work; None where there is one process.
        notice: What is said of the run once nothing is left that would be refused before it; empty for nothing.
    """

    request: Request
    seeds: list[int]
    method: Method
    called: Mapping[str, Any]
    device: torch.device
    dtype: torch.dtype
    devices: Sequence[torch.device] | None = None
    deadline: Deadline | None = None
    ranks: Ranks | None = None
    notice: str = ""

    def counted(self) -> str:
        """`1 sample`, `2 samples`."""
        return f"{len(self.seeds)} sample{'s' * (len(self.seeds) > 1)}"

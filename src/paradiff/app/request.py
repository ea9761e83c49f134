# SPDX-License-Identifier: Apache-2.0
"""What one run of the command line was asked for: the options as they were typed, and what they stand for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paradiff.app import flags
from paradiff.app.flags import DTYPES, NOISES
from paradiff.app.options import parse_argument, parse_seeds, parse_size
from paradiff.errors import refuse_unknown, require_real

if TYPE_CHECKING:
    import torch

    from paradiff.solver.deadline import Deadline
    from paradiff.solver.protocol import Method
    from paradiff.solver.ranks import Ranks
    from paradiff.solver.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of `paradiff sample`, each as it was typed; None where it was left out and has no default of its own.

    Each field is an option of the command line, and says how it is typed and what its default is (parameters.py).

    Raises:
        ValueError: If a text among them is malformed, or no known name.
    """

    model: flags.Model = "digits"
    sampler: flags.Sampler = None
    steps: flags.Steps = None
    eta: flags.Eta = None
    grid: flags.Grid = None
    form: flags.Form = None
    seeds: flags.Seeds = "0"
    noise: flags.Noise = NOISES[0]
    method: flags.MethodName = "auto"
    method_option: flags.MethodOption = field(default_factory=list)
    window: flags.Window = None
    tolerance: flags.Tolerance = None
    objective: flags.Objective = None
    out: flags.Out = None
    compare: flags.Compare = False
    trace: flags.Trace = False
    overwrite: flags.Overwrite = False
    device: flags.Devices = "auto"
    dtype: flags.Dtype = DTYPES[0]
    threads: flags.Threads = None
    max_rows: flags.MaxRows = None
    timeout: flags.Timeout = None
    deadline: flags.Deadline = None
    previews: flags.Previews = None
    start: flags.Start = None
    save_trajectory: flags.SaveTrajectory = None
    prompt: flags.Prompt = None
    negative_prompt: flags.NegativePrompt = None
    guidance: flags.Guidance = None
    size: flags.Size = None
    argument: flags.Argument = field(default_factory=list)
    trust_remote_code: flags.TrustRemoteCode = False

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
        deadline: What ends calls that take too long; None for no such bound, and for a method that keeps its deadline itself.
        begin: The trajectory that the run begins from; None for none.
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
    begin: Trajectory | None = None
    ranks: Ranks | None = None
    notice: str = ""

    def counted(self) -> str:
        """`1 sample`, `2 samples`."""
        return f"{len(self.seeds)} sample{'s' * (len(self.seeds) > 1)}"

# SPDX-License-Identifier: Apache-2.0
"""What is served: a network, the chains that requests may ask for, and what a sample is made into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.noise import Keyed, Noise, Recorded
from paradiff.chain.table import Table
from paradiff.errors import refuse_unknown, shown
from paradiff.methods.presets import parasolver
from paradiff.serving.request import SampleRequest
from paradiff.solver.arguments import require_callable
from paradiff.solver.by_row import ByRow
from paradiff.solver.evaluator import Denoiser, Evaluator
from paradiff.solver.loop import sample


def unchanged(sample: Tensor) -> Tensor:
    """A sample as it is."""
    return sample


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedModel:
    """A model as an engine serves it. Models are compared by identity.

    Attributes:
        denoiser: The network as a function `(x, t, **conditioning) -> m` of rows (solver/evaluator.py).
        shape: `[...]` of one sample.
        chain: The table of a request; it raises ValueError, with a sentence, where it has none.
        decode: What a finished sample `[...]` is made into.
        conditioning: One row `[...]` of each tensor that the network is given beside, by name: what a request that names none
            has.
        max_rows: Most rows of one network call; None for no bound.
        device: Where the network lives; None for where its weights are.
        dtype: Its dtype; None for that of the states.
    """

    denoiser: Denoiser
    shape: Sequence[int]
    chain: Callable[[SampleRequest], Table]
    decode: Callable[[Tensor], Tensor] = unchanged
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)
    max_rows: int | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        require_callable("the chain", self.chain, "a function of a request that returns a Table")
        require_callable("decode", self.decode, "a function of a sample")
        if isinstance(self.denoiser, ByRow | Evaluator):
            raise ValueError(
                f"the denoiser is a {type(self.denoiser).__name__}; a server merges rows of many chains, and needs "
                "the model as a function of states and times"
            )

    def evaluator(self, slots: int) -> Evaluator:
        """An evaluator with room for the conditioning of so many requests at once, a row each."""
        rows = {name: row.expand(slots, *row.shape).clone() for name, row in self.conditioning.items()}
        return Evaluator(self.denoiser, conditioning=rows, max_rows=self.max_rows, device=self.device, dtype=self.dtype)

    def rows_of(self, request: SampleRequest) -> dict[str, Tensor]:
        """A request's conditioning, `[...]` by name.

        Raises:
            ValueError: If a name is unknown, or a value is not of its shape.
        """
        if not self.conditioning and request.conditioning:
            raise ValueError("conditioning was given, but the model takes none; leave it out")
        found = dict(self.conditioning)
        for name, value in request.conditioning.items():
            refuse_unknown("a name of the conditioning", name, [*self.conditioning])
            found[name] = _like(name, value, self.conditioning[name])
        return found

    def noise(self, request: SampleRequest, device: torch.device) -> Noise:
        """x[0] and the noises of a request; those of diffusers are drawn on the network's device."""
        if request.noise == "keyed":
            return Keyed(self.shape, [request.seed])
        generator = torch.Generator(device).manual_seed(request.seed)
        return Recorded(self.shape, [generator], dtype=self.dtype or torch.float32)

    def check(self, table: Table, rows: int) -> None:
        """Looks, on one chain, whether the model's output for a row depends on that row alone (solver/row_check.py).

        Args:
            table: The chain, of which a few steps are walked.
            rows: How many steps, and rows of a sample at most.

        Raises:
            ValueError: If not, or if the model fails.
        """
        sample(self.evaluator(2), table[:rows], Keyed(self.shape, [0, 1]), parasolver(rows))


def _like(name: str, value: Any, row: Tensor) -> Tensor:
    """A value as a row of its tensor."""
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = None
    whole = not (row.dtype.is_floating_point or row.dtype.is_complex)
    if found is None or found.shape != row.shape or found.dtype == torch.bool or (whole and found.is_floating_point()):
        numbers = "whole numbers" if whole else "numbers"
        raise ValueError(f"the conditioning {name!r} is {shown(value)}; give {numbers} of shape {tuple(row.shape)}")
    if found.is_floating_point() and not bool(torch.isfinite(found).all()):
        raise ValueError(f"the conditioning {name!r} has an entry that is not finite; give numbers")
    return found.to(device=row.device, dtype=row.dtype)

# SPDX-License-Identifier: Apache-2.0
"""What is served: a network, the chains that requests may ask for, and what a sample is made into."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paradiff.chain.home import at_home
from paradiff.chain.noise import Keyed, Noise, Recorded, noise_along
from paradiff.chain.step import Step
from paradiff.chain.table import Table
from paradiff.errors import refuse_unknown, shown
from paradiff.methods.presets import parasolver
from paradiff.serving.request import SampleRequest
from paradiff.solver.arguments import require_callable
from paradiff.solver.by_row import ByRow
from paradiff.solver.evaluator import Denoiser, Evaluator
from paradiff.solver.judge import Judge
from paradiff.solver.loop import sample
from paradiff.solver.protocol import Batch

SECONDS = 1.0
"""Seconds after which no more numbers of rows are looked at: a server is to be there soon."""

TEXTS = ("prompt", "negative_prompt", "guidance")
"""Fields of requests to models that follow a text."""


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
        encode: What the text of a request becomes, rows of the conditioning by name, once a request; None where the model
            follows no text.
        texts: Fields of a request's text that the model heeds, where it follows one.
        drawn_on: Where recorded noises are drawn; None for where the network lives.
        max_rows: Most rows of one network call; None for no bound.
        device: Where the network lives; None for where its weights are.
        dtype: Its dtype; None for that of the states.
    """

    denoiser: Denoiser
    shape: Sequence[int]
    chain: Callable[[SampleRequest], Table]
    decode: Callable[[Tensor], Tensor] = unchanged
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)
    encode: Callable[[SampleRequest], Mapping[str, Tensor]] | None = None
    texts: Sequence[str] = TEXTS
    drawn_on: torch.device | str | None = None
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

    def given_rows(self, request: SampleRequest) -> dict[str, Tensor]:
        """A request's conditioning, `[...]` by name, without what its text becomes.

        Raises:
            ValueError: If a name is unknown, a value is not of its shape, or there is a text too many or too few.
        """
        texts = () if self.encode is None else self.texts
        given = next((name for name in TEXTS if name not in texts and getattr(request, name) is not None), None)
        if given is not None:
            why = "the model follows no text" if self.encode is None else "the model has no use for it"
            raise ValueError(f"the {given} was given, but {why}; leave it out")
        if self.encode is not None and request.prompt is None:
            raise ValueError('the request has no prompt; give one, such as {"prompt": "a red circle"}')
        taken = {} if self.encode is not None else dict(self.conditioning)
        if not taken and request.conditioning:
            other = "none" if self.encode is None else "a prompt"
            raise ValueError(f"conditioning was given, but the model takes {other}; leave it out")
        for name, value in request.conditioning.items():
            refuse_unknown("a name of the conditioning", name, [*taken])
            taken[name] = _like(name, value, taken[name])
        return taken

    def rows_of(self, request: SampleRequest) -> dict[str, Tensor]:
        """A request's conditioning, `[...]` by name.

        Raises:
            ValueError: As `given_rows` does, and whatever `encode` raises.
        """
        given = self.given_rows(request)
        return given if self.encode is None else {**given, **self.encode(request)}

    def noise(self, request: SampleRequest, device: torch.device, table: Table | None = None) -> Noise:
        """x[0] and the noises of a request; those of diffusers are drawn on the network's device, or on `drawn_on`.

        Args:
            request: The request.
            device: The network's.
            table: Its chain; None for one that draws once a step.

        Raises:
            ValueError: If the chain's scheduler draws with another generator than the one it is given.
        """
        if request.noise == "keyed":
            noise: Noise = Keyed(self.shape, [request.seed])
        else:
            generator = torch.Generator(self.drawn_on or device).manual_seed(request.seed)
            noise = Recorded(self.shape, [generator], dtype=self.dtype or torch.float32)
        return noise if table is None else noise_along(noise, table.draws, table.first)

    def check(self, table: Table, rows: int, most: int) -> None:
        """Looks, on one chain, whether the model's output for a row depends on that row alone (solver/row_check.py), and in
        calls of more and more rows, as far as a second and the memory take it.

        Args:
            table: The chain, of which a few steps are walked.
            rows: How many steps, and rows of a sample at most.
            most: Rows of the widest call.

        Raises:
            ValueError: If not, or if the model fails.
        """
        sample(self.evaluator(2), table[:rows], Keyed(self.shape, [0, 1]), parasolver(rows))
        evaluator, end = self.evaluator(most), time.monotonic() + SECONDS
        step, judge = Step(table, evaluator.device, torch.float32), Judge(evaluator.evaluate_again, self.dtype)
        counts = itertools.takewhile(lambda count: count <= min(most, self.max_rows or most), _counts())
        try:
            for count in counts:
                with at_home():
                    noise, nodes = Keyed(self.shape, range(count)), torch.arange(count) % table.steps
                    x = step.move(torch.stack([noise.start(k) for k in range(count)]))
                    batch = Batch(x, step.t[nodes], nodes, torch.arange(count))
                    judge.alone(batch, judge.evaluated(batch), count // 2)
                if time.monotonic() > end:
                    break
        except torch.OutOfMemoryError:
            pass  # rounds have as many rows as the memory takes


def _counts() -> Iterator[int]:
    """Powers of 2, and the numbers that follow them."""
    for power in itertools.count(1):
        yield from (2**power, 2**power + 1)


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

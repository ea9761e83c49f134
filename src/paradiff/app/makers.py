# SPDX-License-Identifier: Apache-2.0
"""What computes the samples of a bulk run: an unconditional pixel model, or a pipeline.

The samples of a batch depend on its seeds alone, and not on what was computed before. A network call that does not fit ends the
run, since calls of another size would round otherwise; where it is a pipeline's parallel one, its sample is that of the plain
call.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from paradiff.app.bulk import Bulk
from paradiff.app.calls import Call, call_each, generator_of, timed
from paradiff.app.media import Output
from paradiff.app.options import effective_options
from paradiff.app.packing import Sample
from paradiff.app.pipeline import call_arguments
from paradiff.app.pixels import make_table, noise_of
from paradiff.models.pipeline import load_pipeline, set_sampler
from paradiff.models.pixel import load
from paradiff.solver.evaluator import Evaluator
from paradiff.solver.loop import sample
from paradiff.solver.protocol import Method
from paradiff.solver.solution import Solution, Status

PIXEL_BATCH, PIPELINE_BATCH = 64, 8
"""Samples of a batch, by default."""

COUNTS = ("num_images_per_prompt", "batch_size")
"""Arguments of a pipeline's call by which it makes several pictures, each with a generator of its own."""

ALIKE = 0.1
"""Most root mean square difference, of pictures from -1 to 1, between a sample of a batch and the same sample by itself, which
differ by rounding alone."""


class Maker(Protocol):
    """What computes samples.

    Attributes:
        batch: Samples of a batch.
        together: Samples that are solved together in parallel over time.
        effective: What took effect of the method's options, as JSON.
        warnings: Sentences of the calls so far.
    """

    batch: int
    together: int
    effective: Mapping[str, Any]
    warnings: list[str]

    def batched(self, seeds: Sequence[int]) -> list[Sample]:
        """The samples of a batch, by the sequential chain."""
        ...

    def parallel(self, seeds: Sequence[int]) -> list[Sample]:
        """The samples of seeds that are solved together, in parallel over time."""
        ...


class PixelMaker:
    """An unconditional pixel model.

    Args:
        bulk: What was asked for, with the defaults of pixel models.
        method: The method.
        called: What its preset was called with.
        device: Where the network goes.
        dtype: The network's dtype.

    Raises:
        ValueError: If there is no such model, or an option does not fit it.
    """

    def __init__(self, bulk: Bulk, method: Method, called: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        request = bulk.request
        self._model = load(request.model, device=device, dtype=dtype)
        self._table = make_table(self._model, request)
        method.edges(self._table)
        self._method, self._noise, self._max_rows = method, request.noise, request.max_rows
        self._evaluator = Evaluator(self._model, max_rows=request.max_rows, device=device, dtype=dtype)
        self.batch = PIXEL_BATCH if bulk.batch is None else bulk.batch
        self.together = max(1, self.batch // method.width(self._table))
        self.effective: Mapping[str, Any] = effective_options(method, called)
        self.warnings: list[str] = []

    def batched(self, seeds: Sequence[int]) -> list[Sample]:
        """The samples of a batch, by the sequential chain."""
        return self._run(seeds, self._method.reference())

    def parallel(self, seeds: Sequence[int]) -> list[Sample]:
        """The samples of seeds that are solved together, in parallel over time."""
        return self._run(seeds, self._method)

    def _run(self, seeds: Sequence[int], method: Method) -> list[Sample]:
        noise = noise_of(self._noise, seeds, self._model, self._evaluator)
        solution: Solution = sample(self._evaluator, self._table, noise, method)
        if self._evaluator.max_rows != self._max_rows:
            raise ValueError(
                f"memory ran out at a network call of more than {self._evaluator.max_rows} rows; give --max-rows "
                f"{self._evaluator.max_rows}, or a smaller --batch, and another folder"
            )
        return [
            Sample(output=Output(x[None], None, 0), estimated_error=e.estimated_error, status=solution.status.code)
            for x, e in zip(solution.sample.float().cpu(), solution.error_estimates, strict=True)
        ]


class PipelineMaker:
    """A pipeline, called once for each batch, or for each seed.

    Args:
        bulk: What was asked for.
        method: The method.
        called: What its preset was called with.
        device: Where the networks go.
        dtype: Their dtype.

    Raises:
        ValueError: If there is no such model, or an option does not fit it.
    """

    def __init__(self, bulk: Bulk, method: Method, called: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> None:
        request = bulk.request
        self._pipeline: Any = load_pipeline(
            request.model, device=device, dtype=dtype, trust_remote_code=request.trust_remote_code
        )
        if request.sampler is not None:
            set_sampler(self._pipeline, request.sampler)
        self._given = call_arguments(self._pipeline, request)
        self._pipeline.set_progress_bar_config(disable=True)
        self._method, self._max_rows = method, request.max_rows
        known = inspect.signature(self._pipeline.__call__).parameters
        self._count = next((name for name in COUNTS if name in known and name not in self._given), None)
        default = 1 if self._count is None else PIPELINE_BATCH
        self.batch = default if bulk.batch is None else bulk.batch
        if self.batch > 1 and self._count is None:
            raise ValueError(
                f"--batch is {self.batch}, but a call of the {type(self._pipeline).__name__} makes one sample: leave it out"
            )
        self.together = 1
        self.effective: Mapping[str, Any] = effective_options(method, called)
        self.warnings: list[str] = []
        self._checked = self.batch == 1

    def batched(self, seeds: Sequence[int]) -> list[Sample]:
        """The samples of a batch, by the pipeline's plain call.

        Of the first batch the last sample is made by itself, too, and compared.

        Raises:
            ValueError: If they differ by more than rounding.
        """
        if self.batch == 1:
            return [_exact(self._alone(seed)) for seed in seeds]
        generators = [generator_of(seed) for seed in seeds]
        together, _ = timed(self._pipeline, {**self._given, str(self._count): len(seeds)}, generators)
        pictures = together.pictures
        if pictures is None or together.fps or together.sound is not None or len(pictures) != len(seeds):
            raise ValueError(
                f"the {type(self._pipeline).__name__} does not give one picture for each of {len(seeds)} seeds; give --batch 1"
            )
        if not self._checked:
            own = self._alone(seeds[-1]).pictures
            apart = float("inf") if own is None else (own[0] - pictures[-1]).square().mean().sqrt().item()
            if not apart <= ALIKE:
                raise ValueError(
                    f"the {type(self._pipeline).__name__} makes another sample of seed {seeds[-1]} in a batch of {len(seeds)} "
                    f"than by itself (RMS difference {apart:.2g}); give --batch 1"
                )
            self._checked = True
        return [_exact(Output(picture[None], None, 0)) for picture in pictures]

    def parallel(self, seeds: Sequence[int]) -> list[Sample]:
        """The samples of seeds, each by a call in parallel over time; by a plain one where memory runs out in that."""
        return [self._in_parallel(seed) for seed in seeds]

    def _in_parallel(self, seed: int) -> Sample:
        calls: list[Call] = []
        call_each(self._pipeline, self._method, self._given, [seed], calls, max_rows=self._max_rows, bars=False)
        report, most = calls[0].report, calls[0].report.max_rows
        cut = report.executor != "sequential" and most != self._max_rows
        told = (
            [
                f"memory ran out at network calls of more than {most} rows, so samples were made by plain calls, one after the "
                f"other; for parallel ones give --max-rows {most}, and another folder"
            ]
            if cut
            else report.warnings
        )
        self.warnings += [text for text in told if text not in self.warnings]
        if cut:  # calls of another size would round otherwise
            return _exact(self._alone(seed))
        error = 0.0 if report.error_estimate is None else report.error_estimate.estimated_error
        return Sample(output=calls[0].output, estimated_error=error, status=report.status.code)

    def _alone(self, seed: int) -> Output:
        return timed(self._pipeline, self._given, generator_of(seed))[0]


def _exact(output: Output) -> Sample:
    """A sample of the sequential chain."""
    return Sample(output=output, estimated_error=0.0, status=Status.EXACT.code)
